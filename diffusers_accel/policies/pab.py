"""Pyramid Attention Broadcast's rule (https://arxiv.org/abs/2408.12588): attention is computed every few steps.

In the middle of a request, attention's outputs change little from step to step, and cross-attention's change least.
Within a window of timesteps an output is reused until its age in steps reaches the interval.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Broadcast:
    """The rule for one kind of attention.

    Attributes:
        interval: Steps from one computation to the next.
        window: Lowest and highest timestep (0 to 1000) between which outputs are reused.
    """

    interval: int
    window: tuple[float, float] = (100.0, 800.0)

    def computes(self, timestep: float, age: int | None) -> bool:
        """Whether a step computes attention.

        Args:
            timestep: The step's timestep, between 0 and 1000.
            age: Steps since the kept output was computed; `None` without a kept output.
        """
        low, high = self.window
        return age is None or age >= self.interval or not low < timestep < high
