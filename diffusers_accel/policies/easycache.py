"""EasyCache's rule (https://arxiv.org/abs/2507.02860): the change of the output is foretold from that of the input.

Between two computed steps the output changes k times as much as the input does, k = |y - y'| / |x - x'| (means of
absolute values). k hardly changes from step to step, so on the next one the output's relative change will be about
k |x - x'| / |y|, x' being the last step's input, skipped or not, and y the last computed output. These are summed up;
while the sum is small the whole denoiser is skipped. No table, no coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .accumulated import Accumulated


@dataclass
class EasyCache(Accumulated):
    """One branch of one request. See the module for the rule."""

    first: int = 7


def rate(output_change: Any, input_change: Any) -> Any:
    """k, from mean absolute changes between two computed steps; numbers or tensors of one."""
    return output_change / input_change


def foretold(k: Any, input_change: Any, output_size: Any) -> Any:
    """The relative change of the output since the last step."""
    return k * input_change / output_size
