"""Gates: on a step that may be skipped, each stack of blocks gives its input plus a residual predicted from earlier
steps; or the whole denoiser does.

A gate around every block (outside the compiled block) carries it out. The gate of the first block that may be skipped
asks the policy; on a skipped step the blocks from there on pass their streams on and the last of them adds the stack's
residual. So everything the stock forward does before, between and after the blocks (embeddings, ControlNet's additions,
final norm and projection) runs on fresh data. No stock forward is copied.

A rule for the whole denoiser needs one layer: on a skipped step the latents plus a predicted difference are returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...core.step import Mode, StepState
from ...models import Stack
from ...models.adapter import by_name, parameter_names
from ...policies import Taylor
from ..context import Denoiser, PipelineContext
from .lanes import Guarded, Lane, Streams, predicted, relative
from .recorder import record, take
from .rule import Rule
from .signals import latents_of, leaves, main_stream

_WHOLE = "outputs"
# Where the form of an output has a tensor.
_GAP = object()


class StepCache:
    """The cache of one denoiser: its lanes, and the layers that use them.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        rule: What to do.

    Attributes:
        others: The caches of the pipeline's other denoisers, which hand over to this one.
    """

    def __init__(self, context: PipelineContext, denoiser: Denoiser, rule: Rule):
        self.context, self.denoiser, self.rule = context, denoiser, rule
        self.watch = rule.watch(context, denoiser)
        # By request and branch: a request may begin inside another one's callback.
        self.lanes: dict[tuple[int, str], Lane] = {}
        self.others: list[StepCache] = []
        self._lane: Lane | None = None
        self._names = parameter_names(denoiser.module)
        self._together: tuple[tuple[int, int | None], Mode] = ((0, None), Mode.FULL)

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: chooses the lane, and closes it whatever happens."""
        step = self.context.clock.current
        # A call whose place in the request is unknown is computed in full, and leaves no trace.
        if step is None or step.repeated:
            return inner(*args, **kwargs)
        lane = self.lanes.get((step.request, step.branch))
        if lane is None:
            for other in self.others:
                other.hand_over(step.request)
            lane = self.lanes[step.request, step.branch] = Lane(step.request, self.rule.policy(step.branch))
            lane.guarded = Guarded() if self.rule.guard else None
        self._lane = lane
        try:
            arguments = by_name(self._names, args, kwargs)
            if self.watch.at_entry and not self._told(step):
                lane.change = self.watch.look(lane, step, None, arguments, {})
            if self.rule.whole:
                return self._whole(lane, step, arguments, lambda: inner(*args, **kwargs))
            return inner(*args, **kwargs)
        except BaseException:
            self.forget(step.request)
            raise
        finally:
            self._lane = None
            self._look_back(lane, step)
            lane.close(step.last)

    def forget(self, request: int) -> None:
        """Lets go of a request that has ended, whether it came to its last step or not."""
        self.lanes = {key: lane for key, lane in self.lanes.items() if key[0] != request}

    def hand_over(self, request: int) -> None:
        """Lets go of what is kept, when another expert takes over: they work one after another."""
        for (number, branch), lane in self.lanes.items():
            if number == request:
                lane.close(last=True)
                self.context.stats.cache_bytes.pop((self.denoiser.name, branch), None)

    def gate(self, stack: Stack, block: nn.Module, index: int) -> Callable[..., Any]:
        """The layer around one block of a stack, by its place there."""
        names, stacks = parameter_names(block), self.denoiser.stacks
        last = len(stacks[-1].blocks(self.denoiser.module)) - self.rule.last
        skipped = [each.path for each in stacks if each is not stacks[-1] or last > 0]
        decides = stack is stacks[0]
        # The part of the stack that may be skipped.
        start = self.rule.first if decides else 0
        end = len(stack.blocks(self.denoiser.module)) - (self.rule.last if stack is stacks[-1] else 0)
        begins, enters, leaves = decides and index == 0 < start, index == start, index == end - 1
        within = start <= index < end

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            lane, step = self._lane, self.context.clock.current
            if lane is None or step is None or not (within or begins):
                return inner(*args, **kwargs)
            arguments = by_name(names, args, kwargs)
            streams: Streams = {name: arguments.get(name) for name in stack.streams}
            if begins:
                lane.begin = main_stream(streams)
            if enters and decides:
                if not self.watch.at_entry:
                    lane.change = self.watch.look(lane, step, block, arguments, streams)
                self._decide(lane, step, lane.can_skip(skipped, streams))
            if within and step.mode is Mode.SKIP:
                if leaves:
                    streams = predicted(streams, lane.residuals[stack.path], _place(step))
                return _as_output(streams)
            if within:
                lane.entering(stack.path, streams)
            out = inner(*args, **kwargs)
            if within and step.step is not None:
                lane.left[stack.path] = _as_streams(stack, out)
                if leaves:
                    lane.keep(stack.path, lane.left[stack.path], _place(step), self.rule.order)
                    if self.rule.recording:
                        take(lane, main_residual(lane.residuals[stack.path]))
            return out

        return forward

    def _whole(self, lane: Lane, step: StepState, arguments: dict[str, Any], inner: Callable[[], Any]) -> Any:
        """The denoiser's output, computed or predicted as its latents and a difference."""
        latents, place = latents_of(self.denoiser, arguments), _place(step) if step.step is not None else 0
        shapes = [item.shape for item in latents]
        self._decide(lane, step, lane.memory.get("shapes") == shapes and _WHOLE in lane.residuals)
        if step.mode is Mode.SKIP:
            kept, (form, spec) = lane.residuals[_WHOLE], lane.memory["form"]
            values = [
                (_base(latents, index, item.derivatives[0].shape) + item.predict(place)).to(dtype)
                for index, (item, dtype) in enumerate(zip(kept.values(), lane.memory["types"], strict=True))
                if item is not None
            ]
            found = iter(values)
            return pytree.tree_unflatten([next(found) if part is _GAP else part for part in form], spec)
        out = inner()
        flat, spec = pytree.tree_flatten(out)
        outputs = leaves(out)
        form = [_GAP if isinstance(part, torch.Tensor) else part for part in flat]
        lane.memory.update(form=(form, spec), shapes=shapes, types=[item.dtype for item in outputs])
        kept = lane.residuals.setdefault(_WHOLE, {})
        if len(kept) != len(outputs):
            kept.clear()
        for index, output in enumerate(outputs):
            value, item = output - _base(latents, index, output.shape), kept.get(str(index))
            if item is None or item.derivatives[0].shape != value.shape:
                item = kept[str(index)] = Taylor(self.rule.order)
            elif lane.checking:
                lane.errors.append(relative(item.predict(place), value))
            item.update(place, value)
        self.watch.computed(lane, outputs)
        return out

    def _decide(self, lane: Lane, step: StepState, possible: bool) -> None:
        """Sets the step's mode."""
        seen, change = lane.change
        lane.step = step.step
        told = self._told(step)
        if told:
            mode = self._together[1] if possible else Mode.FULL
        else:
            mode = Mode(lane.policy.decide(step, change if possible else None))
            if not possible or change is None:
                mode = Mode.FULL  # whatever a policy says
        if self.rule.together and not told:
            self._together = ((step.request, step.step), mode)
        if mode is Mode.SKIP and lane.guarded is not None:
            mode = self._guarded(lane, lane.guarded)
        step.mode = mode
        if seen is not None and (mode is Mode.FULL or not self.watch.with_computed):
            lane.signal = seen

    def _told(self, step: StepState) -> bool:
        """Whether another guidance branch of this step has decided for this one."""
        return self.rule.together and self._together[0] == (step.request, step.step)

    def _guarded(self, lane: Lane, guarded: Guarded) -> Mode:
        """The mode of a step that may be skipped: after the bound was passed none is, and some are looked at."""
        if guarded.stopped is not None:
            return Mode.FULL
        before, share = lane.offered, self.rule.guard
        lane.offered += 1
        lane.checking = math.ceil(lane.offered * share) > math.ceil(before * share)
        return Mode.FULL if lane.checking else Mode.SKIP

    def _look_back(self, lane: Lane, step: StepState) -> None:
        """Settles what a call leaves: what the guard found, and the memory that is kept."""
        key = (self.denoiser.name, step.branch)
        if lane.checking and lane.guarded is not None and lane.errors:
            guarded, worst = lane.guarded, float(torch.stack(lane.errors).max())
            guarded.checked += 1
            guarded.worst = max(guarded.worst, worst)
            # NaN compares false, so a prediction gone wrong stops too.
            if not worst <= self.rule.bound:
                guarded.stopped = step.step
            self.context.stats.cache_guarded[key] = guarded
        if self.rule.recording and (found := record(lane, step)) is not None:
            self.context.outputs.cache_records.setdefault(key, []).append(found)
        self.context.stats.cache_bytes[key] = lane.bytes


def _place(step: StepState) -> int:
    assert step.step is not None
    return step.step - step.first


def _base(latents: list[torch.Tensor], index: int, shape: torch.Size) -> torch.Tensor | float:
    """The latents that an output is a change of: with conditioning behind them in one dimension cut off; 0 if none."""
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
    """What a stack added to the picture's stream."""
    item = kept["hidden_states"] if "hidden_states" in kept else list(kept.values())[-1]
    assert item is not None
    value: torch.Tensor = item.derivatives[0]
    return value


def _as_streams(stack: Stack, out: Any) -> Streams:
    return dict(zip(stack.streams, out if isinstance(out, tuple) else (out,), strict=True))


def _as_output(streams: Streams) -> Any:
    values = tuple(streams.values())
    return values[0] if len(values) == 1 else values
