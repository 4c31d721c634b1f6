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

    def slab(self, length: int, fill: Callable[[torch.Tensor], None] | None = None) -> Slab:
        """A slab, page-locked where the system allows it. Called by other threads too.

        Args:
            length: Its bytes.
            fill: Function that writes all of the host memory before it is locked; `None` if it is written later.
        """
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueues a copy on the copy stream."""
        ...

    def event(self) -> Any:
        """An event that CUDA graphs record, and wait for, as nodes. It can be recorded in a graph, and waited for
        outside of it, or the reverse. Other events are not valid beyond a capture's bounds."""
        ...

    def computed(self, event: Any = None) -> Any:
        """Records an event after everything that the computing stream has been given.

        Args:
            event: The event to record, made by `event`; `None` for a new one.

        Returns:
            The event.
        """
        ...

    def copied(self, event: Any = None) -> Any:
        """Records an event after everything that the copy stream has been given.

        Args:
            event: The event to record, made by `event`; `None` for a new one.

        Returns:
            The event.
        """
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

    def slab(self, length: int, fill: Callable[[torch.Tensor], None] | None = None) -> Slab:
        """See `Transfers`."""
        buffer = LockedBuffer.allocate(length, self._device)
        # Pages that are there are locked in half the time.
        (fill or torch.Tensor.zero_)(buffer.memory)
        locked = buffer.lock()
        return Slab(buffer.memory, buffer.on_device() if locked else buffer.memory, locked)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Transfers`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def event(self) -> torch.cuda.Event:
        """See `Transfers`."""
        return torch.cuda.Event(external=True)

    def computed(self, event: torch.cuda.Event | None = None) -> torch.cuda.Event:
        """See `Transfers`."""
        return self._record(torch.cuda.current_stream(self._device), event)

    def copied(self, event: torch.cuda.Event | None = None) -> torch.cuda.Event:
        """See `Transfers`."""
        return self._record(self._stream, event)

    def compute_after(self, event: torch.cuda.Event) -> None:
        """See `Transfers`."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def copy_after(self, event: torch.cuda.Event) -> None:
        """See `Transfers`."""
        self._stream.wait_event(event)

    def _record(self, stream: torch.cuda.Stream, event: torch.cuda.Event | None) -> torch.cuda.Event:
        event = torch.cuda.Event() if event is None else event
        with torch.cuda.device(self._device):
            event.record(stream)
        return event


# Device type -> transfers. The tests add one for the CPU.
TRANSFERS: dict[str, Callable[[torch.device], Transfers]] = {"cuda": CudaTransfers}
