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
from .feature import Denoiser, Plan, Target


def check(target: Target, config: Any) -> Plan:
    """Always possible."""
    beside = [
        f"{name} ({type(module).__name__}) stays stock: it is no denoiser."
        for name, module in target.pipe.components.items()
        if isinstance(module, nn.Module) and "controlnet" in name
    ]
    return Plan("place every call: request, step, guidance branch", len(target.denoisers), left=tuple(beside))


def edits(target: Target, config: Any) -> Iterator[Edit]:
    """One layer per denoiser, and one per `cache_context`."""
    for denoiser in target.denoisers:
        yield AddLayer(denoiser.module, target.rank("request"), _placed(target, denoiser))
        if hasattr(denoiser.module, "cache_context"):
            yield AddLayer(denoiser.module, target.rank("request"), _named(target), method="cache_context")


def _placed(target: Target, denoiser: Denoiser) -> Callable[..., Any]:
    clock, adapter, names = target.clock, denoiser.adapter, parameter_names(denoiser.module)

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        device = next(denoiser.module.parameters()).device
        before = clock.requests
        config = target.config
        timestep = kwargs["timestep"] if "timestep" in kwargs else by_name(names, args, {}).get("timestep")
        state = clock.enter(denoiser.name, adapter.branches, timestep, adapter.special_branch(kwargs))
        if clock.requests != before:
            try:
                for look in target.begun:
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
            target.attention_calls.clear()
            target.attention_timings.clear()
            target.attention_broadcasts.clear()
            target.cache_bytes.clear()
            target.cache_guarded.clear()
            target.call_times.clear()
        begin = moment(device)
        try:
            out = inner(*args, **kwargs)
        except BaseException:
            clock.abandon()
            raise
        target.call_times.append((state, begin, moment(device)))
        clock.leave(state)
        return out

    return forward


def _named(target: Target) -> Callable[..., Any]:
    clock = target.clock

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
