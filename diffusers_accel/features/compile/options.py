"""The backends, modes and options of the installed torch's compiler.

A query loads the compiler, which takes seconds. It is made only for a configuration that names a backend, a mode or an
option.
"""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

import torch

from ...compat.torch_private import (
    LIST_OPTIONS,
    PRE_GRAD_PASS,
    inductor_modes,
    inductor_option_type,
    inductor_options,
    lookup_backend,
)
from ...config import CompileConfig, plain
from ...errors import ConfigError, nearest, shown


def backends() -> list[str]:
    """Names of backends, of torch and of registered packages."""
    return torch.compiler.list_backends(exclude_tags=None)  # type: ignore[arg-type]


def modes() -> list[str]:
    """Names of inductor's modes."""
    return inductor_modes()


def options_of(config: CompileConfig) -> dict[str, Any]:
    """A configuration's options as inductor takes them: name -> value, with tuples where inductor has tuples."""
    return {name: _value(name, value) for name, value in plain(config.options or {}).items()}


def refuse_options(config: CompileConfig) -> None:
    """Refuses options that the backend does not know or would ignore.

    Raises:
        ConfigError: An option is unknown or has a value of a wrong type, or the backend takes no options.
    """
    if not config.options:
        return
    if config.backend != "inductor":
        if not _takes_options(config.backend):
            raise ConfigError(
                f"compile.options: backend={config.backend!r} ignores them; got "
                f"{shown(plain(config.options))}. Give None, or backend='inductor'."
            )
        return
    known = inductor_options()
    for name, value in options_of(config).items():
        own = name.replace("-", "_")
        if own not in known:
            close = nearest(own, known).partition(" Known:")[0]
            listed = f"{LIST_OPTIONS} has all."
            raise ConfigError(
                f"compile.options: unknown option {shown(name)}. "
                f"{f'{close} ' if close.startswith('Did') else ''}{listed}"
            )
        if own == PRE_GRAD_PASS:
            raise ConfigError(
                f"compile.options[{name!r}]: the rewrites of this package are that pass. Give yours to another option, "
                "such as 'joint_custom_pre_pass', or to a backend of your own."
            )
        kind = inductor_option_type(own)
        if not _of_type(value, kind):
            words = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise ConfigError(
                f"compile.options[{name!r}]: expected {words}, got {shown(value)}. torch has {known[own]!r}."
            )


def _of_type(value: Any, kind: Any) -> bool:
    """Whether a value has the type of an inductor option. A type without a run-time check accepts any value."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in of
    if origin in (typing.Union, types.UnionType):
        return any(_of_type(value, one) for one in of)
    kind = origin or kind
    if not isinstance(kind, type):
        return True
    number = isinstance(value, bool) and kind in (int, float)
    return not number and isinstance(value, (int, float) if kind is float else kind)


def _value(name: str, value: Any) -> Any:
    """The value of an option; a list becomes a tuple if inductor's default is one."""
    if not isinstance(value, list):
        return value
    now = inductor_options().get(name.replace("-", "_"))
    return tuple(value) if isinstance(now, tuple) else value


def _takes_options(backend: str) -> bool:
    """Whether a backend has a parameter for options. torch's own backends ignore unknown keyword arguments. Another
    package's backend with arbitrary keyword arguments may use them, so it counts as one that takes options."""
    function = lookup_backend(backend)
    parameters = inspect.signature(function).parameters
    anything = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    return "options" in parameters or (anything and not function.__module__.startswith(f"{torch.__name__}."))
