"""Fields of configuration sections: each field's meaning and range beside its default, and the validation by them.

A field's annotation states its type, and `option` its meaning and range. A section validates itself when it is made, so
an existing section is valid. Its numbers are finite, lists have become tuples, mappings are read-only copies, and no
value is shared with the caller. An invalid value raises `ConfigError` with section, field, value and the nearest valid
value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Union

from ..errors import ConfigError, nearest, shown

# Bounds without a declared range: of counts, and of the length of a text.
MAX_NUMBER = 2**31 - 1
MAX_LENGTH = 1000

_METADATA = "spec"
# The default of a required field.
REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "nothing"})()


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """The valid values of a field, beyond its annotation. Bounds hold for each item of a list and each mapped value.

    Attributes:
        meaning: The field's meaning, as documentation.
        minimum: Smallest number.
        maximum: Largest number.
        exclusive_minimum: Bound that every number exceeds.
        choices: All valid strings, if there is a fixed set.
        registry: Kind of the registered names that are valid strings, e.g. `"attention kernel"`.
        extra_choices: Valid strings besides the registered names.
        pattern: Regular expression that a string matches.
        min_items: Smallest number of items of a list or a mapping.
        key_kind: Kind of a mapping's keys, in the plural, for messages.
        condition: Predicate that holds for every valid value after conversion.
        expected: Description of valid values for messages; `None` derives it from the other attributes.
        examples: Valid values for tests, if they cannot be derived from the other attributes.
    """

    meaning: str
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: float | None = None
    choices: tuple[str, ...] = ()
    registry: str | None = None
    extra_choices: tuple[str, ...] = ()
    pattern: str | None = None
    min_items: int = 0
    key_kind: str = "globs"
    condition: Callable[[Any], bool] | None = None
    expected: str | None = None
    examples: tuple[Any, ...] = ()


def option(default: Any, meaning: str, **spec: Any) -> Any:
    """A field of a section.

    Args:
        default: The default value; `REQUIRED` for none.
        meaning: The field's meaning, as documentation. Line breaks are removed.
        spec: Further attributes of `FieldSpec`.
    """
    return dataclasses.field(
        default=default, metadata={_METADATA: FieldSpec(meaning=" ".join(meaning.split()), **spec)}
    )


def option_like(section: type, name: str, default: Any) -> Any:
    """A field with the meaning and range of another section's field, and another default."""
    return dataclasses.field(default=default, metadata={_METADATA: spec_of(section.__dataclass_fields__[name])})  # type: ignore[attr-defined]


def spec_of(field: dataclasses.Field[Any]) -> FieldSpec:
    """The specification of a field that `option` made."""
    found: FieldSpec = field.metadata[_METADATA]
    return found


class FrozenDict(dict):
    """A read-only mapping, so that a configuration can be kept, compared and hashed."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("A configuration cannot be changed. dataclasses.replace makes another one.")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


@dataclass(frozen=True, kw_only=True)
class Section:
    """The base class of configuration sections. Subclasses declare their fields with `option`.

    Attributes:
        section: The section's name in `AccelConfig`.
        shorthand: Name of the field that a string alone stands for; `None` if a string is invalid.
        switch: Whether `True` alone stands for the section with its defaults.
        number: Meaning of a whole number alone, which `from_number` reads; `None` if it is invalid.
        kind: Name of this class among several classes of one section; empty for a single class.
    """

    section: typing.ClassVar[str]
    shorthand: typing.ClassVar[str | None] = None
    switch: typing.ClassVar[bool] = False
    number: typing.ClassVar[str | None] = None
    kind: typing.ClassVar[str] = ""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.__doc__ = _documented(cls)

    def __post_init__(self) -> None:
        kinds = types_of(type(self))  # type: ignore[arg-type]
        for field in fields(self):
            value = validated(
                f"{self.section}.{field.name}", kinds[field.name], getattr(self, field.name), spec_of(field)
            )
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Refuses invalid combinations of fields.

        Raises:
            ConfigError: Two fields contradict each other.
        """

    def registry_names(self) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
        """(field with section, kind of registry, name, extra choices) of every name that a registry must know."""
        for field in fields(self):
            spec, value = spec_of(field), getattr(self, field.name)
            if isinstance(value, Section):
                yield from value.registry_names()
            if spec.registry is None:
                continue
            items = value.items() if isinstance(value, Mapping) else [(None, value)]
            for key, name in items:
                if isinstance(name, str) and name not in spec.extra_choices:
                    where = f"{self.section}.{field.name}"
                    yield where if key is None else f"{where}[{key!r}]", spec.registry, name, spec.extra_choices


@functools.cache
def types_of(section: type) -> dict[str, Any]:
    """Field name -> type of a section's fields."""
    return typing.get_type_hints(section)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the annotation itself."""
    union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


class _Invalid(Exception):
    """A value, or an item of it, is invalid.

    Args:
        item: The invalid value or item.
    """

    def __init__(self, item: Any):
        self.item = item


def validated(where: str, annotation: Any, value: Any, spec: FieldSpec) -> Any:
    """A field's value after validation and conversion. The result shares nothing with the caller's value.

    Args:
        where: Section and field, for the message.
        annotation: The field's type.
        value: The value that the user gave.
        spec: The field's specification.

    Raises:
        ConfigError: The value is missing or invalid.
    """
    if value is REQUIRED:
        raise ConfigError(f"{where}: is needed: {spec.meaning}")
    item = value
    for kind in alternatives(annotation):
        try:
            found = _convert(kind, value, spec)
            if spec.condition is not None and found is not None and not spec.condition(found):
                raise _Invalid(value)
            return found
        except _Invalid as error:
            # An invalid item in a container of the right type is a better message than a wrong type.
            item = error.item if item is value else item
        except RecursionError:
            continue
    within = f" {shown(item)} is invalid." if item is not value else ""
    expected = spec.expected or _description(annotation, spec)
    raise ConfigError(f"{where}: expected {expected}, got {shown(value)}.{within}{_hint(annotation, item, spec)}")


def _convert(kind: Any, value: Any, spec: FieldSpec) -> Any:
    """A value converted to one type.

    Raises:
        _Invalid: The value has another type or is out of range.
    """
    origin = typing.get_origin(kind) or kind
    if kind is Any:
        return _frozen_data(value)
    if isinstance(kind, type) and issubclass(kind, Section):
        return _nested(kind, value)
    if origin is tuple and isinstance(value, (list, tuple)):
        of = typing.get_args(kind)
        each = [of[0]] * len(value) if of[-1] is Ellipsis else of
        if len(each) != len(value) or len(value) < spec.min_items:
            raise _Invalid(value)
        return tuple(_convert_item(one, item, spec) for one, item in zip(each, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        _, of_values = typing.get_args(kind)
        if len(value) < spec.min_items:
            raise _Invalid(value)
        keys = [_convert_item(str, key, _ANY_TEXT) for key in value]
        return FrozenDict(
            (key, _convert_item(of_values, item, spec)) for key, item in zip(keys, value.values(), strict=True)
        )
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return _in_range(value, int(value), spec)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return _in_range(value, float(value), spec)
        except OverflowError:
            raise _Invalid(value) from None
    if kind is str and isinstance(value, str):
        text = str.__str__(value)
        choices = (*spec.choices, *spec.extra_choices)
        if text in choices:
            return text
        sound = text and len(text) <= MAX_LENGTH and text.isprintable() and not text.isspace()
        matches = spec.pattern is None or re.fullmatch(spec.pattern, text, re.ASCII) is not None
        if not sound or spec.choices or not matches:
            raise _Invalid(value)
        return text
    if kind is type(None) and value is None:
        return None
    raise _Invalid(value)


def from_mapping(name: str, section: type[Section], values: Mapping[str, Any]) -> Any:
    """The section of a mapping of its fields.

    Args:
        name: The section's name, for the message.
        section: Its class.
        values: The mapping.

    Raises:
        ConfigError: A key is unknown, or a value is invalid.
    """
    known = [field.name for field in fields(section)]
    for key in values:
        if key not in known:
            written = str(key) if isinstance(key, str) else ""
            raise ConfigError(f"{name}: unknown key {shown(key)}. {nearest(written, known)}")
    return section(**values)


def accepted_inputs(section: type[Section]) -> str:
    """The inputs that a section accepts, in words."""
    words = [section.__name__, f"a mapping of its fields ({', '.join(field.name for field in fields(section))})"]
    words += [f"a string (its {section.shorthand})"] if section.shorthand is not None else []
    words += [f"a whole number ({section.number})"] if section.number is not None else []
    return ", ".join([*words, *(["true"] if section.switch else [])])


def _nested(kind: type[Section], value: Any) -> Section:
    """A section within a section: an instance, a mapping of its fields, its shorthand, or `True`.

    Raises:
        _Invalid: The value is none of these.
        ConfigError: A key is unknown, or a value of the inner section is invalid.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        normalized = kind.normalize_mapping(value) if hasattr(kind, "normalize_mapping") else value
        return from_mapping(kind.section, kind, normalized)
    if value is True and kind.switch:
        return kind()
    if kind.shorthand is not None and isinstance(value, str):
        return kind(**{kind.shorthand: value})
    raise _Invalid(value)


def _convert_item(kind: Any, item: Any, spec: FieldSpec) -> Any:
    try:
        return _convert(kind, item, spec)
    except _Invalid:
        raise _Invalid(item) from None


def _in_range(value: Any, number: Any, spec: FieldSpec) -> Any:
    """The number, if it is in the declared range, or in the default range for integers.

    Raises:
        _Invalid: The number is out of range, infinite or NaN.
    """
    minimum = -MAX_NUMBER if spec.minimum is None else spec.minimum
    maximum = MAX_NUMBER if spec.maximum is None else spec.maximum
    bounded = isinstance(number, int) or spec.minimum is not None
    low = number >= minimum if bounded else math.isfinite(number)
    high = number <= maximum if isinstance(number, int) or spec.maximum is not None else math.isfinite(number)
    if not (low and high and (spec.exclusive_minimum is None or number > spec.exclusive_minimum)):
        raise _Invalid(value)
    return number


def _frozen_data(value: Any) -> Any:
    """A read-only copy of plain data, i.e. data that YAML writes and reads back equal.

    Raises:
        _Invalid: The value is no plain data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return int(value)
    if isinstance(value, float) and not math.isnan(value):
        return float(value)
    if isinstance(value, str) and len(value) <= MAX_LENGTH and (value.isprintable() or not value):
        return str.__str__(value)
    if isinstance(value, (list, tuple)):
        return tuple(_frozen_data(item) for item in value)
    if isinstance(value, Mapping):
        return FrozenDict((_convert_item(str, key, _ANY_TEXT), _frozen_data(item)) for key, item in value.items())
    raise _Invalid(value)


def plain(value: Any) -> Any:
    """A field's value with lists for tuples, and dicts for read-only mappings and inner sections, as YAML writes it."""
    if isinstance(value, Section):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


_ANY_TEXT = FieldSpec(meaning="")


# --- messages ---------------------------------------------------------------------------------------------------------


def _description(annotation: Any, spec: FieldSpec) -> str:
    """The valid values in words: `"a whole number of at least 1, or None"`."""
    found = [_describe_type(kind, spec) for kind in alternatives(annotation)]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])}, or {found[-1]}"


def _describe_type(kind: Any, spec: FieldSpec, plural: bool = False) -> str:
    origin = typing.get_origin(kind) or kind
    bounds = range_text(spec)
    if kind is Any:
        return "plain data, such as YAML holds (text, finite numbers, true, false, null, lists and mappings of them)"
    if origin is tuple:
        of = typing.get_args(kind)
        number = f"{spec.min_items} or more " if spec.min_items > 1 else ""
        number = number if of[-1] is Ellipsis else f"{len(of)} "
        empty = " (not an empty one)" if spec.min_items == 1 else ""
        return f"a list of {number}{_describe_type(of[0], spec, plural=True)}{empty}"
    if origin is dict:
        return f"a mapping of {spec.key_kind} to {_describe_type(typing.get_args(kind)[1], spec, plural=True)}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return accepted_inputs(kind)
    if kind is bool:
        return "true or false"
    if kind is int:
        return f"whole numbers{bounds}" if plural else f"a whole number{bounds}"
    if kind is float:
        return f"finite numbers{bounds}" if plural else f"a finite number{bounds}"
    if kind is type(None):
        return "None"
    choices = tuple(repr(item) for item in spec.choices)
    if choices:
        return " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
    if spec.registry is not None:
        return f"names of {spec.registry}s" if plural else f"the name of a {spec.registry}".replace("a a", "an a")
    return "texts of one line" if plural else "text of one line"


def range_text(spec: FieldSpec) -> str:
    """The range of numbers in words, to follow a noun: `" between 0 and 1"`. Empty without a range."""
    if spec.minimum is not None and spec.maximum is not None:
        return f" between {spec.minimum:g} and {spec.maximum:g}"
    if spec.exclusive_minimum is not None:
        upper = f" and up to {spec.maximum:g}" if spec.maximum is not None else ""
        return f" above {spec.exclusive_minimum:g}{upper}"
    if spec.minimum is not None:
        return f" of at least {spec.minimum:g}"
    return f" up to {spec.maximum:g}" if spec.maximum is not None else ""


def _hint(annotation: Any, value: Any, spec: FieldSpec) -> str:
    """A sentence with the nearest valid value; empty if there is none."""
    kinds = alternatives(annotation)
    kinds += tuple(of for kind in kinds for of in typing.get_args(kind) if of is not Ellipsis)
    choices = (*spec.choices, *spec.extra_choices)
    if isinstance(value, str):
        number = _number(value) if {int, float} & set(kinds) and not (choices or spec.registry) else None
        if number is not None and _is_valid(annotation, number, spec):
            return f" Write {number!r}: it was read as text."
        lists = any(typing.get_origin(kind) is tuple for kind in kinds) and str not in alternatives(annotation)
        if lists and _is_valid(annotation, [value], spec):
            return f" Write [{shown(value)}]."
        return f" {nearest(value, choices)}" if choices else ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        for kind in (int, float):
            if kind in kinds:
                close = _clamped(value, kind, spec)
                return f" Nearest: {close!r}." if close is not None else ""
    return f" Known besides: {', '.join(spec.extra_choices)}." if spec.extra_choices else ""


def _clamped(value: float, kind: type, spec: FieldSpec) -> Any:
    """The nearest number in the range, or `None` if the range has no nearest number."""
    minimum, maximum = spec.minimum, spec.maximum
    if kind is int:
        minimum, maximum = -MAX_NUMBER if minimum is None else minimum, MAX_NUMBER if maximum is None else maximum
    within = value if minimum is None else max(value, minimum)
    within = within if maximum is None else min(within, maximum)
    excluded = spec.exclusive_minimum is not None and within <= spec.exclusive_minimum
    if excluded or (maximum is None and abs(within) > MAX_NUMBER):
        return None
    return round(within) if kind is int else float(within)


def _number(text: str) -> int | float | None:
    for read in (int, float):
        try:
            return read(text[:40])  # type: ignore[no-any-return]
        except ValueError:
            continue
    return None


def _is_valid(annotation: Any, value: Any, spec: FieldSpec) -> bool:
    for kind in alternatives(annotation):
        try:
            _convert(kind, value, spec)
            return True
        except _Invalid:
            continue
    return False


def _documented(section: type) -> str:
    """A section's docstring with an `Args` part from its fields' meanings."""
    text = section.__doc__ or ""
    own = {name: value for name, value in vars(section).items() if isinstance(value, dataclasses.Field)}
    inherited = {
        field.name: field
        for base in section.__mro__[1:]
        if dataclasses.is_dataclass(base)
        for field in fields(base)
        if field.name not in own
    }
    lines = [
        textwrap.fill(f"{name}: {spec_of(field).meaning}", 116, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for name, field in {**own, **inherited}.items()
    ]
    if not lines:
        return text
    head, mark, tail = text.partition("    Raises:")
    return f"{head.rstrip()}\n\n    Args:\n" + "\n".join(lines) + f"\n\n    {mark.strip()}{tail}".rstrip() + "\n    "
