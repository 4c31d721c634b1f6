"""Registries: named records, loaded only when they are needed.

A registry maps a name to a record; nothing is imported by looking one up. It is the only kind of state this package
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
        kind: What the records are, as a user reads it in an error.
        register: The public function that lets a user's own in.
        reserved: Words that a configuration takes beside names.
    """

    def __init__(self, kind: str, register: str, reserved: tuple[str, ...] = ()):
        self.kind, self.register, self.reserved = kind, register, reserved
        self._records: dict[str, Record] = {}
        self._families: dict[str, Callable[[str], Record]] = {}

    def add(self, name: str, record: Record, replace: bool = False) -> None:
        if not isinstance(name, str) or not name.strip() or len(name) > MAX_LENGTH or not name.isprintable():
            raise ValueError(f"A {self.kind} is named by text of one line, got {shown(name)}.")
        if name in self.reserved or name.startswith(tuple(self._families)):
            raise ValueError(f"{name!r} means something else where a {self.kind} is named. Give another name.")
        if name in self._records and not replace:
            raise ValueError(f"There is a {self.kind} named {name!r} already. Give another name, or replace=True.")
        self._records[name] = record

    def add_family(self, prefix: str, make: Callable[[str], Record]) -> None:
        """Names that begin with `prefix` have records made for them when they are asked for; none is listed."""
        self._families[prefix] = make

    def get(self, name: str) -> Record:
        """The record of that name; `UnknownName` with the nearest known name if there is none."""
        if name not in self._records:
            for prefix, make in self._families.items():
                if name.startswith(prefix):
                    return make(name)
            raise self.unknown(name)
        return self._records[name]

    def knows(self, name: str) -> bool:
        """Whether there is a record of that name, or a family that may make one."""
        return name in self._records or name.startswith(tuple(self._families))

    def unknown(self, name: str, field: str = "", besides: Iterable[str] = ()) -> UnknownName:
        """The error for a name that is not here.

        Args:
            name: The name.
            field: Section and field of the configuration that have it.
            besides: What else that field takes.
        """
        none = f"None is registered; diffusers_accel.{self.register} lets one in."
        where = f"{field}={shown(name)}" if field else shown(name)
        reason = f"There is no {self.kind} of that name."
        # Records that say more than their name, behind a slash, are told to those who know that.
        known = [each for each in self._records if "/" in name or "/" not in each]
        return UnknownName(where, reason, nearest(name, (*known, *besides), none))

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)
