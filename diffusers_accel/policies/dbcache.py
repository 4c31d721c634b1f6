"""DBCache's rule (https://github.com/vipshop/cache-dit), and FBCache's, which is the same with one block watched.

The first `Fn` blocks are computed on every step. What they add to their input is compared with what they added on the
last step that was computed in full: while the relative change stays under the threshold, the blocks behind them are
skipped. Warm-up steps are always computed; caps bound how many steps are skipped, in all and in a row; a refresh forces
a step to be computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.step import Mode, StepState
from .mask import StepMask


@dataclass
class DBCache:
    """One branch of one request. See the module for the rule.

    Attributes:
        threshold: Of the relative change.
        warmup: Steps at the beginning that are always computed.
        most: Steps that may be skipped in all; -1 for any number.
        most_in_a_row: Steps that may be skipped one after another; -1 for any number.
        refresh: A step, counted from the request's first, that is computed; `None` for none.
        repeat: Whether every so many steps are computed instead.
        mask: Steps that it computes whatever the change; where it skips, the change decides. `None` for none.
    """

    threshold: float
    warmup: int = 8
    most: int = -1
    most_in_a_row: int = -1
    refresh: int | None = None
    repeat: bool = False
    mask: StepMask | None = None
    skipped: int = field(default=0, init=False)
    in_a_row: int = field(default=0, init=False)

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The mode of this step; see `Policy.decide`."""
        # NaN compares false, so blocks gone wrong compute in full.
        if change is None or self._always(step) or not change < self.threshold:
            self.in_a_row = 0
            return Mode.FULL
        self.skipped += 1
        self.in_a_row += 1
        return Mode.SKIP

    def _always(self, step: StepState) -> bool:
        if step.step is None:
            return True
        place = step.step - step.first
        if place < self.warmup or (self.mask is not None and self.mask.computes(step)):
            return True
        if self.refresh and (place % self.refresh == 0 if self.repeat else place == self.refresh):
            return True
        return 0 <= self.most <= self.skipped or 0 <= self.most_in_a_row <= self.in_a_row
