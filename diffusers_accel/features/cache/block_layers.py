"""Layers that carry out a caching rule: around the denoiser, and around every block outside its compiled forward.

The layer of the first skippable block asks the policy. On a skipped step all skippable blocks return their input
streams, and the last of them in each stack adds the stack's predicted residual. The stock forward's other work
(embeddings, ControlNet's additions, final norm and projection) runs on fresh data. No stock forward is copied.

A rule for the whole denoiser needs one layer, which on a skipped step returns the latents plus a predicted difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...core.step import Mode, StepState
from ...core.tree import split
from ...models import Stack
from ...models.adapter import by_name, parameter_names
from ...policies import Taylor
from ..context import Denoiser, PipelineContext
from .rule import Rule
from .signals import latents_of, main_stream
from .state import BranchState, GuardReport, Streams, predicted, relative
from .trace import add_residual, record_step

# The key of the whole denoiser's residuals, beside the paths of stacks.
_DENOISER = "outputs"


class StepCache:
    """The cache of one denoiser: its branch states, and the layers that use them.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        rule: The caching rule.

    Attributes:
        signal: The signal whose change the policy reads.
        states: (request, branch) -> state. There are several requests while one runs inside another's step callback.
        others: The caches of the pipeline's other denoisers, which drop their state when this denoiser takes over.
    """

    def __init__(self, context: PipelineContext, denoiser: Denoiser, rule: Rule):
        self.context, self.denoiser, self.rule = context, denoiser, rule
        self.signal = rule.signal(context, denoiser)
        self.states: dict[tuple[int, str], BranchState] = {}
        self.others: list[StepCache] = []
        self._state: BranchState | None = None
        self._names = parameter_names(denoiser.module)
        # (request, step) of the last decision that all branches share, and its mode.
        self._shared: tuple[tuple[int, int | None], Mode] = ((0, None), Mode.FULL)

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: selects the branch's state, and always ends the call."""
        step = self.context.clock.current
        # A call with an unknown place in the request is computed in full and leaves no state.
        if step is None or step.repeated:
            return inner(*args, **kwargs)
        state = self.states.get((step.request, step.branch))
        if state is None:
            for other in self.others:
                other.hand_over(step.request)
            state = self.states[step.request, step.branch] = BranchState(step.request, self.rule.policy(step.branch))
            state.guard = GuardReport() if self.rule.guard else None
        self._state = state
        try:
            arguments = by_name(self._names, args, kwargs)
            if self.signal.before_denoiser and not self._is_decided(step):
                state.measurement = self.signal.measure(state, step, None, arguments, {})
            if self.rule.whole_denoiser:
                return self._run_denoiser(state, step, arguments, lambda: inner(*args, **kwargs))
            return inner(*args, **kwargs)
        except BaseException:
            self.forget(step.request)
            raise
        finally:
            self._state = None
            self._report(state, step)
            state.end_call(step.last)

    def forget(self, request: int) -> None:
        """Drops the states of a request that has ended, at its last step or before."""
        self.states = {key: state for key, state in self.states.items() if key[0] != request}

    def hand_over(self, request: int) -> None:
        """Frees the kept tensors of a request when another expert takes over. Experts work one after another."""
        for (number, branch), state in self.states.items():
            if number == request:
                state.end_call(last=True)
                self.context.stats.cache_bytes.pop((self.denoiser.name, branch), None)

    def around_block(self, stack: Stack, block: nn.Module, index: int) -> Callable[..., Any]:
        """The layer around one block.

        Args:
            stack: The block's stack.
            block: The block.
            index: The block's index in its stack.
        """
        names, stacks = parameter_names(block), self.denoiser.stacks
        last = len(stacks[-1].blocks(self.denoiser.module)) - self.rule.last
        skipped = [each.path for each in stacks if each is not stacks[-1] or last > 0]
        decides = stack is stacks[0]
        # The skippable blocks of this stack: start <= index < end.
        start = self.rule.first if decides else 0
        end = len(stack.blocks(self.denoiser.module)) - (self.rule.last if stack is stacks[-1] else 0)
        is_entry, is_first, is_last = decides and index == 0 < start, index == start, index == end - 1
        is_skippable = start <= index < end

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state, step = self._state, self.context.clock.current
            if state is None or step is None or not (is_skippable or is_entry):
                return inner(*args, **kwargs)
            arguments = by_name(names, args, kwargs)
            streams: Streams = {name: arguments.get(name) for name in stack.streams}
            if is_entry:
                state.first_input = main_stream(streams)
            if is_first and decides:
                if not self.signal.before_denoiser:
                    state.measurement = self.signal.measure(state, step, block, arguments, streams)
                self._decide(state, step, state.can_skip(skipped, streams))
            if is_skippable and step.mode is Mode.SKIP:
                if is_last:
                    streams = predicted(streams, state.residuals[stack.path], _steps_done(step))
                return _as_output(streams)
            if is_skippable:
                state.record_input(stack.path, streams)
            out = inner(*args, **kwargs)
            if is_skippable and step.step is not None:
                state.outputs[stack.path] = _as_streams(stack, out)
                if is_last:
                    state.record_residual(stack.path, state.outputs[stack.path], _steps_done(step), self.rule.order)
                    if self.rule.tracing:
                        add_residual(state, main_residual(state.residuals[stack.path]))
            return out

        return forward

    def _run_denoiser(
        self, state: BranchState, step: StepState, arguments: dict[str, Any], inner: Callable[[], Any]
    ) -> Any:
        """The denoiser's output: computed, or predicted as its latents plus a difference."""
        latents, place = latents_of(self.denoiser, arguments), _steps_done(step) if step.step is not None else 0
        shapes = [item.shape for item in latents]
        self._decide(state, step, state.memory.get("shapes") == shapes and _DENOISER in state.residuals)
        if step.mode is Mode.SKIP:
            kept = state.residuals[_DENOISER]
            return state.memory["form"].fill(
                (_base(latents, index, item.derivatives[0].shape) + item.predict(place)).to(dtype)
                for index, (item, dtype) in enumerate(zip(kept.values(), state.memory["dtypes"], strict=True))
                if item is not None
            )
        out = inner()
        outputs, form = split(out)
        state.memory.update(form=form, shapes=shapes, dtypes=[item.dtype for item in outputs])
        kept = state.residuals.setdefault(_DENOISER, {})
        if len(kept) != len(outputs):
            kept.clear()
        for index, output in enumerate(outputs):
            value, item = output - _base(latents, index, output.shape), kept.get(str(index))
            if item is None or item.derivatives[0].shape != value.shape:
                item = kept[str(index)] = Taylor(self.rule.order)
            elif state.checking:
                state.errors.append(relative(item.predict(place), value))
            item.update(place, value)
        self.signal.record_outputs(state, outputs)
        return out

    def _decide(self, state: BranchState, step: StepState, possible: bool) -> None:
        """Sets the step's mode.

        Args:
            state: The branch's state.
            step: The running call; its `mode` is set.
            possible: Whether residuals are kept that fit this call.
        """
        signal, change = state.measurement
        state.step = step.step
        decided = self._is_decided(step)
        if decided:
            mode = self._shared[1] if possible else Mode.FULL
        else:
            mode = Mode(state.policy.decide(step, change if possible else None))
            if not possible or change is None:
                mode = Mode.FULL  # a policy cannot skip without a residual
        if self.rule.shared_decision and not decided:
            self._shared = ((step.request, step.step), mode)
        if mode is Mode.SKIP and state.guard is not None:
            mode = self._guarded_mode(state, state.guard)
        step.mode = mode
        if signal is not None and (mode is Mode.FULL or not self.signal.since_computed):
            state.signal = signal

    def _is_decided(self, step: StepState) -> bool:
        """Whether another guidance branch of this step has decided for this one."""
        return self.rule.shared_decision and self._shared[0] == (step.request, step.step)

    def _guarded_mode(self, state: BranchState, guard: GuardReport) -> Mode:
        """The mode of a skippable step under the guard. Some are computed for comparison, and all once the bound was
        passed."""
        if guard.stopped is not None:
            return Mode.FULL
        before, share = state.skippable, self.rule.guard
        state.skippable += 1
        state.checking = math.ceil(state.skippable * share) > math.ceil(before * share)
        return Mode.FULL if state.checking else Mode.SKIP

    def _report(self, state: BranchState, step: StepState) -> None:
        """Writes a call's statistics: the guard's findings, the trace and the kept bytes."""
        key = (self.denoiser.name, step.branch)
        if state.checking and state.guard is not None and state.errors:
            guard, worst = state.guard, float(torch.stack(state.errors).max())
            guard.checked += 1
            guard.worst = max(guard.worst, worst)
            # NaN compares false, so an invalid prediction stops skipping too.
            if not worst <= self.rule.bound:
                guard.stopped = step.step
            self.context.stats.cache_guarded[key] = guard
        if self.rule.tracing and (record := record_step(state, step)) is not None:
            self.context.outputs.cache_records.setdefault(key, []).append(record)
        self.context.stats.cache_bytes[key] = state.bytes


def _steps_done(step: StepState) -> int:
    """The step's index, counted from the request's first step."""
    assert step.step is not None
    return step.step - step.first


def _base(latents: list[torch.Tensor], index: int, shape: torch.Size) -> torch.Tensor | float:
    """The latents from which an output's difference is taken; 0 if none fit.

    Args:
        latents: The denoiser's latents.
        index: Index of the output.
        shape: The output's shape. Latents may be longer in one dimension, where conditioning was concatenated behind
            them; it is cut off.
    """
    if index >= len(latents) or latents[index].ndim != len(shape):
        return 0.0
    given = latents[index]
    differing = [dim for dim, size in enumerate(shape) if given.shape[dim] != size]
    if len(differing) > 1 or any(given.shape[dim] < shape[dim] for dim in differing):
        return 0.0
    for dim in differing:
        given = given.narrow(dim, 0, shape[dim])
    return given


def main_residual(kept: dict[str, Taylor | None]) -> torch.Tensor:
    """A stack's residual of the main stream."""
    item = kept["hidden_states"] if "hidden_states" in kept else list(kept.values())[-1]
    assert item is not None
    value: torch.Tensor = item.derivatives[0]
    return value


def _as_streams(stack: Stack, out: Any) -> Streams:
    return dict(zip(stack.streams, out if isinstance(out, tuple) else (out,), strict=True))


def _as_output(streams: Streams) -> Any:
    values = tuple(streams.values())
    return values[0] if len(values) == 1 else values
