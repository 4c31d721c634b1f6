"""Gates around blocks: on a step that may be skipped, each stack of blocks gives its input plus a residual predicted
from earlier steps.

A gate around every block (outside the compiled block) carries it out. The gate of the first block that may be skipped
measures what the rule watches and asks the policy; on a skipped step the blocks from there on pass their streams on and
the last of them adds the stack's residual. So everything the stock forward does before, between and after the stacks
(embeddings, ControlNet's addition behind the last block, final norm and projection) runs on fresh data. No stock
forward is copied.

State lives in a lane per denoiser and guidance branch, made anew for each request, and dropped after its last step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...core.step import Mode, StepState
from ...models import Stack
from ...models.adapter import parameter_names
from ...policies import Policy, Taylor
from ..feature import Denoiser, Target

# A tensor per stream; None for one that is not there.
Streams = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Rule:
    """What a cache does.

    Attributes:
        policy: Makes the policy of one branch of one request.
        label: In a few words.
        watches: What is measured for it: `"signal"` the model's own, `"residual"` what the first blocks add, both
            relative to what they were; `None` if it needs nothing.
        first: Blocks of the first stack that are computed on every step, before the decision.
        last: The same of the last stack, behind what is skipped.
        order: Of the Taylor polynomial that predicts a skipped residual; 0 reuses the last one.
        projected: Whether a signal of the timestep alone is the projected embedding.
    """

    policy: Callable[[], Policy]
    label: str
    watches: str | None = None
    first: int = 0
    last: int = 0
    order: int = 0
    projected: bool = False


@dataclass
class Lane:
    """What one guidance branch of one denoiser remembers within one request.

    Attributes:
        request: Its number.
        policy: Its policy.
        signal: What was watched last.
        step: The step of the last decision.
        begin: What went into the first stack, where its first blocks are watched.
        inputs: What went into the part of each stack that may be skipped, in the call that is running.
        residuals: What that part added, by stack and stream, on the steps that were computed.
    """

    request: int
    policy: Policy
    signal: torch.Tensor | None = None
    step: int | None = None
    begin: torch.Tensor | None = None
    inputs: dict[str, Streams] = field(default_factory=dict)
    residuals: dict[str, dict[str, Taylor | None]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of what is kept from step to step."""
        kept = [self.signal] if self.signal is not None else []
        kept += [
            item for stack in self.residuals.values() for value in stack.values() if value for item in value.derivatives
        ]
        return sum(item.numel() * item.element_size() for item in kept)


class StepCache:
    """The cache of one denoiser: its lanes, and the layers that use them.

    Args:
        target: The pipeline.
        denoiser: The denoiser.
        rule: What to do.
    """

    def __init__(self, target: Target, denoiser: Denoiser, rule: Rule):
        self.target, self.denoiser, self.rule = target, denoiser, rule
        self.lanes: dict[str, Lane] = {}
        self._lane: Lane | None = None
        self._schedule: tuple[int, list[float]] = (0, [])

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: chooses the lane, and closes it whatever happens."""
        step = self.target.clock.current
        # A call whose place in the request is unknown is computed in full, and leaves no trace.
        if step is None or step.repeated:
            return inner(*args, **kwargs)
        lane = self.lanes.get(step.branch)
        if lane is None or lane.request != step.request:
            lane = self.lanes[step.branch] = Lane(step.request, self.rule.policy())
        self._lane = lane
        try:
            return inner(*args, **kwargs)
        except BaseException:
            self.lanes.clear()
            raise
        finally:
            self._lane = None
            lane.inputs.clear()
            lane.begin = None
            self.target.cache_bytes[self.denoiser.name, step.branch] = lane.bytes
            if step.last:
                lane.residuals.clear()
                lane.signal = None

    def gate(self, stack: Stack, block: nn.Module, index: int) -> Callable[..., Any]:
        """The layer around one block of a stack, by its place there."""
        names, stacks = parameter_names(block), self.denoiser.adapter.stacks
        decides = stack is stacks[0]
        # The part of the stack that may be skipped.
        start = self.rule.first if decides else 0
        end = len(stack.blocks(self.denoiser.module)) - (self.rule.last if stack is stacks[-1] else 0)
        begins, enters, leaves = decides and index == 0 < start, index == start, index == end - 1

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            lane, step = self._lane, self.target.clock.current
            if lane is None or step is None:
                return inner(*args, **kwargs)
            within = start <= index < end
            if begins or enters or (within and step.mode is Mode.SKIP):
                arguments = {**dict(zip(names, args, strict=False)), **kwargs}
                streams: Streams = {name: arguments.get(name) for name in stack.streams}
            if begins:
                lane.begin = _watched(streams)
            if enters:
                if decides:
                    step.mode = self._decide(lane, step, block, arguments, streams)
                lane.inputs[stack.path] = streams
            if within and step.mode is Mode.SKIP:
                if leaves:
                    streams = _predicted(lane.inputs[stack.path], lane.residuals[stack.path], step)
                return _as_output(streams)
            out = inner(*args, **kwargs)
            if leaves and stack.path in lane.inputs and step.step is not None:
                kept = lane.residuals.setdefault(stack.path, {})
                self._keep(kept, lane.inputs[stack.path], _as_streams(stack, out), step.step - step.first)
            return out

        return forward

    def _decide(
        self, lane: Lane, step: StepState, block: nn.Module, arguments: Mapping[str, Any], streams: Streams
    ) -> Mode:
        adapter, watches = self.denoiser.adapter, self.rule.watches
        seen: torch.Tensor | None = None
        change: float | None = 0.0
        if watches == "signal" and adapter.timestep_signal is not None:
            change = self._scheduled_change(lane, step, adapter.timestep_signal)
        elif watches == "signal":
            assert adapter.block_signal is not None
            seen = self._conditional(adapter.block_signal(block, arguments), step)
            change = _change(seen, lane.signal)
        elif watches == "residual":
            now, begin = _watched(streams), lane.begin
            if now is None or begin is None or now.shape != begin.shape:
                change = None
            else:
                seen = self._conditional(now - begin, step)
                change = _change(seen, lane.signal)
        lane.step = step.step
        mode = lane.policy.decide(step, change if self._can_skip(lane, streams) else None)
        # A signal is compared with the last step's, a residual with that of the last step that was computed.
        if watches == "signal" or mode is Mode.FULL:
            lane.signal = seen
        return mode

    def _can_skip(self, lane: Lane, streams: Streams) -> bool:
        """Whether there is a residual of every stack, and the first one's shapes are those of this call."""
        stacks = self.denoiser.adapter.stacks
        if any(stack.path not in lane.residuals for stack in stacks):
            return False
        kept = lane.residuals[stacks[0].path]
        return all(
            residual is None or (value is not None and value.shape == residual.derivatives[0].shape)
            for value, residual in ((streams[name], kept[name]) for name in streams)
        )

    def _keep(self, kept: dict[str, Taylor | None], inputs: Streams, outputs: Streams, step: int) -> None:
        """Takes what the blocks of a stack added to each stream; its memory is used again."""
        for name, output in outputs.items():
            given, residual = inputs[name], kept.get(name)
            if output is None or given is None:
                kept[name] = None
                continue
            buffer = residual.derivatives[0] if residual is not None else None
            fits = buffer is not None and buffer.shape == output.shape and buffer.dtype == output.dtype
            fits = fits and not output.requires_grad  # torch writes to no buffer where it records gradients
            if residual is None or not fits or self.rule.order:
                if residual is None or not fits:
                    residual = kept[name] = Taylor(self.rule.order)
                residual.update(step, output - given)
            else:
                residual.update(step, torch.sub(output, given, out=buffer))

    def _conditional(self, signal: torch.Tensor, step: StepState) -> torch.Tensor:
        """The conditional half of a signal, which comes last, where both guidance branches share a call."""
        adapter, pipe = self.denoiser.adapter, self.target.pipe
        batched = adapter.guidance == "batched" and step.branch == adapter.branches[0]
        if batched and getattr(pipe, "do_classifier_free_guidance", False) and signal.shape[0] % 2 == 0:
            return signal.chunk(2)[1]
        return signal

    def _scheduled_change(self, lane: Lane, step: StepState, signal: Callable[..., torch.Tensor]) -> float | None:
        request, changes = self._schedule
        if request != step.request:
            # One read from the device per request: the signals of all timesteps, at once.
            timesteps = self.target.clock.timesteps
            device = next(self.denoiser.module.parameters()).device
            signals = signal(self.denoiser.module, timesteps.to(device), self.rule.projected).float()
            changes = [0.0, *_relative_change(signals[1:], signals[:-1], dim=-1).tolist()]
            self._schedule = (step.request, changes)
        if lane.step is None or step.step is None or step.step != lane.step + 1:
            return None
        return changes[step.step]


def _change(signal: torch.Tensor, previous: torch.Tensor | None) -> float | None:
    """The relative change since the previous signal, read from the device; `None` if there is none to compare with."""
    if previous is None or previous.shape != signal.shape:
        return None
    return float(_relative_change(signal, previous))


def _relative_change(signal: torch.Tensor, previous: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """mean |signal - previous| / mean |previous|, in float32, over all dimensions or the given one."""
    difference = (signal - previous).abs().mean(dim=dim, dtype=torch.float32)
    return difference / previous.abs().mean(dim=dim, dtype=torch.float32)


def _watched(streams: Streams) -> torch.Tensor | None:
    """The stream that is looked at: the picture's, where there is one beside the text's."""
    return streams["hidden_states"] if "hidden_states" in streams else next(iter(streams.values()))


def _as_streams(stack: Stack, out: Any) -> Streams:
    return dict(zip(stack.streams, out if isinstance(out, tuple) else (out,), strict=True))


def _as_output(streams: Streams) -> Any:
    values = tuple(streams.values())
    return values[0] if len(values) == 1 else values


def _predicted(inputs: Streams, residuals: Mapping[str, Taylor | None], step: StepState) -> Streams:
    """What the blocks of a stack would give: what went into them, and what they are predicted to add."""
    assert step.step is not None
    return {
        name: None
        if given is None or (residual := residuals[name]) is None
        else given + residual.predict(step.step - step.first)
        for name, given in inputs.items()
    }
