"""The calibration trace: relative changes of signal and residual from step to step, with nothing skipped.

A fit (`quality/calibrate.py`) reads the trace from `context.outputs.cache_records`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.step import StepState
from .state import BranchState


@dataclass(frozen=True)
class StepRecord:
    """One step of one guidance branch, compared with the step before it.

    Attributes:
        request: Number of the request.
        step: Index into the scheduler's timesteps.
        total: Number of timesteps.
        signal: Relative L1 change of TeaCache's signal; `None` if it is unknown.
        residual: Relative L1 change of the main stream's residual over all blocks.
        ratio: Ratio of the residual's magnitudes (L2 norm per token), averaged over tokens.
    """

    request: int
    step: int
    total: int
    signal: float | None
    residual: float
    ratio: float


def add_residual(state: BranchState, residual: torch.Tensor) -> None:
    """Adds a stack's residual to the running call's. Residuals of stacks with equal shapes are summed."""
    residuals = state.memory.setdefault("trace_residuals", [])
    if residuals and residuals[-1].shape == residual.shape:
        residuals[-1] = residuals[-1] + residual
    else:
        residuals.append(residual.clone())


def record_step(state: BranchState, step: StepState) -> StepRecord | None:
    """The record of the running call; `None` for the first step, which has nothing to compare with."""
    residuals, before = state.memory.pop("trace_residuals", None), state.memory.get("trace_before")
    if not residuals or step.step is None:
        return None
    state.memory["trace_before"] = residuals
    if before is None or [item.shape for item in before] != [item.shape for item in residuals]:
        return None
    pairs = list(zip(residuals, before, strict=True))
    moved = sum((now - was).abs().sum(dtype=torch.float64) for now, was in pairs)
    size = sum(was.abs().sum(dtype=torch.float64) for _, was in pairs)
    ratios = torch.cat([(now.float().norm(dim=-1) / was.float().norm(dim=-1)).flatten() for now, was in pairs])
    return StepRecord(
        step.request, step.step, step.total, state.measurement[1], float(moved / size), float(ratios.mean())
    )
