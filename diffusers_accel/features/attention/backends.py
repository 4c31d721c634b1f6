"""Attention backends of this package in diffusers' dispatcher.

A stock processor may have an attribute with the name of its backend, which it hands to the dispatcher. Such a processor
gets a backend of this package on the instance. The process-wide setting, which diffusers' own setter changes for every
pipeline, stays as it is. A backend is named after the number of an `AttentionDispatcher` and calls that one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...compat.diffusers_private import (
    attention_backend_entry,
    attention_backend_function,
    attention_backend_name,
    attention_backend_tables,
)
from ...compat.torch_private import is_tracing
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
        for table, entry in zip(attention_backend_tables(), attention_backend_entry(attention), strict=True):
            table.setdefault(name, entry)

    def undo(self) -> None:
        _unregister_freed()


def _unregister_freed() -> None:
    """Removes backends whose dispatcher is gone from diffusers' tables, from the end.

    Compiled graphs know a backend by its place in a table. A backend before one of another pipeline therefore stays
    until that one is gone; its removal would recompile the other's graphs. While Dynamo reads the tables, nothing is
    removed.
    """
    if is_tracing():
        return
    tables = attention_backend_tables()
    for name in reversed(list(tables[0])):
        prefix, _, number = str(getattr(name, "value", "")).rpartition("_")
        if prefix != _PREFIX or int(number) in DISPATCHERS:
            return
        for table in tables:
            table.pop(name, None)


@functools.cache
def _backend(number: int) -> tuple[Any, Callable[..., Any]]:
    """The backend name of a dispatcher's number, and its attention function. Compiled graphs know both by identity, so
    all dispatchers of one number share them."""
    attention = attention_backend_function(number, dispatch, refuse_unsupported_arguments)
    return attention_backend_name(f"{_PREFIX}_{number}"), attention


def refuse_unsupported_arguments(given: Any) -> None:
    """Refuses diffusers' context parallelism and arguments for one backend: a kernel that ignored them would be
    wrong."""
    if given:
        raise Unsupported(
            "attention",
            "diffusers' context parallelism or backend arguments reached an accelerated attention layer.",
            "restore(pipe) before using them.",
        )
