"""The slots of one GPU, the copies into them, and the copies that CUDA graphs record.

Copies are in the order in which blocks run. A copy waits for the last block that read its slot, a block for its copy.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..memory_plan import slot_of
from ..timestamps import seconds_between, timestamp
from .blocks import StreamedBlock
from .transfers import TRANSFERS


@dataclass(eq=False)
class _Slot:
    """A slot.

    Attributes:
        memory: uint8, on the GPU.
        held: The block whose weights are, or will be, in it.
        running: The block that computes from it.
        state: `StreamedBlock.state` of that block when it was copied.
        arrived: Event of the last copy outside of CUDA graphs. Graphs wait for it within.
        read: Event of a graph's last read, recorded within it.
        ready: Event after which it may be read.
        free: Event after which it may be overwritten.
    """

    memory: torch.Tensor
    arrived: Any
    read: Any
    held: StreamedBlock | None = None
    running: StreamedBlock | None = None
    state: Hashable = None
    ready: Any = None
    free: Any = None


@dataclass
class StreamCounts:
    """Counters of one request.

    Attributes:
        bytes: Bytes copied to the GPU.
        ahead: Blocks that were copied before they were needed.
        late: Blocks that were copied when they were needed.
        waits: (begin, end) timestamps of the computing stream's waits for copies, outside of CUDA graphs.
        replays: Graph -> number of its replays. Its waits are those of its last replay.
    """

    bytes: int = 0
    ahead: int = 0
    late: int = 0
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    replays: Counter[RecordedCopies] = field(default_factory=Counter)

    def clear(self) -> None:
        """Sets all counters to zero."""
        self.bytes = self.ahead = self.late = 0
        self.waits.clear()
        self.replays.clear()

    @property
    def seconds_waited(self) -> float:
        """Seconds for which the computing stream waited for copies. Reads from the device."""
        eager = sum(seconds_between(begin, end) for begin, end in self.waits)
        return eager + sum(
            count * sum(seconds_between(begin, end) for begin, end in graph.waits)
            for graph, count in self.replays.items()
        )


class WeightStream:
    """The slots of one GPU, and the blocks that are streamed through them.

    Args:
        device: The device that blocks run on.
        slots: Number of slots, at least 2.
        link: Bytes a second of copies.

    Attributes:
        device: The device that blocks run on.
        blocks: All streamed blocks.
        counts: Counters of the last request.
        transfers: Copies and events.
    """

    def __init__(self, device: torch.device, slots: int, link: float):
        self.device, self._number, self._link = device, slots, link
        self.transfers = TRANSFERS[device.type](device)
        self.blocks: list[StreamedBlock] = []
        self.counts = StreamCounts()
        self._slots: list[_Slot] = []
        self._recording: RecordedCopies | None = None

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(self._lengths())

    def _lengths(self) -> list[int]:
        return [
            max((block.bytes for block in self.blocks if block.slot == index), default=0)
            for index in range(self._number)
        ]

    @property
    def hidden(self) -> float | None:
        """Share of the copies' time in which blocks computed, in the last request; `None` if nothing was timed. Reads
        from the device."""
        timed = self.counts.waits or any(graph.waits for graph in self.counts.replays)
        copying = self.counts.bytes / self._link
        return max(0.0, 1 - self.counts.seconds_waited / copying) if copying and timed else None

    def add(self, blocks: Sequence[StreamedBlock], *, repeats: bool) -> None:
        """Adds a model's blocks, and gives each its slot.

        Args:
            blocks: The streamed blocks, in call order.
            repeats: Whether the model is called again and again: its first block then follows its last.
        """
        for index, block in enumerate(blocks):
            block.slot = slot_of(index, len(blocks), self._number) if repeats else index % self._number
        self.blocks += blocks

    # --- lifetime ---

    def open(self) -> None:
        """Allocates the slots, and the views of every block in its slot."""
        with torch.inference_mode(False):
            self._slots = [
                _Slot(
                    torch.zeros(length, dtype=torch.uint8, device=self.device),
                    # Recorded once, since a wait for an event that never was is no node of a graph.
                    self.transfers.copied(self.transfers.event()),
                    self.transfers.event(),
                )
                for length in self._lengths()
            ]
            for block in self.blocks:
                block.point(self._slots[block.slot].memory, inside=True)
        begun = self.transfers.computed()
        for slot in self._slots:
            slot.free = begun

    def close(self) -> None:
        """Releases the slots, after the copies that still run."""
        if self._slots:
            self.transfers.compute_after(self.transfers.copied())
        for block in self.blocks:
            for tensor in block.tensors:
                tensor.inside = None
        self._slots = []

    def forget(self, *, all: bool) -> None:
        """Regards slots as empty whose weights may have changed in the slabs.

        Args:
            all: Whether to regard all slots so; otherwise, those whose weights were seen to change.
        """
        changed = [slot for slot in self._slots if slot.held is not None and (all or slot.state != slot.held.state())]
        for slot in changed:
            slot.held = None
        if changed or all:
            # A write on the computing stream comes before the copies that follow.
            self.transfers.copy_after(self.transfers.computed())

    # --- a block's run ---

    def before(self, block: StreamedBlock) -> None:
        """Copies a block into its slot unless it is there, and lets the computing stream wait for it."""
        slot = self._slots[block.slot]
        if slot.running is not None and slot.running is not block:
            raise RuntimeError(f"offload: {block.name} was called while {slot.running.name} runs.")
        if self._recording is None:
            self.counts.ahead += slot.held is block
            self.counts.late += slot.held is not block
        self._load(block)
        if slot.ready is not None:
            in_graph = self._recording is not None
            waits = self.counts.waits if self._recording is None else self._recording.waits
            if self.device.type == "cuda":
                begin = timestamp(self.device, in_graph=in_graph)
                self.transfers.compute_after(slot.ready)
                waits.append((begin, timestamp(self.device, in_graph=in_graph)))
            else:
                self.transfers.compute_after(slot.ready)
        slot.running = block

    def after(self, block: StreamedBlock) -> None:
        """Frees a block's slot once the computing stream has come here."""
        slot = self._slots[block.slot]
        slot.running = None
        slot.free = self.transfers.computed()
        if self._recording is not None and self._recording.is_last(block):
            self.transfers.computed(slot.read)

    def prefetch(self, following: Iterable[StreamedBlock], after: StreamedBlock | None = None) -> None:
        """Copies the blocks that come next, as far as there are slots.

        Args:
            following: The blocks in the order in which they will run.
            after: The block that runs, or has just run; `None` before the first.
        """
        if self._recording is not None and after is not None:
            following = self._recording.within(following, after)
        claimed = {index for index, slot in enumerate(self._slots) if slot.running is not None}
        for block in following:
            if block.slot in claimed:
                return
            claimed.add(block.slot)
            self._load(block)
            if len(claimed) == len(self._slots):
                return

    def _load(self, block: StreamedBlock) -> None:
        """Copies a block into its slot, unless it is there."""
        slot = self._slots[block.slot]
        if slot.held is block:
            return
        # After a capture no event is left: what was computed until now may have read the slot.
        self.transfers.copy_after(slot.free if slot.free is not None else self.transfers.computed())
        # An interrupted copy leaves no block.
        slot.held, slot.state = None, block.state()
        for first, source in block.sources:
            self.transfers.copy(slot.memory[first : first + source.numel()], source)
        slot.ready = self.transfers.copied(slot.arrived if self._recording is None else None)
        slot.held = block
        if self._recording is None:
            self.counts.bytes += block.bytes
        else:
            self._recording.bytes += block.bytes

    # --- CUDA graphs ---

    def recorded(self, modules: Sequence[nn.Module]) -> RecordedCopies:
        """The copies of a run of blocks that one CUDA graph covers.

        Args:
            modules: The blocks in the order in which they run; blocks that are not streamed among them.
        """
        known = {id(block.module): block for block in self.blocks}
        return RecordedCopies(self, [known[id(module)] for module in modules if id(module) in known])


class RecordedCopies:
    """The copies of a run of blocks that a CUDA graph records.

    A graph begins with certain blocks in the slots: of each slot, the first block of the run that is in it. Their
    copies are made outside of the graph, which waits for each where the block begins (`_Slot.arrived`). All others are
    nodes of the graph. Blocks behind the run are copied outside of it again, once the graph has last read the slot
    (`_Slot.read`): beside the graph's last blocks.

    Args:
        stream: The slots.
        blocks: The streamed blocks of the run, in order.

    Attributes:
        bytes: Bytes that the graph copies.
        waits: (begin, end) timestamps of the last replay's waits for copies.
    """

    def __init__(self, stream: WeightStream, blocks: Sequence[StreamedBlock]):
        self._stream, self._blocks = stream, list(blocks)
        self._place = {block: index for index, block in enumerate(blocks)}
        self._entry = list({block.slot: block for block in reversed(self._blocks)}.values())[::-1]
        self._exit = {block.slot: block for block in self._blocks}
        self._later: list[StreamedBlock] = []
        # Nodes of the graph refer to them.
        self._events: list[Any] = []
        self.bytes = 0
        self.waits: list[tuple[Any, Any]] = []

    def is_last(self, block: StreamedBlock) -> bool:
        """Whether no later block of the run is in the same slot."""
        return self._exit.get(block.slot) is block

    def within(self, following: Iterable[StreamedBlock], after: StreamedBlock) -> list[StreamedBlock]:
        """Of the blocks that will run, those of this run. Those behind its last block are kept for `replayed`.

        Args:
            following: The blocks in the order in which they will run.
            after: The block before them.
        """
        ahead = list(itertools.islice(following, len(self._stream._slots)))
        if after is self._blocks[-1]:
            self._later = ahead
        here = self._place[after]
        return [block for block in ahead if self._place.get(block, -1) > here]

    def prepare(self) -> None:
        """Begins the copies with which the graph begins."""
        stream = self._stream
        for block in self._entry:
            slot = stream._slots[block.slot]
            stream.counts.ahead += slot.held is block
            stream.counts.late += slot.held is not block
            stream._load(block)
            if slot.ready is not slot.arrived:
                # It was copied within another graph.
                stream.transfers.compute_after(slot.ready)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A context in which copies and waits become nodes of the graph that is being captured."""
        stream, transfers = self._stream, self._stream.transfers
        if not all(block.locked for block in self._blocks):
            raise RuntimeError("its weights are in pageable host memory")
        begun, held = transfers.computed(), {block.slot: block for block in self._entry}
        transfers.copy_after(begun)
        for index, slot in enumerate(stream._slots):
            slot.held, slot.ready, slot.free = held.get(index), slot.arrived, begun
        self._events = [(slot.arrived, slot.read) for slot in stream._slots]
        stream._recording, self.bytes = self, 0
        self.waits.clear()
        try:
            yield
            transfers.compute_after(transfers.copied())
        finally:
            stream._recording = None
            for slot in stream._slots:
                # A capture computes nothing, and an interrupted one leaves events that nobody may wait for.
                slot.held = slot.running = slot.ready = slot.free = None

    def replayed(self) -> None:
        """Notes the state in which a replay leaves the slots, and copies the blocks that come next."""
        stream, done = self._stream, self._stream.transfers.computed()
        for block in self._exit.values():
            slot = stream._slots[block.slot]
            slot.held, slot.ready, slot.free, slot.state = block, done, slot.read, block.state()
        stream.prefetch(self._later)
        stream.counts.bytes += self.bytes
        stream.counts.ahead += max(0, len(self._blocks) - len(self._entry))
        stream.counts.replays[self] += 1
