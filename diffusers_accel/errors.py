"""The errors a user meets. Each names the thing, the reason and the way out, and is raised before anything changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Characters of a value that an error shows.
_SHOWN = 120


class AccelError(Exception):
    """Base class of every error this package raises on purpose."""


class Unsupported(AccelError):
    """What was asked for cannot be done here; nothing was changed.

    Args:
        feature: The feature (or kernel) that refuses, as the user wrote it.
        reason: Why it cannot be done, in one sentence.
        instead: What to write instead.
        module: The module or class concerned, where there is one.
    """

    def __init__(self, feature: str, reason: str, instead: str, module: str | None = None):
        self.feature, self.reason, self.instead, self.module = feature, reason, instead, module
        where = f" on {module}" if module else ""
        super().__init__(f"{feature}{where}: {reason} Instead: {instead}")


class ConfigError(AccelError, ValueError):
    """A configuration that cannot be read: an unknown key, a wrong type, a missing or malformed file."""


class UnknownName(Unsupported, ConfigError):
    """A configuration names what no registry has."""


class PolicyFailed(AccelError):
    """A caching policy of the user's own raised, or returned what is no mode."""


class RanksDiffer(AccelError):
    """Processes that share a request were given different ones."""


class Busy(AccelError):
    """Another request is running on the same denoiser, and was not to be waited for."""


class NotAccelerated(AccelError):
    """`restore`, `stats` or `warmup` was called with a pipeline that `accelerate` has not touched."""


def nearest(name: str, known: Iterable[str], none: str = "None is known.") -> str:
    """A phrase with the nearest known name and all of them, for the end of an error message; `none` if there are
    none."""
    names = sorted(known)
    if not names:
        return none
    close = difflib.get_close_matches(name[:_SHOWN], names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."


def shown(value: object) -> str:
    """A value for a reader: short, and whatever it is. Python refuses to print integers of thousands of digits, and
    anybody's object may refuse."""
    try:
        text = repr(value)
    except Exception:
        text = f"a value of type {type(value).__name__} that cannot be printed"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 30]}... ({len(text)} characters)"
