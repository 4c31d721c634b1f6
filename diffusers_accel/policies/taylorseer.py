"""TaylorSeer (https://arxiv.org/abs/2503.06923): a skipped step's value by a Taylor polynomial through computed ones.

Derivatives are finite differences: with y the value at the last computed step, g steps after the one before,
y' = (y - y_before) / g, y'' = (y' - y'_before) / g, and so on. The prediction e steps later is the sum of
y^(k) e^k / k!. Order 0 is plain reuse. As in cache-dit, no difference is taken at a request's second step: what the
first one gives is unlike what follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Taylor:
    """Derivatives of one value over the steps of a request. Values are anything that can be added, subtracted and
    multiplied by a number.

    Attributes:
        order: Of the polynomial.
    """

    order: int
    step: int | None = field(default=None, init=False)
    derivatives: list[Any] = field(default_factory=list, init=False)

    def update(self, step: int, value: Any) -> None:
        """Takes the value that a step, counted from the request's first, computed."""
        found = [value]
        if self.step is not None and step > max(self.step, 1):
            gap = step - self.step
            for before in self.derivatives[: self.order]:
                found.append((found[-1] - before) * (1 / gap))
        self.step, self.derivatives = step, found

    def predict(self, step: int) -> Any:
        """The value at a later step."""
        assert self.step is not None
        ahead, total = step - self.step, self.derivatives[0]
        for order, derivative in enumerate(self.derivatives[1:], 1):
            total = total + derivative * (ahead**order / math.factorial(order))
        return total
