"""The graphs of one denoiser: a first call of each kind is watched, a second recorded, later ones are played."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...config import CudaGraphConfig
from ...core.graphs import RECORDERS, Recording
from ...core.step import Mode
from ...models import Stack
from ...models.adapter import by_name, parameter_names
from ..context import Denoiser, PipelineContext
from .segments import Call, Kind, Running, Segment, Source, form_of, run, source_of
from .state import adapter_of, call_form, first_line, state_of

# Where the form of an output has a tensor.
_TENSOR = object()


class Graphs:
    """The graphs of one denoiser.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        config: How many kinds of calls are recorded at most.
    """

    def __init__(self, context: PipelineContext, denoiser: Denoiser, config: CudaGraphConfig):
        self.context, self.denoiser, self.config = context, denoiser, config
        self.kinds: dict[Hashable, Kind] = {}
        self.replays = 0
        self._running: Running | None = None
        self._request = 0
        self._weights: Hashable = None
        self._adapters: list[tuple[Any, tuple[str, ...]]] = []
        self._why: str | None = None
        self._warned: set[str] = set()
        self._recorder = RECORDERS[denoiser.device.type]
        self._pool: Any = None
        adapter = denoiser.adapter
        self._blocks = {
            id(block) for stack in (*adapter.side_stacks, *adapter.stacks) for block in stack.blocks(denoiser.module)
        }

    @property
    def captured(self) -> int:
        """Graphs that are held."""
        return sum(len(kind.segments) for kind in self.kinds.values())

    # --- the layers ---------------------------------------------------------------------------------------------------

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: finds the kind of call."""
        kind = self._kind(args, kwargs)
        if kind is None:
            return inner(*args, **kwargs)
        if not kind.watched:
            kind.forget()  # an earlier call may have broken off
        self._running = running = Running(kind)
        try:
            out = inner(*args, **kwargs)
        finally:
            self._running = None
        if not kind.watched:
            self._settle(kind, running.order)
        return out

    def around_block(self, stack: Stack, block: nn.Module, index: int) -> Callable[..., Any]:
        """The layer around one block."""
        names, number, last = parameter_names(block), id(block), len(stack.blocks(self.denoiser.module)) - 1
        read = self.denoiser.adapter.static_arguments

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            running = self._running
            if running is None:
                return inner(*args, **kwargs)
            given = by_name(names, args, kwargs)
            if not running.kind.watched:
                # Stock code branches on these values, which cannot be recorded.
                alone = any(isinstance(given.get(name), torch.Tensor) for name in read)
                out = inner(*args, **kwargs)
                self._watch(running, number, given, out, stack, alone, index == last)
                return out
            call = Call(inner, names[: len(args)], tuple(kwargs), running.kind.sources.get(number, {}), stack.streams)
            return self._step(running, number, given, call)

        return forward

    # --- the first call of a kind -------------------------------------------------------------------------------------

    def _watch(
        self, running: Running, number: int, given: dict[str, Any], out: Any, stack: Stack, alone: bool, last: bool
    ) -> None:
        """Takes note of where a block's arguments came from, and whether a segment must begin or end here."""
        kind = running.kind
        sources: dict[str, Source] = {}
        asked = running.ended or (self.denoiser.name, number) in self.context.outputs.observed_blocks
        if not (asked or alone):
            sources = {name: found for name, value in given.items() if (found := source_of(value, running))}
        if len(sources) < len(given):
            if running.order:
                kind.ends.add(running.order[-1])
            kind.heads.add(number)
            kind.cuts += not asked
            running.given, sources = given, {name: Source(name=name) for name in given}
        kind.sources[number] = sources
        returned = out if isinstance(out, tuple) else (out,)
        # What comes out in another form than it went in cannot be handed on.
        running.ended = (
            alone
            or last
            or len(returned) != len(stack.streams)
            or any(
                form_of(value) != form_of(given.get(name)) for name, value in zip(stack.streams, returned, strict=True)
            )
        )
        running.hand_on({} if running.ended else dict(zip(stack.streams, returned, strict=True)))
        if running.ended:
            kind.ends.add(number)
        running.order.append(number)

    def _settle(self, kind: Kind, order: list[int]) -> None:
        """Ends the watching, if every block was called once."""
        kind.watched = set(order) == self._blocks and len(order) == len(self._blocks)
        if not kind.watched:
            kind.forget()
            # On a step that a cache skips this is as it should be.
            step = self.context.clock.current
            if step is not None and step.mode is Mode.FULL:
                kind.why = f"of its {len(self._blocks)} blocks {len(set(order))} are called"
                self._say(kind.why)
        elif 2 * kind.cuts > len(order):
            # A graph for each block would take much memory and gain little.
            kind.why = f"its {len(order)} blocks are called in {len(kind.heads)} runs, with other work in between"
            self._say(kind.why)

    # --- later calls --------------------------------------------------------------------------------------------------

    def _step(self, running: Running, number: int, given: dict[str, Any], call: Call) -> Any:
        """One block of a call whose kind is known: handed on, or the segment's end."""
        kind = running.kind
        if number in kind.heads:
            running.head, running.given, running.pending = number, given, []
            running.hand_on({name: given.get(name) for name in call.streams})
        elif not running.pending:
            raise RuntimeError(_changed(self.denoiser, "another order of blocks"))
        if given.keys() != call.sources.keys():
            raise RuntimeError(_changed(self.denoiser, "other arguments than before"))
        for name, value in given.items():
            if not call.sources[name].holds(value, running):
                raise RuntimeError(_changed(self.denoiser, f"another {name!r} between two blocks"))
        running.pending.append(call)
        if number in kind.ends:
            calls, running.pending = running.pending, []
            return self._play(kind, running.head, running.given, calls)
        values = tuple(running.streams[name] for name in call.streams)
        return values[0] if len(values) == 1 else values

    def _play(self, kind: Kind, head: int, given: dict[str, Any], calls: list[Call]) -> Any:
        """What the last block of a segment returns."""
        leaves, structure = pytree.tree_flatten(given)
        form = structure, [item for item in leaves if not isinstance(item, torch.Tensor)]
        # The same tensor may be given under several names.
        tensors = {id(item): item for item in leaves if isinstance(item, torch.Tensor)}
        inputs = list(tensors.values())
        segment = kind.segments.get(head)
        if segment is None and kind.why is None:
            try:
                segment = kind.segments[head] = self._record(leaves, form, list(tensors), inputs, calls)
            except RuntimeError as error:  # too little memory, or something that cannot be recorded
                kind.why = f"a call cannot be recorded ({first_line(error)})"
                kind.segments.clear()
                self._say(kind.why)
        elif segment is not None and (segment.form != form or not segment.recording.fits(inputs)):
            kind.why = "what its blocks are given changes from step to step"
            self._say(kind.why)
        if segment is None or kind.why is not None:
            return run(calls, given)
        outputs = iter(segment.recording(inputs))
        self.context.stats.attention_calls.update(segment.attention)
        self.replays += 1
        structure, rest = segment.result
        return pytree.tree_unflatten([next(outputs) if item is _TENSOR else item for item in rest], structure)

    def _record(
        self, leaves: list[Any], form: tuple[Any, list[Any]], order: list[int], inputs: list[torch.Tensor],
        calls: list[Call],
    ) -> Segment:  # fmt: skip
        places = {key: place for place, key in enumerate(order)}
        result: list[Any] = []
        counts, made = self.context.stats.attention_calls, Counter[str]()

        def function(static: list[torch.Tensor]) -> list[torch.Tensor]:
            given = [static[places[id(item)]] if isinstance(item, torch.Tensor) else item for item in leaves]
            before = Counter(counts)
            try:
                found, structure = pytree.tree_flatten(run(calls, pytree.tree_unflatten(given, form[0])))
            finally:
                # Calls are counted when they are played.
                made.clear()
                made.update(counts)
                made.subtract(before)
                counts.clear()
                counts.update(before)
            result[:] = structure, [_TENSOR if isinstance(item, torch.Tensor) else item for item in found]
            return [item for item in found if isinstance(item, torch.Tensor)]

        if self._pool is None:
            self._pool = self._recorder.pool()
        recording = Recording(inputs, function, self._recorder(self._pool, inputs[0].device))
        return Segment(recording, form, (result[0], result[1]), +made)

    # --- kinds of calls -----------------------------------------------------------------------------------------------

    def _kind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kind | None:
        """The kind of this call; `None` where it is to be run as it is."""
        step = self.context.clock.current
        if step is None or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():
            self._say("gradients are recorded")
            return None
        if step.request != self._request:
            self._request, self.replays = step.request, 0
            self._look_at_weights()
        elif any(adapter_of(module) != state for module, state in self._adapters):
            self._look_at_weights()  # a callback may change an adapter's scale between two steps
        if self._why is not None:
            return None
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(self.denoiser.device.type)
        key = (call_form(args), call_form(kwargs), modes, tuple(phase() for phase in self.context.outputs.graph_keys))
        kind = self.kinds.get(key)
        if kind is None:
            if len(self.kinds) >= self.config.limit:
                self._say(f"{self.config.limit} kinds of calls are recorded already (cuda_graph.limit)")
                return None
            kind = self.kinds[key] = Kind()
        return kind if kind.why is None else None

    def _look_at_weights(self) -> None:
        """Drops everything recorded if a weight has moved or an adapter has changed; finds what forbids recording."""
        state = state_of(self.denoiser.module)
        self._why, self._adapters = state.why, state.adapters
        if state.weights != self._weights or self._why is not None:
            self.kinds.clear()
            self._pool, self._weights = None, state.weights
        if self._why is not None:
            self._say(self._why)

    def _say(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"cuda_graph: {self.denoiser} is run without graphs: {why}.", stacklevel=2)


def _changed(denoiser: Denoiser, what: str) -> str:
    return (
        f"cuda_graph: {denoiser} went through its blocks with {what}, though it was called alike; a graph would be "
        "wrong. Instead: cuda_graph=None for this model."
    )
