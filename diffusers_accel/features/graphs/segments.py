"""Segments: runs of consecutive blocks that are captured as one CUDA graph.

A graph variant (`GraphVariant`) holds the segments of all calls with one signature. `RunningCall` follows the streams
through the blocks of the running call. `BlockCall` is one block's call, which a capture runs again on other tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...compat.torch_private import version_of
from ...core.graphs import CapturedGraph
from ...core.tree import Form

# Types whose values are captured as they are, and compared between calls.
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Source:
    """The source of a block's argument. Without a stream and an argument it is the constant.

    Attributes:
        stream: Name of the previous block's output stream.
        argument: Name of the argument of the segment's first block.
        constant: The value of a constant.
    """

    stream: str | None = None
    argument: str | None = None
    constant: Any = None

    def gives(self, value: Any, running: RunningCall) -> bool:
        """Whether a value is the source's value in the running call, and was not written to in place."""
        if self.stream is not None:
            held = running.streams[self.stream]
            return value is held and _version(value) == running.versions[self.stream]
        if self.argument is not None:
            return value is running.inputs[self.argument]
        return isinstance(value, CONSTANTS) and value == self.constant

    def value(self, streams: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        """The argument.

        Args:
            streams: Name -> output stream of the previous block.
            inputs: Name -> argument of the segment's first block.
        """
        if self.stream is not None:
            return streams[self.stream]
        return inputs[self.argument] if self.argument is not None else self.constant


@dataclass
class BlockCall:
    """One block's call within a segment.

    Attributes:
        block: The block.
        inner: The block's forward, without the graph's layer.
        positional: Names of the positional arguments.
        keywords: Names of the keyword arguments.
        sources: Argument name -> source.
        streams: Names of the block's output streams.
    """

    block: nn.Module
    inner: Callable[..., Any]
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    sources: dict[str, Source]
    streams: tuple[str, ...]

    def __call__(self, streams: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        """Runs the block.

        Args:
            streams: Name -> output stream of the previous block.
            inputs: Name -> argument of the segment's first block.
        """
        values = {name: self.sources[name].value(streams, inputs) for name in (*self.positional, *self.keywords)}
        return self.inner(*(values[name] for name in self.positional), **{name: values[name] for name in self.keywords})


@dataclass
class Segment:
    """A captured run of blocks.

    Attributes:
        graph: The captured graph.
        inputs: Form of the first block's arguments.
        output: Form of the last block's output.
        attention: Kernel name -> attention calls of one replay.
    """

    graph: CapturedGraph
    inputs: Form
    output: Form
    attention: Counter[str]


@dataclass
class GraphVariant:
    """The segments and graphs of all calls with one signature.

    Attributes:
        starts: Identities of blocks that begin a segment.
        ends: Identities of blocks that end a segment.
        forced_starts: Number of segments that begin because of other work before them.
        sources: Identity of a block -> argument name -> source.
        traced: Whether a whole call was traced, so that the segments are known.
        segments: Identity of a segment's first block -> captured segment.
        refusal: Reason for which calls run without graphs; `None` if they have graphs.
    """

    starts: set[int] = field(default_factory=set)
    ends: set[int] = field(default_factory=set)
    forced_starts: int = 0
    sources: dict[int, dict[str, Source]] = field(default_factory=dict)
    traced: bool = False
    segments: dict[int, Segment] = field(default_factory=dict)
    refusal: str | None = None

    def reset_trace(self) -> None:
        """Drops the findings of a trace."""
        self.starts.clear()
        self.ends.clear()
        self.sources.clear()
        self.forced_starts = 0


@dataclass
class RunningCall:
    """The state of the running denoiser call.

    Attributes:
        variant: The call's graph variant.
        order: Identities of the blocks called so far, during a trace.
        after_end: Whether the previous block ended a segment, during a trace.
        inputs: Name -> argument of the current segment's first block.
        streams: Name -> output stream of the previous block.
        versions: Name -> version counter of the stream's tensor, which shows writes in place.
        pending: Calls of the current segment's blocks so far.
        start: Identity of the current segment's first block.
    """

    variant: GraphVariant
    order: list[int] = field(default_factory=list)
    after_end: bool = True
    inputs: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    pending: list[BlockCall] = field(default_factory=list)
    start: int = 0

    def set_streams(self, streams: dict[str, Any]) -> None:
        """Sets the streams that the next block gets."""
        self.streams, self.versions = streams, {name: _version(value) for name, value in streams.items()}

    def stream_of(self, value: Any) -> str | None:
        """The name of the stream that a value is; `None` for another value, or for a stream written to in place."""
        for name, held in self.streams.items():
            if value is held and _version(value) == self.versions[name]:
                return name
        return None


def run_blocks(calls: list[BlockCall], inputs: Mapping[str, Any]) -> Any:
    """Runs a segment's blocks in order, and returns the last one's output.

    Args:
        calls: The blocks' calls.
        inputs: Name -> argument of the first block.
    """
    streams: dict[str, Any] = {}
    out: Any = None
    for call in calls:
        out = call(streams, inputs)
        streams = dict(zip(call.streams, out if isinstance(out, tuple) else (out,), strict=False))
    return out


def source_of(value: Any, running: RunningCall) -> Source | None:
    """The source of an argument; `None` if it comes from outside the segment."""
    if isinstance(value, CONSTANTS):
        return Source(constant=value)
    stream = running.stream_of(value)
    if stream is not None:
        return Source(stream=stream)
    # A stream that was written to in place differs from the first block's argument, even if it is the same tensor.
    if any(value is held for held in running.streams.values()):
        return None
    return next((Source(argument=name) for name, held in running.inputs.items() if value is held), None)


def _version(value: Any) -> int:
    """A tensor's version counter; 0 for inference tensors, which have none, and for other values."""
    return version_of(value) if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def shape_and_dtype(value: Any) -> tuple[Any, ...]:
    """(shape, dtype) of a tensor; (type,) of another value."""
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else (type(value),)
