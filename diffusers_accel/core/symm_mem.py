"""Symmetric memory: on each rank of a group a buffer that its peers write to and read from directly, over NVLink.

Owns the allocation (torch's symmetric memory, without NVLink's multicast) and the double buffering
of a group. Hands on `SymmetricMemory`, on which `symm_collectives.py` and Ulysses' kernels build. A peer's data goes to
its destination in one copy, at the link's rate: nothing is packed before or unpacked after. A barrier on the device, of
a few microseconds, tells ranks that all have written.

The GPUs must be of one machine, each accessible from the others. Where they are not, or where a driver or container
forbids it, `allocate_symm_mem` returns the reason.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from ..compat.torch_private import allocate_symmetric

# Tensors in a buffer begin where every dtype may, and where copies are fastest.
_ALIGNED = 256
# The first allocation in bytes; later ones are powers of two.
_SMALLEST = 1 << 20


class SymmetricBuffer(Protocol):
    """Memory of the same size on every rank of a group.

    Attributes:
        nbytes: Size in bytes on each rank.
    """

    nbytes: int

    def peer_view(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A part of one rank's memory, as a tensor that this process reads and writes.

        Args:
            rank: The owner's rank in the group; this process's own is allowed.
            offset: Where the tensor begins, in bytes.
            shape: The tensor's shape; it is contiguous.
            dtype: The tensor's dtype.
        """
        ...

    def barrier(self) -> None:
        """Orders the current streams of all ranks: work after it sees the writes before it, on any rank."""
        ...


class _TorchSymmetricBuffer:
    """A buffer of torch's symmetric memory."""

    def __init__(self, group: Any, nbytes: int):
        # Multicast is not used. If each process sees one GPU alone, all number it 0, and torch takes these GPUs for one
        # device. features/parallel/rank_device.py has checked that no two ranks share a GPU.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        self.nbytes = nbytes
        device = torch.device("cuda", torch.cuda.current_device())
        # The allocation lives as long as this tensor.
        self._own, self._handle = allocate_symmetric(nbytes, device, group.handle.group_name)

    def peer_view(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        found: torch.Tensor = self._handle.get_buffer(rank, tuple(shape), dtype, offset // dtype.itemsize)
        return found

    def barrier(self) -> None:
        self._handle.barrier(channel=0)


# Device type -> allocates a buffer for a group (`comm.Group`) and a size in bytes. A collective.
ALLOCATORS: dict[str, Callable[[Any, int], SymmetricBuffer]] = {"cuda": _TorchSymmetricBuffer}


class _CountedBuffer:
    """A buffer whose barriers are counted.

    Attributes:
        nbytes: Size in bytes on each rank.
        barriers: Number of passed barriers. Barriers in CUDA graphs are not counted.
    """

    def __init__(self, buffer: SymmetricBuffer):
        self._buffer, self.nbytes, self.barriers = buffer, buffer.nbytes, 0

    def peer_view(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._buffer.peer_view(rank, offset, shape, dtype)

    def barrier(self) -> None:
        # A barrier that a graph records has not run.
        self.barriers += not _capturing()
        self._buffer.barrier()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class SymmetricMemory:
    """The symmetric memory of one group: two buffers, used in turn.

    A collective writes to one buffer and ends with a barrier. Before the buffer's next turn all ranks pass the other
    buffer's barrier, so no rank waits before it writes. A result in a buffer must therefore be read, on the current
    stream, before the next collective's barrier.

    A collective that an error interrupts may have taken a buffer, or passed a barrier, on some ranks only. Each request
    therefore begins with `resynchronize`.

    Args:
        group: The ranks (`comm.Group`).
        allocate: Allocates a buffer for the group and a size in bytes; a collective.
    """

    def __init__(self, group: Any, allocate: Callable[[Any, int], SymmetricBuffer]):
        self._group, self._allocate = group, allocate
        self._next = 0
        self._stream: Any = None
        self._buffers: list[_CountedBuffer | None] = [None, None]
        # Recorded graphs hold the addresses of outgrown buffers.
        self._outgrown: list[SymmetricBuffer] = []

    def next_buffer(self, nbytes: int) -> SymmetricBuffer:
        """The buffer whose turn it is, at least `nbytes` large. All ranks ask for the same sizes in the same order.

        Raises:
            RuntimeError: A CUDA graph is being recorded and the buffer is too small: memory cannot be allocated in it.
        """
        index, self._next = self._next, 1 - self._next
        buffer = self._buffers[index]
        if buffer is None or buffer.nbytes < nbytes:
            if _capturing():
                raise RuntimeError(
                    f"a CUDA graph needs a symmetric buffer of {nbytes} bytes, and no request before it had one."
                )
            if buffer is not None:
                self._outgrown.append(buffer)
            size = max(_SMALLEST, 1 << math.ceil(math.log2(max(1, nbytes))))
            buffer = _CountedBuffer(self._allocate(self._group, size))
            self._buffers[index] = buffer
        return buffer

    def resynchronize(self) -> None:
        """Begins a request with the first buffer on all ranks, also after an error has interrupted a collective.

        A collective over the process group. Barriers of graphs that only some ranks have replayed are not counted.
        """
        own = self._next, [None if each is None else (each.nbytes, each.barriers) for each in self._buffers]
        states = self._group.all_gather_object(own)
        if all(other == own for other in states):
            self.rewind()
            return
        self.wait_copies()
        sizes = {tuple(None if each is None else each[0] for each in buffers) for _, buffers in states}
        if len(sizes) > 1:
            # A buffer has grown on some ranks only. Recorded graphs hold the addresses of the old ones.
            self._outgrown += [each for each in self._buffers if each is not None]
            self._buffers, self._next = [None, None], 0
            return
        for index, buffer in enumerate(self._buffers):
            if buffer is not None:
                # Ranks that have passed more barriers wait in the last one.
                for _ in range(max(buffers[index][1] for _, buffers in states) - buffer.barriers):
                    buffer.barrier()
        self._next = 1
        self.rewind()

    def rewind(self) -> None:
        """Makes the next collective begin with the first buffer; all results must have been read.

        A recorded graph uses the same buffers at every replay. So every operation that a graph may record begins with
        the first buffer. After an odd number of collectives this takes one more barrier.
        """
        if self._next:
            self.next_buffer(0).barrier()

    def copy_stream(self, device: torch.device) -> Any:
        """A context whose copies run on a stream of their own, by copy engines, after the work of the current stream.

        Args:
            device: The device of the tensors; on the CPU the context does nothing.
        """
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)

    def wait_copies(self) -> None:
        """Makes the current stream wait for the copies of `copy_stream`."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def buffer_offsets(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> tuple[list[int], int]:
    """Offsets in bytes of tensors that lie in a buffer one after another, and the bytes of all of them."""
    offsets, end = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        offsets.append(end)
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED
    return offsets, end


def allocate_symm_mem(group: Any, device: str) -> tuple[SymmetricMemory | None, str | None]:
    """Allocates a group's symmetric memory. A collective, whose answer is the same on all ranks.

    Args:
        group: The ranks (`comm.Group`).
        device: Device type of the tensors, such as `"cuda"`.

    Returns:
        The memory, or `None` and the reason why there is none. A group of one rank gets `None` without a reason.
    """
    if group.size == 1:
        return None, None
    allocate = ALLOCATORS.get(device)
    if allocate is None:
        return None, f"there is no symmetric memory on {device}"
    nodes = group.all_gather_object(platform.node())
    if len(set(nodes)) > 1:
        return None, "its ranks are on several machines"
    memory, reason = SymmetricMemory(group, allocate), None
    try:
        for _ in range(2):
            memory.next_buffer(_SMALLEST)
    except Exception as error:  # drivers and containers forbid it in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    reasons = group.all_gather_object(reason)
    first = next((each for each in reasons if each is not None), None)
    return (memory, None) if first is None else (None, first)
