"""TeaCache's rule (https://arxiv.org/abs/2411.19108): sum up the rescaled change of the signal, skip while it is small.

With d the relative L1 change of the signal between two steps and p the fitted polynomial, `accumulated += |p(d)|`; the
step is skipped while that stays under the threshold, else it is computed and the sum starts anew. The signal is
compared with the previous step's, skipped or not. The first and the last step are always computed; with
`use_ret_steps` (Wan) the first five are, and the last one is not special.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.step import Mode, StepState

RETAINED_STEPS = 5


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """The value at `x` of the polynomial with these coefficients, highest degree first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


@dataclass
class TeaCache:
    """One branch of one request. See the module for the rule."""

    threshold: float
    coefficients: tuple[float, ...]
    use_ret_steps: bool = False
    accumulated: float = 0.0

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The mode of this step; see `Policy.decide`."""
        if change is None or self._always(step):
            self.accumulated = 0.0
            return Mode.FULL
        self.accumulated += abs(polynomial(self.coefficients, change))
        # NaN compares false, so a signal gone wrong computes in full.
        if self.accumulated < self.threshold:
            return Mode.SKIP
        self.accumulated = 0.0
        return Mode.FULL

    def _always(self, step: StepState) -> bool:
        if step.step is None:
            return True
        if self.use_ret_steps:
            return step.step - step.first < RETAINED_STEPS
        return step.step == step.first or step.last
