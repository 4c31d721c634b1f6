"""Tensors whose values come later: from another rank, once both have something to do.

A stock pipeline calls its denoiser once for each branch of guidance and then combines what it got. If each rank
computes one branch, a rank must go on to the next call before it has the last one's result. It is given a `Later` in
its place: a tensor with a shape and a type, and no values yet. Whatever is done to it in between is put off too, where
that can be; the first use that cannot wait has all ranks exchange what they have. Ranks run the same program, so they
come to that use together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Attributes that a tensor without values has.
_KNOWN = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "is_meta", "is_sparse", "names"}


class Later(torch.Tensor):
    """A tensor whose values are found by a function, when they are first needed.

    Args:
        like: A tensor of its shape and type on the device `meta`.
        device: Where its values will be.
        find: Returns them.
        waiting: Whether what is done to it may be put off for now.
    """

    _find: Callable[[], torch.Tensor]
    _waiting: Callable[[], bool]
    _found: torch.Tensor | None
    _like: torch.Tensor

    @staticmethod
    def __new__(
        cls: type[Later],
        like: torch.Tensor,
        device: torch.device,
        find: Callable[[], torch.Tensor],
        waiting: Callable[[], bool],
    ) -> Later:
        made: Later = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made._like, made._find, made._waiting, made._found = like, find, waiting, None
        return made

    @property
    def now(self) -> torch.Tensor:
        """The values, which are found if they are not."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"Later({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "__get__" and getattr(getattr(function, "__self__", None), "__name__", None) in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        mine = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Later)]
        if all(item._found is None and item._waiting() for item in mine) and not _writes(name, kwargs):
            put_off = _put_off(function, args, kwargs, mine[0])
            if put_off is not None:
                return put_off
        return function(*settled(args), **settled(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Where a mode or a subclass has kept `__torch_function__` from being asked.
        return function(*settled(args), **settled(kwargs or {}))


def settled(value: Any) -> Any:
    """A value with all tensors in it as they are."""
    return pytree.tree_map(lambda item: item.now if isinstance(item, Later) else item, value)


def _writes(name: str, kwargs: Any) -> bool:
    """Whether a function writes to what it is given."""
    return (
        kwargs.get("out") is not None
        or name in ("__setitem__", "__set__")
        or (name.endswith("_") and not name.endswith("__"))
        or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    )


def _put_off(function: Any, args: Any, kwargs: Any, first: Later) -> Any:
    """The result of a function that is called later; `None` if it must be called now."""

    def shape_only(item: Any) -> Any:
        if isinstance(item, Later):
            return item._like
        if isinstance(item, torch.device):
            return torch.device("meta")
        if isinstance(item, torch.Tensor) and item.device.type != "meta":
            return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
        return item

    for item in pytree.tree_leaves((args, kwargs)):
        # Moves to another device are for those who will read it at once.
        if isinstance(item, str) or (isinstance(item, torch.device) and item != first.device):
            return None
    try:
        form = function(*pytree.tree_map(shape_only, args), **pytree.tree_map(shape_only, kwargs))
    except Exception:  # whatever a function raises that wants values
        return None
    leaves, spec = pytree.tree_flatten(form)
    if not leaves or not all(isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" for leaf in leaves):
        return None
    done: list[Any] = []

    def find(index: int) -> torch.Tensor:
        if not done:
            done.extend(pytree.tree_leaves(function(*settled(args), **settled(kwargs))))
        found: torch.Tensor = done[index]
        return found

    made = [
        Later(leaf, first.device, lambda index=index: find(index), first._waiting)  # type: ignore[misc]
        for index, leaf in enumerate(leaves)
    ]
    return pytree.tree_unflatten(made, spec)
