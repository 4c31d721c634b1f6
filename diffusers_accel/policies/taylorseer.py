"""TaylorSeer (https://arxiv.org/abs/2503.06923): a skipped step's value from a Taylor polynomial over computed steps.

Derivatives are finite differences. Let y be the value at the last computed step, and g the steps since the computed
step before: y' = (y - y_before) / g, y'' = (y' - y'_before) / g, and so on. The prediction e steps later is the sum of
y^(k) e^k / k!. Order 0 is plain reuse. As in cache-dit, no difference is taken at a request's second step, because the
first step's value differs much from later values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Taylor:
    """The Taylor polynomial of one value over the steps of a request.

    A value supports addition, subtraction and multiplication by a number, e.g. a tensor.

    Attributes:
        order: Order of the polynomial.
        step: The last computed step, counted from the request's first; `None` before it.
        derivatives: The last computed value and its finite differences, in ascending order.
    """

    order: int
    step: int | None = field(default=None, init=False)
    derivatives: list[Any] = field(default_factory=list, init=False)

    def update(self, step: int, value: Any) -> None:
        """Adds a computed value.

        Args:
            step: The computed step, counted from the request's first.
            value: Its value.
        """
        found = [value]
        if self.step is not None and step > max(self.step, 1):
            gap = step - self.step
            for before in self.derivatives[: self.order]:
                found.append((found[-1] - before) * (1 / gap))
        self.step, self.derivatives = step, found

    def predict(self, step: int) -> Any:
        """The predicted value at a later step, counted from the request's first."""
        assert self.step is not None
        ahead, total = step - self.step, self.derivatives[0]
        for order, derivative in enumerate(self.derivatives[1:], 1):
            total = total + derivative * (ahead**order / math.factorial(order))
        return total
