"""FSDP's shards: this rank's shard of each block's weights, and the buffers in which blocks are gathered.

A block's tensors of all dtypes lie one after another in a flat buffer of bytes, and each rank holds an equal part of
the buffer. The tensors stay in their places in the model: they are empty while the block is sharded, and views of the
gathered bytes while the block runs. Two buffers are used in turn: while one block computes, the next block's weights
are gathered on a stream of their own. A block's weights have the same addresses in every call, as CUDA graphs need.

The next block is prefetched by the order of the last forward. All ranks of a group run the same blocks in the same
order, so they prefetch the same block, right or wrong.

torch's `fully_shard` (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) is made for training: it
changes the modules' classes, cannot be undone, and leaves buffers whole, which quantized weights are.
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
from ...core.weights import ALIGNED, Layout, Weight, flat, round_up
from ...errors import Unsupported


class BlockShard:
    """This rank's shard of one block's weights.

    Args:
        name: The block's path, for messages.
        weights: Its tensors, all dense.
        group: The ranks among which they are sharded.
        device: The device that the block runs on.
        slot: Index of the buffer, 0 or 1, in which it is gathered.

    Attributes:
        length: Bytes of each rank's shard.
        local: This rank's shard, uint8 (length,); `None` before `fill` and after the buffers are released.
        forms: Dtype, shape and strides of each tensor.
    """

    def __init__(self, name: str, weights: Sequence[Weight], group: Group, device: torch.device, slot: int):
        self.name, self.weights, self.group, self.device, self.slot = name, tuple(weights), group, device, slot
        self._layout = Layout.of([weight.tensor for weight in self.weights])
        self.length = round_up(self._layout.length, ALIGNED * group.size) // group.size
        self.local: torch.Tensor | None = None
        self._views: list[torch.Tensor] = []
        self.forms = self._layout.forms
        self._empty = [torch.empty(0, dtype=dtype, device=device) for dtype, *_ in self.forms]

    @property
    def gathered_bytes(self) -> int:
        """Bytes of all ranks' shards."""
        return self.length * self.group.size

    def fill(self) -> None:
        """Copies this rank's shard out of the whole weights."""
        own = torch.zeros(self.length, dtype=torch.uint8, device=self.device)
        start = self.group.rank * self.length
        for weight, offset in zip(self.weights, self._layout.offsets, strict=True):
            first, last = max(offset, start), min(offset + weight.bytes, start + self.length)
            if first < last:
                run = flat(weight.tensor).view(torch.uint8)
                own[first - start : last - start] = run[first - offset : last - offset]
        self.local = own

    def allocate_views(self, memory: torch.Tensor) -> None:
        """Makes the views of the gathered weights in a buffer, uint8 (gathered_bytes or more,)."""
        self._views = self._layout.views(memory)

    def unshard(self) -> None:
        """Points the block's tensors to the gathered weights.

        Raises:
            Unsupported: A tensor was written, cast or moved since it was sharded.
        """
        for weight, view in zip(self.weights, self._views, strict=True):
            now = weight.now()
            if now.numel() or now.dtype != view.dtype or now.device != view.device:
                raise Unsupported(
                    "parallel.fsdp",
                    f"a weight of {self.name} is {tuple(now.shape)}, {now.dtype} on {now.device}, and was sharded "
                    f"as {tuple(view.shape)}, {view.dtype} on {view.device}.",
                    "restore(pipe) before weights are written, cast or moved, and accelerate it again.",
                )
        for weight, view in zip(self.weights, self._views, strict=True):
            weight.put(view)

    def reshard(self) -> None:
        """Empties the block's tensors."""
        for weight, empty in zip(self.weights, self._empty, strict=True):
            weight.put(empty)


class GatherBuffers:
    """The two buffers in which blocks are gathered, and the layers that gather them.

    Args:
        group: The ranks among which weights are sharded.
        device: The device that the blocks run on.
    """

    def __init__(self, group: Group, device: torch.device):
        self.group, self.device = group, device
        self._shards: list[BlockShard] = []
        self._buffers: list[torch.Tensor] = []
        # For each buffer: the shard whose weights are in it, the shard whose block runs, and on a GPU the events after
        # which the buffer may be read (`_ready`) and overwritten (`_done`).
        self._held: list[BlockShard | None] = [None, None]
        self._running: list[BlockShard | None] = [None, None]
        self._ready: list[Any] = [None, None]
        self._done: list[Any] = [None, None]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: dict[int, BlockShard] = {}
        self._last: BlockShard | None = None

    def shard(self, name: str, weights: Sequence[Weight]) -> BlockShard:
        """Adds a block; consecutive blocks have different buffers."""
        self._shards.append(BlockShard(name, weights, self.group, self.device, len(self._shards) % 2))
        return self._shards[-1]

    def open(self) -> None:
        """Allocates the buffers, once all blocks are known."""
        for slot in (0, 1):
            length = max((shard.gathered_bytes for shard in self._shards if shard.slot == slot), default=0)
            self._buffers.append(torch.zeros(length, dtype=torch.uint8, device=self.device))
        for shard in self._shards:
            shard.allocate_views(self._buffers[shard.slot])

    def close(self) -> None:
        """Releases buffers and shards, after the gathers that still run. Waits for no other rank."""
        for item in (*self._buffers, *(shard.local for shard in self._shards)):
            if self._stream is not None and item is not None:
                item.record_stream(self._stream)
        for shard in self._shards:
            shard.local, shard._views = None, []
        self._buffers, self._held, self._next, self._last = [], [None, None], {}, None

    def layer(self, shard: BlockShard) -> Callable[..., Any]:
        """The layer around a block's forward."""

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and any(weight.tensor.requires_grad for weight in shard.weights):
                raise Unsupported(
                    "parallel.fsdp", "its weights are gone when gradients would be computed.",
                    "`with torch.no_grad():` around the call, as pipelines have it.", shard.name,
                )  # fmt: skip
            self._unshard(shard)
            if self._last is not None and self._last is not shard:
                self._next[id(self._last)] = shard
            self._last = shard
            try:
                self._prefetch(shard)
                return inner(*args, **kwargs)
            finally:
                self._reshard(shard)
                # A block of the same buffer could not be prefetched before.
                self._prefetch(shard)

        return forward

    @contextmanager
    def unsharded(self, shard: BlockShard) -> Iterator[None]:
        """A context within which a block's weights are whole though it does not run; all ranks enter it together."""
        self._unshard(shard)
        try:
            yield
        finally:
            self._reshard(shard)

    def _unshard(self, shard: BlockShard) -> None:
        other = self._running[shard.slot]
        if other is not None:
            raise RuntimeError(f"parallel.fsdp: {shard.name} was called while {other.name} runs.")
        self._all_gather(shard)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready[shard.slot])
        shard.unshard()
        self._running[shard.slot] = shard

    def _reshard(self, shard: BlockShard) -> None:
        shard.reshard()
        self._running[shard.slot] = None
        if self._stream is not None:
            self._done[shard.slot] = torch.cuda.current_stream(self.device).record_event()

    def _prefetch(self, shard: BlockShard) -> None:
        """Begins to gather the block that followed this one in the last forward."""
        following = self._next.get(id(shard))
        if following is not None and self._running[following.slot] is None:
            self._all_gather(following)

    def _all_gather(self, shard: BlockShard) -> None:
        """Begins to gather a block, unless its buffer holds it."""
        slot = shard.slot
        if self._held[slot] is shard:
            return
        self._held[slot] = None
        memory = self._buffers[slot][: shard.gathered_bytes]
        assert shard.local is not None
        if self._stream is None:
            self.group.all_gather_into(memory, shard.local)
        else:
            # After the computation with the buffer's last block; the first time, after shards and buffers were made.
            if self._done[slot] is None:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            else:
                self._stream.wait_event(self._done[slot])
            with torch.cuda.stream(self._stream):
                self.group.all_gather_into(memory, shard.local)
            self._ready[slot] = self._stream.record_event()
        self._held[slot] = shard


# --- the edits -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ShardBlock:
    """Shards one block. The whole weights stay in host memory for `undo`; weights that are there already are not
    copied.

    Args:
        shard: The block's shard.
    """

    shard: BlockShard
    _kept: list[torch.Tensor] = field(default_factory=list, init=False)
    _homes: list[torch.device] = field(default_factory=list, init=False)
    _moving: list[Future[None]] = field(default_factory=list, init=False)

    def apply(self) -> None:
        with torch.inference_mode(False):
            self.shard.fill()
        for weight in self.shard.weights:
            # Flat, so that it comes back in the order of dimensions that it has now.
            kept = flat(weight.tensor)
            self._homes.append(kept.device)
            if kept.device.type == "cuda":
                self._moving.append(offload_to_host(kept))
            self._kept.append(kept)
        self.shard.reshard()

    def finish(self) -> None:
        """Waits until the weights are in host memory."""
        for moving in self._moving:
            moving.result()
        self._moving.clear()

    def undo(self) -> None:
        for moving in self._moving:
            # If the move failed, the weight is whole in page-locked memory.
            moving.exception()
        for weight, kept, home, form in zip(self.shard.weights, self._kept, self._homes, self.shard.forms, strict=True):
            run = kept if home.type == "cpu" else to_device(kept, weight.now().device)
            weight.back(run.as_strided(*form[1:]))


@dataclass(eq=False)
class MoveToDevice:
    """Moves a tensor that is not sharded from the host to the rank's device; `undo` moves it back."""

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
class AllocateBuffers:
    """Allocates the buffers in which blocks are gathered."""

    memory: GatherBuffers

    def apply(self) -> None:
        with torch.inference_mode(False):
            self.memory.open()

    def undo(self) -> None:
        self.memory.close()
