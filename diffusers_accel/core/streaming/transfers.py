"""The seam between streaming and a device: host memory, copies on a stream of their own, and events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..host_memory import LockedBuffer


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
