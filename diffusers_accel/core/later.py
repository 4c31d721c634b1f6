"""Results of the denoiser that other ranks compute: lazy tensors until the pipeline needs a value.

Owns `Later`, the lazy tensor of CFG parallelism. A stock pipeline calls its denoiser once for each branch of guidance,
then combines the results. With one branch on each rank, a rank must reach its own call before the other rank's result
exists. `Later` takes the place of that result. Operations on it are deferred as well where their output's shape is
known. The first use that needs a value makes all ranks exchange their results. All ranks run the same program, so they
reach that use together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..compat.torch_private import pytree
from .lazy_tensor import LazyTensor, materialized, written_arguments


class Later(LazyTensor):
    """A tensor whose values are computed once, by a function, when a use needs them.

    Args:
        like: A tensor on the device `meta` with its shape, strides and dtype.
        device: The device of its values.
        find: Returns the values. It runs at most once.
        waiting: Whether an operation on the tensor may be deferred. It is asked once for each operand of an operation.
    """

    _like: torch.Tensor
    _find: Callable[[], torch.Tensor]
    _waiting: Callable[[], bool]
    # Operands of the deferred operation that makes this tensor, and tensors that deferred operations make of this one.
    _sources: tuple[Later, ...]
    _readers: list[weakref.ref[Later]]

    @staticmethod
    def __new__(
        cls: type[Later],
        like: torch.Tensor,
        device: torch.device,
        find: Callable[[], torch.Tensor],
        waiting: Callable[[], bool],
    ) -> Later:
        made = cls.without_values(like.shape, like.dtype, device, like.stride())
        made._like, made._find, made._waiting = like, find, waiting
        made._sources, made._readers = (), []
        return made

    def compute(self) -> torch.Tensor:
        values = self._find()
        self.hold(values)
        return values

    def writable(self) -> torch.Tensor:
        """The values. Every deferred operation that may read their memory runs first: it must not see the write."""
        related, seen = [self], set()
        while related:
            item = related.pop()
            if id(item) not in seen:
                seen.add(id(item))
                item.materialize()
                related += [*item._sources, *(reader for ref in item._readers if (reader := ref()) is not None)]
        return super().writable()

    @classmethod
    def handle(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Defers a function whose operands all wait for values, if it writes to none of its arguments."""
        operands = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Later)]
        if not all(item.held is None and item._waiting() for item in operands):
            return NotImplemented
        if not operands or written_arguments(func, args, kwargs):
            return NotImplemented
        return _deferred(func, args, kwargs, operands)


def _deferred(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Later]) -> Any:
    """The result of a function that is called later; `NotImplemented` if it must be called now."""
    device = operands[0].device

    def shape_only(item: Any) -> Any:
        if isinstance(item, Later):
            return item._like
        if isinstance(item, torch.device):
            return torch.device("meta")
        if isinstance(item, torch.Tensor) and item.device.type != "meta":
            return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
        return item

    for item in pytree.tree_leaves((args, kwargs)):
        # A move to another device precedes a read of the values.
        if isinstance(item, str) or (isinstance(item, torch.device) and item != device):
            return NotImplemented
    try:
        form = func(*pytree.tree_map(shape_only, args), **pytree.tree_map(shape_only, kwargs))
    except Exception:  # any error of a function that needs values
        return NotImplemented
    leaves, spec = pytree.tree_flatten(form)
    if not leaves or not all(isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" for leaf in leaves):
        return NotImplemented
    results: list[Any] = []

    def find(index: int) -> torch.Tensor:
        if not results:
            results.extend(pytree.tree_leaves(func(*materialized(args), **materialized(kwargs))))
        found: torch.Tensor = results[index]
        return found

    made = []
    for index, leaf in enumerate(leaves):
        result = Later(leaf, device, lambda index=index: find(index), operands[0]._waiting)  # type: ignore[misc]
        result._sources = tuple(operands)
        for operand in operands:
            operand._readers.append(weakref.ref(result))
        made.append(result)
    return pytree.tree_unflatten(made, spec)
