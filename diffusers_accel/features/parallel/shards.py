"""Blocks whose weights ranks share: a rank's shard of each, and the memory in which a block is put together.

A block's tensors lie one behind the other in one run of bytes, whatever their types, and each rank holds an equal part
of it. The tensors themselves stay where they are in the model: they are empty while the block does not run, and views
of the gathered bytes while it does. There is memory for two blocks, used in turn: while one computes, the next one's
weights come on a stream of their own. A block finds its weights at the same addresses every time.

Which block is next is told by the order of the last forward. All ranks of a group go through the same blocks in the
same order, so they foresee the same, wrong or not.

torch's `fully_shard` (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) is made for training: it
changes the modules' classes, has no way back, and leaves buffers whole, which is what quantized weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...core.comm import Group
from ...core.platform import offload_to_host, to_device
from ...errors import Unsupported

# Where a tensor may begin: kernels read wide words, and torch's own allocator gives no less.
_ALIGNED = 256


@dataclass(eq=False)
class Weight:
    """One tensor of a model.

    Attributes:
        tensor: The parameter or buffer.
        slots: The mappings of its modules that hold it, and its names there: `module.to` may put another in a buffer's
            place.
    """

    tensor: torch.Tensor
    slots: list[tuple[dict[str, Any], str]]

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def now(self) -> torch.Tensor:
        """What stands in its place."""
        holder, name = self.slots[0]
        found = holder.get(name)
        return found if isinstance(found, torch.Tensor) else self.tensor

    def put(self, data: torch.Tensor) -> None:
        """Gives it other values; it stays the object that it is."""
        for holder, name in self.slots:
            if isinstance(holder.get(name), torch.Tensor):
                holder[name].data = data

    def back(self, data: torch.Tensor) -> None:
        """Puts the tensor back in its place, with these values, and in the type that it has been cast to since."""
        self.tensor.data = data.to(self.now().dtype)
        for holder, name in self.slots:
            if isinstance(holder.get(name), torch.Tensor):
                holder[name] = self.tensor


def dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values fill one run of memory, in whatever order of dimensions."""
    length = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != length:
            return False
        length *= size
    return True


def _run(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a dense tensor, as they lie in memory. It is no view of the tensor's: a view would hold on to the
    memory when its own values are elsewhere."""
    found = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return found.set_(tensor.untyped_storage(), tensor.storage_offset(), (tensor.numel(),), (1,))


def _up(length: int, to: int) -> int:
    return -(-length // to) * to


class Shard:
    """One block's weights, of which this rank holds a part.

    Args:
        name: The block, for messages.
        weights: Its tensors; dense ones.
        group: The ranks that share them.
        device: Where it runs.
        place: Which of the two memories it is put together in.

    Attributes:
        length: Bytes that each rank holds.
        forms: Type, shape and strides of each tensor.
    """

    def __init__(self, name: str, weights: Sequence[Weight], group: Group, device: torch.device, place: int):
        self.name, self.weights, self.group, self.device, self.place = name, tuple(weights), group, device, place
        self._offsets: list[int] = []
        length = 0
        for weight in self.weights:
            self._offsets.append(length)
            length = _up(length + weight.bytes, _ALIGNED)
        self.length = _up(length, _ALIGNED * group.size) // group.size
        self.own: torch.Tensor | None = None
        self._views: list[torch.Tensor] = []
        self.forms = [(item.tensor.dtype, item.tensor.shape, item.tensor.stride()) for item in self.weights]
        self._empty = [torch.empty(0, dtype=dtype, device=device) for dtype, *_ in self.forms]

    @property
    def whole(self) -> int:
        """Bytes of all ranks' parts."""
        return self.length * self.group.size

    def fill(self) -> None:
        """Takes this rank's part of the weights."""
        own = torch.zeros(self.length, dtype=torch.uint8, device=self.device)
        start = self.group.rank * self.length
        for weight, offset in zip(self.weights, self._offsets, strict=True):
            first, last = max(offset, start), min(offset + weight.bytes, start + self.length)
            if first < last:
                run = _run(weight.tensor).view(torch.uint8)
                own[first - start : last - start] = run[first - offset : last - offset]
        self.own = own

    def place_in(self, memory: torch.Tensor) -> None:
        """Says where it is put together."""
        self._views = [
            memory[offset : offset + weight.bytes].view(dtype).as_strided(shape, stride)
            for weight, offset, (dtype, shape, stride) in zip(self.weights, self._offsets, self.forms, strict=True)
        ]

    def show(self) -> None:
        """Lets the block see its weights."""
        for weight, view in zip(self.weights, self._views, strict=True):
            now = weight.now()
            if now.numel() or now.dtype != view.dtype or now.device != view.device:
                raise Unsupported(
                    "parallel.fsdp",
                    f"a weight of {self.name} is {tuple(now.shape)}, {now.dtype} on {now.device}, and was shared among "
                    f"ranks as {tuple(view.shape)}, {view.dtype} on {view.device}.",
                    "restore(pipe) before weights are written, cast or moved, and accelerate it again.",
                )
        for weight, view in zip(self.weights, self._views, strict=True):
            weight.put(view)

    def hide(self) -> None:
        """Leaves the block without weights."""
        for weight, empty in zip(self.weights, self._empty, strict=True):
            weight.put(empty)


class Memory:
    """The memory in which blocks are put together, and who is there.

    Args:
        group: The ranks that share weights.
        device: Where the blocks run.
    """

    def __init__(self, group: Group, device: torch.device):
        self.group, self.device = group, device
        self._shards: list[Shard] = []
        self._halves: list[torch.Tensor] = []
        # Of each half: whose weights it holds, who computes with them, and, on a GPU, since when it may be read and
        # written to.
        self._held: list[Shard | None] = [None, None]
        self._running: list[Shard | None] = [None, None]
        self._ready: list[Any] = [None, None]
        self._done: list[Any] = [None, None]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: dict[int, Shard] = {}
        self._last: Shard | None = None

    def shard(self, name: str, weights: Sequence[Weight]) -> Shard:
        """A further block; those that follow one another have different halves."""
        self._shards.append(Shard(name, weights, self.group, self.device, len(self._shards) % 2))
        return self._shards[-1]

    def open(self) -> None:
        """Takes the memory; all blocks are known."""
        for place in (0, 1):
            length = max((shard.whole for shard in self._shards if shard.place == place), default=0)
            self._halves.append(torch.zeros(length, dtype=torch.uint8, device=self.device))
        for shard in self._shards:
            shard.place_in(self._halves[shard.place])

    def close(self) -> None:
        """Lets the memory and the shards go, when what is still on its way has come. Waits for nobody."""
        for item in (*self._halves, *(shard.own for shard in self._shards)):
            if self._stream is not None and item is not None:
                item.record_stream(self._stream)
        for shard in self._shards:
            shard.own, shard._views = None, []
        self._halves, self._held, self._next, self._last = [], [None, None], {}, None

    def around(self, shard: Shard) -> Callable[..., Any]:
        """The layer around a block's forward."""

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and any(weight.tensor.requires_grad for weight in shard.weights):
                raise Unsupported(
                    "parallel.fsdp", "its weights are gone when gradients would be computed.",
                    "`with torch.no_grad():` around the call, as pipelines have it.", shard.name,
                )  # fmt: skip
            self._enter(shard)
            if self._last is not None and self._last is not shard:
                self._next[id(self._last)] = shard
            self._last = shard
            try:
                self._ahead(shard)
                return inner(*args, **kwargs)
            finally:
                self._leave(shard)
                # If it is put together in the same half, there was no room for it before.
                self._ahead(shard)

        return forward

    @contextmanager
    def gathered(self, shard: Shard) -> Iterator[None]:
        """A block's weights in place, while it does not run."""
        self._enter(shard)
        try:
            yield
        finally:
            self._leave(shard)

    def _enter(self, shard: Shard) -> None:
        other = self._running[shard.place]
        if other is not None:
            raise RuntimeError(f"parallel.fsdp: {shard.name} was called while {other.name} runs.")
        self._load(shard)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready[shard.place])
        shard.show()
        self._running[shard.place] = shard

    def _leave(self, shard: Shard) -> None:
        shard.hide()
        self._running[shard.place] = None
        if self._stream is not None:
            self._done[shard.place] = torch.cuda.current_stream(self.device).record_event()

    def _ahead(self, shard: Shard) -> None:
        """Begins to put together the block that followed this one last time."""
        following = self._next.get(id(shard))
        if following is not None and self._running[following.place] is None:
            self._load(following)

    def _load(self, shard: Shard) -> None:
        """Begins to put a block together, where it is not."""
        place = shard.place
        if self._held[place] is shard:
            return
        self._held[place] = None
        memory = self._halves[place][: shard.whole]
        assert shard.own is not None
        if self._stream is None:
            self.group.gather_into(memory, shard.own)
        else:
            # Whoever was there before has computed; nobody was: the shards, and the memory itself, are there.
            if self._done[place] is None:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            else:
                self._stream.wait_event(self._done[place])
            with torch.cuda.stream(self._stream):
                self.group.gather_into(memory, shard.own)
            self._ready[place] = self._stream.record_event()
        self._held[place] = shard


# --- the edits -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Divided:
    """Leaves a block with this rank's shard of its weights. The weights themselves are kept in the host's memory: those
    that lie there already are not copied, and go back there.

    Args:
        shard: The block's.
    """

    shard: Shard
    _kept: list[torch.Tensor] = field(default_factory=list, init=False)
    _homes: list[torch.device] = field(default_factory=list, init=False)
    _moving: list[Future[None]] = field(default_factory=list, init=False)

    def apply(self) -> None:
        with torch.inference_mode(False):
            self.shard.fill()
        for weight in self.shard.weights:
            # As a run of values: it comes back in the order of dimensions in which it lies now.
            kept = _run(weight.tensor)
            self._homes.append(kept.device)
            if kept.device.type == "cuda":
                self._moving.append(offload_to_host(kept))
            self._kept.append(kept)
        self.shard.hide()

    def finish(self) -> None:
        """Waits until the weights lie in the host's memory."""
        for moving in self._moving:
            moving.result()
        self._moving.clear()

    def undo(self) -> None:
        for moving in self._moving:
            # If it failed, the weight lies in page-locked memory, whole.
            moving.exception()
        for weight, kept, home, form in zip(self.shard.weights, self._kept, self._homes, self.shard.forms, strict=True):
            run = kept if home.type == "cpu" else to_device(kept, weight.now().device)
            weight.back(run.as_strided(*form[1:]))


@dataclass(eq=False)
class Settled:
    """Puts a tensor that ranks do not share on the GPU, from the host, to where it goes back."""

    weight: Weight
    device: torch.device
    _kept: torch.Tensor | None = field(default=None, init=False)

    def apply(self) -> None:
        self._kept = self.weight.tensor.detach()
        self.weight.put(self._kept.to(self.device))

    def undo(self) -> None:
        assert self._kept is not None
        self.weight.back(self._kept)


@dataclass(eq=False)
class Opened:
    """Takes the memory in which blocks are put together."""

    memory: Memory

    def apply(self) -> None:
        with torch.inference_mode(False):
            self.memory.open()

    def undo(self) -> None:
        self.memory.close()
