"""The backends, modes and options that the torch at hand compiles with. Asking torch loads its compiler, so it is asked
only of a configuration that names something."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

import torch

from ...config import CompileConfig, plain
from ...errors import ConfigError, nearest, shown


def backends() -> list[str]:
    """Names of backends, torch's and those that others have registered."""
    import torch._dynamo

    return torch._dynamo.list_backends(exclude_tags=None)  # type: ignore[arg-type]


def modes() -> list[str]:
    """Names of inductor's modes."""
    import torch._inductor

    return list(torch._inductor.list_mode_options())


def options_of(config: CompileConfig) -> dict[str, Any]:
    """Inductor's options by the names that it has for them, values of its own types."""
    return {name: _value(name, value) for name, value in plain(config.options or {}).items()}


def refuse_options(config: CompileConfig) -> None:
    """Refuses options that the backend would not take, or take no notice of.

    Raises:
        ConfigError: An option is not known, or of another type; or the backend has no options.
    """
    if not config.options:
        return
    if config.backend != "inductor":
        if not _takes_options(config.backend):
            raise ConfigError(
                f"compile.options: backend={config.backend!r} takes no notice of them; got "
                f"{shown(plain(config.options))}. Give None, or backend='inductor'."
            )
        return
    from torch._inductor import config as inductor

    known = inductor.get_config_copy()  # type: ignore[attr-defined]
    for name, value in options_of(config).items():
        own = name.replace("-", "_")
        if own not in known:
            close = nearest(own, known).partition(" Known:")[0]
            listed = "torch._inductor.list_options() has all."
            raise ConfigError(
                f"compile.options: unknown option {shown(name)}. "
                f"{f'{close} ' if close.startswith('Did') else ''}{listed}"
            )
        kind = inductor.get_type(own)  # type: ignore[attr-defined]
        if not _of_type(value, kind):
            words = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise ConfigError(
                f"compile.options[{name!r}]: expected {words}, got {shown(value)}. torch has {known[own]!r}."
            )


def _of_type(value: Any, kind: Any) -> bool:
    """Whether plain data is of a type that inductor has for an option, as far as it says."""
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
    """A list as a tuple where inductor has one."""
    if not isinstance(value, list):
        return value
    from torch._inductor import config as inductor

    now = inductor.get_config_copy().get(name.replace("-", "_"))  # type: ignore[attr-defined]
    return tuple(value) if isinstance(now, tuple) else value


def _takes_options(backend: str) -> bool:
    """Whether a backend has a parameter for options. torch's own swallow what they do not know; of others' it is not
    known what they make of it."""
    from torch._dynamo.backends.registry import lookup_backend

    function = lookup_backend(backend)
    parameters = inspect.signature(function).parameters
    anything = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    return "options" in parameters or (anything and not function.__module__.startswith(f"{torch.__name__}."))
