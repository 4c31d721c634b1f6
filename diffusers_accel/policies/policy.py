"""What a caching policy is: arithmetic that says when to skip. No tensors, no modules, no device.

A policy object holds the state of one guidance branch of one denoiser in one request; a new one is made for every
request, so nothing can leak from one to the next.
"""

from __future__ import annotations

from typing import Protocol

from ..core.step import Mode, StepState


class Policy(Protocol):
    """Decides one step at a time."""

    def decide(self, step: StepState, change: float | None) -> Mode:
        """What this step does.

        Args:
            step: Where the step stands.
            change: Relative change of what is watched (0 where nothing is), or `None` where it is unknown or nothing is
                kept to skip the step with.
        """
        ...
