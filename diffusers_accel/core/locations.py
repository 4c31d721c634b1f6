"""Where modules are in a model: under which parents and names, whatever has been put around them since."""

from __future__ import annotations

from torch import nn

from .submodules import submodules


class ModuleLocations:
    """Where modules are in a model: looked up once, and kept up with what is exchanged.

    A module's parent may have left the model since, as LoRA layers do that were around it, so every place is found from
    the root.
    """

    def __init__(self) -> None:
        self._known: dict[int, dict[int, list[tuple[nn.Module, str]]]] = {}

    def of(self, module: nn.Module, root: nn.Module) -> list[tuple[nn.Module, str]]:
        """Parents and names under which a module is found below a root."""
        return self._below(root).get(id(module), [])

    def exchange(self, root: nn.Module, here: nn.Module, there: nn.Module) -> None:
        """Puts a module in all places of another."""
        known = self._below(root)
        places = known.pop(id(here), [])
        for owner, name in places:
            owner._modules[name] = there
        if places:
            known[id(there)] = places
            for part in there.modules():
                for name, child in part._modules.items():
                    if child is not None:
                        known[id(child)] = [(part, name)]

    def _below(self, root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
        if id(root) not in self._known:
            found = self._known[id(root)] = {}
            for owner in submodules(root):
                for name, child in owner._modules.items():
                    if child is not None:
                        found.setdefault(id(child), []).append((owner, name))
        return self._known[id(root)]
