"""What a caching rule may watch, and how its change is measured: on the device, read back once per step at most.

A watch looks either before the denoiser runs (`at_entry`), or before its first block that may be skipped. Where ranks
share a sequence, each sees its part of what is watched between blocks: changes are those of all parts together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...core.noise import noise_fractions
from ...core.step import StepState
from ...policies import foretold, gain, rate
from ..context import Denoiser, PipelineContext
from .lanes import Lane, Streams, relative

Arguments = Mapping[str, Any]
# What was seen, to compare the next with, and its relative change; None if there is nothing to compare it with.
Seen = tuple[Any, float | None]
# `FeatureOutputs.all_reduce`.
Summed = Callable[[torch.Tensor], torch.Tensor] | None
# Makes the watch of one denoiser.
WatchFactory = Callable[[PipelineContext, Denoiser], "Watch"]


class Watch:
    """Watches nothing: the change is always 0.

    Attributes:
        at_entry: Whether it looks before the denoiser runs.
        with_computed: Whether it compares with the last step that was computed, instead of with the last step.
    """

    at_entry = False
    with_computed = False

    def __init__(self, context: PipelineContext, denoiser: Denoiser):
        self.context, self.denoiser = context, denoiser

    def look(
        self, lane: Lane, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Seen:
        """What is seen now and how much it changed.

        Args:
            lane: The branch's.
            step: Where the call stands.
            block: The first block that may be skipped; `None` at the entry.
            arguments: The block's, or the denoiser's at the entry.
            streams: The block's.
        """
        return None, 0.0

    def computed(self, lane: Lane, outputs: list[torch.Tensor]) -> None:
        """Takes what the denoiser returned on a step that was computed."""

    def conditional(self, signal: torch.Tensor, step: StepState) -> torch.Tensor:
        """The conditional half of a signal, which comes last, where both guidance branches share a call."""
        adapter, pipe = self.denoiser.adapter, self.context.clock.pipe or self.context.pipe
        batched = adapter.guidance == "batched" and step.branch == adapter.branches[0]
        if batched and getattr(pipe, "do_classifier_free_guidance", False) and signal.shape[0] % 2 == 0:
            return signal.chunk(2)[1]
        return signal


class ModulatedInput(Watch):
    """TeaCache's signal: the first block's modulated input, as the adapter says."""

    def look(
        self, lane: Lane, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Seen:
        """See `Watch.look`."""
        assert self.denoiser.adapter.block_signal is not None and block is not None
        with self.context.outputs.unsharded(block):
            seen = self.conditional(self.denoiser.adapter.block_signal(block, arguments), step)
        return seen, change(seen, lane.signal, self.context.outputs.all_reduce)


class ScheduledSignal(Watch):
    """TeaCache's signal where it depends on the timestep alone: all changes of a request are known at its first step,
    and read from the device once."""

    projected = False

    def __init__(self, context: PipelineContext, denoiser: Denoiser):
        super().__init__(context, denoiser)
        self._known: tuple[int, list[float]] = (0, [])

    def look(
        self, lane: Lane, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Seen:
        """See `Watch.look`."""
        request, changes = self._known
        if request != step.request:
            signal = self.denoiser.adapter.timestep_signal
            assert signal is not None
            timesteps = self.context.clock.timesteps
            device = next(self.denoiser.module.parameters()).device
            signals = signal(self.denoiser.module, timesteps.to(device), self.projected).float()
            changes = [0.0, *_along_steps(signals[1:], signals[:-1]).tolist()]
            self._known = (step.request, changes)
        if lane.step is None or step.step is None or step.step != lane.step + 1:
            return None, None
        return None, changes[step.step]


class ProjectedSignal(ScheduledSignal):
    """The same of the projected embedding (Wan's `use_ret_steps`)."""

    projected = True


class FirstResidual(Watch):
    """What the first blocks add to the picture's stream (FBCache, DBCache)."""

    with_computed = True

    def look(
        self, lane: Lane, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Seen:
        """See `Watch.look`."""
        now, begin = main_stream(streams), lane.begin
        if now is None or begin is None or now.shape != begin.shape:
            return None, None
        seen = self.conditional(now - begin, step)
        return seen, change(seen, lane.signal, self.context.outputs.all_reduce)


class Latents(Watch):
    """The latents' signal, told from their noise by its spectrum (SeaCache).

    Attributes:
        power: Exponent of the spectrum; `None` for 2 for pictures and 3 for videos.
    """

    at_entry = True

    def __init__(self, context: PipelineContext, denoiser: Denoiser, power: float | None = None):
        super().__init__(context, denoiser)
        self.power = power
        self._noise: tuple[int, list[float] | None] = (0, None)
        self._grid: tuple[int, Any] = (0, None)

    def look(
        self, lane: Lane, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Seen:
        """See `Watch.look`."""
        adapter = self.denoiser.adapter
        if self._noise[0] != step.request:
            self._noise = (step.request, noise_fractions(self.context.clock.scheduler))
            self._grid = (step.request, adapter.grid(arguments))
        noise = self._noise[1]
        if noise is None or step.step is None:
            return None, None
        found = adapter.latents(self.denoiser.module, arguments, self._grid[1])
        seen = [self.filtered(item, noise[step.step]) for item in found]
        before = lane.signal
        if before is None or len(before) != len(seen):
            return seen, None
        if any(one.shape != other.shape for one, other in zip(seen, before, strict=True)):
            return seen, None
        changes = [relative(one, other) for one, other in zip(seen, before, strict=True)]
        return seen, _agreed(torch.stack(changes).mean(), self.context.outputs.all_reduce)

    def filtered(self, latents: torch.Tensor, noise: float) -> torch.Tensor:
        """Latents (batch, channels, *space) with the frequencies kept that are signal at this share of noise."""
        dims = tuple(range(2, latents.ndim))
        power = self.power or (3.0 if len(dims) == 3 and latents.shape[2] > 1 else 2.0)
        gains = torch.ones((), dtype=torch.float32)
        for dim in dims:
            axis = torch.tensor(
                [gain(abs(float(item)), noise, power) for item in torch.fft.fftfreq(latents.shape[dim])]
            )
            gains = gains.unsqueeze(-1) * axis
        gains = (gains / gains.mean()).to(latents.device)
        return torch.fft.ifftn(torch.fft.fftn(latents.float(), dim=dims) * gains, dim=dims).real


class Foretold(Watch):
    """The change of the denoiser's output, foretold from that of its input (EasyCache)."""

    at_entry = True

    def look(
        self, lane: Lane, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Seen:
        """See `Watch.look`."""
        # Copies: a pipeline may write its next latents over these.
        seen = [item.clone() for item in latents_of(self.denoiser, arguments)]
        before, outputs, k = (lane.signal, lane.memory.get("outputs"), lane.memory.get("k"))
        moved = _moved(seen, before)
        if moved is None or outputs is None or k is None:
            return seen, None
        return seen, _agreed(foretold(k, moved, _size(outputs)), self.context.outputs.all_reduce)

    def computed(self, lane: Lane, outputs: list[torch.Tensor]) -> None:
        """k, from what changed since the last step that was computed."""
        inputs = lane.signal
        moved = _moved(inputs, lane.memory.get("inputs"))
        changed = _moved(outputs, lane.memory.get("outputs"))
        if moved is not None and changed is not None:
            lane.memory["k"] = rate(changed, moved)
        lane.memory["inputs"], lane.memory["outputs"] = inputs, [item.clone() for item in outputs]


def latents_of(denoiser: Denoiser, arguments: Arguments) -> list[torch.Tensor]:
    """The tensors among the denoiser's arguments that its outputs answer to, in their order."""
    return leaves([arguments.get(name) for name in denoiser.adapter.denoised])


def leaves(values: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and outputs."""
    return [item for item in torch.utils._pytree.tree_leaves(values) if isinstance(item, torch.Tensor)]


def main_stream(streams: Streams) -> torch.Tensor | None:
    """The stream that is looked at: the picture's, which comes after the text's where there are two."""
    return streams["hidden_states"] if "hidden_states" in streams else list(streams.values())[-1]


def change(signal: torch.Tensor, previous: torch.Tensor | None, summed: Summed = None) -> float | None:
    """The relative change since the previous signal, read from the device; `None` if there is none to compare with."""
    if previous is None or previous.shape != signal.shape:
        return None
    if summed is None:
        return float(relative(signal, previous))
    sizes = [item.abs().sum(dtype=torch.float32) for item in (signal - previous, previous)]
    moved, size = summed(torch.stack(sizes)).tolist()
    return float(moved / size)


def _agreed(value: torch.Tensor, summed: Summed) -> float:
    """What ranks that see the same have found: their mean, should one have rounded otherwise."""
    if summed is None:
        return float(value)
    total, ranks = summed(torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)])).tolist()
    return float(total / ranks)


def _along_steps(signals: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    return (signals - previous).abs().mean(-1) / previous.abs().mean(-1)


def _moved(now: list[torch.Tensor] | None, before: list[torch.Tensor] | None) -> torch.Tensor | None:
    """Mean absolute difference of all values together; `None` if they cannot be compared."""
    if now is None or before is None or [item.shape for item in now] != [item.shape for item in before]:
        return None
    total = [(one - other).abs().sum(dtype=torch.float32) for one, other in zip(now, before, strict=True)]
    return torch.stack(total).sum() / sum(item.numel() for item in now)


def _size(values: list[torch.Tensor]) -> torch.Tensor:
    total = torch.stack([item.abs().sum(dtype=torch.float32) for item in values]).sum()
    return total / sum(item.numel() for item in values)


# What a registered policy may ask for by name, besides the model's own signal.
WATCHES: dict[str | None, WatchFactory] = {None: Watch, "residual": FirstResidual, "latents": Latents}
