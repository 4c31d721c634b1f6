"""Edits that move weights to host memory, allocate slots, and move tensors between devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ...errors import Unsupported
from ..weights import Weight, is_plain
from .blocks import StreamedBlock, parts_of
from .slots import WeightStream
from .transfers import Slab, Transfers


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
        block.leave()
        self.slabs.release(block)
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


class HostBudget(Protocol):
    """The host memory that slabs may take."""

    def take(self, length: int) -> bool:
        """Whether so many bytes may be taken; they count as taken then."""
        ...

    def give_back(self, length: int) -> None:
        """Gives back bytes that were taken."""
        ...


class Slabs:
    """The slabs of blocks, which threads take, fill and lock ahead of the edits. The calling thread copies weights of a
    GPU, which needs locked pages.

    Args:
        transfers: Where host memory comes from.
        blocks: The blocks, in the order in which they are filled.
        budget: The host memory that slabs may take.
        lock: Whether to lock pages. Otherwise weights on the host stay in the memory that they are in.
    """

    # Threads: some write pages while others lock them.
    _THREADS = 4
    # Slabs that are taken ahead of the block that waits for its own.
    _AHEAD = 4

    def __init__(self, transfers: Transfers, blocks: Sequence[StreamedBlock], budget: HostBudget, lock: bool = True):
        self._transfers, self._budget, self._lock = transfers, budget, lock
        self._waiting = deque(blocks)
        self._threads: ThreadPoolExecutor | None = None
        # Block -> its slab, or `None` for weights that stay on the host.
        self._taken: dict[StreamedBlock, Future[Slab] | None] = {}

    def fill(self, block: StreamedBlock) -> None:
        """Moves a block's weights to host memory.

        Raises:
            Unsupported: The host's memory does not suffice for weights of a GPU.
        """
        if block not in self._taken:
            self._take_ahead(block)
        while self._waiting and sum(taken is not None for taken in self._taken.values()) <= self._AHEAD:
            self._take_ahead(self._waiting[0])
        taken = self._taken.pop(block)
        if taken is None:
            block.use(None)
        else:
            slab = taken.result()
            devices = {part.device for tensor in block.tensors for part in tensor.parts if part.is_cuda}
            if not _on_host(block):
                block.fill(slab.host)
            if not slab.locked:
                # The model sees this memory on the host, where nothing waits for the copies.
                for device in devices:
                    torch.cuda.synchronize(device)
            block.use(slab)
        if not self._waiting:
            self._end()

    def release(self, block: StreamedBlock) -> None:
        """Gives a block's host memory back, and after an error all slabs that were taken ahead."""
        if block.slab is not None:
            self._budget.give_back(block.layout.length)
        self._waiting.clear()
        for each, taken in self._taken.items():
            if taken is not None:
                taken.exception()
                self._budget.give_back(each.layout.length)
        self._taken.clear()
        self._end()

    def _end(self) -> None:
        if self._threads is not None and not any(self._taken.values()):
            self._threads.shutdown()
            self._threads = None

    def _take_ahead(self, block: StreamedBlock) -> None:
        """Begins to take the slab of a block."""
        if block in self._waiting:
            self._waiting.remove(block)
        on_host = _on_host(block)
        length = block.layout.length
        if on_host and not self._lock:
            self._taken[block] = None
        elif self._budget.take(length):
            self._taken[block] = self._submit(self._transfers.slab, length, block.fill if on_host else None)
        elif on_host:
            self._taken[block] = None
        else:
            raise Unsupported(
                "offload",
                f"the host has too little memory for {block.name}: {length / 2**20:.0f} MiB more are needed.",
                "more memory or swap, a larger offload.vram or offload.ram, or linear='fp8', which halves the weights.",
            )

    def _submit(self, function: Callable[..., Slab], *args: Any) -> Future[Slab]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._THREADS, "diffusers_accel-page-locking")
        return self._threads.submit(function, *args)


def _on_host(block: StreamedBlock) -> bool:
    """Whether all values of a block are in host memory."""
    return all(part.device.type == "cpu" for tensor in block.tensors for part in tensor.parts)


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
