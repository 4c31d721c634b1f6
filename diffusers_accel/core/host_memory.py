"""Host memory that a GPU reads: page-locked buffers of exact size, their view on the GPU, and the amount there is.

A buffer is ordinary memory that is locked with `cudaHostRegister`. torch's own page-locked allocator rounds each buffer
up to a power of two, which costs up to twice the memory. The GPU reads and writes locked memory directly, over the bus,
so a buffer is also visible as a tensor on the GPU (`LockedBuffer.on_device`) with an address of its own.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# A locked page belongs to one buffer alone: no page can be locked twice.
_PAGE = 4096
# cudaHostRegisterPortable | cudaHostRegisterMapped: every GPU of the process may read the buffer, also in kernels.
_FLAGS = 3


def available_bytes() -> int | None:
    """Bytes that this process may still take from the host: the kernel's estimate, bounded by control groups. `None`
    where neither is known."""
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    for limit, used, statistics, inactive in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        group = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):
            most, now = int((group / limit).read_text()), int((group / used).read_text())
            # Cached files count as used, and are given back when memory is short.
            lines = (group / statistics).read_text().splitlines()
            files = next((int(line.split()[1]) for line in lines if line.startswith(inactive + " ")), 0)
            found.append(max(0, most - now + files))
    return min(found) if found else None


class _Interface:
    """A buffer as other libraries see it: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html.

    A tensor made from it keeps this object, and with it the buffer.
    """

    def __init__(self, buffer: LockedBuffer):
        self.buffer = buffer
        self.__cuda_array_interface__ = {
            "shape": (buffer.memory.numel(),),
            "typestr": "|u1",
            "data": (buffer.memory.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


@dataclass(eq=False)
class LockedBuffer:
    """A buffer in page-locked host memory. It is unlocked when the last tensor over it is gone.

    Args:
        memory: uint8 (bytes,), on the host, in pages of its own; `allocate` makes it.
        device: The GPU that reads it.

    Attributes:
        locked: Whether it is locked.
    """

    memory: torch.Tensor
    device: torch.device
    locked: bool = False

    @classmethod
    def allocate(cls, length: int, device: torch.device) -> LockedBuffer:
        """A buffer of this many bytes, not locked yet. Its pages are taken as they are first written."""
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
        # Pages of its own from first to last: torch asks whether a storage's first byte is locked.
        pages = mmap.mmap(-1, -(-max(1, length) // _PAGE) * _PAGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Pages of 2 MiB are taken and locked in half the time. A kernel without them refuses.
            with contextlib.suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
        return cls(torch.frombuffer(pages, dtype=torch.uint8)[: max(1, length)], device)

    def lock(self) -> bool:
        """Locks the buffer, whose pages should have been written: locking pages that are there takes half the time.

        Returns:
            Whether it is locked. The system may refuse.
        """
        length = -(-self.memory.numel() // _PAGE) * _PAGE
        with torch.cuda.device(self.device):
            error = torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), length, _FLAGS)
        self.locked = int(error) == 0
        if not self.locked:
            # CUDA reports the error once more at the next kernel.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.device).add_(1)
        return self.locked

    def on_device(self) -> torch.Tensor:
        """The locked buffer as a tensor on the GPU, uint8 (bytes,), over the same memory."""
        found: torch.Tensor = torch.as_tensor(_Interface(self), device=self.device)
        return found

    def __del__(self) -> None:
        if self.locked and torch is not None and torch.cuda is not None:
            self.locked = False
            with contextlib.suppress(Exception):  # at the interpreter's end CUDA may be gone
                torch.cuda.synchronize(self.device)
                torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("Page-locked memory is not copied.")
