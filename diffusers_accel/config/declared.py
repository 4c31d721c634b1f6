"""Declarations of a section's fields, each beside its default; and the one check that reads the declarations.

A field's annotation says its type, `declared` its range and its meaning. A section checks itself as it is made, so a
section that exists is sound: numbers are finite, lists have become tuples, mappings read-only copies, and nothing of
the caller's is kept. A value that will not do is refused with section, field, value and the nearest legal one.
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

# Bounds of everything that is not declared narrower: of counts, of lengths of text.
MOST = 2**31 - 1
LONGEST = 1000

_KEY = "declared"
# Stands for the default of a field that must be given.
NEEDED: Any = type("Needed", (), {"__repr__": lambda self: "nothing"})()


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The values of a field, as far as its annotation does not say them.

    Attributes:
        means: What the field is, for a reader.
        least: Smallest number.
        most: Largest number.
        above: What every number is greater than.
        among: The strings it takes, where there are only these.
        names: What its strings are names of, where a registry knows them; see `Section.named`.
        besides: Strings that are taken beside such names.
        form: A regular expression of its strings.
        fewest: Items that a list or a mapping has at least.
        keys: What the keys of a mapping are, for a reader.
        also: What must hold of a value that has been read.
        wants: The whole of it in words, where the above do not say it.
        examples: Legal values, where they cannot be told from the above.
    """

    means: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    among: tuple[str, ...] = ()
    names: str | None = None
    besides: tuple[str, ...] = ()
    form: str | None = None
    fewest: int = 0
    keys: str = "globs"
    also: Callable[[Any], bool] | None = None
    wants: str | None = None
    examples: tuple[Any, ...] = ()


def declared(default: Any, means: str, **said: Any) -> Any:
    """A field of a section: its default, its meaning, and what `Declared` may say of it."""
    return dataclasses.field(default=default, metadata={_KEY: Declared(means=" ".join(means.split()), **said)})


def like(section: type, name: str, default: Any) -> Any:
    """A field of another section, with another default."""
    return dataclasses.field(default=default, metadata={_KEY: declaration(section.__dataclass_fields__[name])})  # type: ignore[attr-defined]


def declaration(field: dataclasses.Field[Any]) -> Declared:
    """The declaration of a field."""
    found: Declared = field.metadata[_KEY]
    return found


class FrozenDict(dict):
    """A mapping that cannot be changed, so that a configuration can be kept, compared and hashed."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("A configuration cannot be changed. dataclasses.replace makes another one.")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the configuration; what its fields take is declared at each.

    Attributes:
        section: Its name in `AccelConfig`.
        shorthand: The field that a string alone means.
        switch: Whether `True` alone means the section with its defaults.
        kind: What tells it from other classes of the same section.
    """

    section: typing.ClassVar[str]
    shorthand: typing.ClassVar[str | None] = None
    switch: typing.ClassVar[bool] = False
    kind: typing.ClassVar[str] = ""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.__doc__ = _documented(cls)

    def __post_init__(self) -> None:
        kinds = types_of(type(self))  # type: ignore[arg-type]
        for field in fields(self):
            value = checked(
                f"{self.section}.{field.name}", kinds[field.name], getattr(self, field.name), declaration(field)
            )
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Refuses what fields together do not mean."""

    def named(self) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
        """(field with section, what is named, name, what else that field takes) of every name that only a registry
        knows."""
        for field in fields(self):
            said, value = declaration(field), getattr(self, field.name)
            if said.names is None:
                continue
            items = value.items() if isinstance(value, Mapping) else [(None, value)]
            for key, name in items:
                if isinstance(name, str) and name not in said.besides:
                    where = f"{self.section}.{field.name}"
                    yield where if key is None else f"{where}[{key!r}]", said.names, name, said.besides


@functools.cache
def types_of(section: type) -> dict[str, Any]:
    """The types of a section's fields."""
    return typing.get_type_hints(section)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows."""
    union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


class _Unfit(Exception):
    """A value, or the item of it that it names, will not do."""

    def __init__(self, item: Any):
        self.item = item


def checked(where: str, annotation: Any, value: Any, said: Declared) -> Any:
    """A value as it is kept: of its type, within its range, and nobody else's.

    Args:
        where: Section and field, for the error.
        annotation: The type that is wanted.
        value: As the user wrote it.
        said: What is declared of the field.

    Raises:
        ConfigError: It will not do.
    """
    if value is NEEDED:
        raise ConfigError(f"{where}: is needed: {said.means}")
    item = value
    for kind in alternatives(annotation):
        try:
            found = _fit(kind, value, said)
            if said.also is not None and found is not None and not said.also(found):
                raise _Unfit(value)
            return found
        except _Unfit as error:
            # A container of the right type with a wrong item says more than a wrong type does.
            item = error.item if item is value else item
        except RecursionError:
            continue
    within = f" {shown(item)} will not do." if item is not value else ""
    wants = said.wants or _phrase(annotation, said)
    raise ConfigError(f"{where}: expected {wants}, got {shown(value)}.{within}{_hint(annotation, item, said)}")


def _fit(kind: Any, value: Any, said: Declared) -> Any:
    """A value as one type has it, or `_Unfit`."""
    origin = typing.get_origin(kind) or kind
    if kind is Any:
        return _plain_data(value)
    if origin is tuple and isinstance(value, (list, tuple)):
        of = typing.get_args(kind)
        each = [of[0]] * len(value) if of[-1] is Ellipsis else of
        if len(each) != len(value) or len(value) < said.fewest:
            raise _Unfit(value)
        return tuple(_item(one, item, said) for one, item in zip(each, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        _, of_values = typing.get_args(kind)
        if len(value) < said.fewest:
            raise _Unfit(value)
        keys = [_item(str, key, _TEXT) for key in value]
        return FrozenDict((key, _item(of_values, item, said)) for key, item in zip(keys, value.values(), strict=True))
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return _within(value, int(value), said)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return _within(value, float(value), said)
        except OverflowError:
            raise _Unfit(value) from None
    if kind is str and isinstance(value, str):
        text = str.__str__(value)
        known = (*said.among, *said.besides)
        if text in known:
            return text
        sound = text and len(text) <= LONGEST and text.isprintable() and not text.isspace()
        if not sound or said.among or (said.form is not None and re.fullmatch(said.form, text, re.ASCII) is None):
            raise _Unfit(value)
        return text
    if kind is type(None) and value is None:
        return None
    raise _Unfit(value)


def _item(kind: Any, item: Any, said: Declared) -> Any:
    try:
        return _fit(kind, item, said)
    except _Unfit:
        raise _Unfit(item) from None


def _within(value: Any, number: Any, said: Declared) -> Any:
    least, most = -MOST if said.least is None else said.least, MOST if said.most is None else said.most
    bounded = isinstance(number, int) or said.least is not None
    low = number >= least if bounded else math.isfinite(number)
    high = number <= most if isinstance(number, int) or said.most is not None else math.isfinite(number)
    if not (low and high and (said.above is None or number > said.above)):
        raise _Unfit(value)
    return number


def _plain_data(value: Any) -> Any:
    """What YAML can hold and comes back equal: a copy that cannot be changed."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return int(value)
    if isinstance(value, float) and not math.isnan(value):
        return float(value)
    if isinstance(value, str) and len(value) <= LONGEST and (value.isprintable() or not value):
        return str.__str__(value)
    if isinstance(value, (list, tuple)):
        return tuple(_plain_data(item) for item in value)
    if isinstance(value, Mapping):
        return FrozenDict((_item(str, key, _TEXT), _plain_data(item)) for key, item in value.items())
    raise _Unfit(value)


def plain(value: Any) -> Any:
    """Lists and dicts of a kept value's tuples and mappings, as YAML writes them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


_TEXT = Declared(means="")


# --- in words ---------------------------------------------------------------------------------------------------------


def _phrase(annotation: Any, said: Declared) -> str:
    """The values of a field in words: `"a whole number of at least 1, or None"`."""
    found = [_words(kind, said) for kind in alternatives(annotation)]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])}, or {found[-1]}"


def _words(kind: Any, said: Declared, many: bool = False) -> str:
    origin = typing.get_origin(kind) or kind
    bounds = span(said)
    if kind is Any:
        return "plain data, such as YAML holds (text, finite numbers, true, false, null, lists and mappings of them)"
    if origin is tuple:
        of = typing.get_args(kind)
        number = f"{said.fewest} or more " if said.fewest > 1 else ""
        number = number if of[-1] is Ellipsis else f"{len(of)} "
        empty = " (not an empty one)" if said.fewest == 1 else ""
        return f"a list of {number}{_words(of[0], said, many=True)}{empty}"
    if origin is dict:
        return f"a mapping of {said.keys} to {_words(typing.get_args(kind)[1], said, many=True)}"
    if kind is bool:
        return "true or false"
    if kind is int:
        return f"whole numbers{bounds}" if many else f"a whole number{bounds}"
    if kind is float:
        return f"finite numbers{bounds}" if many else f"a finite number{bounds}"
    if kind is type(None):
        return "None"
    known = tuple(repr(item) for item in said.among)
    if known:
        return " or ".join(known) if len(known) == 2 else f"one of {', '.join(known)}"
    if said.names is not None:
        return f"names of {said.names}s" if many else f"the name of a {said.names}".replace("a a", "an a")
    return "texts of one line" if many else "text of one line"


def span(said: Declared) -> str:
    """A range, behind what it is a range of; empty if there is none."""
    if said.least is not None and said.most is not None:
        return f" between {said.least:g} and {said.most:g}"
    if said.above is not None:
        return f" above {said.above:g}" + (f" and up to {said.most:g}" if said.most is not None else "")
    if said.least is not None:
        return f" of at least {said.least:g}"
    return f" up to {said.most:g}" if said.most is not None else ""


def _hint(annotation: Any, value: Any, said: Declared) -> str:
    """The nearest legal value, where there is one."""
    kinds = alternatives(annotation)
    kinds += tuple(of for kind in kinds for of in typing.get_args(kind) if of is not Ellipsis)
    known = (*said.among, *said.besides)
    if isinstance(value, str):
        number = _number(value) if {int, float} & set(kinds) and not (known or said.names) else None
        if number is not None and _fits(annotation, number, said):
            return f" Write {number!r}: it was read as text."
        lists = any(typing.get_origin(kind) is tuple for kind in kinds) and str not in alternatives(annotation)
        if lists and _fits(annotation, [value], said):
            return f" Write [{shown(value)}]."
        return f" {nearest(value, known)}" if known else ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        for kind in (int, float):
            if kind in kinds:
                close = _clamped(value, kind, said)
                return f" Nearest: {close!r}." if close is not None else ""
    return f" Known besides: {', '.join(said.besides)}." if said.besides else ""


def _clamped(value: float, kind: type, said: Declared) -> Any:
    """The nearest number within the range, or `None` if there is no nearest."""
    least, most = said.least, said.most
    if kind is int:
        least, most = -MOST if least is None else least, MOST if most is None else most
    within = value if least is None else max(value, least)
    within = within if most is None else min(within, most)
    if (said.above is not None and within <= said.above) or (most is None and abs(within) > MOST):
        return None
    return round(within) if kind is int else float(within)


def _number(text: str) -> int | float | None:
    for read in (int, float):
        try:
            return read(text[:40])  # type: ignore[no-any-return]
        except ValueError:
            continue
    return None


def _fits(annotation: Any, value: Any, said: Declared) -> bool:
    for kind in alternatives(annotation):
        try:
            _fit(kind, value, said)
            return True
        except _Unfit:
            continue
    return False


def _documented(section: type) -> str:
    """A section's docstring with the meaning of its fields, which is declared at each, in the place of arguments."""
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
        textwrap.fill(f"{name}: {declaration(field).means}", 116, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for name, field in {**own, **inherited}.items()
    ]
    if not lines:
        return text
    head, mark, tail = text.partition("    Raises:")
    return f"{head.rstrip()}\n\n    Args:\n" + "\n".join(lines) + f"\n\n    {mark.strip()}{tail}".rstrip() + "\n    "
