"""Streaming of weights: blocks whose weights lie in host memory and are copied to the GPU just before they run.

The master copy of a block's weights is its *slab*: one buffer of page-locked host memory. On the GPU there are a few
*slots*, buffers at fixed addresses. A block is copied into its slot, always the same one, while earlier blocks compute.
All copies are on one stream, and ordered against computation by events. The host waits for nothing, and nothing is
copied back.

Outside of its model's forward, a block's tensors are the slab itself, read by the GPU over the bus
(`host_memory.LockedBuffer.on_device`). Everything that reads or writes weights (saving, LoRA layers and merges, moves)
therefore works on the master copy. Within the forward, views of the slots take the tensors' places. Each block's views
never change, so compiled code sees no change, and CUDA graphs stay valid.

A CUDA graph records the copies of its blocks as nodes beside the kernels (`RecordedCopies`), since a wait for an event
outside of the graph would end the capture.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..compat.torch_private import is_traceable_wrapper_subclass, version_of
from ..errors import Unsupported
from .host_memory import LockedBuffer
from .memory_plan import slot_of
from .submodules import submodules
from .timestamps import seconds_between, timestamp
from .weights import Layout, Weight, flat, is_plain


@dataclass
class Slab:
    """Host memory that holds one block's weights.

    Attributes:
        host: uint8 (bytes,), on the host.
        outside: uint8 (bytes,), the same memory as the model sees it outside of its forward: on the GPU if the memory
            is page-locked, otherwise on the host.
        locked: Whether copies run beside the host: the memory is page-locked.
    """

    host: torch.Tensor
    outside: torch.Tensor
    locked: bool = True


class Transfers(Protocol):
    """The seam between streaming and a device: host memory, copies on a stream of their own, and events.

    Args:
        device: The device that blocks run on.
    """

    def __init__(self, device: torch.device): ...

    def slab(self, length: int) -> Slab:
        """A slab of this many bytes, page-locked where the system allows it. Called by another thread too."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a copy on the copy stream."""
        ...

    def computed(self) -> Any:
        """An event after everything that the computing stream has been given."""
        ...

    def copied(self) -> Any:
        """An event after everything that the copy stream has been given."""
        ...

    def compute_after(self, event: Any) -> None:
        """Lets the computing stream wait for an event."""
        ...

    def copy_after(self, event: Any) -> None:
        """Lets the copy stream wait for an event."""
        ...


class CudaTransfers:
    """Copies on a CUDA stream."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def slab(self, length: int) -> Slab:
        """See `Transfers`."""
        buffer = LockedBuffer.allocate(length, self._device)
        # Pages that are there are locked in half the time.
        buffer.memory.zero_()
        locked = buffer.lock()
        return Slab(buffer.memory, buffer.on_device() if locked else buffer.memory, locked)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfers`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def computed(self) -> torch.cuda.Event:
        """See `Transfers`."""
        return self._record(torch.cuda.current_stream(self._device))

    def copied(self) -> torch.cuda.Event:
        """See `Transfers`."""
        return self._record(self._stream)

    def compute_after(self, event: torch.cuda.Event) -> None:
        """See `Transfers`."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def copy_after(self, event: torch.cuda.Event) -> None:
        """See `Transfers`."""
        self._stream.wait_event(event)

    def _record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        with torch.cuda.device(self._device):
            event.record(stream)
        return event


# Device type -> transfers. The tests add one for the CPU.
TRANSFERS: dict[str, Callable[[torch.device], Transfers]] = {"cuda": CudaTransfers}


# --- one block -------------------------------------------------------------------------------------------------------


class StreamedTensor:
    """A parameter or buffer of a streamed block.

    Args:
        weight: The tensor and its places.

    Attributes:
        stock: The stock tensor.
        parts: The plain tensors that hold its values: itself, or the inner tensors of another package's tensor.
        outside: The tensor in its places outside of the forward; `None` before the slab is filled.
        inside: The tensor in its places within the forward, over a slot.
    """

    def __init__(self, weight: Weight):
        self.weight, self.stock = weight, weight.tensor
        self.parts, self._rebuild = parts_of(self.stock)
        self.outside: torch.Tensor | None = None
        self.inside: torch.Tensor | None = None

    def point(self, views: Sequence[torch.Tensor]) -> None:
        """Points the stock tensor, or the tensor that stands for it, to views of its values outside of the forward."""
        for part, view in zip(self.parts, views, strict=True):
            part.data = view
        before = self.stock if self.outside is None else self.outside
        self.outside = self.stock if self.parts[0] is self.stock else self._rebuild(views)
        self._exchange(before, self.outside)

    def over(self, views: Sequence[torch.Tensor]) -> None:
        """Makes the tensor over views of a slot."""
        self.inside = self._rebuild(views)

    def put_back(self) -> None:
        """Puts the stock tensor into its places."""
        if self.outside is not None:
            self._exchange(self.outside, self.stock)
            self.outside = None

    @property
    def is_replaced(self) -> bool:
        """Whether another tensor is in its places outside of the forward."""
        return any(holder.get(name) is not self.outside for holder, name in self.weight.slots)

    def enter(self) -> None:
        """Puts the tensor over the slot into the places, for a forward."""
        for holder, name in self.weight.slots:
            holder[name] = self.inside

    def leave(self) -> None:
        """Puts the tensor over the slab into the places. A value that the user has put there since stays."""
        self._exchange(self.inside, self.outside)

    def _exchange(self, old: Any, new: Any) -> None:
        for holder, name in self.weight.slots:
            if holder.get(name) is old:
                holder[name] = new


def parts_of(tensor: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], torch.Tensor]]:
    """The plain tensors that hold a tensor's values, and a function that makes such a tensor of others like them.

    Args:
        tensor: A tensor or parameter, plain or of another package's class (torchao).
    """
    is_parameter, gradient = isinstance(tensor, nn.Parameter), tensor.requires_grad

    def finished(made: torch.Tensor) -> torch.Tensor:
        return nn.Parameter(made, requires_grad=gradient) if is_parameter else made

    if is_plain(tensor):
        return [tensor], lambda views: finished(views[0])
    parts: list[torch.Tensor] = []
    inner = tensor.data if is_parameter else tensor
    build = _flattened(inner, parts)
    return parts, lambda views: finished(build(iter(views)))


def can_stream(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can lie in other memory: it is plain, or made of plain tensors."""
    if tensor.is_meta:
        return False
    inner = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    return is_plain(tensor) or (is_traceable_wrapper_subclass(inner) and all(map(is_plain, parts_of(tensor)[0])))


def _flattened(tensor: Any, parts: list[torch.Tensor]) -> Callable[[Iterator[torch.Tensor]], Any]:
    """Adds a tensor's plain tensors to a list.

    Returns:
        A function that rebuilds the tensor from plain tensors in the order of the list.
    """
    if not is_traceable_wrapper_subclass(tensor):
        parts.append(tensor)
        return next
    names, context = tensor.__tensor_flatten__()
    inner = {name: _flattened(getattr(tensor, name), parts) for name in names}
    kind, size, stride = type(tensor), tensor.size(), tensor.stride()

    def build(views: Iterator[torch.Tensor]) -> Any:
        return kind.__tensor_unflatten__({name: make(views) for name, make in inner.items()}, context, size, stride)

    return build


@dataclass(eq=False)
class StreamedBlock:
    """A block whose weights are streamed.

    Args:
        name: The block's path, for messages.
        module: The block.
        streamed: Its tensors that are copied into the slot.
        read_in_place: Its tensors that are read from the slab over the bus, if at all: they are not copied.

    Attributes:
        slab: The block's slab; `None` before it is filled, and where the weights stay in the memory that they are in.
        sources: (first byte in the slot, uint8 tensor on the host) of each copy into the slot.
        slot: Index of its slot.
        layout: The places of all its tensors in the slab, those that are copied first.
        bytes: Bytes that are copied.
    """

    name: str
    module: nn.Module
    streamed: list[StreamedTensor]
    read_in_place: list[StreamedTensor] = field(default_factory=list)
    slab: Slab | None = field(default=None, init=False)
    sources: list[tuple[int, torch.Tensor]] = field(default_factory=list, init=False)
    slot: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.layout = Layout.of([part for tensor in self.tensors for part in tensor.parts])
        self.bytes = Layout.of([part for tensor in self.streamed for part in tensor.parts]).length

    @property
    def tensors(self) -> list[StreamedTensor]:
        """All its tensors."""
        return [*self.streamed, *self.read_in_place]

    @property
    def locked(self) -> bool:
        """Whether its copies run beside the host."""
        return self.slab is not None and self.slab.locked

    def fill(self, memory: torch.Tensor) -> None:
        """Copies the weights into host memory, uint8 (`layout.length` or more,). Copies from a GPU may still run when
        this returns."""
        for offset, run in self._runs():
            memory[offset : offset + run.numel()].copy_(run, non_blocking=True)

    def use(self, slab: Slab | None) -> None:
        """Takes a slab that holds the weights; `None` leaves them in the memory that they are in."""
        self.slab = slab
        if slab is None:
            self.sources = [(offset, run) for offset, run in self._runs() if offset < self.bytes]
            for tensor in self.tensors:
                tensor.outside = tensor.stock
            return
        self.sources = [(0, slab.host[: self.bytes])]
        self.point(slab.outside)

    def _runs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The values of each part as bytes, with their place in the layout."""
        parts = [part for tensor in self.tensors for part in tensor.parts]
        for part, offset in zip(parts, self.layout.offsets, strict=True):
            yield offset, flat(part.detach()).view(torch.uint8)

    def point(self, memory: torch.Tensor, *, inside: bool = False) -> None:
        """Points the tensors to memory in the slab's layout.

        Args:
            memory: uint8. For tensors within the forward `bytes` or more, otherwise `layout.length` or more.
            inside: Whether the memory is a slot.
        """
        if inside:
            streamed = Layout(self.layout.offsets, self.layout.forms, self.bytes)
            count = sum(len(tensor.parts) for tensor in self.streamed)
            views = Layout(streamed.offsets[:count], streamed.forms[:count], self.bytes).views(memory)
        else:
            views = self.layout.views(memory)
        for tensor in self.streamed if inside else self.tensors:
            own, views = views[: len(tensor.parts)], views[len(tensor.parts) :]
            (tensor.over if inside else tensor.point)(own)

    def changed(self) -> list[StreamedTensor]:
        """Tensors that the user has replaced or moved since: their values are no longer those that are copied."""
        if self.slab is None:
            return [tensor for tensor in self.tensors if tensor.is_replaced]
        first, found = self.slab.outside.data_ptr(), []
        offsets = iter(self.layout.offsets)
        for tensor in self.tensors:
            places = [first + next(offsets) for _ in tensor.parts]
            if tensor.is_replaced or [part.data_ptr() for part in parts_of(tensor.weight.now())[0]] != places:
                found.append(tensor)
        return found

    def state(self) -> Hashable:
        """A value that differs after a write in place or a merge of LoRA layers into the weights."""
        versions = [version_of(tensor.stock) for tensor in self.tensors if not tensor.stock.is_inference()]
        merged = [
            str(vars(part)["merged_adapters"]) for part in submodules(self.module) if "merged_adapters" in vars(part)
        ]
        return (*versions, *merged)


# --- the slots -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Slot:
    """A slot.

    Attributes:
        memory: uint8, on the GPU.
        held: The block whose weights are, or will be, in it.
        running: The block that computes from it.
        state: `StreamedBlock.state` of that block when it was copied.
        ready: Event after which it may be read.
        free: Event after which it may be overwritten.
    """

    memory: torch.Tensor
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
        waits: (begin, end) timestamps of the computing stream's waits, in calls without a graph.
    """

    bytes: int = 0
    ahead: int = 0
    late: int = 0
    waits: list[tuple[Any, Any]] = field(default_factory=list)

    def clear(self) -> None:
        """Sets all counters to zero."""
        self.bytes = self.ahead = self.late = 0
        self.waits.clear()

    @property
    def seconds_waited(self) -> float:
        """Seconds for which the computing stream waited for copies, in calls without a graph. Reads from the
        device."""
        return sum(seconds_between(begin, end) for begin, end in self.waits)


class WeightStream:
    """The slots of one GPU, and the blocks that are streamed through them.

    Args:
        device: The device that blocks run on.
        slots: Number of slots, at least 2.

    Attributes:
        device: The device that blocks run on.
        models: The streamed models.
        counts: Counters of the last request.
        transfers: Copies and events.
    """

    def __init__(self, device: torch.device, slots: int):
        self.device, self._number = device, slots
        self.transfers = TRANSFERS[device.type](device)
        self.models: list[StreamedModel] = []
        self.counts = StreamCounts()
        self._slots: list[_Slot] = []
        self._recording = False

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(self._lengths())

    def _lengths(self) -> list[int]:
        blocks = [block for model in self.models for block in model.blocks]
        return [
            max((block.bytes for block in blocks if block.slot == index), default=0) for index in range(self._number)
        ]

    def add(self, name: str, blocks: Sequence[StreamedBlock], *, repeats: bool) -> StreamedModel:
        """Adds a model's blocks.

        Args:
            name: The model's name, for messages.
            blocks: Its streamed blocks, in call order.
            repeats: Whether the model is called again and again: its first block then follows its last.
        """
        for index, block in enumerate(blocks):
            block.slot = slot_of(index, len(blocks), self._number) if repeats else index % self._number
        self.models.append(StreamedModel(self, name, tuple(blocks), repeats))
        return self.models[-1]

    # --- lifetime ---

    def open(self) -> None:
        """Allocates the slots, and the views of every block in its slot."""
        with torch.inference_mode(False):
            self._slots = [
                _Slot(torch.zeros(length, dtype=torch.uint8, device=self.device)) for length in self._lengths()
            ]
            for model in self.models:
                for block in model.blocks:
                    block.point(self._slots[block.slot].memory, inside=True)
        begun = self.transfers.computed()
        for slot in self._slots:
            slot.free = begun

    def close(self) -> None:
        """Releases the slots, after the copies that still run."""
        if self._slots:
            self.transfers.compute_after(self.transfers.copied())
        for model in self.models:
            for block in model.blocks:
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
        if not self._recording:
            self.counts.ahead += slot.held is block
            self.counts.late += slot.held is not block
        self._load(block)
        if slot.ready is not None:
            if self._recording or self.device.type != "cuda":
                self.transfers.compute_after(slot.ready)
            else:
                begin = timestamp(self.device)
                self.transfers.compute_after(slot.ready)
                self.counts.waits.append((begin, timestamp(self.device)))
        slot.running = block

    def after(self, block: StreamedBlock) -> None:
        """Frees a block's slot once the computing stream has come here."""
        slot = self._slots[block.slot]
        slot.running = None
        slot.free = self.transfers.computed()

    def prefetch(self, following: Iterable[StreamedBlock]) -> None:
        """Copies the blocks that come next, as far as there are slots.

        Args:
            following: The blocks in the order in which they will run.
        """
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
        slot.ready = self.transfers.copied()
        slot.held = block
        if not self._recording:
            self.counts.bytes += block.bytes

    # --- CUDA graphs ---

    def recorded(self, modules: Sequence[nn.Module]) -> RecordedCopies:
        """The copies of a run of blocks that one CUDA graph covers.

        Args:
            modules: The blocks in the order in which they run; blocks that are not streamed among them.
        """
        known = {id(block.module): block for model in self.models for block in model.blocks}
        return RecordedCopies(self, [known[id(module)] for module in modules if id(module) in known])


class RecordedCopies:
    """The copies of a run of blocks that a CUDA graph records.

    A graph begins with certain blocks in the slots: of each slot, the first block of the run that is in it. `prepare`
    brings that about before each replay, which costs nothing if the run before has left it so. The graph contains all
    later copies of the run, and ends with the blocks in the slots that come next.

    Args:
        stream: The slots.
        blocks: The streamed blocks of the run, in order.
    """

    def __init__(self, stream: WeightStream, blocks: Sequence[StreamedBlock]):
        self._stream = stream
        self._entry = list({block.slot: block for block in reversed(blocks)}.values())[::-1]
        self._exit: list[StreamedBlock | None] = []
        self._bytes = 0
        self._blocks = list(blocks)

    def prepare(self) -> None:
        """Brings the slots into the state in which the graph begins."""
        stream = self._stream
        for block in self._entry:
            slot = stream._slots[block.slot]
            stream.counts.ahead += slot.held is block
            stream.counts.late += slot.held is not block
            stream._load(block)
            if slot.ready is not None:
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
            slot.held, slot.ready, slot.free = held.get(index), None, begun
        stream._recording = True
        try:
            yield
            transfers.compute_after(transfers.copied())
            self._exit = [slot.held for slot in stream._slots]
            self._bytes = sum(block.bytes for block in self._blocks)
        finally:
            stream._recording = False
            for slot in stream._slots:
                # A capture computes nothing, and an interrupted one leaves events that nobody may wait for.
                slot.held = slot.running = slot.ready = slot.free = None

    def replayed(self) -> None:
        """Notes the state in which a replay leaves the slots."""
        stream, done = self._stream, self._stream.transfers.computed()
        for slot, held in zip(stream._slots, self._exit, strict=True):
            slot.held, slot.ready, slot.free = held, done, done
            slot.state = None if held is None else held.state()
        stream.counts.bytes += self._bytes
        stream.counts.ahead += max(0, len(self._blocks) - len(self._entry))


# --- one model -------------------------------------------------------------------------------------------------------


class StreamedModel:
    """A model with streamed blocks: the layers around its forward and its blocks.

    Args:
        stream: The slots.
        name: The model's name, for messages.
        blocks: Its streamed blocks, in the order in which their modules are called.
        repeats: Whether its first block follows its last.

    Attributes:
        transient: Whether the slots exist while the model runs, and no longer.
    """

    def __init__(self, stream: WeightStream, name: str, blocks: tuple[StreamedBlock, ...], repeats: bool):
        self.stream, self.name, self.blocks, self._repeats = stream, name, blocks, repeats
        self._order = list(blocks)
        self._place = {id(block): index for index, block in enumerate(blocks)}
        self._called: list[StreamedBlock] = []
        self._inside = 0
        self._begins = True
        self.transient = False

    def begin_request(self) -> None:
        """Lets the next call look for moved weights, and copy every block anew. Not every write leaves a trace."""
        self._begins = True

    def around_model(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the model's forward: the slots' views are in the model until it returns."""
        if torch.is_grad_enabled() and any(
            tensor.stock.requires_grad for block in self.blocks for tensor in block.tensors
        ):
            raise Unsupported(
                "offload", "its weights are overwritten before gradients are computed.",
                "`with torch.no_grad():` around the call, as pipelines have it.", self.name,
            )  # fmt: skip
        if self._inside:
            return inner(*args, **kwargs)
        if self._begins or any(tensor.is_replaced for block in self.blocks for tensor in block.streamed):
            self._take_changes()
        if self.transient:
            self.stream.open()
        else:
            self.stream.forget(all=self._begins)
            self._begins = False
        self._inside += 1
        try:
            for block in self.blocks:
                for tensor in block.streamed:
                    tensor.enter()
            self._called = []
            self.stream.prefetch(self._order)
            return inner(*args, **kwargs)
        finally:
            for block in self.blocks:
                for tensor in block.streamed:
                    tensor.leave()
            self._inside -= 1
            self._learn()
            if self._repeats:
                self.stream.prefetch(self._order)
            if self.transient:
                self.stream.close()

    def around_block(self, block: StreamedBlock) -> Callable[..., Any]:
        """The layer around one block's forward."""

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._inside:
                return inner(*args, **kwargs)  # called by itself, it reads its slab over the bus
            stream = self.stream
            stream.before(block)
            self._called.append(block)
            try:
                stream.prefetch(self._following(block))
                return inner(*args, **kwargs)
            finally:
                stream.after(block)
                # A block of the same slot could not be copied before.
                stream.prefetch(self._following(block))

        return forward

    def _following(self, block: StreamedBlock) -> Iterator[StreamedBlock]:
        """The blocks after this one; after the last one the first, if the model is called again and again."""
        here, count = self._place[id(block)], len(self._order)
        last = here + count if self._repeats else count
        return (self._order[index % count] for index in range(here + 1, last))

    def _learn(self) -> None:
        """Takes the order of a forward that called every block once. Skipped steps call some of them, and text encoders
        have blocks for pictures too: there, blocks that were not called come last."""
        called = list(dict.fromkeys(self._called))
        if self._repeats and not len(called) == len(self._called) == len(self.blocks):
            return
        order = [*called, *(block for block in self._order if block not in called)]
        if called and order != self._order:
            self._order, self._place = order, {id(block): index for index, block in enumerate(order)}

    def _take_changes(self) -> None:
        """Takes weights that were replaced or moved since into the slabs.

        Raises:
            Unsupported: A weight has another shape or dtype now.
        """
        for block in self.blocks:
            for tensor in block.changed():
                self._take(block, tensor)

    def _take(self, block: StreamedBlock, tensor: StreamedTensor) -> None:
        now = tensor.weight.now()
        parts, _ = parts_of(now)
        place = sum(len(each.parts) for each in block.tensors[: block.tensors.index(tensor)])
        expected = [(dtype, shape) for dtype, shape, _ in block.layout.forms[place : place + len(tensor.parts)]]
        if [(item.dtype, item.shape) for item in parts] != expected:
            dtype, shape = expected[0]
            raise Unsupported(
                "offload",
                f"a weight of {block.name} is {now.dtype} {tuple(now.shape)}, and was {dtype} {tuple(shape)} at first.",
                "restore(pipe) before weights are cast or replaced by others, and accelerate it again.",
                self.name,
            )
        with torch.no_grad(), torch.inference_mode(False):
            if block.slab is None:
                views = [part.detach().to("cpu") for part in parts]
            else:
                views = block.layout.views(block.slab.outside)[place : place + len(parts)]
                for view, part in zip(views, parts, strict=True):
                    view.copy_(part)
            for holder, name in tensor.weight.slots:
                holder[name] = tensor.outside
            tensor.point(views)
            if block.slab is None:
                block.use(None)


# --- the edits -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class OffloadBlock:
    """Moves a block's weights into its slab. `undo` moves them back to their device.

    Args:
        block: The block.
        slabs: Where the slab comes from.
    """

    block: StreamedBlock
    slabs: Slabs

    @property
    def target(self) -> Any:
        """The instance that it changes."""
        return self.block.module

    _homes: list[torch.device] = field(default_factory=list, init=False)

    def apply(self) -> None:
        block = self.block
        self._homes = [part.device for tensor in block.tensors for part in tensor.parts]
        with torch.inference_mode(False), torch.no_grad():
            self.slabs.fill(block)

    def undo(self) -> None:
        block = self.block
        self.slabs.release()
        slab = block.slab
        if slab is None:
            for tensor in block.tensors:
                tensor.put_back()
            return
        if slab.outside.device != slab.host.device:
            # Writes of the GPU to the slab come first.
            torch.cuda.synchronize(slab.outside.device)
        changed = {id(tensor) for tensor in block.changed()}
        with torch.inference_mode(False):
            homes, host = iter(self._homes), block.layout.views(slab.host)
            for tensor in block.tensors:
                own, host = host[: len(tensor.parts)], host[len(tensor.parts) :]
                if id(tensor) in changed:
                    # Cast, moved or loaded since: the user's values stay.
                    parts, _ = parts_of(tensor.stock)
                    tensor.point([part.detach().to(next(homes)) for part in parts])
                else:
                    tensor.point([view.to(next(homes)) for view in own])
                tensor.put_back()
        block.slab, block.sources = None, []


class Slabs:
    """The slabs of blocks. The calling thread copies weights while another thread takes and locks pages.

    Args:
        transfers: Where host memory comes from.
        blocks: The blocks, in the order in which they are filled.
        allowed: Called with a slab's bytes before it is taken; returns whether the host's memory suffices.
        lock: Whether to lock pages. Otherwise weights on the host stay in the memory that they are in.
    """

    # Slabs that are taken ahead of the copies into them.
    _AHEAD = 2

    def __init__(
        self,
        transfers: Transfers,
        blocks: Sequence[StreamedBlock],
        allowed: Callable[[int], bool],
        lock: bool = True,
    ):
        self._transfers, self._allowed, self._lock = transfers, allowed, lock
        self._waiting = deque(blocks)
        self._thread: ThreadPoolExecutor | None = None
        self._taken: dict[int, Future[Slab]] = {}

    def fill(self, block: StreamedBlock) -> None:
        """Moves a block's weights to host memory.

        Raises:
            Unsupported: The host's memory does not suffice for weights of a GPU.
        """
        if block in self._waiting:
            self._take_ahead(block)
        while self._waiting and len(self._taken) <= self._AHEAD:
            self._take_ahead(self._waiting[0])
        taken = self._taken.pop(id(block), None)
        if taken is None:
            # Without locked pages, weights on the host stay where they are.
            block.use(None)
            return
        slab = taken.result()
        block.fill(slab.host)
        block.use(slab)
        if not self._waiting and not self._taken and self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def release(self) -> None:
        """Drops slabs that were taken ahead, after an error."""
        self._waiting.clear()
        for taken in self._taken.values():
            taken.exception()
        self._taken.clear()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _take_ahead(self, block: StreamedBlock) -> None:
        """Begins to take the slab of a block."""
        self._waiting.remove(block)
        on_host = all(part.device.type == "cpu" for tensor in block.tensors for part in tensor.parts)
        length = block.layout.length
        if on_host and not self._lock:
            return
        if not self._allowed(length):
            if on_host:
                return
            raise Unsupported(
                "offload",
                f"the host has too little memory for {block.name}: {length / 2**20:.0f} MiB more are needed.",
                "more memory or swap, a larger offload.vram or offload.ram, or linear='fp8', which halves the weights.",
            )
        self._taken[id(block)] = self._submit(self._transfers.slab, length)

    def _submit(self, function: Callable[..., Slab], *args: Any) -> Future[Slab]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "diffusers_accel-page-locking")
        return self._thread.submit(function, *args)


@dataclass(eq=False)
class OpenSlots:
    """Allocates the slots."""

    stream: WeightStream

    def apply(self) -> None:
        self.stream.open()

    def undo(self) -> None:
        self.stream.close()


@dataclass(eq=False)
class MoveWeight:
    """Moves a tensor to a device; `undo` moves it back, with what its user has written since.

    Args:
        weight: The tensor and its places.
        device: The device.
        target: The model that holds it.
    """

    weight: Weight
    device: torch.device
    target: nn.Module
    _home: torch.device | None = field(default=None, init=False)
    _moved: torch.Tensor | None = field(default=None, init=False)

    def apply(self) -> None:
        self._home = self.weight.tensor.device
        with torch.inference_mode(False):
            self._move(self.device)

    def undo(self) -> None:
        if self._home is not None:
            with torch.inference_mode(False):
                self._move(self._home)

    def _move(self, device: torch.device) -> None:
        now = self.weight.now()
        if now.device == device:
            return
        if is_plain(now):
            self.weight.put(now.data.to(device))
            return
        data = now.data if isinstance(now, nn.Parameter) else now
        made: Any = data.to(device)
        made = nn.Parameter(made, requires_grad=now.requires_grad) if isinstance(now, nn.Parameter) else made
        for holder, name in self.weight.slots:
            if holder.get(name) is now:
                holder[name] = made
