"""Pyramid Attention Broadcast (PAB): a layer around each attention module returns its last output for some steps.

The outputs are kept per request, module and guidance branch, and dropped when the request ends. The layers are within
the blocks, so blocks that are compiled or captured as a whole cannot have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...config import PABConfig
from ...core.edits import AddLayer, Edit
from ...core.noise import noise_fractions
from ...core.tree import tensors_in
from ...errors import Unsupported
from ...policies import Broadcast
from ..context import Denoiser, PipelineContext
from ..feature import Plan


@dataclass
class _KeptOutput:
    """The last computed output of one attention module in one branch.

    Attributes:
        step: Index of the step that computed it.
        shapes: Shapes of the tensors among the module's arguments.
        output: The module's output, nested or a tensor.
    """

    step: int
    shapes: list[torch.Size]
    output: Any


def check(context: PipelineContext, config: PABConfig) -> Plan:
    """The number of attention modules by kind, and the intervals of their broadcasts.

    Raises:
        Unsupported: The blocks are compiled or captured in CUDA graphs, a glob matches no attention module, or no
            attention module has an interval above 1.
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
            "it skips attention within the blocks, which are captured whole.",
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
        if not any(each.matches(path, glob) for each in context.denoisers for path, _ in _modules(each)):
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


def is_possible(context: PipelineContext) -> bool:
    """Whether PAB with its defaults fits the model and the rest of the configuration."""
    try:
        return bool(check(context, PABConfig()).modules)
    except Unsupported:
        return False


def edits(context: PipelineContext, config: PABConfig) -> Iterator[Edit]:
    """One layer around each attention module with an interval, and one around each denoiser."""
    low, high = config.window
    for denoiser in context.denoisers:
        state = _BroadcastState(context, denoiser)
        context.clock.on_request_end.append(state.forget)
        for path, module in _modules(denoiser):
            interval = _interval(denoiser, path, config)
            if interval is not None and interval > 1:
                rule = Broadcast(interval, (low, high))
                yield AddLayer(module, context.rank("cache block"), state.around_attention(path, rule))
        yield AddLayer(denoiser.module, context.rank("cache denoiser"), state.around_denoiser)


class _BroadcastState:
    """The kept attention outputs of one denoiser.

    Args:
        context: The pipeline.
        denoiser: The denoiser.

    Attributes:
        kept: (request, path of the module, branch) -> its last output.
        active: Whether a denoiser call is running whose scheduler tells the steps' noise.
    """

    def __init__(self, context: PipelineContext, denoiser: Denoiser):
        self.context, self.denoiser = context, denoiser
        self.kept: dict[tuple[int, str, str], _KeptOutput] = {}
        self.active = False
        self._noise: tuple[int, list[float] | None] = (0, None)

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: activates the modules' layers, and drops outputs at the end."""
        step = self.context.clock.current
        if step is None or step.repeated:
            return inner(*args, **kwargs)
        if self._noise[0] != step.request:
            self._noise = (step.request, noise_fractions(self.context.clock.scheduler))
        self.active = self._noise[1] is not None
        try:
            return inner(*args, **kwargs)
        except BaseException:
            self.forget(step.request)
            raise
        finally:
            self.active = False
            key = (self.denoiser.name, step.branch)
            self.context.stats.cache_bytes[key] = sum(
                tensor.numel() * tensor.element_size()
                for (request, _, branch), kept in self.kept.items()
                if (request, branch) == (step.request, step.branch)
                for tensor in tensors_in(kept.output)
            )
            if step.last:
                this = (step.request, step.branch)
                self.kept = {key: kept for key, kept in self.kept.items() if (key[0], key[2]) != this}

    def forget(self, request: int) -> None:
        """Drops the outputs of a request that has ended, at its last step or before."""
        self.kept = {key: kept for key, kept in self.kept.items() if key[0] != request}

    def around_attention(self, path: str, rule: Broadcast) -> Callable[..., Any]:
        """The layer around one attention module.

        Args:
            path: The module's path in the denoiser.
            rule: The interval and window of its broadcast.
        """

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            step, noise = self.context.clock.current, self._noise[1]
            if not self.active or step is None or step.step is None or noise is None:
                return inner(*args, **kwargs)
            kept = self.kept.get((step.request, path, step.branch))
            shapes = [item.shape for item in tensors_in([args, kwargs])]
            fits = kept is not None and kept.shapes == shapes
            age = step.step - kept.step if kept is not None and fits else None
            calls = self.context.stats.attention_broadcasts
            if not rule.computes(1000 * noise[step.step], age):
                assert kept is not None
                calls["reused"] += 1
                return kept.output
            calls["computed"] += 1
            output = inner(*args, **kwargs)
            self.kept[step.request, path, step.branch] = _KeptOutput(step.step, shapes, output)
            return output

        return forward


def _modules(denoiser: Denoiser) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the attention modules within the adapter's blocks: modules with a `processor`."""
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
        if denoiser.matches(path, glob):
            return interval
    by_kind: int | None = getattr(config, _kind(denoiser, path))
    return by_kind
