"""A stand-in for CUDA graphs on the CPU: records every operator that a function runs, and plays them again on the
memory they were recorded with. As with the real ones Python is not run again, tensors that were not static inputs keep
the place they had, and recording by itself has no effect.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Tape(TorchDispatchMode):
    """Operators in the order they ran."""

    def __init__(self):
        super().__init__()
        self.calls = []

    @classmethod
    def is_infra_mode(cls):
        """Dynamo runs compiled code under such modes only."""
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


class Memory:
    """What recordings that are replayed in turn share."""


class TapeRecorder:
    """A `Recorder` for the CPU."""

    def __init__(self, pool, device):
        assert type(pool) is Memory
        self.memory = pool

    def prepare(self, function):
        function()

    def record(self, function):
        self.tape = Tape()
        with self.tape:
            self.found = function()
        # Recording has no effect: what comes out is filled by a replay.
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
                    # A collective of Gloo that is under way. What waited for it was no operator, and is not recorded.
                    other.wait()
        for output, found in zip(self.outputs, self.found, strict=True):
            output.copy_(now(found))

    @staticmethod
    def pool():
        return Memory()
