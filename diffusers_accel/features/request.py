"""Request scope: the clock gets the place (request, step, branch) of every denoiser call before other layers run.

The feature is always on. One layer is around each denoiser's forward. If the class has a `cache_context`, a second
layer around that method sets the branch's name for its duration. Both layers wait in the request queue, which all
pipelines with this denoiser share.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.edits import AddLayer, Edit
from ..core.timestamps import timestamp
from ..models.adapter import by_name, parameter_names
from .context import Denoiser, PipelineContext
from .feature import Plan


def check(context: PipelineContext, config: Any) -> Plan:
    """The number of denoisers. ControlNets are reported as unchanged."""
    unchanged = [
        f"{name} ({type(module).__name__}) stays stock: it is no denoiser."
        for name, module in context.pipe.components.items()
        if isinstance(module, nn.Module) and "controlnet" in name
    ]
    return Plan("place every call: request, step, guidance branch", len(context.denoisers), left=tuple(unchanged))


def edits(context: PipelineContext, config: Any) -> Iterator[Edit]:
    """One layer per denoiser, and one per `cache_context` method."""
    section = context.config.request if context.config is not None else None
    context.clock.set_busy(section.busy if section is not None else "wait")
    for denoiser in context.denoisers:
        yield AddLayer(denoiser.module, context.rank("request"), _step_layer(context, denoiser))
        if hasattr(denoiser.module, "cache_context"):
            yield AddLayer(denoiser.module, context.rank("request"), _branch_layer(context), method="cache_context")


def _step_layer(context: PipelineContext, denoiser: Denoiser) -> Callable[..., Any]:
    """The layer around a denoiser's forward: it enters the call in the clock, and runs request hooks before the first
    call of a request."""
    clock, adapter, names = context.clock, denoiser.adapter, parameter_names(denoiser.module)

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        device = next(denoiser.module.parameters()).device
        before = clock.requests
        config = context.config
        timestep = kwargs["timestep"] if "timestep" in kwargs else by_name(names, args, {}).get("timestep")
        state = clock.enter(denoiser.name, adapter.branches, timestep, adapter.special_branch(kwargs))
        if clock.requests != before:
            try:
                for hook in context.outputs.request_hooks:
                    hook(None)
            except BaseException:
                clock.abandon()
                raise
            if state.step is None and config is not None and (config.cache or config.attention):
                warnings.warn(
                    f"accelerate: {type(clock.scheduler).__name__} does not tell which step it is at: no step is "
                    "skipped, and attention's dense kernel computes all steps if `dense_steps` is set.",
                    stacklevel=2,
                )
            context.stats.clear()
        begin = timestamp(device)
        try:
            out = inner(*args, **kwargs)
        except BaseException:
            clock.abandon()
            raise
        context.stats.call_times.append((state, begin, timestamp(device)))
        clock.leave(state)
        return out

    return forward


def _branch_layer(context: PipelineContext) -> Callable[..., Any]:
    """The layer around `cache_context`: it sets the clock's branch, and resets it also after an exception."""
    clock = context.clock

    @contextmanager
    def cache_context(inner: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        clock.acquire()
        before, clock.context = clock.context, name
        try:
            with inner(name, *args, **kwargs):
                yield
        finally:
            clock.context = before

    return cache_context
