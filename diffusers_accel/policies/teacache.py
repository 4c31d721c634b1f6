"""TeaCache's rule (https://arxiv.org/abs/2411.19108): rescaled changes of the signal are summed, a small sum skips.

With d the relative L1 change of the signal between two steps and p the fitted polynomial, |p(d)| is summed. The signal
is compared with the previous step's, skipped or not. The first and the last step are always computed. With
`use_ret_steps` (Wan) the first five steps are always computed, and the last one is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from .accumulated import Accumulated

RETAINED_STEPS = 5


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """The value of a polynomial.

    Args:
        coefficients: Coefficients, highest degree first.
        x: The argument.
    """
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


@dataclass
class TeaCache(Accumulated):
    """The policy of one guidance branch for one request. The module states the rule.

    Attributes:
        coefficients: The rescaling polynomial, highest degree first.
    """

    coefficients: tuple[float, ...] = (1.0, 0.0)

    @classmethod
    def published(cls, threshold: float, coefficients: tuple[float, ...], use_ret_steps: bool = False) -> TeaCache:
        """The policy in one of its published variants.

        Args:
            threshold: The sum of rescaled changes below which a step is skipped.
            coefficients: The rescaling polynomial, highest degree first.
            use_ret_steps: Whether the first five steps are always computed, instead of the first and the last one.
        """
        first, last = (RETAINED_STEPS, 0) if use_ret_steps else (1, 1)
        return cls(threshold, first, last, coefficients=coefficients)

    def rescaled(self, change: float) -> float:
        """The absolute value of the polynomial at a change."""
        return abs(polynomial(self.coefficients, change))
