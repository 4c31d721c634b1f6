"""The protocol of caching policies: arithmetic that decides each step. No tensors, no modules, no device.

A policy object holds the state of one guidance branch of one denoiser in one request. Every request gets a new object,
so no state passes from one request to the next.
"""

from __future__ import annotations

from typing import Protocol

from ..core.step import Mode, StepState


class Policy(Protocol):
    """Decides one step at a time."""

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The mode of a step.

        Args:
            step: The place of the call in the request.
            change: Relative change of the policy's signal; 0 for a policy without one. `None` if the change is unknown,
                or no residual is kept to skip the step with.
        """
        ...
