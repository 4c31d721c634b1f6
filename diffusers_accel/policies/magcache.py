"""MagCache's rule (https://arxiv.org/abs/2506.09045): a table foretells how far a skipped step's residual is off.

The magnitude of what the blocks add falls from step to step by ratios that hardly depend on the prompt. Reusing a
residual over several steps is off by the product of their ratios; these errors, |1 - product|, are summed up, and steps
are skipped while the sum is small. It looks at no tensor, so a schedule is known before its first step.

The table has one ratio for each step of a schedule of its own length; for another length the nearest is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.step import Mode, StepState


def nearest_steps(table: Sequence[float], steps: int) -> tuple[float, ...]:
    """A table for another number of steps."""
    if steps == 1:
        return (table[-1],)
    return tuple(table[round(place * (len(table) - 1) / (steps - 1))] for place in range(steps))


@dataclass
class MagCache:
    """One branch of one request. See the module for the rule.

    Attributes:
        threshold: Of the summed-up error; a step is skipped up to it.
        ratios: Ratio of the residual's magnitude to the last step's, by the step of a schedule.
        most_in_a_row: Steps that may be skipped one after another.
        retention: Share of the first steps that are always computed: of the steps from the first one this policy sees,
            so that each of two experts keeps its own.
    """

    threshold: float
    ratios: tuple[float, ...]
    most_in_a_row: int = 3
    retention: float = 0.2
    product: float = field(default=1.0, init=False)
    error: float = field(default=0.0, init=False)
    in_a_row: int = field(default=0, init=False)
    begin: int | None = field(default=None, init=False)

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The mode of this step; see `Policy.decide`. `change` is `None` where nothing is kept to skip with."""
        if self.begin is None:
            self.begin = step.step
        if step.step is not None and not self._keeps(step.step, step.total):
            self.product *= nearest_steps(self.ratios, step.total)[step.step]
            self.error += abs(1 - self.product)
            self.in_a_row += 1
            if change is not None and 0 < self.threshold >= self.error and self.in_a_row <= self.most_in_a_row:
                return Mode.SKIP
        self.product, self.error, self.in_a_row = 1.0, 0.0, 0
        return Mode.FULL

    def _keeps(self, step: int, total: int) -> bool:
        assert self.begin is not None
        return step - self.begin < int(self.retention * (total - self.begin) + 0.5)
