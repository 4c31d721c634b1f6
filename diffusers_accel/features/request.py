"""Request scope: every denoiser call is placed (request, step, branch) before anything else looks at it.

Always on. It adds one layer around each denoiser's forward and, where the class has a `cache_context`, one around that,
so that the branch a pipeline names is known and forgotten again, also when the call raises. Here a request waits for
its turn, whichever pipeline it is of.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.edits import AddLayer, Edit
from ..core.moments import moment
from ..models.adapter import by_name, parameter_names
from .context import Denoiser, PipelineContext
from .feature import Plan


def check(context: PipelineContext, config: Any) -> Plan:
    """Always possible."""
    beside = [
        f"{name} ({type(module).__name__}) stays stock: it is no denoiser."
        for name, module in context.pipe.components.items()
        if isinstance(module, nn.Module) and "controlnet" in name
    ]
    return Plan("place every call: request, step, guidance branch", len(context.denoisers), left=tuple(beside))


def edits(context: PipelineContext, config: Any) -> Iterator[Edit]:
    """One layer per denoiser, and one per `cache_context`."""
    section = context.config.request if context.config is not None else None
    context.clock.when_busy(section.busy if section is not None else "wait")
    for denoiser in context.denoisers:
        yield AddLayer(denoiser.module, context.rank("request"), _placed(context, denoiser))
        if hasattr(denoiser.module, "cache_context"):
            yield AddLayer(denoiser.module, context.rank("request"), _named(context), method="cache_context")


def _placed(context: PipelineContext, denoiser: Denoiser) -> Callable[..., Any]:
    clock, adapter, names = context.clock, denoiser.adapter, parameter_names(denoiser.module)

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        device = next(denoiser.module.parameters()).device
        before = clock.requests
        config = context.config
        timestep = kwargs["timestep"] if "timestep" in kwargs else by_name(names, args, {}).get("timestep")
        state = clock.enter(denoiser.name, adapter.branches, timestep, adapter.special_branch(kwargs))
        if clock.requests != before:
            try:
                for look in context.outputs.request_hooks:
                    look(None)
            except BaseException:
                clock.abandon()
                raise
            if state.step is None and config is not None and (config.cache or config.attention):
                warnings.warn(
                    f"accelerate: {type(clock.scheduler).__name__} does not tell which step it is at: nothing is "
                    "skipped, and steps that depend on their place are computed with care.",
                    stacklevel=2,
                )
            context.stats.clear()
        begin = moment(device)
        try:
            out = inner(*args, **kwargs)
        except BaseException:
            clock.abandon()
            raise
        context.stats.call_times.append((state, begin, moment(device)))
        clock.leave(state)
        return out

    return forward


def _named(context: PipelineContext) -> Callable[..., Any]:
    clock = context.clock

    @contextmanager
    def cache_context(inner: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        clock.arrive()
        before, clock.context = clock.context, name
        try:
            with inner(name, *args, **kwargs):
                yield
        finally:
            clock.context = before

    return cache_context
