"""Lazy tensors: tensors with a shape and a dtype whose values are computed by the first use that needs them.

Owns `LazyTensor`, the base class of every lazy tensor of this package. Stock code is given a lazy tensor in place of an
ordinary one, and uses it as such. Each call on a lazy tensor is one of four:

- A metadata accessor (`METADATA`) is answered without values.
- An operation that the subclass handles itself (`handle`) may stay without values.
- A write goes to values that every later use sees, or raises. `written_arguments` finds all its forms: an in-place
  method, an operator such as `+=`, a setter, an `out=`.
- Any other function runs on values, which take the place of the lazy tensors among its arguments.

The mechanism is torch's wrapper subclass (https://docs.pytorch.org/docs/stable/notes/extending.html). Calls from
Python, setters among them, enter `__torch_function__`. Operators of code that bypasses it enter `__torch_dispatch__`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from ..compat.torch_private import (
    DisableTorchFunctionSubclass,
    OpOverload,
    make_wrapper_subclass,
    pytree,
    schema_of,
    storage_identity,
)

_ATTRIBUTES = (
    "shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "is_meta", "is_sparse", "layout", "requires_grad",
    "itemsize", "nbytes",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device", "is_floating_point",
    "is_complex", "__len__",
)  # fmt: skip
# Functions of one tensor that do not depend on its values.
METADATA = frozenset(
    {getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES}
    | {getattr(torch.Tensor, name) for name in _METHODS}
    | {torch.numel, torch.is_floating_point, torch.is_complex}
)

# Functions that write to their first argument and whose names do not end with a single underscore.
_IN_PLACE = frozenset(
    {"__setitem__", "__set__"}
    | {f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow")}
    | {f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")}
)

# Arguments of these types are passed on as they are.
_ATOMS = frozenset(
    {type(None), bool, int, float, str, slice, torch.Tensor, torch.nn.Parameter, torch.dtype, torch.device}
)


class LazyTensor(torch.Tensor):
    """Base class of tensors whose values are computed by the first use that needs them.

    A subclass implements `compute`. It may override `handle` (operations that stay lazy), and `hold`, `writable` and
    `written` (the values that a write goes to).

    Attributes:
        held: The values from the first write or view on, an ordinary tensor whose metadata is the lazy tensor's; `None`
            before. The lazy tensor keeps them as long as it lives. They replace `compute()`, which knows of no write.
    """

    _held: torch.Tensor | None = None

    @classmethod
    def without_values(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        strides: Sequence[int] | None = None,
        requires_grad: bool = False,
    ) -> Self:
        """A tensor with metadata and no memory.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            device: The device on which its values will be.
            strides: Its strides in elements; those of a contiguous tensor if `None`.
            requires_grad: The value of its attribute `requires_grad`.
        """
        made: Self = make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device, requires_grad=requires_grad
        )
        return made

    def compute(self) -> torch.Tensor:
        """The values, an ordinary tensor of this tensor's shape, dtype and device."""
        raise NotImplementedError

    @classmethod
    def handle(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation that the subclass handles itself; `NotImplemented` for any other."""
        return NotImplemented

    @property
    def held(self) -> torch.Tensor | None:
        return self._held

    def hold(self, values: torch.Tensor) -> None:
        """Makes `values` the tensor's values from now on. Memory that the values share stays shared."""
        self._held = values

    def materialize(self) -> torch.Tensor:
        """The values: those that are held, or else computed ones."""
        held = self.held
        return self.compute() if held is None else held

    def writable(self) -> torch.Tensor:
        """The values that a function may write to. `written` follows the write."""
        values = self.materialize()
        self.hold(values)
        return values

    def written(self, values: torch.Tensor) -> None:
        """Takes over values from `writable` after a function has written to them."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        # `Tensor.__deepcopy__` would have lazy tensors replaced in all of `memo`, which may be cyclic.
        return copy.deepcopy(self.materialize(), memo)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA and args:
            held = args[0].held
            if held is not None:
                return func(held, *args[1:], **kwargs)
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = cls.handle(func, args, kwargs)
        return _run(func, args, kwargs) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def materialized(value: Any) -> Any:
    """A value with ordinary tensors in place of the lazy tensors in it.

    Args:
        value: A tensor, a container of tensors (any pytree), or any other value, which is returned unchanged.
    """
    return _replaced(value, lambda lazy: lazy.materialize())


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among a function's arguments that the function writes to, lazy or not.

    An operator overload declares them in its schema. For any other function its name, `out=` and `inplace=` tell.
    """
    if isinstance(func, OpOverload):
        schema = schema_of(func)
        if not schema.is_mutable:
            return []
        given = dict(zip((item.name for item in schema.arguments), args, strict=False)) | kwargs
        places = [item.name for item in schema.arguments if item.alias_info and item.alias_info.is_write]
        return _tensors([given.get(place) for place in places])
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    found: list[Any] = []
    if in_place or kwargs.get("inplace"):
        found.append(args[0] if args else next(iter(kwargs.values()), None))
    if kwargs.get("out") is not None:
        found.append(kwargs["out"])
    return _tensors(found) if found else []


def _tensors(value: Any) -> list[torch.Tensor]:
    return [item for item in pytree.tree_leaves(value) if isinstance(item, torch.Tensor)]


def _replaced(value: Any, replace: Callable[[LazyTensor], torch.Tensor]) -> Any:
    """A value with `replace(lazy)` in place of each lazy tensor in it."""
    if isinstance(value, LazyTensor):
        return replace(value)
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is tuple or kind is list:  # faster than pytree
        return kind([_replaced(item, replace) for item in value])
    if kind is dict:
        return {name: _replaced(item, replace) for name, item in value.items()}
    return pytree.tree_map_only(LazyTensor, replace, value)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function with values in place of the lazy tensors among its arguments."""
    targets = [item for item in written_arguments(func, args, kwargs) if isinstance(item, LazyTensor)]
    values: dict[int, tuple[LazyTensor, torch.Tensor]] = {}

    def replace(lazy: LazyTensor) -> torch.Tensor:
        found = values.get(id(lazy))
        if found is None:
            written = targets and any(lazy is target for target in targets)
            found = values[id(lazy)] = lazy, lazy.writable() if written else lazy.materialize()
        return found[1]

    result = func(*[_replaced(item, replace) for item in args], **_replaced(kwargs, replace))
    for target in targets:
        target.written(values[id(target)][1])
    for lazy, own in values.values():
        if targets and result is own and any(lazy is target for target in targets):
            return lazy  # a function that writes to its argument returns that argument
        if lazy.held is None and _share_memory(result, own):
            lazy.hold(own)  # a write to the view must be seen
    return result


def _share_memory(result: Any, values: torch.Tensor) -> bool:
    """Whether a function's result, a tensor or several, is a view of its argument."""
    first = result[0] if type(result) in (list, tuple) and result else result
    if not isinstance(first, torch.Tensor) or first.layout is not torch.strided:
        return False
    return storage_identity(first.untyped_storage()) == storage_identity(values.untyped_storage())
