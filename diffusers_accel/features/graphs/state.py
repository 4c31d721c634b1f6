"""What a recorded graph depends on besides its inputs: where the weights lie, what adapters do, and the form of a
call."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.submodules import submodules
from .segments import CONSTANTS


@dataclass(frozen=True)
class State:
    """A module's, as it is now.

    Attributes:
        weights: To be compared: every tensor's place, and what adapters do.
        adapters: LoRA layers, and what each does besides its weights; it may change between two steps.
        why: Why nothing can be recorded, or `None`.
    """

    weights: Hashable
    adapters: list[tuple[Any, tuple[str, ...]]]
    why: str | None


def state_of(module: nn.Module) -> State:
    """What a graph of a module's forward would depend on, and what forbids one."""
    why: str | None = None
    adapters: list[tuple[Any, tuple[str, ...]]] = []
    found: list[Hashable] = []
    for part in submodules(module):
        own = vars(part)
        if "_hf_hook" in own or ("_diffusers_hook" in own and any("offload" in name for name in _hooks_of(part))):
            why = "its weights are offloaded"
        called = part._forward_hooks or part._forward_pre_hooks
        if called and part is not module and _has_foreign_hooks(part):
            path = next(path for path, each in module.named_modules() if each is part)
            why = f"{path} has hooks, which a graph would not call"
        found += (id(part), part.training)
        for tensors in (part._parameters, part._buffers):
            if tensors:
                found += [_address(item) for item in tensors.values() if item is not None]
        if "scaling" in own and hasattr(part, "active_adapters"):
            adapters.append((part, adapter_of(part)))
    return State((*found, *(state for _, state in adapters)), adapters, why)


def _hooks_of(module: Any) -> Iterable[str]:
    """Names of diffusers' hooks."""
    return getattr(module._diffusers_hook, "hooks", ())


def _has_foreign_hooks(module: nn.Module) -> bool:
    """Whether torch's hooks are somebody's own: transformers has some by which a model returns what its layers
    computed."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def adapter_of(module: Any) -> tuple[str, ...]:
    """What a LoRA layer does besides its weights."""
    names = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
    return tuple(str(getattr(module, name, None)) for name in names)


def _address(item: torch.Tensor) -> int:
    try:
        return item.data_ptr()
    except RuntimeError:  # a tensor that is made of others
        return id(item)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def call_form(value: Any) -> Hashable:
    """What tells kinds of calls apart."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, str(value.device))
    if isinstance(value, Mapping):
        return tuple((key, call_form(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(call_form(item) for item in value))
    if isinstance(value, CONSTANTS):
        return (type(value).__name__, value)
    return (type(value).__name__, id(value))
