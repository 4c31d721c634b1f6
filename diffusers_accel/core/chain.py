"""The chain: one wrapper around a method of one instance, with layers of functions sorted by rank.

Ranks alone decide the nesting. A cache layer ends up outside the compiled block, whether it is added before compilation
or after. The chain lies in the instance's `__dict__`, so no class and no `state_dict` changes. The chain disappears
with its last layer.

Hooks of other packages may wrap `forward` too. accelerate's hook keeps the wrapped function in an attribute of the
module (`WRAPPED_FORWARD`) and restores it on removal. Under such a hook the chain is put into that attribute, and taken
out of it. Any other hook that was added after the chain holds the chain itself: an empty chain stays behind in the hook
and passes calls on.
"""

from __future__ import annotations

import bisect
import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

from ..compat.accelerate_private import ACCELERATE_HOOK, WRAPPED_FORWARD


class Layer:
    """A function around a method.

    Args:
        rank: Position in the chain: higher ranks run outside lower ones.
        function: Called as `function(inner, *args, **kwargs)`.
    """

    __slots__ = ("function", "rank")

    def __init__(self, rank: int, function: Callable[..., Any]):
        self.rank, self.function = rank, function


# Key of the chain in the owner's `__dict__`: `find` needs it once another package's hook has wrapped the chain.
_MARK = "_diffusers_accel_chain_{}"


def _slot(owner: Any, method: str) -> str:
    """The key of the owner's `__dict__` that a chain around the method takes: inside of accelerate's hook."""
    slots = vars(owner)
    hooked = method == "forward" and ACCELERATE_HOOK in slots and WRAPPED_FORWARD in slots
    return WRAPPED_FORWARD if hooked else method


class Chain:
    """Layers around a method of one instance. `around` and `find` make and find chains.

    Attributes:
        inner: The method as it was before the chain.
    """

    def __init__(self, owner: Any, method: str):
        self.method = method
        self._owner = weakref.ref(owner)
        slots, self._slot = vars(owner), _slot(owner, method)
        self._was_absent = self._slot not in slots
        self.inner: Callable[..., Any] = getattr(owner, self._slot)
        if isinstance(self.inner, Chain):
            # A removed chain, which a removed hook has put back.
            self._was_absent, self.inner = self.inner._was_absent, self.inner.inner
        self._layers: list[Layer] = []
        self._call: Callable[..., Any] = self.inner
        # The mark comes first: after an interruption `find` finds the chain, and it can be removed.
        slots[_MARK.format(method)] = self
        slots[self._slot] = self

    @classmethod
    def find(cls, owner: Any, method: str = "forward") -> Chain | None:
        """The chain around `owner.method`, or `None`."""
        chain = vars(owner).get(_MARK.format(method))
        return chain if isinstance(chain, Chain) else None

    @classmethod
    def around(cls, owner: Any, method: str = "forward") -> Chain:
        """The chain around `owner.method`, made if there is none."""
        return cls.find(owner, method) or cls(owner, method)

    @classmethod
    def is_stock(cls, owner: Any, method: str = "forward") -> bool:
        """Whether a chain around the method has, or would have, the method of the owner's class inside. Hooks that were
        removed may have left that method in the owner's `__dict__`, or a chain without layers."""
        inner: Any = cls.find(owner, method) or vars(owner).get(_slot(owner, method))
        while isinstance(inner, Chain):
            inner = inner.inner
        own = getattr(type(owner), method)
        return inner is None or (getattr(inner, "__func__", None) is own and inner.__self__ is owner)

    def add(self, layer: Layer) -> None:
        """Adds a layer at its rank."""
        bisect.insort(self._layers, layer, key=lambda item: item.rank)
        self._compose()

    def remove(self, layer: Layer) -> None:
        """Removes a layer, if it is in the chain. A chain without layers is removed from its owner."""
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
        # A hook that was added or removed since may have moved the chain between the two slots.
        for slot in (self.method, WRAPPED_FORWARD):
            if slots.get(slot) is self:
                if self._was_absent and slot == self.method:
                    del slots[slot]
                else:
                    slots[slot] = self.inner
        # The mark goes last: after an interruption `find` finds the chain, and its removal can be finished.
        slots.pop(_MARK.format(self.method), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of an accelerated module is a stock module: the layers belong to the original's session.
        return copy.deepcopy(self.inner, memo)
