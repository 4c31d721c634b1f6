"""A stand-in for a GPU's copies: two streams on the CPU, which run their work as early or as late as events allow.

Computation runs when Python runs it. A copy runs at once (`early`), or when something waits for it (`late`). A block
that computes before its bytes have come differs in the late order, a slot that is overwritten too soon in the early
one. The log of all events also shows what real streams may do: `races` looks for work that nothing orders.

Within a capture (`tape.py`) nothing is done: copies, records and waits become nodes, which every replay runs.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import torch
from tape import Tape

from diffusers_accel.core.streaming import Slab


class Event:
    """An event. One that is not external is recorded and waited for in one capture, or outside of all."""

    def __init__(self, external=False):
        self.external, self.graph, self.time = external, None, None


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

    def slab(self, length, fill=None):
        self.locked += length
        memory = torch.full((length,), 0xEE, dtype=torch.uint8)
        if fill is not None:
            fill(memory)
        return Slab(memory, memory)

    def copy(self, target, source):
        def run():
            self._tick("copy", "copy", target.untyped_storage().data_ptr())
            self.queue.append((target, source))
            if self.order == "early":
                self._run()

        self._do(run)

    def event(self):
        return Event(external=True)

    def computed(self, event=None):
        return self._record("compute", event)

    def copied(self, event=None):
        return self._record("copy", event)

    def compute_after(self, event):
        self._wait("compute", event, self._run)

    def copy_after(self, event):
        self._wait("copy", event)

    def read(self, address):
        """Called where computation reads a slot."""
        self._do(lambda: self._tick("compute", "read", address))

    @staticmethod
    def _do(action):
        """Runs an action, or makes it a node of the graph that is being captured."""
        if Tape.active is None:
            action()
        else:
            Tape.active.calls.append((action, (), {}, None))

    def _run(self):
        while self.queue:
            target, source = self.queue.popleft()
            target.copy_(source)

    def _tick(self, stream, what, address):
        clock = self.clock[stream]
        clock[stream] += 1
        self.log.append((stream, what, address, dict(clock)))

    def _record(self, stream, event):
        event = Event() if event is None else event
        event.graph = Tape.active

        def run():
            self.clock[stream][stream] += 1
            event.time = dict(self.clock[stream])

        self._do(run)
        return event

    def _wait(self, stream, event, then=lambda: None):
        assert event.external or event.graph is Tape.active, "an event of another capture"

        def run():
            for name, time in event.time.items():
                self.clock[stream][name] = max(self.clock[stream][name], time)
            then()

        self._do(run)

    def races(self):
        """Pairs of a copy into a slot and a read of it, in either order, that no event orders."""
        found = []
        for place, (_, what, address, clock) in enumerate(self.log):
            for other, kind, where, before in self.log[:place]:
                if where == address and what != kind and clock[other] < before[other]:
                    found.append((kind, what, address))
        return found
