"""The caching rule of one denoiser: skippable blocks, measured signal, deciding policy and predicted residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...policies import Policy
from .signals import ChangeSignal, SignalFactory


@dataclass(frozen=True)
class Rule:
    """A caching rule, made from a configuration by `rules.rule_of`.

    Attributes:
        policy: Makes the policy of a guidance branch for one request, from the branch's name.
        label: Short description for `explain`.
        signal: Makes the signal whose change the policy reads.
        first: Number of blocks of the first stack that are computed on every step, before the decision.
        last: Number of blocks of the last stack that are computed on every step, behind the skipped ones.
        order: Order of the Taylor polynomial that predicts a skipped residual; 0 reuses the last residual.
        whole_denoiser: Whether the whole denoiser is skipped instead of its blocks.
        shared_decision: Whether the first guidance branch of a step decides for all branches.
        guard: Share of the skippable steps that are computed for comparison, between 0 and 1.
        bound: Relative error of a prediction above which the guard stops skipping.
        tracing: Whether every step's changes are recorded for calibration.
    """

    policy: Callable[[str], Policy]
    label: str
    signal: SignalFactory = ChangeSignal
    first: int = 0
    last: int = 0
    order: int = 0
    whole_denoiser: bool = False
    shared_decision: bool = False
    guard: float = 0.0
    bound: float = 0.0
    tracing: bool = False
