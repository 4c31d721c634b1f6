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

from .chain import Chain

_DICTIONARIES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Attribute of a module with diffusers' hook registry, and the registry's name for layerwise casting.
REGISTRY = "_diffusers_hook"
_LAYERWISE = "layerwise_casting"


def share_hooks(stock: nn.Module, replacement: nn.Module) -> None:
    """Lets a replacement share the stock module's dictionaries of torch hooks: hooks added later are called too."""
    for name in _DICTIONARIES:
        vars(replacement)[name] = vars(stock)[name]


def copy_diffusers_hooks(replacement: nn.Module, stock: nn.Module) -> None:
    """Copies diffusers' hooks of a replacement to the stock module that comes back, if that has no registry."""
    registry: Any = vars(replacement).get(REGISTRY)
    if registry is None or REGISTRY in vars(stock):
        return
    stock_registry = type(registry).check_if_exists_or_initialize(stock)
    for name in registry._hook_order:
        # A copy: some hooks cannot be removed, and each holds the forward that it wraps.
        stock_registry.register_hook(copy.copy(registry.hooks[name]), name)


def has_layerwise_casting(module: nn.Module) -> bool:
    """Whether diffusers casts a module's weights before and after each call."""
    registry: Any = vars(module).get(REGISTRY)
    return registry is not None and _LAYERWISE in registry.hooks


def is_wrapped(module: nn.Module) -> bool:
    """Whether other code runs around a module's forward: a torch hook, or a `forward` of the instance that is no
    `Chain`."""
    own = vars(module).get("forward")
    return bool(module._forward_hooks or module._forward_pre_hooks) or not (own is None or isinstance(own, Chain))
