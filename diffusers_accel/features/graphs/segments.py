"""Segments: which blocks can be played as one, and how. What is seen of a call while it is watched (`Kind`), what is
noted while one runs (`Running`), and the blocks' calls themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...core.graphs import Recording

# What may be recorded as it is, and compared.
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Source:
    """Where an argument of a block comes from: the `stream` of the block before, the argument `name` of the segment's
    first block, or a `constant`."""

    stream: str | None = None
    name: str | None = None
    constant: Any = None

    def holds(self, value: Any, running: Running) -> bool:
        """Whether an argument comes from there."""
        if self.stream is not None:
            held = running.streams[self.stream]
            return value is held and _version(value) == running.versions[self.stream]
        if self.name is not None:
            return value is running.given[self.name]
        return isinstance(value, CONSTANTS) and value == self.constant

    def value(self, streams: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        """The argument itself."""
        if self.stream is not None:
            return streams[self.stream]
        return given[self.name] if self.name is not None else self.constant


@dataclass
class Call:
    """One block's call within a segment.

    Attributes:
        inner: What runs the block.
        positional: Names of the arguments that are given by place.
        keywords: Names of the others.
        sources: Where each comes from.
        streams: Names of what the block returns.
    """

    inner: Callable[..., Any]
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    sources: dict[str, Source]
    streams: tuple[str, ...]

    def __call__(self, streams: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        """Runs it on the streams of the block before and what the segment's first block was given."""
        values = {name: self.sources[name].value(streams, given) for name in (*self.positional, *self.keywords)}
        return self.inner(*(values[name] for name in self.positional), **{name: values[name] for name in self.keywords})


@dataclass
class Segment:
    """A recorded run of blocks.

    Attributes:
        recording: What is played.
        form: Of the first block's arguments: their structure, and what in them is no tensor.
        result: Of the last block's output: the same.
        attention: Attention calls that a replay stands for.
    """

    recording: Recording
    form: tuple[Any, list[Any]]
    result: tuple[Any, list[Any]]
    attention: Counter[str]


@dataclass
class Kind:
    """One kind of call.

    Attributes:
        heads: Blocks that a segment begins with, by their id.
        ends: Those that one ends with.
        cuts: How many begin one because something else is done before them.
        sources: Block -> where its arguments come from.
        watched: Whether a whole call was watched.
        segments: What was recorded, by the first block.
        why: Why this kind is run as it is; `None` if it is not.
    """

    heads: set[int] = field(default_factory=set)
    ends: set[int] = field(default_factory=set)
    cuts: int = 0
    sources: dict[int, dict[str, Source]] = field(default_factory=dict)
    watched: bool = False
    segments: dict[int, Segment] = field(default_factory=dict)
    why: str | None = None

    def forget(self) -> None:
        """Drops what was seen while watching."""
        self.heads.clear()
        self.ends.clear()
        self.sources.clear()
        self.cuts = 0


@dataclass
class Running:
    """The call that is running.

    Attributes:
        kind: Its kind.
        order: Blocks called so far, while the call is watched.
        given: What the segment's first block was given.
        streams: What the block before returned, or handed on.
        versions: Of these, to see whether somebody wrote to them.
        pending: The segment's calls so far.
        head: Its first block.
        ended: Whether the block before was a segment's last, while the call is watched.
    """

    kind: Kind
    order: list[int] = field(default_factory=list)
    ended: bool = True
    given: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    pending: list[Call] = field(default_factory=list)
    head: int = 0

    def hand_on(self, streams: dict[str, Any]) -> None:
        """Takes what the next block is to be given."""
        self.streams, self.versions = streams, {name: _version(value) for name, value in streams.items()}

    def stream_of(self, value: Any) -> str | None:
        """Which stream a value is, if nobody has written to it."""
        for name, held in self.streams.items():
            if value is held and _version(value) == self.versions[name]:
                return name
        return None


def run(calls: list[Call], given: Mapping[str, Any]) -> Any:
    """A segment's blocks one after another; what the last one returns."""
    streams: dict[str, Any] = {}
    out: Any = None
    for call in calls:
        out = call(streams, given)
        streams = dict(zip(call.streams, out if isinstance(out, tuple) else (out,), strict=False))
    return out


def source_of(value: Any, running: Running) -> Source | None:
    """Where an argument comes from; `None` if from elsewhere."""
    if isinstance(value, CONSTANTS):
        return Source(constant=value)
    stream = running.stream_of(value)
    if stream is not None:
        return Source(stream=stream)
    # A stream that was written to is no longer what the first block was given either.
    if any(value is held for held in running.streams.values()):
        return None
    return next((Source(name=name) for name, held in running.given.items() if value is held), None)


def _version(value: Any) -> int:
    """How often somebody wrote to a tensor; 0 where that is not counted."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def form_of(value: Any) -> tuple[Any, ...]:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else (type(value),)
