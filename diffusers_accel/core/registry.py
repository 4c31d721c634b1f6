"""Registries of named records: attention kernels, linear formats, rules of caching.

A record is data with lazy loaders, so looking one up imports nothing. Registries are the only state that this package
keeps at module level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from ..config.fields import MAX_LENGTH
from ..errors import UnknownName, nearest, shown

Record = TypeVar("Record")


class Registry(Generic[Record]):
    """Named records of one kind.

    Args:
        kind: Noun for a record in errors, e.g. `"linear kernel"`.
        register: Name of the public function that adds a user's record.
        reserved: Words that a configuration field accepts beside names; no record may have one of them.
    """

    def __init__(self, kind: str, register: str, reserved: tuple[str, ...] = ()):
        self.kind, self.register, self.reserved = kind, register, reserved
        self._records: dict[str, Record] = {}
        self._families: dict[str, Callable[[str], Record]] = {}

    def add(self, name: str, record: Record, replace: bool = False) -> None:
        """Adds a record.

        Args:
            name: One line of text.
            record: The record.
            replace: Whether a record of this name may be replaced.

        Raises:
            ValueError: The name is no such text, is reserved, belongs to a family, or is taken.
        """
        if not isinstance(name, str) or not name.strip() or len(name) > MAX_LENGTH or not name.isprintable():
            raise ValueError(
                f"The name of a {self.kind} is one line of text of at most {MAX_LENGTH} characters, got "
                f"{shown(name)}. Give another name."
            )
        if name in self.reserved or name.startswith(tuple(self._families)):
            raise ValueError(
                f"{name!r} is reserved: it has another meaning where a {self.kind} is named. Give another name."
            )
        if name in self._records and not replace:
            raise ValueError(f"There is a {self.kind} named {name!r} already. Give another name, or replace=True.")
        self._records[name] = record

    def add_family(self, prefix: str, make: Callable[[str], Record]) -> None:
        """Adds a family of names. `get` makes the record of a name that begins with `prefix`; iteration lists none of
        them."""
        self._families[prefix] = make

    def get(self, name: str) -> Record:
        """The record of a name.

        Raises:
            UnknownName: There is none; the message has the nearest known name.
        """
        if name not in self._records:
            for prefix, make in self._families.items():
                if name.startswith(prefix):
                    return make(name)
            raise self.unknown(name)
        return self._records[name]

    def knows(self, name: str) -> bool:
        """Whether a record has this name, or a family may make one."""
        return name in self._records or name.startswith(tuple(self._families))

    def unknown(self, name: str, field: str = "", besides: Iterable[str] = ()) -> UnknownName:
        """The error for an unknown name.

        Args:
            name: The name.
            field: Section and field of the configuration that holds it, e.g. `"linear.algo"`.
            besides: Other words that this field accepts.
        """
        none = f"None is registered; diffusers_accel.{self.register} adds one."
        where = f"{field}={shown(name)}" if field else shown(name)
        reason = f"There is no {self.kind} of that name."
        # Recipes (names with a slash) are suggested only to a user who wrote a slash: there are many.
        known = [known for known in self._records if "/" in name or "/" not in known]
        return UnknownName(where, reason, nearest(name, (*known, *besides), none))

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)
