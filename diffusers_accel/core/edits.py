"""Edits and the journal: the only way this package touches anything that is not its own.

An edit knows how to apply itself and holds what it replaced (a value, or that there was none). The journal records an
edit before it is applied, so that an error or Ctrl-C in the middle of one is unwound too, and `undo` takes all of them
back last-in first-out. No feature writes an undo of its own.

Between `apply` and `undo` the pipeline belongs to its user. A LoRA may have wrapped a module, a setter may have put
another value in an attribute's place. So `undo` looks for its module where it is now, and leaves alone a value that is
not its own any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from .chain import Chain, Layer
from .hooks import copy_diffusers_hooks, share_hooks
from .locations import ModuleLocations
from .platform import offload_to_host, to_device


class Edit(Protocol):
    """One reversible change.

    `undo` is right for an edit that was applied in full, in part or not at all, and may be called twice. `apply` may be
    called again after `undo`.
    """

    def apply(self) -> None: ...

    def undo(self) -> None: ...


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def _slots(owner: Any, name: str) -> MutableMapping[str, Any]:
    """The mapping that holds an instance's attribute: a module keeps parameters, buffers and children apart."""
    own = vars(owner)
    if name not in own and isinstance(owner, nn.Module):
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in own[kind]:
                found: MutableMapping[str, Any] = own[kind]
                return found
    return own


@dataclass(eq=False)
class SetAttr:
    """Sets an attribute of one instance; a class attribute it hides shows again after `undo`.

    Args:
        owner: The instance.
        name: The attribute. A child module, parameter or buffer of that name keeps its place among the others.
        value: Its value.

    Attributes:
        set_by_user: Whether its user has set it since, to whatever value.
    """

    owner: Any
    name: str
    value: Any
    set_by_user: bool = field(default=False, init=False)
    _old: Any = field(default=None, init=False)
    _held: MutableMapping[str, Any] | None = field(default=None, init=False)

    def apply(self) -> None:
        held = _slots(self.owner, self.name)
        self._old, self._held = held.get(self.name, ABSENT), held
        if held is vars(self.owner):
            setattr(self.owner, self.name, self.value)
        elif isinstance(self.value, nn.Module):
            held[self.name] = self.value
        else:
            # Python finds an instance's own attribute before it asks the module for a child of that name.
            vars(self.owner)[self.name] = self.value
            held[self.name] = None

    @property
    def target(self) -> Any:
        """The instance that it changes."""
        return self.owner

    @property
    def replaced(self) -> bool:
        """Whether somebody has put another value in its place since."""
        return self.set_by_user or _slots(self.owner, self.name).get(self.name, ABSENT) is not self.value

    def undo(self) -> None:
        held = self._held
        if held is None or self.replaced:
            return
        current = _slots(self.owner, self.name)
        if self._old is ABSENT:
            current.pop(self.name, None)
        elif held is current and held is vars(self.owner):
            setattr(self.owner, self.name, self._old)
        else:
            held[self.name] = self._old
            if current is not held:
                current.pop(self.name, None)
        self._held = None


@dataclass(eq=False)
class SetItem:
    """Sets an item of a mapping (a registry, say)."""

    mapping: MutableMapping
    key: Any
    value: Any
    _old: Any = field(default=None, init=False)
    _applied: bool = field(default=False, init=False)

    def apply(self) -> None:
        self._old, self._applied = self.mapping.get(self.key, ABSENT), True
        self.mapping[self.key] = self.value

    def undo(self) -> None:
        if not self._applied or self.mapping.get(self.key, ABSENT) is not self.value:
            return
        if self._old is ABSENT:
            self.mapping.pop(self.key, None)
        else:
            self.mapping[self.key] = self._old


@dataclass(eq=False)
class SwapModule:
    """Puts another module in a child's place. The replacement keeps the parent's order of children, and the hooks that
    others hang on either of the two are hooks of both.

    Args:
        parent: The module whose child it is.
        name: The child's name.
        module: The replacement.
        root: The model that both are part of: where the replacement is looked for, since LoRA layers move it when they
            are put around it or taken away.
        locations: Where modules are; looked up anew if it is not given.
    """

    parent: nn.Module
    name: str
    module: nn.Module
    root: nn.Module | None = None
    locations: ModuleLocations | None = field(default=None, init=False)
    _old: nn.Module | None = field(default=None, init=False)

    def apply(self) -> None:
        if self._old is None:
            self._old = self.parent._modules[self.name]
            self._swap(self._old, self.module)
        else:
            share_hooks(self._old, self.module)
            self._exchange(self._old, self.module)

    def _swap(self, old: nn.Module | None, new: nn.Module) -> None:
        assert old is not None
        share_hooks(old, new)
        self.parent._modules[self.name] = new

    def undo(self) -> None:
        if self._old is None:
            return
        copy_diffusers_hooks(self.module, self._old)
        self._exchange(self.module, self._old)
        self.locations = None

    @property
    def target(self) -> Any:
        """The module that is now part of the model."""
        return self.module

    def _exchange(self, here: nn.Module, there: nn.Module) -> None:
        locations = self.locations or ModuleLocations()
        locations.exchange(self.root if self.root is not None else self.parent, here, there)


# An empty buffer that says of which type a parked weight would be now.
_LIKE = "_diffusers_accel_like"


@dataclass(eq=False)
class OffloadWeight:
    """Puts the weight, or another parameter, of a module that is no longer used aside: to the host's memory, or away
    for good.

    Args:
        module: The module.
        successor: What stands in its place: tells where the weight belongs when it comes back.
        keep: Whether to keep it. If not, `undo` finds what the successor holds, and `irreversible` says so.
        tensor: The parameter's name.
    """

    module: nn.Module
    successor: nn.Module
    keep: bool
    tensor: str = "weight"
    _made: type | None = field(default=None, init=False)
    _moving: Future[None] | None = field(default=None, init=False)

    @property
    def target(self) -> Any:
        """The module that is now part of the model."""
        return self.successor

    @property
    def irreversible(self) -> str | None:
        return None if self.keep else "the original weights were dropped (keep_original='drop')"

    def apply(self) -> None:
        weight: torch.Tensor = getattr(self.module, self.tensor)
        self._made = type(getattr(self.successor, self.tensor, None))
        made = getattr(self.successor, self.tensor, None)
        plain = type(getattr(made, "data", None)) is torch.Tensor
        if not plain and not hasattr(self.successor, "weight_dtype"):
            # A tensor of another package may not follow a cast of the model; an empty one beside it does.
            like = torch.empty(0, dtype=weight.dtype, device=weight.device)
            self.successor.register_buffer(_LIKE, like, persistent=False)
        if not self.keep:
            weight.data = weight.data.new_empty(0)
        elif weight.device.type == "cuda":
            self._moving = offload_to_host(weight)
        else:
            weight.data = to_device(weight.data, torch.device("cpu"))

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
            # A cast of the model since passes the module by, and so does a weight that was loaded in the place of its
            # successor's; that has seen it.
            seen: Any = self.successor._buffers.get(_LIKE)
            if seen is None:
                seen = getattr(self.successor, self.tensor, weight)
            dtype = seen.dtype if isinstance(seen, torch.Tensor) and seen.is_floating_point() else weight.dtype
            now: Any = getattr(self.successor, self.tensor, None)
            loaded = type(now) is nn.Parameter and self._made is not nn.Parameter
            if loaded and type(now.data) is torch.Tensor and now.shape == weight.shape:
                weight.data = now.data
            else:
                weight.data = to_device(weight.data, there.device).to(dtype)
            self._follow()
        elif not weight.numel():
            with torch.no_grad():
                weight.data = getattr(self.successor, self.tensor) + 0

    def _follow(self) -> None:
        """Takes over what became of the module's other parameters in its successor: loaded, cast or moved ones."""
        for name, own in self.module._parameters.items():
            there = self.successor._parameters.get(name)
            same = there is own or there is None or own is None or name == self.tensor
            if not same and there.shape == own.shape and type(there.data) is torch.Tensor:  # type: ignore[union-attr]
                own.data = there.data  # type: ignore[union-attr]


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
        self._move(self.here, self.there)

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

    @property
    def target(self) -> Any:
        """The instance that it changes."""
        return self.owner

    def apply(self) -> None:
        if self._layer is None:
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

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._applied)

    @property
    def irreversible(self) -> list[str]:
        """Why some of the edits cannot be undone."""
        reasons = (getattr(edit, "irreversible", None) for edit in self._applied)
        return list(dict.fromkeys(reason for reason in reasons if reason))

    def apply(self, edits: Iterable[Edit]) -> None:
        """Applies each edit as it is yielded. On any error, Ctrl-C included, everything in the journal is undone."""
        try:
            for edit in edits:
                # Recorded first: an edit that is interrupted has changed something too.
                self._applied.append(edit)
                edit.apply()
            self._finish()
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Takes every edit back, last first. Safe to call twice.

        Ctrl-C does not stop it, and is raised when all is undone. An edit that cannot be undone does not keep others
        from it; its error is raised in the end.
        """
        try:
            self._unwind()
        except KeyboardInterrupt:
            self.undo()
            raise

    def _unwind(self) -> None:
        failed: Exception | None = None
        locations = ModuleLocations()
        while self._applied:
            edit = self._applied[-1]
            if hasattr(edit, "locations"):
                edit.locations = locations
            try:
                edit.undo()
            except Exception as error:  # whatever a foreign module raises while it is put back
                failed = failed or error
            # Undone first: if it is interrupted here, it is undone twice.
            if self._applied and self._applied[-1] is edit:
                self._applied.pop()
        if failed is not None:
            raise failed

    def transfer(self, other: Journal, belongs: Callable[[Edit], bool]) -> None:
        """Has another journal undo some of the edits, in their order, as if they had been applied before its own."""
        given = [edit for edit in self._applied if belongs(edit)]
        # For a moment they are in both, and Ctrl-C loses none: an edit may be undone twice.
        other._applied[:0] = given
        self._applied = [edit for edit in self._applied if edit not in given]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A context within which every edit is undone; the same edits are applied again behind it."""
        edits, locations = list(self._applied), ModuleLocations()
        self.undo()
        try:
            yield
        finally:
            for edit in edits:
                if hasattr(edit, "locations"):
                    edit.locations = locations
            self.apply(edits)

    def _finish(self) -> None:
        """Waits for whatever edits do beside what comes after them."""
        for edit in self._applied:
            finish = getattr(edit, "finish", None)
            if finish is not None:
                finish()
