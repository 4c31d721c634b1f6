"""Tensors within nested arguments and results: taken out as a list, and put back into the same form.

A form is a pytree's structure together with every leaf that is no tensor. Two values of equal form differ in their
tensors alone, so a layer can keep a form, and fill it with new tensors as the stock module would.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..compat.torch_private import pytree

# The place of a tensor among the leaves of a form.
_TENSOR = object()


@dataclass(frozen=True)
class Form:
    """A nested value without its tensors.

    Attributes:
        structure: The pytree's structure, as torch has it.
        leaves: The leaves that are no tensors, in order, with a placeholder for every tensor.
    """

    structure: Any
    leaves: tuple[Any, ...]

    def fill(self, tensors: Iterable[torch.Tensor]) -> Any:
        """The nested value with these tensors, in the order of `split`."""
        following = iter(tensors)
        return pytree.tree_unflatten(
            [next(following) if item is _TENSOR else item for item in self.leaves], self.structure
        )

    @property
    def constants(self) -> list[Any]:
        """The leaves that are no tensors."""
        return [item for item in self.leaves if item is not _TENSOR]


def split(value: Any) -> tuple[list[torch.Tensor], Form]:
    """The tensors of a nested value, and its form."""
    leaves, structure = pytree.tree_flatten(value)
    tensors = [item for item in leaves if isinstance(item, torch.Tensor)]
    return tensors, Form(structure, tuple(_TENSOR if isinstance(item, torch.Tensor) else item for item in leaves))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples, dictionaries and model outputs."""
    return [item for item in pytree.tree_leaves(value) if isinstance(item, torch.Tensor)]
