"""TeaCache's rule (https://arxiv.org/abs/2411.19108): sum up the rescaled change of the signal, skip while it is small.

With d the relative L1 change of the signal between two steps and p the fitted polynomial, |p(d)| is summed up. The
signal is compared with the previous step's, skipped or not. The first and the last step are always computed; with
`use_ret_steps` (Wan) the first five are, and the last one is not special.
"""

from __future__ import annotations

from dataclasses import dataclass

from .accumulated import Accumulated

RETAINED_STEPS = 5


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """The value at `x` of the polynomial with these coefficients, highest degree first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


@dataclass
class TeaCache(Accumulated):
    """One branch of one request. See the module for the rule."""

    coefficients: tuple[float, ...] = (1.0, 0.0)

    @classmethod
    def published(cls, threshold: float, coefficients: tuple[float, ...], use_ret_steps: bool = False) -> TeaCache:
        """The rule with one of its two ways of treating the first and the last steps."""
        first, last = (RETAINED_STEPS, 0) if use_ret_steps else (1, 1)
        return cls(threshold, first, last, coefficients=coefficients)

    def rescaled(self, change: float) -> float:
        """What a change adds to the sum."""
        return abs(polynomial(self.coefficients, change))
