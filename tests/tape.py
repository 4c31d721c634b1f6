"""A stand-in for CUDA graphs on the CPU: it captures every operator of a function, and replays them on the same memory.

As with real graphs a replay does not run Python, tensors that are no static inputs keep their addresses, and a capture
has no effect by itself.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Tape(TorchDispatchMode):
    """Operators in the order they ran, and functions of other stand-ins that a replay calls between them."""

    # The tape that is being written.
    active = None

    def __init__(self):
        super().__init__()
        self.calls = []

    def __enter__(self):
        Tape.active = self
        return super().__enter__()

    def __exit__(self, *error):
        Tape.active = None
        return super().__exit__(*error)

    @classmethod
    def is_infra_mode(cls):
        """Dynamo runs compiled code under such modes only."""
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


class Memory:
    """A memory pool, which graphs that are replayed in turn share."""


class TapeBackend:
    """A `GraphBackend` for the CPU."""

    def __init__(self, pool, device):
        assert type(pool) is Memory
        self.memory = pool

    def warm_up(self, function):
        function()

    def capture(self, function):
        self.tape = Tape()
        with self.tape:
            self.found = function()
        # A capture computes nothing: a replay fills the outputs.
        self.outputs = [torch.full_like(item, float("nan")) for item in self.found]
        return self.outputs

    def replay(self):
        made = {}

        def now(item):
            return made.get(id(item), item)

        for function, args, kwargs, out in self.tape.calls:
            again = function(*pytree.tree_map(now, args), **pytree.tree_map(now, kwargs))
            for one, other in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                made[id(one)] = other
                if isinstance(other, torch.ScriptObject):
                    # A running collective of Gloo. Its wait is no operator and is not captured.
                    other.wait()
        for output, found in zip(self.outputs, self.found, strict=True):
            output.copy_(now(found))

    @staticmethod
    def pool():
        return Memory()
