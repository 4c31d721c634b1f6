"""Registries: named records, loaded only when they are needed.

A registry maps a name to a record; nothing is imported by looking one up. It is the only kind of state this package
keeps at module level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ..errors import Unsupported, nearest

Record = TypeVar("Record")


class Registry(Generic[Record]):
    """Named records of one kind.

    Args:
        kind: What the records are, as a user reads it in an error.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._records: dict[str, Record] = {}
        self._families: dict[str, Callable[[str], Record]] = {}

    def add(self, name: str, record: Record, replace: bool = False) -> None:
        if name in self._records and not replace:
            raise ValueError(f"There is a {self.kind} named {name!r} already. Give another name, or replace=True.")
        self._records[name] = record

    def add_family(self, prefix: str, make: Callable[[str], Record]) -> None:
        """Names that begin with `prefix` have records made for them when they are asked for; none is listed."""
        self._families[prefix] = make

    def get(self, name: str) -> Record:
        """The record of that name; `Unsupported` with the nearest known name if there is none."""
        if name not in self._records:
            for prefix, make in self._families.items():
                if name.startswith(prefix):
                    return make(name)
            raise Unsupported(repr(name), f"There is no {self.kind} of that name.", nearest(name, self._records))
        return self._records[name]

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)
