"""A fast walk over all submodules of a model, for checks at the start of a request: the GPU waits for them.

`nn.Module.modules` builds a path for every submodule, and `getattr` of a missing attribute searches parameters, buffers
and children before it raises. For the 1355 submodules of FLUX.1 the state of a CUDA graph took 7 ms that way, and takes
2 ms with this walk.
"""

from __future__ import annotations

from torch import nn

from ..compat.torch_private import children_of


def submodules(module: nn.Module) -> list[nn.Module]:
    """A module and all its submodules, once each, in the order of `nn.Module.modules`."""
    found: dict[int, nn.Module] = {}
    stack = [module]
    while stack:
        current = stack.pop()
        if id(current) in found:
            continue
        found[id(current)] = current
        children = children_of(current)
        if children:
            stack += [child for child in reversed(children.values()) if child is not None]
    return list(found.values())
