"""Sections from a user's input: a class, a mapping, a shorthand or a YAML file. Sections validate themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest, shown
from .cache import POLICY_NAMES, CacheConfig, PolicyConfig
from .fields import Section, accepted_inputs, from_mapping


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: The file is missing, unreadable or no YAML, or does not hold a mapping.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else None
    except OSError as error:
        raise ConfigError(f"{shown(str(path))} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from error
    if text is None:
        raise ConfigError(f"There is no configuration file {str(path)!r}. Give the path of a YAML file.")
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not YAML that can be read: {error}") from error
    if not isinstance(values, Mapping):
        found = "is empty" if values is None else f"is a {type(values).__name__}"
        raise ConfigError(
            f"{str(path)!r} {found} and holds no mapping of configuration sections. Write e.g. 'attention: auto'."
        )
    return values


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. A repeated key, of which YAML silently keeps the last, is refused.

    Raises:
        ValueError: The text is not YAML, repeats a key, or holds a date or number that Python cannot represent.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """A loader of plain data that refuses repeated keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """The mapping of a YAML node."""
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                place = (key.tag, key.value) if isinstance(key.value, Hashable) else None
                if place is not None and place in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise ValueError(f"line {key.start_mark.line + 1}: the key {shown(key.value)} is there twice.")
                seen.add(place)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deep.") from error


def build_section(entry: dataclasses.Field[Any], value: Any) -> Any:
    """The section of a user's input; `None` for an input that switches it off. The input is not changed.

    Args:
        entry: The section's field of `AccelConfig`.
        value: An instance of a section's class, a mapping, a shorthand string, `True`, `False` or `None`.

    Raises:
        ConfigError: The input is none of these, or has an unknown key or an invalid value.
    """
    section = entry.metadata["section"]
    choices: dict[str, type[Section]] | None = section if isinstance(section, dict) else None
    classes: tuple[type, ...] = tuple(choices.values()) if choices else (section,)
    if value is None or value is False or isinstance(value, classes):
        return None if value is False else value
    if choices is not None:
        if isinstance(value, str):
            value = {"kind": value}
        if isinstance(value, Mapping):
            values = dict(value)
            kind = values.pop("kind", None)
            known = (*choices, *POLICY_NAMES)
            if not isinstance(kind, str):
                got = "" if kind is None else f", got {shown(kind)}"
                raise ConfigError(f"{entry.name}.kind: expected the name of a rule{got}. {nearest('', known)}")
            if kind in choices:
                return from_mapping(entry.name, choices[kind], values)
            if kind in POLICY_NAMES:
                return _registered(entry.name, kind, values)
            raise ConfigError(f"{entry.name}.kind: unknown kind {shown(kind)}. {nearest(kind, known)}")
    else:
        if isinstance(value, Mapping):
            value = section.normalize_mapping(value) if hasattr(section, "normalize_mapping") else value
            return None if value is None else from_mapping(entry.name, section, value)
        if value is True and section.switch:
            return section()
        if section.shorthand is not None and isinstance(value, str):
            return section(**{section.shorthand: value})
        if section.number is not None and isinstance(value, int) and not isinstance(value, bool):
            return section.from_number(value)
    raise ConfigError(f"{entry.name}: expected {_accepted_inputs(section)}, or None, got {shown(value)}.")


def _accepted_inputs(section: Any) -> str:
    """The inputs that a section accepts, in words."""
    if isinstance(section, dict):
        return f"the class of a rule, a mapping of its kind and its fields, a kind ({', '.join(section)})"
    return accepted_inputs(section)


def _registered(section: str, name: str, values: Mapping[str, Any]) -> PolicyConfig:
    """The section of a registered policy. Keys besides the fields of `CacheConfig` are options of the policy's
    factory."""
    shared = {item.name for item in fields(CacheConfig)}
    options = {key: value for key, value in values.items() if key not in shared}
    given = {key: values[key] for key in shared & set(values)}
    return PolicyConfig(name=name, options=options or None, **given)
