"""Attention backends of this package in diffusers' dispatcher. Private names of the dispatcher appear in this file
only.

A stock processor that has `_attention_backend` hands it to the dispatcher. Such a processor gets a backend of this
package on the instance. The process-wide setting, which diffusers' own setter changes for every pipeline, stays as it
is. A backend is named after the number of an `AttentionDispatcher` and calls that one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...core.edits import Edit
from ...errors import Unsupported
from ...kernels.attention import DISPATCHERS, AttentionDispatcher, dispatch

# The start of a backend's name; the number of its dispatcher follows.
_PREFIX = "diffusers_accel"


def registered_backend(dispatcher: AttentionDispatcher) -> tuple[Any, list[Edit]]:
    """The backend name of a dispatcher, and the edits that register the name in diffusers' tables. The edit that adds
    the dispatcher to `DISPATCHERS` comes after these.

    The tables hold no pipeline. If a pipeline is dropped without `restore`, its registration is removed.
    """
    weakref.finalize(dispatcher, _unregister_freed).atexit = False
    return _backend(dispatcher.number)[0], [_Register(dispatcher.number)]


@dataclass(eq=False)
class _Register:
    """Registers the backend of a dispatcher's number in diffusers' tables, unless it is there."""

    number: int

    def apply(self) -> None:
        name, attention = _backend(self.number)
        arguments = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
        for table, entry in zip(_tables(), (attention, [], arguments | {"_parallel_config"}), strict=True):
            table.setdefault(name, entry)

    def undo(self) -> None:
        _unregister_freed()


def _tables() -> tuple[dict[Any, Any], ...]:
    """The tables of diffusers: functions, constraints and names of arguments, by backend."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    return registry._backends, registry._constraints, registry._supported_arg_names


def _unregister_freed() -> None:
    """Removes backends whose dispatcher is gone from diffusers' tables, from the end.

    Compiled graphs know a backend by its place in a table. A backend before one of another pipeline therefore stays
    until that one is gone; its removal would recompile the other's graphs. While Dynamo reads the tables, nothing is
    removed.
    """
    if torch._guards.CompileContext.try_get() is not None:
        return
    for name in reversed(list(_tables()[0])):
        prefix, _, number = str(getattr(name, "_value_", "")).rpartition("_")
        if prefix != _PREFIX or int(number) in DISPATCHERS:
            return
        for table in _tables():
            table.pop(name, None)


@functools.cache
def _backend(number: int) -> tuple[Any, Callable[..., Any]]:
    """The backend name of a dispatcher's number, and its attention function. Compiled graphs know both by identity, so
    all dispatchers of one number share them.

    The name is an instance of diffusers' enumeration without being one of its members: the class stays as it is.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    value = f"{_PREFIX}_{number}"
    name: Any = str.__new__(AttentionBackendName, value)
    name._name_, name._value_ = value, value

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        refuse_unsupported_arguments(_parallel_config)
        return dispatch(number, query, key, value, attn_mask, is_causal, scale)

    return name, attention


def refuse_unsupported_arguments(given: Any) -> None:
    """Refuses diffusers' context parallelism and arguments for one backend: a kernel that ignored them would be
    wrong."""
    if given:
        raise Unsupported(
            "attention",
            "diffusers' context parallelism or backend arguments reached an accelerated attention layer.",
            "restore(pipe) before using them.",
        )
