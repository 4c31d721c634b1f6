"""The dependencies of a captured graph besides its inputs: addresses of weights, state of LoRA layers, hooks.

A call's signature is here too: it decides which graph a call may replay.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...compat.accelerate_private import ACCELERATE_HOOK
from ...compat.diffusers_private import HOOK_REGISTRY, diffusers_hooks
from ...compat.torch_private import buffers_of, forward_hooks_of, forward_pre_hooks_of, parameters_of
from ...core.submodules import submodules
from .segments import CONSTANTS


@dataclass(frozen=True)
class Dependencies:
    """The present dependencies of graphs of one module.

    Attributes:
        weights: Addresses of all parameters and buffers with the state of LoRA layers, for comparison.
        loras: LoRA layers with their state, which a step callback may change.
        refusal: Reason for which nothing can be captured, or `None`.
    """

    weights: Hashable
    loras: list[tuple[Any, tuple[str, ...]]]
    refusal: str | None


def dependencies_of(module: nn.Module) -> Dependencies:
    """The present dependencies of graphs of a module's forward."""
    refusal: str | None = None
    loras: list[tuple[Any, tuple[str, ...]]] = []
    found: list[Hashable] = []
    for part in submodules(module):
        own = vars(part)
        if ACCELERATE_HOOK in own or (
            HOOK_REGISTRY in own and any("offload" in name for name in diffusers_hooks(part))
        ):
            refusal = "its weights are offloaded"
        hooked = forward_hooks_of(part) or forward_pre_hooks_of(part)
        if hooked and part is not module and _has_foreign_hooks(part):
            path = next(path for path, each in module.named_modules() if each is part)
            refusal = f"{path} has hooks, which a graph would not call"
        found += (id(part), part.training)
        for tensors in (parameters_of(part), buffers_of(part)):
            if tensors:
                found += [_address(item) for item in tensors.values() if item is not None]
        if "scaling" in own and hasattr(part, "active_adapters"):
            loras.append((part, lora_state(part)))
    return Dependencies((*found, *(state for _, state in loras)), loras, refusal)


def _has_foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has torch hooks of its user. Hooks of transformers, which collect layer outputs, do not
    count."""
    hooks = (*forward_hooks_of(module).values(), *forward_pre_hooks_of(module).values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def lora_state(module: Any) -> tuple[str, ...]:
    """The state of a LoRA layer besides its weights: scales, and active, disabled and merged adapters."""
    names = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
    return tuple(str(getattr(module, name, None)) for name in names)


def _address(item: torch.Tensor) -> int:
    try:
        return item.data_ptr()
    except RuntimeError:  # a wrapper subclass (torchao) has no storage
        return id(item)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def call_signature(value: Any) -> Hashable:
    """The signature of nested arguments: shapes, strides, dtypes and devices of tensors, and values of constants.
    Another object counts by its identity."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, str(value.device))
    if isinstance(value, Mapping):
        return tuple((key, call_signature(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(call_signature(item) for item in value))
    if isinstance(value, CONSTANTS):
        return (type(value).__name__, value)
    return (type(value).__name__, id(value))
