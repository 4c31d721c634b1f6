"""DBCache's rule (https://github.com/vipshop/cache-dit). FBCache is DBCache with one measured block.

The first `Fn` blocks are computed on every step. Their residual is compared with the one of the last fully computed
step. While its relative change stays below the threshold, the blocks behind them are skipped. Warm-up steps are always
computed. Caps bound the number of skipped steps, in total and consecutively. A refresh computes a given step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.step import Mode, StepState
from .mask import StepMask


@dataclass
class DBCache:
    """The policy of one guidance branch for one request. The module states the rule.

    Attributes:
        threshold: The relative change below which a step is skipped.
        warmup: Number of steps at the beginning that are always computed.
        max_skipped: Largest number of skipped steps in a request; -1 for no bound.
        max_consecutive: Largest number of consecutive skipped steps; -1 for no bound.
        refresh: Index of a computed step, counted from the request's first; `None` for none.
        repeat: Whether every `refresh`-th step is computed, instead of one.
        mask: Steps that are computed for any change; on the mask's other steps the change decides. `None` for none.
        skipped: Number of steps skipped so far.
        consecutive: Number of steps skipped since the last computed step.
    """

    threshold: float
    warmup: int = 8
    max_skipped: int = -1
    max_consecutive: int = -1
    refresh: int | None = None
    repeat: bool = False
    mask: StepMask | None = None
    skipped: int = field(default=0, init=False)
    consecutive: int = field(default=0, init=False)

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The step's mode; see `Policy.decide`."""
        # NaN compares false, so invalid residuals compute the step.
        if change is None or self._is_forced(step) or not change < self.threshold:
            self.consecutive = 0
            return Mode.FULL
        self.skipped += 1
        self.consecutive += 1
        return Mode.SKIP

    def _is_forced(self, step: StepState) -> bool:
        if step.step is None:
            return True
        place = step.step - step.first
        if place < self.warmup or (self.mask is not None and self.mask.computes(step)):
            return True
        if self.refresh and (place % self.refresh == 0 if self.repeat else place == self.refresh):
            return True
        return 0 <= self.max_skipped <= self.skipped or 0 <= self.max_consecutive <= self.consecutive
