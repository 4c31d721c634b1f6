"""The rule that TeaCache, EasyCache and SeaCache share: sum up a change from step to step, skip while the sum is small.

They differ in what changes and in how it is rescaled; a computed step starts the sum anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.step import Mode, StepState


@dataclass
class Accumulated:
    """One branch of one request. See the module for the rule.

    Attributes:
        threshold: Of the sum; a step is skipped while it stays below.
        first: Steps at the beginning that are always computed.
        last: Steps at the end that are always computed.
        most_in_a_row: Steps that may be skipped one after another; -1 for any number.
    """

    threshold: float
    first: int = 1
    last: int = 1
    most_in_a_row: int = -1
    accumulated: float = field(default=0.0, init=False)
    in_a_row: int = field(default=0, init=False)

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The mode of this step; see `Policy.decide`."""
        if change is not None and not self._always(step):
            self.accumulated += self.rescaled(change)
            # NaN compares false, so a signal gone wrong computes in full.
            if self.accumulated < self.threshold:
                self.in_a_row += 1
                return Mode.SKIP
        self.accumulated, self.in_a_row = 0.0, 0
        return Mode.FULL

    def rescaled(self, change: float) -> float:
        """What a change adds to the sum."""
        return change

    def _always(self, step: StepState) -> bool:
        if step.step is None:
            return True
        begins, ends = step.step - step.first < self.first, step.step >= step.total - self.last
        return begins or ends or 0 <= self.most_in_a_row <= self.in_a_row
