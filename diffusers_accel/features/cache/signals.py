"""Change signals: the values whose relative change a caching policy reads, measured on the device.

A signal is measured before the denoiser runs (`before_denoiser`), or before its first skippable block. A change is read
back to the host once per step at most. If ranks share a sequence, each has a part of the values between blocks, and
`FeatureOutputs.all_reduce` sums over ranks. So all ranks get one change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...core.noise import noise_fractions
from ...core.step import StepState
from ...core.tree import tensors_in
from ...policies import change_ratio, estimated_change, wiener_gain
from ..context import Denoiser, PipelineContext
from .state import BranchState, Streams, relative

Arguments = Mapping[str, Any]
# (signal, relative change): the signal is kept for the next comparison; the change is None without a comparison.
Measurement = tuple[Any, float | None]
# `FeatureOutputs.all_reduce`.
Reduce = Callable[[torch.Tensor], torch.Tensor] | None
# Makes the signal of one denoiser.
SignalFactory = Callable[[PipelineContext, Denoiser], "ChangeSignal"]


class ChangeSignal:
    """The base class, and the signal of policies that read none: its change is always 0.

    Args:
        context: The pipeline.
        denoiser: The denoiser.

    Attributes:
        before_denoiser: Whether the signal is measured before the denoiser runs, instead of at its first skippable
            block.
        since_computed: Whether the change is that since the last computed step, instead of since the last step.
    """

    before_denoiser = False
    since_computed = False

    def __init__(self, context: PipelineContext, denoiser: Denoiser):
        self.context, self.denoiser = context, denoiser

    def measure(
        self, state: BranchState, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Measurement:
        """The signal of this call and its relative change.

        Args:
            state: The state of the call's branch.
            step: The place of the call.
            block: The first skippable block; `None` before the denoiser.
            arguments: Name -> argument of the block, or of the denoiser.
            streams: The block's input streams; empty before the denoiser.
        """
        return None, 0.0

    def record_outputs(self, state: BranchState, outputs: list[torch.Tensor]) -> None:
        """Called with the denoiser's outputs on a computed step, if the rule skips the whole denoiser."""

    def conditional(self, signal: torch.Tensor, step: StepState) -> torch.Tensor:
        """The conditional half of a signal (batch, ...) if both guidance branches share a call. Pipelines put it
        last."""
        adapter, pipe = self.denoiser.adapter, self.context.clock.pipe or self.context.pipe
        batched = adapter.guidance == "batched" and step.branch == adapter.branches[0]
        if batched and getattr(pipe, "do_classifier_free_guidance", False) and signal.shape[0] % 2 == 0:
            return signal.chunk(2)[1]
        return signal


class ModulatedInput(ChangeSignal):
    """TeaCache's signal: the first block's modulated input, computed by `Adapter.block_signal`."""

    def measure(
        self, state: BranchState, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Measurement:
        """See `ChangeSignal.measure`."""
        assert self.denoiser.adapter.block_signal is not None and block is not None
        with self.context.outputs.unsharded(block):
            signal = self.conditional(self.denoiser.adapter.block_signal(block, arguments), step)
        return signal, change(signal, state.signal, self.context.outputs.all_reduce)


class TimestepSignal(ChangeSignal):
    """TeaCache's signal for models where it depends on the timestep alone (Wan).

    All changes of a request are computed at its first step, and read from the device once.

    Attributes:
        projected: Whether the signal is the projected time embedding.
    """

    projected = False

    def __init__(self, context: PipelineContext, denoiser: Denoiser):
        super().__init__(context, denoiser)
        self._changes: tuple[int, list[float]] = (0, [])  # of a request, by its number

    def measure(
        self, state: BranchState, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Measurement:
        """See `ChangeSignal.measure`."""
        request, changes = self._changes
        if request != step.request:
            signal = self.denoiser.adapter.timestep_signal
            assert signal is not None
            timesteps = self.context.clock.timesteps
            device = next(self.denoiser.module.parameters()).device
            signals = signal(self.denoiser.module, timesteps.to(device), self.projected).float()
            changes = [0.0, *_changes_along_steps(signals[1:], signals[:-1]).tolist()]
            self._changes = (step.request, changes)
        if state.step is None or step.step is None or step.step != state.step + 1:
            return None, None
        return None, changes[step.step]


class ProjectedTimestepSignal(TimestepSignal):
    """TeaCache's signal from the projected time embedding (Wan's `use_ret_steps`)."""

    projected = True


class FirstResidual(ChangeSignal):
    """The residual of the first blocks in the main stream (FBCache, DBCache)."""

    since_computed = True

    def measure(
        self, state: BranchState, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Measurement:
        """See `ChangeSignal.measure`."""
        stream, first_input = main_stream(streams), state.first_input
        if stream is None or first_input is None or stream.shape != first_input.shape:
            return None, None
        signal = self.conditional(stream - first_input, step)
        return signal, change(signal, state.signal, self.context.outputs.all_reduce)


class FilteredLatents(ChangeSignal):
    """The latents with their noise filtered out in the frequency domain (SeaCache).

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        power: Exponent of the clean pictures' power spectrum; `None` takes 2 for pictures and 3 for videos.
    """

    before_denoiser = True

    def __init__(self, context: PipelineContext, denoiser: Denoiser, power: float | None = None):
        super().__init__(context, denoiser)
        self.power = power
        # Values of a request, with its number.
        self._noise: tuple[int, list[float] | None] = (0, None)
        self._grid: tuple[int, Any] = (0, None)

    def measure(
        self, state: BranchState, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Measurement:
        """See `ChangeSignal.measure`."""
        adapter = self.denoiser.adapter
        if self._noise[0] != step.request:
            self._noise = (step.request, noise_fractions(self.context.clock.scheduler))
            self._grid = (step.request, adapter.grid(arguments))
        noise = self._noise[1]
        if noise is None or step.step is None:
            return None, None
        latents = adapter.latents(self.denoiser.module, arguments, self._grid[1])
        signal = [self.filtered(item, noise[step.step]) for item in latents]
        before = state.signal
        if before is None or len(before) != len(signal):
            return signal, None
        if any(one.shape != other.shape for one, other in zip(signal, before, strict=True)):
            return signal, None
        changes = [relative(one, other) for one, other in zip(signal, before, strict=True)]
        return signal, _mean_of_ranks(torch.stack(changes).mean(), self.context.outputs.all_reduce)

    def filtered(self, latents: torch.Tensor, noise: float) -> torch.Tensor:
        """Latents after a Wiener-like filter; see `policies/seacache.py`.

        Args:
            latents: Floating point (batch, channels, *space).
            noise: Share of noise in the latents, between 0 and 1.

        Returns:
            float32 of the same shape.
        """
        dims = tuple(range(2, latents.ndim))
        power = self.power or (3.0 if len(dims) == 3 and latents.shape[2] > 1 else 2.0)
        gains = torch.ones((), dtype=torch.float32)
        for dim in dims:
            axis = torch.tensor(
                [wiener_gain(abs(float(item)), noise, power) for item in torch.fft.fftfreq(latents.shape[dim])]
            )
            gains = gains.unsqueeze(-1) * axis
        gains = (gains / gains.mean()).to(latents.device)
        return torch.fft.ifftn(torch.fft.fftn(latents.float(), dim=dims) * gains, dim=dims).real


class EstimatedOutput(ChangeSignal):
    """The denoiser's latents, whose change gives an estimate of the output's change (EasyCache)."""

    before_denoiser = True

    def measure(
        self, state: BranchState, step: StepState, block: nn.Module | None, arguments: Arguments, streams: Streams
    ) -> Measurement:
        """See `ChangeSignal.measure`."""
        # Copies, because a pipeline may write its next latents in place.
        signal = [item.clone() for item in latents_of(self.denoiser, arguments)]
        before, outputs, k = (state.signal, state.memory.get("outputs"), state.memory.get("k"))
        moved = _mean_difference(signal, before)
        if moved is None or outputs is None or k is None:
            return signal, None
        return signal, _mean_of_ranks(estimated_change(k, moved, _mean_size(outputs)), self.context.outputs.all_reduce)

    def record_outputs(self, state: BranchState, outputs: list[torch.Tensor]) -> None:
        """Updates k, the ratio of the output's to the input's change, between two computed steps."""
        inputs = state.signal
        moved = _mean_difference(inputs, state.memory.get("inputs"))
        changed = _mean_difference(outputs, state.memory.get("outputs"))
        if moved is not None and changed is not None:
            state.memory["k"] = change_ratio(changed, moved)
        state.memory["inputs"], state.memory["outputs"] = inputs, [item.clone() for item in outputs]


def latents_of(denoiser: Denoiser, arguments: Arguments) -> list[torch.Tensor]:
    """The denoiser's latents, in the order of its outputs (`Adapter.denoised`)."""
    return tensors_in([arguments.get(name) for name in denoiser.adapter.denoised])


def main_stream(streams: Streams) -> torch.Tensor | None:
    """The picture's stream. Stock blocks call it `hidden_states`, or return it behind the text's stream."""
    return streams["hidden_states"] if "hidden_states" in streams else list(streams.values())[-1]


def change(signal: torch.Tensor, previous: torch.Tensor | None, reduce: Reduce = None) -> float | None:
    """The relative L1 change since the previous signal, read from the device.

    Args:
        signal: The signal of this step.
        previous: The signal to compare with, or `None`.
        reduce: Sums a tensor over ranks with other parts of the signal; `None` for a single rank.

    Returns:
        `None` if there is no previous signal, or one of another shape.
    """
    if previous is None or previous.shape != signal.shape:
        return None
    if reduce is None:
        return float(relative(signal, previous))
    sizes = [item.abs().sum(dtype=torch.float32) for item in (signal - previous, previous)]
    moved, size = reduce(torch.stack(sizes)).tolist()
    return float(moved / size)


def _mean_of_ranks(value: torch.Tensor, reduce: Reduce) -> float:
    """The mean over ranks of a change of replicated values. Ranks may round differently and must decide alike."""
    if reduce is None:
        return float(value)
    total, ranks = reduce(torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)])).tolist()
    return float(total / ranks)


def _changes_along_steps(signals: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Relative L1 changes (steps,) between signals (steps, features)."""
    return (signals - previous).abs().mean(-1) / previous.abs().mean(-1)


def _mean_difference(now: list[torch.Tensor] | None, before: list[torch.Tensor] | None) -> torch.Tensor | None:
    """Mean absolute difference over all values of several tensors; `None` if shapes differ or one side is missing."""
    if now is None or before is None or [item.shape for item in now] != [item.shape for item in before]:
        return None
    total = [(one - other).abs().sum(dtype=torch.float32) for one, other in zip(now, before, strict=True)]
    return torch.stack(total).sum() / sum(item.numel() for item in now)


def _mean_size(values: list[torch.Tensor]) -> torch.Tensor:
    """Mean absolute value over all values of several tensors."""
    total = torch.stack([item.abs().sum(dtype=torch.float32) for item in values]).sum()
    return total / sum(item.numel() for item in values)


# `PolicyRecord.signal` -> signal, besides "modulated_input", which depends on the model.
SIGNALS: dict[str | None, SignalFactory] = {None: ChangeSignal, "residual": FirstResidual, "latents": FilteredLatents}
