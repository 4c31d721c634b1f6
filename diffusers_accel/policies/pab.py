"""Pyramid Attention Broadcast's rule (https://arxiv.org/abs/2408.12588): attention is computed every few steps.

In the middle of a request the outputs of attention change little from step to step, those of cross-attention least.
Within a window of timesteps an output is used again until it is so many steps old.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Broadcast:
    """When one kind of attention is computed.

    Attributes:
        interval: On one of so many steps.
        window: Timesteps, of 1000, between which it may be skipped.
    """

    interval: int
    window: tuple[float, float] = (100.0, 800.0)

    def computes(self, timestep: float, age: int | None) -> bool:
        """Whether a step computes it.

        Args:
            timestep: The step's, of 1000.
            age: Steps since it was last computed; `None` if nothing is kept.
        """
        low, high = self.window
        return age is None or age >= self.interval or not low < timestep < high
