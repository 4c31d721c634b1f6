"""A stand-in for a GPU's copies: two streams on the CPU, which run their work as early or as late as events allow.

Computation runs when Python runs it. A copy runs at once (`early`), or when something waits for it (`late`). A block
that computes before its bytes have come differs in the late order, a slot that is overwritten too soon in the early
one. The log of all events also shows what real streams may do: `races` looks for work that nothing orders.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import torch

from diffusers_accel.core.streaming import Slab


class Event:
    def __init__(self, stream, time):
        self.stream, self.time = stream, time


class HostTransfers:
    """A `Transfers` for the CPU."""

    order = "early"
    made: ClassVar[list[HostTransfers]] = []

    def __init__(self, device):
        self.device, self.queue = device, deque()
        # Vector clocks: the operations of a stream, and those of the other that it has waited for.
        self.clock = {"compute": {"compute": 0, "copy": 0}, "copy": {"compute": 0, "copy": 0}}
        self.log = []
        self.locked = 0
        type(self).made.append(self)

    def slab(self, length):
        self.locked += length
        memory = torch.full((length,), 0xEE, dtype=torch.uint8)
        return Slab(memory, memory)

    def copy(self, target, source):
        self._tick("copy", "copy", target.untyped_storage().data_ptr())
        self.queue.append((target, source))
        if self.order == "early":
            self._run()

    def computed(self):
        return self._event("compute")

    def copied(self):
        return self._event("copy")

    def compute_after(self, event):
        self._wait("compute", event)
        self._run()

    def copy_after(self, event):
        self._wait("copy", event)

    def read(self, address):
        """Called where computation reads a slot."""
        self._tick("compute", "read", address)

    def _run(self):
        while self.queue:
            target, source = self.queue.popleft()
            target.copy_(source)

    def _tick(self, stream, what, address):
        clock = self.clock[stream]
        clock[stream] += 1
        self.log.append((stream, what, address, dict(clock)))

    def _event(self, stream):
        self.clock[stream][stream] += 1
        return Event(stream, dict(self.clock[stream]))

    def _wait(self, stream, event):
        for name, time in event.time.items():
            self.clock[stream][name] = max(self.clock[stream][name], time)

    def races(self):
        """Pairs of a copy into a slot and a read of it, in either order, that no event orders."""
        found = []
        for place, (_, what, address, clock) in enumerate(self.log):
            for other, kind, where, before in self.log[:place]:
                if where == address and what != kind and clock[other] < before[other]:
                    found.append((kind, what, address))
        return found
