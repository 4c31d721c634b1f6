"""The errors of the package. Each names the thing, the reason and the way out, and is raised before any change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Characters of a value that an error shows.
_SHOWN = 120


class AccelError(Exception):
    """Base class of all deliberate errors of this package."""


class Unsupported(AccelError):
    """A request that cannot be carried out; nothing was changed.

    Args:
        feature: The refused feature, field or kernel, as the user wrote it.
        reason: The reason, one sentence.
        instead: The way out, as text to write instead.
        module: The module or class concerned, or `None`.
    """

    def __init__(self, feature: str, reason: str, instead: str, module: str | None = None):
        self.feature, self.reason, self.instead, self.module = feature, reason, instead, module
        where = f" on {module}" if module else ""
        super().__init__(f"{feature}{where}: {reason} Instead: {instead}")


class ConfigError(AccelError, ValueError):
    """An invalid configuration: an unknown key, a wrong type or value, a missing or malformed file."""


class UnknownName(Unsupported, ConfigError):
    """A name in a configuration that its registry does not have."""


class PolicyFailed(AccelError):
    """A user's caching policy raised, or did not return a mode."""


class RanksDiffer(AccelError):
    """Processes that share a request were given different requests."""


class Busy(AccelError):
    """Another request runs on the same denoiser, and waiting is switched off or impossible."""


class NotAccelerated(AccelError):
    """`restore`, `stats` or `warmup` was called with a pipeline that `accelerate` has not touched."""


def nearest(name: str, known: Iterable[str], none: str = "None is known.") -> str:
    """Sentences with the nearest known name and all known names, for the end of an error message.

    Args:
        name: The unknown name.
        known: The known names.
        none: The sentence without any known name.
    """
    names = sorted(known)
    if not names:
        return none
    close = difflib.get_close_matches(name[:_SHOWN], names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."


def shown(value: object) -> str:
    """A short text of any value, for a message. `repr` may raise: for integers of thousands of digits, or in a user's
    object."""
    try:
        text = repr(value)
    except Exception:
        text = f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 30]}... ({len(text)} characters)"
