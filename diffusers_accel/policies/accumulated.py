"""The rule that TeaCache, EasyCache and SeaCache share: changes are summed over steps, and a small sum skips the step.

The policies differ in the measured change and in its rescaling. A computed step resets the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.step import Mode, StepState


@dataclass
class Accumulated:
    """The policy of one guidance branch for one request. The module states the rule.

    Attributes:
        threshold: The sum of changes below which a step is skipped.
        first: Number of steps at the beginning that are always computed.
        last: Number of steps at the end that are always computed.
        max_consecutive: Largest number of consecutive skipped steps; -1 for no bound.
        accumulated: The sum since the last computed step.
        consecutive: Number of steps skipped since the last computed step.
    """

    threshold: float
    first: int = 1
    last: int = 1
    max_consecutive: int = -1
    accumulated: float = field(default=0.0, init=False)
    consecutive: int = field(default=0, init=False)

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The step's mode; see `Policy.decide`."""
        if change is not None and not self._is_forced(step):
            self.accumulated += self.rescaled(change)
            # NaN compares false, so an invalid signal computes the step.
            if self.accumulated < self.threshold:
                self.consecutive += 1
                return Mode.SKIP
        self.accumulated, self.consecutive = 0.0, 0
        return Mode.FULL

    def rescaled(self, change: float) -> float:
        """The summand for a change."""
        return change

    def _is_forced(self, step: StepState) -> bool:
        if step.step is None:
            return True
        begins, ends = step.step - step.first < self.first, step.step >= step.total - self.last
        return begins or ends or 0 <= self.max_consecutive <= self.consecutive
