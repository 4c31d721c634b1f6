"""From what a user may write (a class, a mapping, a shorthand, a YAML file) to sections, checked field by field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Union

from ..errors import ConfigError, nearest
from .cache import POLICY_NAMES, CacheConfig, PolicyConfig


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; `ConfigError` if there is no such file or no mapping in it."""
    import yaml

    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"There is no configuration file {str(path)!r}. Give the path of a YAML file.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{str(path)!r} holds no mapping of configuration sections. Write e.g. 'attention: auto'.")
    return values


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def section_of(entry: dataclasses.Field[Any], value: Any) -> Any:
    """Turns what a user may write for a section into an instance of the section's class, or `None`."""
    section = entry.metadata["section"]
    choices: dict[str, type] | None = section if isinstance(section, dict) else None
    classes: tuple[type, ...] = tuple(choices.values()) if choices else (section,)
    if value is None or value is False:
        return None
    if isinstance(value, classes):
        for item in fields(value):  # type: ignore[arg-type]
            object.__setattr__(value, item.name, _checked(entry.name, value, item))
        if hasattr(value, "validate"):
            value.validate()
        return value
    if choices is not None:
        if isinstance(value, str):
            value = {"kind": value}
        if isinstance(value, Mapping):
            values = dict(value)
            kind = values.pop("kind", None)
            if kind is None:
                raise ConfigError(f"{entry.name}: say which with {entry.name}.kind. {nearest('', choices)}")
            if kind in POLICY_NAMES:
                return section_of(entry, _registered(str(kind), values))
            if kind not in choices:
                raise ConfigError(
                    f"{entry.name}: unknown kind {kind!r}. {nearest(str(kind), (*choices, *POLICY_NAMES))}"
                )
            return section_of(entry, _build(entry.name, choices[kind], values))
    else:
        if isinstance(value, Mapping):
            value = section._translated(value) if hasattr(section, "_translated") else value
            return section_of(entry, _build(entry.name, section, value))
        shorthand = section._shorthand
        if value is True and (shorthand is not None or getattr(section, "_switch", False)):
            return section()
        if shorthand is not None and isinstance(value, str):
            return section(**{shorthand: value})
    names = " or ".join(item.__name__ for item in classes)
    raise ConfigError(f"{entry.name}: expected {names}, a mapping of its fields, a shorthand or None, got {value!r}.")


def _registered(name: str, values: Mapping[str, Any]) -> PolicyConfig:
    """A registered policy's section; keys that are no field of every cache's are its factory's options."""
    shared = {item.name for item in fields(CacheConfig)}
    options = {key: value for key, value in values.items() if key not in shared}
    return PolicyConfig(name=name, options=options or None, **{key: values[key] for key in shared & set(values)})


def _build(name: str, section: type, values: Mapping[str, Any]) -> Any:
    known = {item.name for item in fields(section)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{name}: unknown key {key!r}. {nearest(str(key), known)}")
    return section(**values)


def _checked(section: str, holder: Any, item: dataclasses.Field) -> Any:
    """One field's value, checked against its annotation; lists become tuples and integers floats where asked."""
    annotation = typing.get_type_hints(type(holder))[item.name]
    value = getattr(holder, item.name)
    for kind in typing.get_args(annotation) if _is_union(annotation) else (annotation,):
        origin = typing.get_origin(kind) or kind
        if origin is tuple and isinstance(value, (list, tuple)):
            of = typing.get_args(kind)[0]
            if of in (str, int):
                if all(isinstance(item, of) and not isinstance(item, bool) for item in value):
                    return tuple(value)
            elif all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value):
                return tuple(float(number) for number in value)
        elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, origin):
            return value
    raise ConfigError(f"{section}.{item.name}: expected {item.type}, got {value!r}.")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)
