"""EasyCache's rule (https://arxiv.org/abs/2507.02860): the output's change is estimated from the input's change.

Between two computed steps the output changes k times as much as the input: k = |y - y'| / |x - x'|, with means of
absolute values. k hardly varies from step to step. So the output's next relative change is about k |x - x'| / |y|. Here
x' is the last step's input (skipped or not), and y the last computed output. The estimates are summed, and while the
sum is small the whole denoiser is skipped. The rule needs no table and no coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .accumulated import Accumulated


@dataclass
class EasyCache(Accumulated):
    """The policy of one guidance branch for one request. The module states the rule."""

    first: int = 7


def change_ratio(output_change: Any, input_change: Any) -> Any:
    """k, the ratio of the output's to the input's change.

    Args:
        output_change: Mean absolute change of the output between two computed steps; a number or a scalar tensor.
        input_change: Mean absolute change of the input between the same steps; a number or a scalar tensor.
    """
    return output_change / input_change


def estimated_change(k: Any, input_change: Any, output_size: Any) -> Any:
    """The estimated relative change of the output since the last step.

    Args:
        k: The ratio from `change_ratio`.
        input_change: Mean absolute change of the input since the last step; a number or a scalar tensor.
        output_size: Mean absolute value of the last computed output; a number or a scalar tensor.
    """
    return k * input_change / output_size
