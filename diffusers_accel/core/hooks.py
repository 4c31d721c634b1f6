"""Hooks that others hang on a module, when another module takes its place.

torch keeps a module's hooks in dictionaries of the instance. A module and its replacement share them, so that a hook is
called whichever of the two is in the model, and its handle removes it from both. Hooks that wrap `forward` (diffusers'
layerwise casting, say) cannot be shared: they are hung on the module that comes back.
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
# Where diffusers keeps what it wraps around a module's forward, and the hook of layerwise casting there.
REGISTRY = "_diffusers_hook"
_LAYERWISE = "layerwise_casting"


def share_hooks(stock: nn.Module, replacement: nn.Module) -> None:
    """Has a replacement call the hooks of the module whose place it takes, those added later too."""
    for name in _DICTIONARIES:
        vars(replacement)[name] = vars(stock)[name]


def copy_diffusers_hooks(replacement: nn.Module, stock: nn.Module) -> None:
    """Hangs diffusers' hooks of a replacement on the stock module that comes back."""
    registry: Any = vars(replacement).get(REGISTRY)
    if registry is None or REGISTRY in vars(stock):
        return
    there = type(registry).check_if_exists_or_initialize(stock)
    for name in registry._hook_order:
        # A copy: some cannot be removed from where they are, and each knows the forward that it wraps.
        there.register_hook(copy.copy(registry.hooks[name]), name)


def has_layerwise_casting(module: nn.Module) -> bool:
    """Whether diffusers casts a module's weights before and after each call."""
    registry: Any = vars(module).get(REGISTRY)
    return registry is not None and _LAYERWISE in registry.hooks


def is_wrapped(module: nn.Module) -> bool:
    """Whether somebody's own code runs around a module's forward: a hook of torch's, or another `forward`."""
    own = vars(module).get("forward")
    return bool(module._forward_hooks or module._forward_pre_hooks) or not (own is None or isinstance(own, Chain))
