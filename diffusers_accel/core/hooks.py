"""Hooks of other packages on a module that a replacement takes the place of.

torch keeps a module's hooks in dictionaries of the instance. A stock module and its replacement share these
dictionaries. A hook is therefore called whichever of the two is in the model, and its handle removes it from both.

diffusers' hooks (layerwise casting, say) wrap `forward` of one instance and cannot be shared. They are copied to the
stock module when it comes back.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..compat.diffusers_private import HOOK_REGISTRY, LAYERWISE_CASTING, diffusers_hooks, ordered_hooks
from ..compat.torch_private import HOOK_DICTIONARIES, forward_hooks_of, forward_pre_hooks_of
from .chain import Chain


def share_hooks(stock: nn.Module, replacement: nn.Module) -> None:
    """Lets a replacement share the stock module's dictionaries of torch hooks: hooks added later are called too."""
    for name in HOOK_DICTIONARIES:
        vars(replacement)[name] = vars(stock)[name]


def copy_diffusers_hooks(replacement: nn.Module, stock: nn.Module) -> None:
    """Copies diffusers' hooks of a replacement to the stock module that comes back, if that has no registry."""
    registry: Any = vars(replacement).get(HOOK_REGISTRY)
    if registry is None or HOOK_REGISTRY in vars(stock):
        return
    stock_registry = type(registry).check_if_exists_or_initialize(stock)
    for name, hook in ordered_hooks(registry):
        # A copy: some hooks cannot be removed, and each holds the forward that it wraps.
        stock_registry.register_hook(copy.copy(hook), name)


def has_layerwise_casting(module: nn.Module) -> bool:
    """Whether diffusers casts a module's weights before and after each call."""
    return LAYERWISE_CASTING in diffusers_hooks(module)


def is_wrapped(module: nn.Module) -> bool:
    """Whether other code runs around a module's forward: a torch hook, or a `forward` of the instance that is no
    `Chain`."""
    own = vars(module).get("forward")
    return bool(forward_hooks_of(module) or forward_pre_hooks_of(module)) or not (own is None or isinstance(own, Chain))
