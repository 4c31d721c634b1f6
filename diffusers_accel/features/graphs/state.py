"""What a recorded graph depends on besides its inputs: where the weights lie, what adapters do, and the form of a
call."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
    why, adapters, found = None, [], []
    for path, part in module.named_modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        if "_hf_hook" in vars(part) or any("offload" in name for name in hooks):
            why = "its weights are offloaded"
        if path and any(map(_foreign, (*part._forward_hooks.values(), *part._forward_pre_hooks.values()))):
            why = f"{path} has hooks, which a graph would not call"
        tensors = (*part._parameters.values(), *part._buffers.values())
        found.append((id(part), part.training, *(_address(item) for item in tensors if item is not None)))
        if hasattr(part, "scaling") and hasattr(part, "active_adapters"):
            adapters.append((part, adapter_of(part)))
    return State((*found, *(state for _, state in adapters)), adapters, why)


def _foreign(hook: Any) -> bool:
    """Whether a hook is somebody's own: transformers has some by which a model returns what its layers computed."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")


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
