"""The chain: one wrapper around a method of one instance, holding layers sorted by rank.

Nesting follows rank, never the history of calls: a cache layer added before or after compilation ends up outside the
compiled block either way. The chain sits in the instance's `__dict__` (no class is touched, no module added, so
`state_dict` and types stay) and disappears with its last layer.

Neighbours that wrap `forward` too are lived with. accelerate's hooks keep the function they wrap in `_old_forward` and
put it back when they are removed, so under such a hook the chain goes there. A hook added after the chain holds the
chain as the function it wraps; there an emptied chain stays behind, transparent, until that hook goes.
"""

from __future__ import annotations

import bisect
import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any


class Layer:
    """A function around a method: called as `function(inner, *args, **kwargs)`; higher ranks run outside lower ones."""

    __slots__ = ("function", "rank")

    def __init__(self, rank: int, function: Callable[..., Any]):
        self.rank, self.function = rank, function


# Kept beside the method in the owner's __dict__, so that a chain hidden under a foreign wrapper is found again.
_MARK = "_diffusers_accel_chain_{}"


class Chain:
    """Layers around `inner`, the method as it was found. Made and found through `around` and `find`."""

    def __init__(self, owner: Any, method: str):
        self.method = method
        self._owner = weakref.ref(owner)
        slots = vars(owner)
        hooked = method == "forward" and "_hf_hook" in slots and "_old_forward" in slots
        self._slot = "_old_forward" if hooked else method
        self._was_absent = self._slot not in slots
        self.inner: Callable[..., Any] = getattr(owner, self._slot)
        self._layers: list[Layer] = []
        self._call: Callable[..., Any] = self.inner
        # Marked first: a chain that was interrupted here is found by its mark, and undone.
        slots[_MARK.format(method)] = self
        slots[self._slot] = self

    @classmethod
    def find(cls, owner: Any, method: str = "forward") -> Chain | None:
        """The chain around `owner.method`, if there is one."""
        chain = vars(owner).get(_MARK.format(method))
        return chain if isinstance(chain, Chain) else None

    @classmethod
    def around(cls, owner: Any, method: str = "forward") -> Chain:
        """The chain around `owner.method`, made if there is none."""
        return cls.find(owner, method) or cls(owner, method)

    @property
    def stock(self) -> bool:
        """Whether `inner` is the plain method of the owner's class, wrapped by nobody else."""
        return self._was_absent

    def add(self, layer: Layer) -> None:
        bisect.insort(self._layers, layer, key=lambda item: item.rank)
        self._compose()

    def remove(self, layer: Layer) -> None:
        """Takes a layer out, if it is there; the last one takes the chain along."""
        if layer in self._layers:
            self._layers.remove(layer)
        self._compose()
        if not self._layers:
            self._detach()

    def _compose(self) -> None:
        call = self.inner
        for layer in self._layers:
            call = functools.partial(layer.function, call)
        self._call = call

    def _detach(self) -> None:
        owner = self._owner()
        if owner is None:
            return
        slots = vars(owner)
        # A hook added or removed since may have moved the chain between the two places.
        for slot in (self.method, "_old_forward"):
            if slots.get(slot) is self:
                if self._was_absent and slot == self.method:
                    del slots[slot]
                else:
                    slots[slot] = self.inner
        # The mark goes last: without it a chain that is left behind would not be found.
        slots.pop(_MARK.format(self.method), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of an accelerated module is a stock module: the layers belong to the original's session.
        return copy.deepcopy(self.inner, memo)
