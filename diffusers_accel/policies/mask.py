"""Step computation masks: the computed steps are fixed in advance (https://github.com/vipshop/cache-dit).

The published masks are runs of computed and skipped steps for 28 steps. For another number of steps their boundaries
move in proportion. A fixed interval (https://arxiv.org/abs/2407.01425) is the simplest mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.step import Mode, StepState

# Runs of computed steps, and of the skipped steps between them, for 28 steps.
MASKS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}


def named_mask(name: str) -> tuple[bool, ...]:
    """A published mask: whether each of its 28 steps is computed."""
    computed, skipped = MASKS[name]
    found: list[bool] = []
    for place, run in enumerate(computed):
        found += [True] * run
        if place < len(skipped):
            found += [False] * skipped[place]
    return tuple(found)


def scale_mask(mask: Sequence[bool], steps: int) -> tuple[bool, ...]:
    """A mask of another length. Boundaries of its runs move in proportion, every computed run keeps at least one step,
    and the first step is computed.

    Args:
        mask: Whether each step is computed.
        steps: Number of steps wanted.
    """
    if len(mask) == steps:
        return (True, *mask[1:])
    found = [False] * steps
    start = 0
    while start < len(mask):
        end = start
        while end < len(mask) and mask[end] == mask[start]:
            end += 1
        if mask[start]:
            first = min(round(start * steps / len(mask)), steps - 1)
            last = max(round(end * steps / len(mask)), first + 1)
            found[first:last] = [True] * (min(last, steps) - first)
        start = end
    found[0] = True
    return tuple(found)


def interval_mask(interval: int, steps: int, warmup: int = 1) -> tuple[bool, ...]:
    """A mask that computes the first steps, and then one step of each interval.

    Args:
        interval: Steps per computed step.
        steps: Length of the mask.
        warmup: Number of computed steps at the beginning.
    """
    return tuple(place < warmup or (place - warmup + 1) % interval == 0 for place in range(steps))


@dataclass
class StepMask:
    """The policy of one guidance branch for one request. A mask alone decides.

    Attributes:
        mask: Whether each step is computed. A mask of any length is scaled to the request's number of steps.
        interval: Steps per computed step; 0 takes the mask instead.
        warmup: Number of computed steps at the beginning, with an interval.
    """

    mask: tuple[bool, ...] = ()
    interval: int = 0
    warmup: int = 1

    def computes(self, step: StepState) -> bool:
        """Whether the mask computes a step. A step with an unknown index is computed."""
        if step.step is None:
            return True
        steps = step.total - step.first
        mask = interval_mask(self.interval, steps, self.warmup) if self.interval else scale_mask(self.mask, steps)
        return mask[step.step - step.first]

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The step's mode; see `Policy.decide`. A `change` of `None` means that no residual is kept."""
        return Mode.FULL if change is None or self.computes(step) else Mode.SKIP
