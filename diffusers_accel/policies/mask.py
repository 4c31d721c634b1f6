"""Step computation masks: which steps are computed is said beforehand (https://github.com/vipshop/cache-dit).

The published masks are runs of computed and of skipped steps, found for 28 steps; for another number their boundaries
are moved in proportion. A fixed interval (https://arxiv.org/abs/2407.01425) is the simplest mask.
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


def steps_of(name: str) -> tuple[bool, ...]:
    """A published mask: whether each of its 28 steps is computed."""
    computed, skipped = MASKS[name]
    found: list[bool] = []
    for place, run in enumerate(computed):
        found += [True] * run
        if place < len(skipped):
            found += [False] * skipped[place]
    return tuple(found)


def scaled(mask: Sequence[bool], steps: int) -> tuple[bool, ...]:
    """A mask for another number of steps: boundaries of its runs in proportion; every computed run keeps a step, and
    the first step is computed."""
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


def every(interval: int, steps: int, warmup: int = 1) -> tuple[bool, ...]:
    """The first steps, and then one of so many."""
    return tuple(place < warmup or (place - warmup + 1) % interval == 0 for place in range(steps))


@dataclass
class StepMask:
    """One branch of one request: a mask alone decides.

    Attributes:
        mask: Whether each step is computed, of any length; scaled to the request's.
        interval: Instead, compute one of so many.
        warmup: With an interval, steps at the beginning that are computed.
    """

    mask: tuple[bool, ...] = ()
    interval: int = 0
    warmup: int = 1

    def computes(self, step: StepState) -> bool:
        """Whether the mask computes a step."""
        if step.step is None:
            return True
        steps = step.total - step.first
        mask = every(self.interval, steps, self.warmup) if self.interval else scaled(self.mask, steps)
        return mask[step.step - step.first]

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The mode of this step; see `Policy.decide`. `change` is `None` where nothing is kept to skip with."""
        return Mode.FULL if change is None or self.computes(step) else Mode.SKIP
