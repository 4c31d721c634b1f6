"""Step caching: on a step that may be skipped, each stack of blocks gives its input plus the residual it last computed.

A gate around every block (outside the compiled block) carries it out. The gate of the first block computes the model's
signal and asks the policy; on a skipped step the blocks of a stack pass their streams on and the last one adds the
stack's residual, so everything the stock forward does before, between and after the stacks (embeddings, ControlNet's
addition behind the last block, final norm and projection) runs on fresh data. No stock forward is copied.

State lives in a lane per denoiser and guidance branch, made anew for each request, and dropped after its last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import TeaCacheConfig
from ..core.edits import AddLayer, Edit
from ..core.step import Mode, StepState
from ..errors import Unsupported, nearest
from ..models import TEACACHE_ROWS, Checkpoint, Stack
from ..models.adapter import parameter_names
from ..policies import Policy, TeaCache
from .feature import Denoiser, Plan, Target

# A residual per stack and stream; None for a stream that a stack's last block drops.
Residual = dict[str, torch.Tensor | None]


def check(target: Target, config: TeaCacheConfig) -> Plan:
    """The threshold and coefficients of each denoiser.

    Raises:
        Unsupported: The denoiser has no adapter or native caching is on; or nothing was published for it and no
            coefficients were given.
    """
    actions, modules = [], 0
    for denoiser in target.denoisers:
        if getattr(denoiser.module, "is_cache_enabled", False):
            raise Unsupported(
                "cache", "one of diffusers' own caches is on.", f"{denoiser.name}.disable_cache() first.", str(denoiser)
            )
        adapter = denoiser.adapter
        if adapter.block_signal is None and adapter.timestep_signal is None:
            raise Unsupported(
                "cache", "no adapter says what signal to watch.", "cache=None for this model.", str(denoiser)
            )
        threshold, _, source = _constants(target, denoiser, config)
        actions.append(f"{denoiser.name}: teacache, threshold {threshold:g}, {source}")
        modules += sum(len(stack.blocks(denoiser.module)) for stack in adapter.stacks)
    return Plan("; ".join(actions), modules)


def edits(target: Target, config: TeaCacheConfig) -> Iterator[Edit]:
    """One layer around the denoiser and one around each block."""
    for denoiser in target.denoisers:
        threshold, coefficients, _ = _constants(target, denoiser, config)

        def policy(threshold: float = threshold, coefficients: tuple[float, ...] = coefficients) -> Policy:
            return TeaCache(threshold, coefficients, config.use_ret_steps)

        cache = StepCache(target, denoiser, policy, projected=config.use_ret_steps)
        yield AddLayer(denoiser.module, target.rank("cache decision"), cache.around_denoiser)
        for stack in denoiser.adapter.stacks:
            blocks = stack.blocks(denoiser.module)
            for index, block in enumerate(blocks):
                gate = cache.gate(stack, block, first=index == 0, last=index == len(blocks) - 1)
                yield AddLayer(block, target.rank("cache gate"), gate)


def _constants(target: Target, denoiser: Denoiser, config: TeaCacheConfig) -> tuple[float, tuple[float, ...], str]:
    """The threshold, the coefficients and where they come from, or `Unsupported`."""
    given = config.coefficients
    if denoiser.name == "transformer_2" and config.coefficients_2 is not None:
        given = config.coefficients_2
    if isinstance(given, tuple):
        if config.threshold is None:
            raise Unsupported(
                "cache='teacache'", "own coefficients have no published threshold.", "threshold=...", str(denoiser)
            )
        return config.threshold, given, "given coefficients"
    checkpoint = Checkpoint(
        config=denoiser.config,
        pipeline=type(target.pipe).__name__,
        pipeline_config=dict(getattr(target.pipe, "config", {})),
        use_ret_steps=config.use_ret_steps,
    )
    name = given if given is not None else denoiser.adapter.row(checkpoint)
    if name is None:
        rows = ", ".join(denoiser.adapter.rows) or "none for this class"
        raise Unsupported(
            "cache='teacache'",
            "no coefficients are published for this configuration.",
            f"TeaCacheConfig(threshold=..., coefficients=(...)) fitted for it, or the name of a row ({rows}).",
            str(denoiser),
        )
    if name not in TEACACHE_ROWS:
        raise Unsupported("cache='teacache'", f"there is no row {name!r}.", nearest(name, TEACACHE_ROWS))
    row = TEACACHE_ROWS[name]
    if row.use_ret_steps != config.use_ret_steps:
        raise Unsupported(
            "cache='teacache'",
            f"row {name!r} was fitted with use_ret_steps={row.use_ret_steps}.",
            f"use_ret_steps={row.use_ret_steps}, or another row.",
            str(denoiser),
        )
    return row.threshold if config.threshold is None else config.threshold, row.coefficients, f"row {name!r}"


@dataclass
class Lane:
    """What one guidance branch of one denoiser remembers within one request."""

    request: int
    policy: Policy
    signal: torch.Tensor | None = None
    step: int | None = None
    inputs: dict[str, Residual] = field(default_factory=dict)
    residuals: dict[str, Residual] = field(default_factory=dict)


class StepCache:
    """The cache of one denoiser: its lanes, and the layers that use them.

    Args:
        target: The pipeline.
        denoiser: The denoiser.
        policy: Makes a new policy.
        projected: Whether a signal of the timestep alone is the projected embedding.
    """

    def __init__(self, target: Target, denoiser: Denoiser, policy: Callable[[], Policy], projected: bool):
        self.target, self.denoiser, self.policy, self.projected = target, denoiser, policy, projected
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
            lane = self.lanes[step.branch] = Lane(step.request, self.policy())
        self._lane = lane
        try:
            return inner(*args, **kwargs)
        except BaseException:
            self.lanes.clear()
            raise
        finally:
            self._lane = None
            lane.inputs.clear()
            if step.last:
                lane.residuals.clear()
                lane.signal = None

    def gate(self, stack: Stack, block: nn.Module, first: bool, last: bool) -> Callable[..., Any]:
        """The layer around one block of a stack."""
        names = parameter_names(block)
        decides = first and stack is self.denoiser.adapter.stacks[0]

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            lane, step = self._lane, self.target.clock.current
            if lane is None or step is None:
                return inner(*args, **kwargs)
            if decides or first or last or step.mode is Mode.SKIP:
                arguments = {**dict(zip(names, args, strict=False)), **kwargs}
                streams: Residual = {name: arguments.get(name) for name in stack.streams}
            if decides:
                step.mode = self._decide(lane, step, block, arguments, streams)
            if first:
                lane.inputs[stack.path] = streams
            if step.mode is Mode.SKIP:
                if last:
                    streams = _add(lane.inputs[stack.path], lane.residuals[stack.path])
                return _as_output(streams)
            out = inner(*args, **kwargs)
            if last and stack.path in lane.inputs:
                lane.residuals[stack.path] = _subtract(_as_streams(stack, out), lane.inputs[stack.path])
            return out

        return forward

    def _decide(
        self, lane: Lane, step: StepState, block: nn.Module, arguments: Mapping[str, Any], streams: Residual
    ) -> Mode:
        adapter = self.denoiser.adapter
        if adapter.timestep_signal is not None:
            change = self._scheduled_change(lane, step, adapter.timestep_signal)
        else:
            assert adapter.block_signal is not None
            change = self._measured_change(lane, step, adapter.block_signal(block, arguments))
        lane.step = step.step
        mode = lane.policy.decide(step, change if self._can_skip(lane, streams) else None)
        return mode

    def _can_skip(self, lane: Lane, streams: Residual) -> bool:
        """Whether there is a residual of every stack, and the first one's shapes are those of this call."""
        stacks = self.denoiser.adapter.stacks
        if any(stack.path not in lane.residuals for stack in stacks):
            return False
        kept = lane.residuals[stacks[0].path]
        return all(
            residual is None or (value is not None and value.shape == residual.shape)
            for value, residual in ((streams[name], kept[name]) for name in streams)
        )

    def _measured_change(self, lane: Lane, step: StepState, signal: torch.Tensor) -> float | None:
        adapter, pipe = self.denoiser.adapter, self.target.pipe
        batched = adapter.guidance == "batched" and step.branch == adapter.branches[0]
        if batched and getattr(pipe, "do_classifier_free_guidance", False) and signal.shape[0] % 2 == 0:
            # Both halves share a call; the conditional one, which comes last, decides.
            signal = signal.chunk(2)[1]
        previous, lane.signal = lane.signal, signal
        if previous is None or previous.shape != signal.shape:
            return None
        return float(_relative_change(signal, previous))

    def _scheduled_change(self, lane: Lane, step: StepState, signal: Callable[..., torch.Tensor]) -> float | None:
        request, changes = self._schedule
        if request != step.request:
            # One read from the device per request: the signals of all timesteps, at once.
            timesteps = self.target.clock.timesteps
            device = next(self.denoiser.module.parameters()).device
            signals = signal(self.denoiser.module, timesteps.to(device), self.projected).float()
            changes = [0.0, *_relative_change(signals[1:], signals[:-1], dim=-1).tolist()]
            self._schedule = (step.request, changes)
        if lane.step is None or step.step is None or step.step != lane.step + 1:
            return None
        return changes[step.step]


def _relative_change(signal: torch.Tensor, previous: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """mean |signal - previous| / mean |previous|, in float32, over all dimensions or the given one."""
    difference = (signal - previous).abs().mean(dim=dim, dtype=torch.float32)
    return difference / previous.abs().mean(dim=dim, dtype=torch.float32)


def _as_streams(stack: Stack, out: Any) -> Residual:
    return dict(zip(stack.streams, out if isinstance(out, tuple) else (out,), strict=True))


def _as_output(streams: Residual) -> Any:
    values = tuple(streams.values())
    return values[0] if len(values) == 1 else values


def _subtract(outputs: Residual, inputs: Residual) -> Residual:
    return {
        name: None if output is None or (given := inputs[name]) is None else output - given
        for name, output in outputs.items()
    }


def _add(inputs: Residual, residuals: Residual) -> Residual:
    return {
        name: None if given is None or (residual := residuals[name]) is None else given + residual
        for name, given in inputs.items()
    }
