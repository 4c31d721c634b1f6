"""Windows: memory of each rank that the others of its group write to and read from directly, over NVLink, say.

What a rank has for another goes there in one copy, without a message: nothing is packed before, or unpacked after, and
copies run at the link's rate. Ranks agree that all have written by a barrier on the device, of a few microseconds.

torch's symmetric memory makes them, without NVLink's multicast. They need GPUs of one machine, each in sight of the
others; `open_windows` says why there are none.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch

# Parts of a window begin where every type may, and where copies are fastest.
_ALIGNED = 256
# Windows grow: at least so large, then twice as large.
_SMALLEST = 1 << 20


class Window(Protocol):
    """Memory of the same size on every rank of a group."""

    nbytes: int

    def part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A part of a rank's memory, as a tensor that can be read and written here."""
        ...

    def barrier(self) -> None:
        """What comes after it, on any rank's current stream, sees what came before it on all of them."""
        ...


class _SymmetricMemory:
    """A window by torch's symmetric memory."""

    def __init__(self, group: Any, nbytes: int):
        from torch.distributed import _symmetric_memory as symmetric

        # Multicast is not used. Processes that see one GPU alone all call it the first, and torch would take them for
        # one; that no two have the same has been seen to (features/parallel/gpus.py).
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        self.nbytes = nbytes
        device = torch.device("cuda", torch.cuda.current_device())
        # Memory lives as long as this tensor.
        self._own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(self._own, group.handle.group_name)

    def part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        found: torch.Tensor = self._handle.get_buffer(rank, tuple(shape), dtype, offset // dtype.itemsize)
        return found

    def barrier(self) -> None:
        self._handle.barrier(channel=0)


# Type of device -> makes a window, from a group and its size in bytes. A collective.
MAKERS: dict[str, Callable[[Any, int], Window]] = {"cuda": _SymmetricMemory}


class _Counted:
    """A window whose barriers are counted."""

    def __init__(self, window: Window):
        self._window, self.nbytes, self.passed = window, window.nbytes, 0

    def part(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._window.part(rank, offset, shape, dtype)

    def barrier(self) -> None:
        # What a graph records has not been passed.
        self.passed += not _capturing()
        self._window.barrier()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Windows:
    """A group's two windows, used in turn.

    An exchange writes to one of them and ends with a barrier. When it is that window's turn again, all ranks have
    passed the other's barrier since, and so have read what was there: nobody waits before he writes. So what is found
    in a window must be read before the exchange after the next one begins.

    An exchange that an error breaks off may have taken a window, or passed a barrier, on some ranks only. So whoever
    begins a request calls `begin`, which has all of them agree again.

    Args:
        group: The ranks.
        make: What makes a window.
    """

    def __init__(self, group: Any, make: Callable[[Any, int], Window]):
        self._group, self._make = group, make
        self._turn = 0
        self._stream: Any = None
        self._windows: list[_Counted | None] = [None, None]
        # Recorded graphs know outgrown ones by their address.
        self._outgrown: list[Window] = []

    def following(self, nbytes: int) -> Window:
        """The window whose turn it is, at least so large. All ranks ask for the same, in the same order."""
        turn, self._turn = self._turn, 1 - self._turn
        window = self._windows[turn]
        if window is None or window.nbytes < nbytes:
            if _capturing():
                raise RuntimeError(f"a window of {nbytes} bytes is needed in a graph, and no request before had one.")
            if window is not None:
                self._outgrown.append(window)
            window = _Counted(self._make(self._group, max(_SMALLEST, 1 << math.ceil(math.log2(max(1, nbytes))))))
            self._windows[turn] = window
        return window

    def begin(self) -> None:
        """Begins a request with the first window, after all that was read or written before, also where an error has
        broken that off. A collective, whose ranks ask each other by messages.

        Graphs that some ranks have played and others have not are not counted.
        """
        own = self._turn, [None if each is None else (each.nbytes, each.passed) for each in self._windows]
        told = self._group.objects(own)
        if all(other == own for other in told):
            self.rest()
            return
        self.join()
        sizes = {tuple(None if each is None else each[0] for each in windows) for _, windows in told}
        if len(sizes) > 1:
            # One of them has grown on some ranks. Recorded graphs know the old ones.
            self._outgrown += [each for each in self._windows if each is not None]
            self._windows, self._turn = [None, None], 0
            return
        for place, window in enumerate(self._windows):
            if window is not None:
                # Ranks that have passed more barriers wait in the last one.
                for _ in range(max(windows[place][1] for _, windows in told) - window.passed):
                    window.barrier()
        self._turn = 1
        self.rest()

    def rest(self) -> None:
        """Ends an operation that may have used windows an odd number of times, after all that it reads is read.

        A recorded graph uses the same windows whenever it is played, whatever was played before it. So every operation
        begins with the first one; after an odd number of exchanges that takes one more barrier.
        """
        if self._turn:
            self.following(0).barrier()

    def beside(self, device: torch.device) -> Any:
        """A context in which copies go on beside what follows, by copy engines, after what is on the current stream."""
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        """What follows on the current stream comes after these copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def placed(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> tuple[list[int], int]:
    """Where tensors lie in a window, one after another, and how many bytes all of them take."""
    offsets, end = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        offsets.append(end)
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED
    return offsets, end


def open_windows(group: Any, device: str) -> tuple[Windows | None, str | None]:
    """A group's windows, or why there are none. A collective: all ranks have the same answer.

    Args:
        group: The ranks.
        device: Type of the device that tensors are on.
    """
    if group.size == 1:
        return None, None
    make = MAKERS.get(device)
    if make is None:
        return None, f"there are none on {device}"
    nodes = group.objects(platform.node())
    if len(set(nodes)) > 1:
        return None, "its ranks are on several machines"
    windows, reason = Windows(group, make), None
    try:
        for _ in range(2):
            windows.following(_SMALLEST)
    except Exception as error:  # drivers and containers forbid it in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    reasons = group.objects(reason)
    first = next((each for each in reasons if each is not None), None)
    return (windows, None) if first is None else (None, first)
