"""What a caching rule is: which part may be skipped, what is watched, which policy decides, what predicts a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...policies import Policy
from .signals import Watch, WatchFactory


@dataclass(frozen=True)
class Rule:
    """What a cache does.

    Attributes:
        policy: Makes the policy of one guidance branch, by its name, of one request.
        label: In a few words.
        watch: Measures what the policy decides by.
        first: Blocks of the first stack that are computed on every step, before the decision.
        last: The same of the last stack, behind what is skipped.
        order: Of the Taylor polynomial that predicts a skipped residual; 0 reuses the last one.
        whole: Whether the whole denoiser is skipped, instead of its blocks.
        together: Whether the first guidance branch of a step decides for all.
        guard: Share of the skipped steps that are computed to compare.
        bound: Of the relative error found so.
        recording: Whether every computed step's signal and residual are recorded.
    """

    policy: Callable[[str], Policy]
    label: str
    watch: WatchFactory = Watch
    first: int = 0
    last: int = 0
    order: int = 0
    whole: bool = False
    together: bool = False
    guard: float = 0.0
    bound: float = 0.0
    recording: bool = False
