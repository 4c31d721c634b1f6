"""Attention broadcast (PAB): a gate around each attention module gives its last output again while it is fresh enough.

State is kept for each module and guidance branch, and dropped at the end of a request. It acts within the blocks, so
blocks that are compiled whole cannot have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ...config import PABConfig
from ...core.edits import AddLayer, Edit
from ...core.noise import noise_fractions
from ...errors import Unsupported
from ...policies import Broadcast
from ..context import Denoiser, PipelineContext
from ..feature import Plan
from .signals import leaves


@dataclass
class _Kept:
    """The last output of one module in one branch, its step, and the shapes it was computed for."""

    place: int
    shapes: list[torch.Size]
    output: Any


def check(context: PipelineContext, config: PABConfig) -> Plan:
    """How many attention modules are broadcast.

    Raises:
        Unsupported: The blocks are to be compiled, a glob matches nothing, there is no attention module, or the
            scheduler does not tell how noisy its steps are.
    """
    if context.compiled:
        raise Unsupported(
            "cache='pab'",
            "it skips attention within the blocks, which are compiled whole.",
            "compile=None, or a cache that skips whole steps.",
        )
    if context.config is not None and context.config.cuda_graph is not None:
        raise Unsupported(
            "cache='pab'",
            "it skips attention within the blocks, which are recorded whole.",
            "cuda_graph=None, or a cache that skips whole steps.",
        )
    counts: dict[str, int] = {}
    for denoiser in context.denoisers:
        for path, _ in _modules(denoiser):
            interval = _interval(denoiser, path, config)
            if interval is not None and interval > 1:
                name = f"{_kind(denoiser, path)} every {interval}"
                counts[name] = counts.get(name, 0) + 1
    for glob in config.layers or {}:
        if not any(_matches(each, path, glob) for each in context.denoisers for path, _ in _modules(each)):
            example = next((path for each in context.denoisers for path, _ in _modules(each)), None)
            raise Unsupported(
                f"cache.layers[{glob!r}]",
                "it matches no attention module.",
                f"a glob over names like {example!r}; nn.Module.named_modules lists them."
                if example
                else "another cache.",
            )
    if not counts:
        raise Unsupported(
            "cache='pab'", "no attention module would be broadcast.", "intervals above 1, or another cache."
        )
    action = "pab: " + ", ".join(f"{name} steps ({count} modules)" for name, count in counts.items())
    return Plan(action, sum(counts.values()))


def able(context: PipelineContext) -> bool:
    """Whether its defaults would do, beside what else is asked for."""
    try:
        return bool(check(context, PABConfig()).modules)
    except Unsupported:
        return False


def edits(context: PipelineContext, config: PABConfig) -> Iterator[Edit]:
    """One layer around each attention module."""
    low, high = config.window
    for denoiser in context.denoisers:
        state = _State(context, denoiser)
        context.clock.ended.append(state.forget)
        for path, module in _modules(denoiser):
            interval = _interval(denoiser, path, config)
            if interval is not None and interval > 1:
                rule = Broadcast(interval, (low, high))
                yield AddLayer(module, context.rank("cache gate"), state.gate(path, rule))
        yield AddLayer(denoiser.module, context.rank("cache decision"), state.around_denoiser)


class _State:
    """What all modules of one denoiser keep, by request, path and branch."""

    def __init__(self, context: PipelineContext, denoiser: Denoiser):
        self.context, self.denoiser = context, denoiser
        self.kept: dict[tuple[int, str, str], _Kept] = {}
        self.open = False
        self._noise: tuple[int, list[float] | None] = (0, None)

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: knows the step, and forgets everything with a request."""
        step = self.context.clock.current
        if step is None or step.repeated:
            return inner(*args, **kwargs)
        if self._noise[0] != step.request:
            self._noise = (step.request, noise_fractions(self.context.clock.scheduler))
        self.open = self._noise[1] is not None
        try:
            return inner(*args, **kwargs)
        except BaseException:
            self.forget(step.request)
            raise
        finally:
            self.open = False
            key = (self.denoiser.name, step.branch)
            self.context.stats.cache_bytes[key] = sum(
                tensor.numel() * tensor.element_size()
                for (request, _, branch), kept in self.kept.items()
                if (request, branch) == (step.request, step.branch)
                for tensor in leaves(kept.output)
            )
            if step.last:
                this = (step.request, step.branch)
                self.kept = {key: kept for key, kept in self.kept.items() if (key[0], key[2]) != this}

    def forget(self, request: int) -> None:
        """Lets go of a request that has ended, whether it came to its last step or not."""
        self.kept = {key: kept for key, kept in self.kept.items() if key[0] != request}

    def gate(self, path: str, rule: Broadcast) -> Callable[..., Any]:
        """The layer around one attention module."""

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            step, noise = self.context.clock.current, self._noise[1]
            if not self.open or step is None or step.step is None or noise is None:
                return inner(*args, **kwargs)
            kept = self.kept.get((step.request, path, step.branch))
            shapes = [item.shape for item in leaves([args, kwargs])]
            fits = kept is not None and kept.shapes == shapes
            age = step.step - kept.place if kept is not None and fits else None
            calls = self.context.stats.attention_broadcasts
            if not rule.computes(1000 * noise[step.step], age):
                assert kept is not None
                calls["reused"] += 1
                return kept.output
            calls["computed"] += 1
            output = inner(*args, **kwargs)
            self.kept[step.request, path, step.branch] = _Kept(step.step, shapes, output)
            return output

        return forward


def _modules(denoiser: Denoiser) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules within the blocks that a step runs through."""
    blocks = {id(block) for stack in denoiser.adapter.stacks for block in stack.blocks(denoiser.module)}
    inside = [path for path, module in denoiser.module.named_modules() if id(module) in blocks]
    for path, module in denoiser.module.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None and callable(processor) and any(path.startswith(f"{block}.") for block in inside):
            yield path, module


def _kind(denoiser: Denoiser, path: str) -> str:
    if "temporal" in path:
        return "temporal_attention"
    return "cross_attention" if path.rpartition(".")[2] in denoiser.adapter.cross_attention else "self_attention"


def _interval(denoiser: Denoiser, path: str, config: PABConfig) -> int | None:
    for glob, interval in (config.layers or {}).items():
        if _matches(denoiser, path, glob):
            return interval
    by_kind: int | None = getattr(config, _kind(denoiser, path))
    return by_kind


def _matches(denoiser: Denoiser, path: str, glob: str) -> bool:
    return fnmatchcase(path, glob) or fnmatchcase(f"{denoiser.name}.{path}", glob)
