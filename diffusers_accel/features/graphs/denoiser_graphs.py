"""The CUDA graphs of one denoiser: the first call of a variant is traced, the second captured, later ones replayed.

A trace is an ordinary run that notes the source of every block's arguments, which gives the segments. A replayed call
checks the sources again and raises if they differ, because a graph would then compute a wrong result. A call that
cannot be captured runs without graphs, with one warning for each reason.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn

from ...config import CudaGraphConfig
from ...core.graphs import GRAPH_BACKENDS, CapturedGraph
from ...core.step import Mode
from ...core.tree import Form, split
from ...models import Stack
from ...models.adapter import by_name, parameter_names
from ..context import Denoiser, PipelineContext
from .dependencies import call_signature, dependencies_of, first_line, lora_state
from .segments import BlockCall, GraphVariant, RunningCall, Segment, Source, run_blocks, shape_and_dtype, source_of


class DenoiserGraphs:
    """The graphs of one denoiser, and the layers that capture and replay them.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        config: The configuration; `limit` bounds the number of variants.

    Attributes:
        variants: Signature of a call -> its graph variant.
        replays: Number of graph replays in the last request.
    """

    def __init__(self, context: PipelineContext, denoiser: Denoiser, config: CudaGraphConfig):
        self.context, self.denoiser, self.config = context, denoiser, config
        self.variants: dict[Hashable, GraphVariant] = {}
        self.replays = 0
        self._running: RunningCall | None = None
        self._request = 0
        self._weights: Hashable = None
        self._loras: list[tuple[Any, tuple[str, ...]]] = []
        self._refusal: str | None = None
        self._warned: set[str] = set()
        self._backend = GRAPH_BACKENDS[denoiser.device.type]
        self._pool: Any = None
        adapter = denoiser.adapter
        self._blocks = {
            id(block) for stack in (*adapter.side_stacks, *adapter.stacks) for block in stack.blocks(denoiser.module)
        }

    @property
    def captured(self) -> int:
        """Number of graphs that are held."""
        return sum(len(variant.segments) for variant in self.variants.values())

    # --- layers -------------------------------------------------------------------------------------------------------

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: selects the call's graph variant."""
        variant = self._variant(args, kwargs)
        if variant is None:
            return inner(*args, **kwargs)
        if not variant.traced:
            variant.reset_trace()  # an earlier trace may have been interrupted
        self._running = running = RunningCall(variant)
        try:
            out = inner(*args, **kwargs)
        finally:
            self._running = None
        if not variant.traced:
            self._end_trace(variant, running.order)
        return out

    def around_block(self, stack: Stack, block: nn.Module, index: int) -> Callable[..., Any]:
        """The layer around one block.

        Args:
            stack: The block's stack.
            block: The block.
            index: The block's index in its stack.
        """
        names, number, last = parameter_names(block), id(block), len(stack.blocks(self.denoiser.module)) - 1
        static_arguments = self.denoiser.adapter.static_arguments

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            running = self._running
            if running is None:
                return inner(*args, **kwargs)
            inputs = by_name(names, args, kwargs)
            if not running.variant.traced:
                # Stock code branches on the values of these tensors, which a graph cannot.
                alone = any(isinstance(inputs.get(name), torch.Tensor) for name in static_arguments)
                out = inner(*args, **kwargs)
                self._trace_block(running, number, inputs, stack, out, must_end=alone or index == last, alone=alone)
                return out
            sources = running.variant.sources.get(number, {})
            call = BlockCall(block, inner, names[: len(args)], tuple(kwargs), sources, stack.streams)
            return self._call_block(running, number, inputs, call)

        return forward

    # --- the trace ----------------------------------------------------------------------------------------------------

    def _trace_block(
        self,
        running: RunningCall,
        number: int,
        inputs: dict[str, Any],
        stack: Stack,
        out: Any,
        *,
        must_end: bool,
        alone: bool,
    ) -> None:
        """Notes the sources of a block's arguments, and the start or end of a segment at this block.

        Args:
            running: The traced call.
            number: Identity of the block.
            inputs: Name -> argument of the block.
            stack: The block's stack.
            out: The block's output.
            must_end: Whether a segment ends with this block in any case.
            alone: Whether the block is in a segment of its own.
        """
        variant = running.variant
        sources: dict[str, Source] = {}
        must_start = running.after_end or (self.denoiser.name, number) in self.context.outputs.observed_blocks
        if not (must_start or alone):
            sources = {name: found for name, value in inputs.items() if (found := source_of(value, running))}
        if len(sources) < len(inputs):
            if running.order:
                variant.ends.add(running.order[-1])
            variant.starts.add(number)
            variant.forced_starts += not must_start
            running.inputs, sources = inputs, {name: Source(argument=name) for name in inputs}
        variant.sources[number] = sources
        returned = out if isinstance(out, tuple) else (out,)
        # A segment's block before its last returns its input streams, so outputs must have their shapes and dtypes.
        running.after_end = (
            must_end
            or len(returned) != len(stack.streams)
            or any(
                shape_and_dtype(value) != shape_and_dtype(inputs.get(name))
                for name, value in zip(stack.streams, returned, strict=True)
            )
        )
        running.set_streams({} if running.after_end else dict(zip(stack.streams, returned, strict=True)))
        if running.after_end:
            variant.ends.add(number)
        running.order.append(number)

    def _end_trace(self, variant: GraphVariant, order: list[int]) -> None:
        """Ends a trace. If a block was not called exactly once, the trace is invalid and the next call is traced.

        Args:
            variant: The call's variant.
            order: Identities of the called blocks.
        """
        variant.traced = set(order) == self._blocks and len(order) == len(self._blocks)
        if not variant.traced:
            variant.reset_trace()
            # A step that a cache skips calls no block, or some of them.
            step = self.context.clock.current
            if step is not None and step.mode is Mode.FULL:
                variant.refusal = f"of its {len(self._blocks)} blocks {len(set(order))} are called"
                self._warn(variant.refusal)
        elif 2 * variant.forced_starts > len(order):
            # Segments of one block each would take much memory for little gain.
            variant.refusal = (
                f"its {len(order)} blocks are called in {len(variant.starts)} runs, with other work in between"
            )
            self._warn(variant.refusal)

    # --- captured calls -----------------------------------------------------------------------------------------------

    def _call_block(self, running: RunningCall, number: int, inputs: dict[str, Any], call: BlockCall) -> Any:
        """One block of a traced variant. The last block of a segment replays it; the others return their streams.

        Args:
            running: The running call.
            number: Identity of the block.
            inputs: Name -> argument of the block.
            call: The block's call.

        Raises:
            RuntimeError: The order of blocks or the source of an argument differs from the trace.
        """
        variant = running.variant
        if number in variant.starts:
            running.start, running.inputs, running.pending = number, inputs, []
            running.set_streams({name: inputs.get(name) for name in call.streams})
        elif not running.pending:
            raise RuntimeError(_differs(self.denoiser, "another order of blocks"))
        if inputs.keys() != call.sources.keys():
            raise RuntimeError(_differs(self.denoiser, "other arguments than before"))
        for name, value in inputs.items():
            if not call.sources[name].gives(value, running):
                raise RuntimeError(_differs(self.denoiser, f"another {name!r} between two blocks"))
        running.pending.append(call)
        if number in variant.ends:
            calls, running.pending = running.pending, []
            return self._replay(variant, running.start, running.inputs, calls)
        values = tuple(running.streams[name] for name in call.streams)
        return values[0] if len(values) == 1 else values

    def _replay(self, variant: GraphVariant, start: int, inputs: dict[str, Any], calls: list[BlockCall]) -> Any:
        """The output of a segment's last block: by replay after a capture, or by running the blocks.

        Args:
            variant: The call's variant.
            start: Identity of the segment's first block.
            inputs: Name -> argument of that block.
            calls: The segment's blocks.
        """
        tensors, form = split(inputs)
        # One tensor may be given under several names and has one buffer.
        unique = list({id(item): item for item in tensors}.values())
        segment = variant.segments.get(start)
        if segment is None and variant.refusal is None:
            try:
                segment = variant.segments[start] = self._capture(tensors, unique, form, calls)
            except RuntimeError as error:  # out of memory, or an operation that cannot be captured
                variant.refusal = f"a call cannot be captured ({first_line(error)})"
                variant.segments.clear()
                self._warn(variant.refusal)
        elif segment is not None and (segment.inputs != form or not segment.graph.fits(unique)):
            variant.refusal = "its blocks' arguments change from step to step"
            self._warn(variant.refusal)
        if segment is None or variant.refusal is not None:
            return run_blocks(calls, inputs)
        outputs = segment.graph(unique)
        self.context.stats.attention_calls.update(segment.attention)
        self.replays += 1
        return segment.output.fill(outputs)

    def _capture(
        self, tensors: list[torch.Tensor], unique: list[torch.Tensor], form: Form, calls: list[BlockCall]
    ) -> Segment:
        """Captures a segment.

        Args:
            tensors: Tensors among the first block's arguments, in the form's order.
            unique: The same tensors without repetitions: the graph's inputs.
            form: Form of the first block's arguments.
            calls: The segment's blocks.
        """
        index = {id(item): place for place, item in enumerate(unique)}
        order = [index[id(item)] for item in tensors]
        output: list[Form] = []
        total, calls_in_graph = self.context.stats.attention_calls, Counter[str]()

        def function(buffers: list[torch.Tensor]) -> list[torch.Tensor]:
            before = Counter(total)
            try:
                found, form_of_output = split(run_blocks(calls, form.fill(buffers[place] for place in order)))
            finally:
                # A replay counts its attention calls, so warm-up and capture must not.
                calls_in_graph.clear()
                calls_in_graph.update(total)
                calls_in_graph.subtract(before)
                total.clear()
                total.update(before)
            output[:] = [form_of_output]
            return found

        if self._pool is None:
            self._pool = self._backend.pool()
        stream = self.context.outputs.weight_stream
        copies = None if stream is None else stream.recorded([call.block for call in calls])
        graph = CapturedGraph(unique, function, self._backend(self._pool, unique[0].device), copies)
        return Segment(graph, form, output[0], +calls_in_graph)

    # --- variants -----------------------------------------------------------------------------------------------------

    def _variant(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphVariant | None:
        """The graph variant of this call; `None` if it runs without graphs."""
        step = self.context.clock.current
        if step is None or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():
            self._warn("gradients are recorded")
            return None
        if step.request != self._request:
            self._request, self.replays = step.request, 0
            self._check_weights()
        elif any(lora_state(module) != state for module, state in self._loras):
            self._check_weights()  # a step callback may have changed an adapter's scale
        if self._refusal is not None:
            return None
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(self.denoiser.device.type)
        key = (
            call_signature(args),
            call_signature(kwargs),
            modes,
            tuple(function() for function in self.context.outputs.graph_keys),
        )
        variant = self.variants.get(key)
        if variant is None:
            if len(self.variants) >= self.config.limit:
                self._warn(f"{self.config.limit} graph variants exist already (cuda_graph.limit)")
                return None
            variant = self.variants[key] = GraphVariant()
        return variant if variant.refusal is None else None

    def _check_weights(self) -> None:
        """Drops all variants if a weight has moved or an adapter has changed, and updates the refusal."""
        found = dependencies_of(self.denoiser.module)
        self._refusal, self._loras = found.refusal, found.loras
        if found.weights != self._weights or self._refusal is not None:
            self.variants.clear()
            self._pool, self._weights = None, found.weights
        if self._refusal is not None:
            self._warn(self._refusal)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"cuda_graph: {self.denoiser} runs without graphs: {reason}.", stacklevel=2)


def _differs(denoiser: Denoiser, difference: str) -> str:
    return (
        f"cuda_graph: {denoiser} went through its blocks with {difference}, though the call has the same signature; a "
        "graph would compute a wrong result. Instead: cuda_graph=None for this model."
    )
