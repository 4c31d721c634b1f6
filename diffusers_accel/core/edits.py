"""Edits and the journal: the only way this package touches anything that is not its own.

An edit knows how to apply itself and holds what it replaced (a value, or that there was none). The journal applies
edits as they are yielded; an error unwinds all of them, and `undo` takes them back last-in first-out. No feature writes
an undo of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from .chain import Chain, Layer
from .platform import moved, parked


class Edit(Protocol):
    """One reversible change."""

    def apply(self) -> None: ...

    def undo(self) -> None: ...


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclass(eq=False)
class SetAttr:
    """Sets an attribute of one instance; a class attribute it hides shows again after `undo`."""

    owner: Any
    name: str
    value: Any
    _old: Any = field(default=ABSENT, init=False)

    def apply(self) -> None:
        self._old = vars(self.owner).get(self.name, ABSENT)
        setattr(self.owner, self.name, self.value)

    def undo(self) -> None:
        if self._old is ABSENT:
            vars(self.owner).pop(self.name, None)
        else:
            setattr(self.owner, self.name, self._old)


@dataclass(eq=False)
class SetItem:
    """Sets an item of a mapping (a registry, say)."""

    mapping: MutableMapping
    key: Any
    value: Any
    _old: Any = field(default=ABSENT, init=False)

    def apply(self) -> None:
        self._old = self.mapping.get(self.key, ABSENT)
        self.mapping[self.key] = self.value

    def undo(self) -> None:
        if self._old is ABSENT:
            self.mapping.pop(self.key, None)
        else:
            self.mapping[self.key] = self._old


@dataclass(eq=False)
class SwapModule:
    """Puts another module in a child's place. The replacement keeps the parent's order of children."""

    parent: nn.Module
    name: str
    module: nn.Module
    _old: nn.Module | None = field(default=None, init=False)

    def apply(self) -> None:
        self._old = self.parent._modules[self.name]
        self.parent._modules[self.name] = self.module

    def undo(self) -> None:
        current = self.parent._modules[self.name]
        if current is not self.module and current is not None:
            # Someone (a LoRA loader, say) has put a wrapper around it since: it stays, around the old module.
            for owner in current.modules():
                for name, child in owner._modules.items():
                    if child is self.module:
                        owner._modules[name] = self._old
                        return
        self.parent._modules[self.name] = self._old


@dataclass(eq=False)
class ParkWeight:
    """Puts the weight, or another parameter, of a module that is no longer used aside: to the host's memory, or away
    for good.

    Args:
        module: The module.
        successor: What stands in its place: tells where the weight belongs when it comes back.
        keep: Whether to keep it. If not, `undo` finds what the successor holds, and `lasting` says so.
        tensor: The parameter's name.
    """

    module: nn.Module
    successor: nn.Module
    keep: bool
    tensor: str = "weight"
    _moving: Future[None] | None = field(default=None, init=False)

    @property
    def lasting(self) -> str | None:
        return None if self.keep else "the original weights were dropped (keep_original='drop')"

    def apply(self) -> None:
        weight: torch.Tensor = getattr(self.module, self.tensor)
        if not self.keep:
            weight.data = weight.data.new_empty(0)
        elif weight.device.type == "cuda":
            self._moving = parked(weight)
        else:
            weight.data = moved(weight.data, torch.device("cpu"))

    def finish(self) -> None:
        """Waits until the weight lies where it is to stay."""
        if self._moving is not None:
            self._moving.result()
            self._moving = None

    def undo(self) -> None:
        if self._moving is not None:
            # If it failed, the weight lies in page-locked memory, whole.
            self._moving.exception()
            self._moving = None
        weight: torch.Tensor = getattr(self.module, self.tensor)
        if self.keep:
            there = next(itertools.chain(self.successor.buffers(), self.successor.parameters()), weight)
            # A cast of the model since passes the module by; its successor has seen it.
            seen = getattr(self.successor, self.tensor, weight)
            dtype = seen.dtype if isinstance(seen, torch.Tensor) and seen.is_floating_point() else weight.dtype
            weight.data = moved(weight.data, there.device).to(dtype)
        else:
            with torch.no_grad():
                weight.data = getattr(self.successor, self.tensor) + 0


@dataclass(eq=False)
class MoveTensors:
    """Moves what modules have on one device to another. They have nothing there yet; what is on a third one stays.

    Args:
        modules: The modules.
        here: Where their parameters and buffers are.
        there: Where they are to be.
    """

    modules: Sequence[nn.Module]
    here: torch.device
    there: torch.device

    def apply(self) -> None:
        try:
            self._move(self.here, self.there)
        except BaseException:
            # There is no room, say: the journal does not know of an edit that was half applied.
            self.undo()
            raise

    def undo(self) -> None:
        self._move(self.there, self.here)

    def _move(self, here: torch.device, there: torch.device) -> None:
        for module in self.modules:
            # As `module.to` does it, which would take along what is elsewhere.
            module._apply(lambda x: x.to(there) if x.device == here else x)
        if here.type == "cuda":
            # Other processes may be waiting for that memory.
            torch.cuda.empty_cache()


@dataclass(eq=False)
class AddLayer:
    """Adds a layer to the chain around one of an instance's methods (`forward` unless said otherwise).

    Args:
        owner: The instance whose method is wrapped.
        rank: Its place among the layers: higher ranks run outside lower ones, whatever the order of the edits.
        function: Called as `function(inner, *args, **kwargs)`.
        method: The name of the method.
    """

    owner: Any
    rank: int
    function: Callable[..., Any]
    method: str = "forward"
    _layer: Layer | None = field(default=None, init=False)

    def apply(self) -> None:
        self._layer = Layer(self.rank, self.function)
        Chain.around(self.owner, self.method).add(self._layer)

    def undo(self) -> None:
        chain = Chain.find(self.owner, self.method)
        if chain is not None and self._layer is not None:
            chain.remove(self._layer)


class Journal:
    """The edits in force, in the order they were applied."""

    def __init__(self) -> None:
        self._applied: list[Edit] = []

    def __len__(self) -> int:
        return len(self._applied)

    @property
    def lasting(self) -> list[str]:
        """Why some of the edits cannot be undone."""
        reasons = (getattr(edit, "lasting", None) for edit in self._applied)
        return list(dict.fromkeys(reason for reason in reasons if reason))

    def apply(self, edits: Iterable[Edit]) -> None:
        """Applies each edit as it is yielded. On any error, Ctrl-C included, everything in the journal is undone."""
        try:
            for edit in edits:
                edit.apply()
                self._applied.append(edit)
            for edit in self._applied:
                finish = getattr(edit, "finish", None)
                if finish is not None:
                    finish()
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Takes every edit back, last first. Safe to call twice."""
        while self._applied:
            self._applied.pop().undo()
