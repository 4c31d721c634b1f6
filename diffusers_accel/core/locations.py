"""An index of module locations: the parents and names under which a model holds each module.

`undo` of a module swap needs it, since a LoRA may have moved the replacement under a wrapper of its own. One index
serves a whole unwinding journal; looking each module up anew would walk the model once per edit.
"""

from __future__ import annotations

from torch import nn

from ..compat.torch_private import children_of
from .submodules import submodules


class ModuleLocations:
    """Module -> (parent, name) pairs below a root. The index is built on first use, and updated by `exchange`.

    Locations are searched from the root: a former parent (a LoRA layer, say) may have left the model.
    """

    def __init__(self) -> None:
        self._indexes: dict[int, dict[int, list[tuple[nn.Module, str]]]] = {}

    def of(self, module: nn.Module, root: nn.Module) -> list[tuple[nn.Module, str]]:
        """The (parent, name) pairs that hold a module below a root; empty if it has left the model."""
        return self._index(root).get(id(module), [])

    def exchange(self, root: nn.Module, old: nn.Module, new: nn.Module) -> None:
        """Puts `new` in all locations of `old` below a root."""
        index = self._index(root)
        locations = index.pop(id(old), [])
        for parent, name in locations:
            children_of(parent)[name] = new
        if locations:
            index[id(new)] = locations
            for parent in new.modules():
                for name, child in children_of(parent).items():
                    if child is not None:
                        index[id(child)] = [(parent, name)]

    def _index(self, root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
        if id(root) not in self._indexes:
            index = self._indexes[id(root)] = {}
            for parent in submodules(root):
                for name, child in children_of(parent).items():
                    if child is not None:
                        index.setdefault(id(child), []).append((parent, name))
        return self._indexes[id(root)]
