"""Changes that users have made to a pipeline since its session began.

They are looked for as a request begins. A pipeline that was moved to another device is accelerated anew; an attribute
that was set since keeps its value, with a warning; two caches on one denoiser are refused.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..core.edits import SetAttr
from ..errors import Unsupported
from .session import Session

# Devices on which weights wait for their turn elsewhere.
_OFFLOADED = ("cpu", "meta")


def check_changes(
    session: Session, pipe: Any, denoisers: tuple[str, ...], accelerate_again: Callable[[Any], Any]
) -> None:
    """Finds changes as a request begins.

    Args:
        session: The session.
        pipe: The pipeline before anything of the request was done; `None` just before a denoiser's first call.
        denoisers: Names of a pipeline's components that can be denoisers.
        accelerate_again: Accelerates a pipeline with the session's arguments.

    Raises:
        Unsupported: The request would be wrong.
    """
    context, config = session.context, session.config
    if pipe is not None and not context.denoisers and any(getattr(pipe, name, None) is not None for name in denoisers):
        warnings.warn("accelerate: a denoiser was loaded since: everything is chosen again.", stacklevel=2)
        accelerate_again(pipe)
        return
    for denoiser in context.denoisers:
        if config.cache is not None and getattr(denoiser.module, "is_cache_enabled", False):
            raise Unsupported(
                "cache",
                "one of diffusers' own caches has been enabled since, and two would skip each other's steps.",
                f"{denoiser.name}.disable_cache(), or accelerate(pipe, cache=None, ...).",
                str(denoiser),
            )
        now = next(denoiser.module.parameters()).device.type
        if now not in (*_OFFLOADED, denoiser.device.type) and not context.outputs.rank_device:
            moved = f"accelerate: {denoiser} has moved from {denoiser.device.type} to {now}"
            if pipe is not None:
                warnings.warn(f"{moved}: everything is chosen again.", stacklevel=2)
                accelerate_again(pipe)
                return
            _warn_once(session, f"{moved}, for which nothing was chosen. Instead: accelerate(pipe, ...) again.")
    replaced = Counter(
        f"{edit.name} of {type(edit.owner).__name__}"
        for edit in session.edits
        if isinstance(edit, SetAttr) and edit.replaced
    )
    for name, count in replaced.items():
        _warn_once(
            session,
            f"accelerate: {name} was set by somebody else since ({count} of them), and stays as it is now. Instead: "
            "accelerate(pipe, ...) again, which takes it along.",
        )


def _warn_once(session: Session, message: str) -> None:
    """Warns unless the session has given this warning."""
    if message not in session.warned:
        session.warned.add(message)
        warnings.warn(message, stacklevel=2)
