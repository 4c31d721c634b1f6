"""MagCache's rule (https://arxiv.org/abs/2506.09045): a table of magnitude ratios gives a reused residual's error.

The residual's magnitude falls from step to step by ratios that hardly depend on the prompt. A residual that is reused
over several steps is wrong by the product of their ratios. The errors |1 - product| are summed, and steps are skipped
while the sum is small. No tensor is measured, so a schedule's decisions are known before its first step.

The table has one ratio per step of a schedule. A schedule of another length takes the nearest entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.step import Mode, StepState


def nearest_steps(table: Sequence[float], steps: int) -> tuple[float, ...]:
    """A table of another length.

    Args:
        table: The ratios.
        steps: Number of steps wanted.
    """
    if steps == 1:
        return (table[-1],)
    return tuple(table[round(place * (len(table) - 1) / (steps - 1))] for place in range(steps))


@dataclass
class MagCache:
    """The policy of one guidance branch for one request. The module states the rule.

    Attributes:
        threshold: The summed error up to which a step is skipped.
        ratios: Ratio of the residual's magnitude to the previous step's, for each step of a schedule.
        max_consecutive: Largest number of consecutive skipped steps.
        retention: Share of always computed steps, between 0 and 1, at the beginning of this policy's steps. Each of two
            experts counts from its own first step.
        product: Product of the ratios since the last computed step.
        error: Sum of the errors since the last computed step.
        consecutive: Number of steps skipped since the last computed step.
        begin: Index of the policy's first step.
    """

    threshold: float
    ratios: tuple[float, ...]
    max_consecutive: int = 3
    retention: float = 0.2
    product: float = field(default=1.0, init=False)
    error: float = field(default=0.0, init=False)
    consecutive: int = field(default=0, init=False)
    begin: int | None = field(default=None, init=False)

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The step's mode; see `Policy.decide`. A `change` of `None` means that no residual is kept."""
        if self.begin is None:
            self.begin = step.step
        if step.step is not None and not self._is_retained(step.step, step.total):
            self.product *= nearest_steps(self.ratios, step.total)[step.step]
            self.error += abs(1 - self.product)
            self.consecutive += 1
            if change is not None and 0 < self.threshold >= self.error and self.consecutive <= self.max_consecutive:
                return Mode.SKIP
        self.product, self.error, self.consecutive = 1.0, 0.0, 0
        return Mode.FULL

    def _is_retained(self, step: int, total: int) -> bool:
        assert self.begin is not None
        return step - self.begin < int(self.retention * (total - self.begin) + 0.5)
