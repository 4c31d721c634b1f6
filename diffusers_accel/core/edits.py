"""Edits and the journal: the only way that this package changes objects of others.

An edit applies itself and holds the value that it replaced, or the fact that there was none. The journal records an
edit before it is applied, so that an error or Ctrl-C in the middle is unwound too. `Journal.undo` reverts all edits,
last in first out. No feature writes an undo of its own.

Between `apply` and `undo` the pipeline belongs to its user. A LoRA may have wrapped a module, and a setter may have
replaced an attribute. An edit's `undo` therefore looks for its module at its current location, and leaves alone a value
that its user has set since.
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

from ..compat.torch_private import (
    BUFFERS,
    CHILDREN,
    PARAMETERS,
    apply_to_tensors,
    buffers_of,
    children_of,
    parameters_of,
)
from .chain import Chain, Layer
from .hooks import copy_diffusers_hooks, share_hooks
from .locations import ModuleLocations
from .platform import offload_to_host, to_device


class Edit(Protocol):
    """One reversible change.

    `undo` must be correct after a full, a partial and no `apply`, and when it is called twice. `apply` may be called
    again after `undo`.

    An edit may have more attributes, which the journal or the session reads:

    - `target`: the instance that it changes, for sessions that share components.
    - `irreversible`: the reason why it cannot be undone, or `None`.
    - `locations`: the journal sets an index of modules that edits share.
    - `finish()`: waits for background work.
    """

    def apply(self) -> None: ...

    def undo(self) -> None: ...


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def _slots(owner: Any, name: str) -> MutableMapping[str, Any]:
    """The mapping that holds an instance's attribute: `__dict__`, or a module's parameters, buffers or children."""
    own = vars(owner)
    if name not in own and isinstance(owner, nn.Module):
        for kind in (PARAMETERS, BUFFERS, CHILDREN):
            if name in own[kind]:
                found: MutableMapping[str, Any] = own[kind]
                return found
    return own


@dataclass(eq=False)
class SetAttr:
    """Sets an attribute of one instance. After `undo` a class attribute of that name is visible again.

    Args:
        owner: The instance.
        name: The attribute. A child module, parameter or buffer of that name keeps its position among the others.
        value: The new value.

    Attributes:
        set_by_user: Whether the user has set the attribute since. A setter's wrapper writes it, so that the same value
            counts too.
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
            # Python finds an attribute in `__dict__` before it asks the module for a child of that name.
            vars(self.owner)[self.name] = self.value
            held[self.name] = None

    @property
    def target(self) -> Any:
        """The instance that it changes."""
        return self.owner

    @property
    def replaced(self) -> bool:
        """Whether the attribute was set since."""
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
    """Sets an item of a mapping.

    Args:
        mapping: The mapping.
        key: The key.
        value: The new value.
    """

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
    """Replaces a child module. The order of the parent's children stays, and the two modules share torch hooks.

    Args:
        parent: The module that holds the child.
        name: The child's name.
        module: The replacement.
        root: The model. `undo` searches it for the replacement, since LoRA layers move a module when they are added or
            removed. `None` searches the parent.

    Attributes:
        locations: An index of modules that the journal shares among edits; `None` builds one.
    """

    parent: nn.Module
    name: str
    module: nn.Module
    root: nn.Module | None = None
    locations: ModuleLocations | None = field(default=None, init=False)
    _old: nn.Module | None = field(default=None, init=False)

    def apply(self) -> None:
        if self._old is None:
            self._old = children_of(self.parent)[self.name]
            self._swap(self._old, self.module)
        else:
            share_hooks(self._old, self.module)
            self._exchange(self._old, self.module)

    def _swap(self, old: nn.Module | None, new: nn.Module) -> None:
        assert old is not None
        share_hooks(old, new)
        children_of(self.parent)[self.name] = new

    def undo(self) -> None:
        if self._old is None:
            return
        copy_diffusers_hooks(self.module, self._old)
        self._exchange(self.module, self._old)
        self.locations = None

    @property
    def target(self) -> Any:
        """The module that is now in the model."""
        return self.module

    def _exchange(self, old: nn.Module, new: nn.Module) -> None:
        locations = self.locations or ModuleLocations()
        locations.exchange(self.root if self.root is not None else self.parent, old, new)


# Name of an empty buffer whose dtype follows casts of the model: the dtype that an offloaded weight has to take.
_DTYPE_PROBE = "_diffusers_accel_dtype"


@dataclass(eq=False)
class OffloadWeight:
    """Offloads the weight, or another parameter, of a replaced module to host memory, or frees it.

    Args:
        module: The replaced module.
        successor: The module in its place. Its device, dtype and loaded parameters are given to the restored module.
        keep: Whether to keep the weight in host memory. If not, it is freed: `undo` takes the successor's weight, and
            `irreversible` gives the reason.
        tensor: Name of the parameter.
    """

    module: nn.Module
    successor: nn.Module
    keep: bool
    tensor: str = "weight"
    _made: type | None = field(default=None, init=False)
    _moving: Future[None] | None = field(default=None, init=False)

    @property
    def target(self) -> Any:
        """The module that is now in the model."""
        return self.successor

    @property
    def irreversible(self) -> str | None:
        """The reason why `undo` does not bring the stock weight back, or `None`."""
        return None if self.keep else "the original weights were dropped (keep_original='drop')"

    def apply(self) -> None:
        weight: torch.Tensor = getattr(self.module, self.tensor)
        self._made = type(getattr(self.successor, self.tensor, None))
        made = getattr(self.successor, self.tensor, None)
        plain = type(getattr(made, "data", None)) is torch.Tensor
        if not plain and not hasattr(self.successor, "weight_dtype"):
            # Another package's tensor may not follow a cast of the model; an empty tensor beside it does.
            probe = torch.empty(0, dtype=weight.dtype, device=weight.device)
            self.successor.register_buffer(_DTYPE_PROBE, probe, persistent=False)
        if not self.keep:
            weight.data = weight.data.new_empty(0)
        elif weight.device.type == "cuda":
            self._moving = offload_to_host(weight)
        else:
            weight.data = to_device(weight.data, torch.device("cpu"))

    def finish(self) -> None:
        """Waits until the weight has arrived in host memory."""
        if self._moving is not None:
            self._moving.result()
            self._moving = None

    def undo(self) -> None:
        if self._moving is not None:
            # If the transfer failed, the whole weight lies in page-locked memory.
            self._moving.exception()
            self._moving = None
        weight: torch.Tensor = getattr(self.module, self.tensor)
        if self.keep:
            reference = next(itertools.chain(self.successor.buffers(), self.successor.parameters()), weight)
            # Casts of the model and loaded weights reach the successor only, which is in the model.
            seen: Any = buffers_of(self.successor).get(_DTYPE_PROBE)
            if seen is None:
                seen = getattr(self.successor, self.tensor, weight)
            dtype = seen.dtype if isinstance(seen, torch.Tensor) and seen.is_floating_point() else weight.dtype
            now: Any = getattr(self.successor, self.tensor, None)
            loaded = type(now) is nn.Parameter and self._made is not nn.Parameter
            if loaded and type(now.data) is torch.Tensor and now.shape == weight.shape:
                weight.data = now.data
            else:
                weight.data = to_device(weight.data, reference.device).to(dtype)
            self._take_over_parameters()
        elif not weight.numel():
            with torch.no_grad():
                weight.data = getattr(self.successor, self.tensor) + 0

    def _take_over_parameters(self) -> None:
        """Copies the successor's other parameters to the module, where they were loaded, cast or moved since."""
        for name, own in parameters_of(self.module).items():
            other = parameters_of(self.successor).get(name)
            same = other is own or other is None or own is None or name == self.tensor
            if not same and other.shape == own.shape and type(other.data) is torch.Tensor:  # type: ignore[union-attr]
                own.data = other.data  # type: ignore[union-attr]


@dataclass(eq=False)
class MoveTensors:
    """Moves the parameters and buffers of modules from one device to another. Tensors on a third device stay.

    Args:
        modules: The modules, without tensors on `destination`, so that `undo` moves the same tensors back.
        source: The device that tensors are moved from.
        destination: The device that tensors are moved to.
    """

    modules: Sequence[nn.Module]
    source: torch.device
    destination: torch.device

    def apply(self) -> None:
        self._move(self.source, self.destination)

    def undo(self) -> None:
        self._move(self.destination, self.source)

    def _move(self, source: torch.device, destination: torch.device) -> None:
        for module in self.modules:
            # `module.to` would move the tensors on a third device too.
            apply_to_tensors(module, lambda x: x.to(destination) if x.device == source else x)
        if source.type == "cuda":
            # Other processes may need this memory.
            torch.cuda.empty_cache()


@dataclass(eq=False)
class AddLayer:
    """Adds a layer to the chain around a method of an instance.

    Args:
        owner: The instance whose method is wrapped.
        rank: Position among the layers: higher ranks run outside lower ones, in any order of edits.
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
    """The edits that are applied, in the order of their application."""

    def __init__(self) -> None:
        self._applied: list[Edit] = []

    def __len__(self) -> int:
        return len(self._applied)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._applied)

    @property
    def irreversible(self) -> list[str]:
        """The reasons why edits cannot be undone, each once."""
        reasons = (getattr(edit, "irreversible", None) for edit in self._applied)
        return list(dict.fromkeys(reason for reason in reasons if reason))

    def apply(self, edits: Iterable[Edit]) -> None:
        """Applies each edit as it is yielded. On any error, Ctrl-C included, all edits in the journal are undone."""
        try:
            for edit in edits:
                # Recorded first: an interrupted edit must be undone too.
                self._applied.append(edit)
                edit.apply()
            self._finish()
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Undoes every edit, last first. Calling it twice is safe.

        Ctrl-C does not stop it, and is raised at the end. An error in one edit does not keep the others from being
        undone; the first error is raised at the end.
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
            except Exception as error:  # modules of other packages raise errors of any kind
                failed = failed or error
            # Removed after its undo: an interrupted edit is undone twice rather than never.
            if self._applied and self._applied[-1] is edit:
                self._applied.pop()
        if failed is not None:
            raise failed

    def transfer(self, other: Journal, belongs: Callable[[Edit], bool]) -> None:
        """Moves edits to the front of another journal, in their order.

        Args:
            other: The journal that will undo them.
            belongs: Whether an edit is moved.
        """
        moved = [edit for edit in self._applied if belongs(edit)]
        # The edits are in both journals for a moment, so that Ctrl-C loses none: they may be undone twice.
        other._applied[:0] = moved
        self._applied = [edit for edit in self._applied if edit not in moved]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A context in which every edit is undone. The same edits are applied again at its end."""
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
        """Waits for the background work of all edits."""
        for edit in self._applied:
            finish = getattr(edit, "finish", None)
            if finish is not None:
                finish()
