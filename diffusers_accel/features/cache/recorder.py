"""Recording for calibration: how much the signal and the residual change from step to step, with nothing skipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.step import StepState
from .lanes import Lane


@dataclass(frozen=True)
class Record:
    """One step of one guidance branch, against the step before it.

    Attributes:
        request: Its number.
        step: Index into the scheduler's timesteps.
        total: Number of timesteps.
        signal: Relative L1 change of TeaCache's signal; `None` where it is unknown.
        residual: The same of what all blocks add to the picture's stream.
        ratio: Mean over tokens of the ratio of that residual's magnitudes.
    """

    request: int
    step: int
    total: int
    signal: float | None
    residual: float
    ratio: float


def take(lane: Lane, residual: torch.Tensor) -> None:
    """Takes what a stack added; stacks of one shape are one residual."""
    parts = lane.memory.setdefault("parts", [])
    if parts and parts[-1].shape == residual.shape:
        parts[-1] = parts[-1] + residual
    else:
        parts.append(residual.clone())


def record(lane: Lane, step: StepState) -> Record | None:
    """What a call showed, once there is a step before it."""
    parts, before = lane.memory.pop("parts", None), lane.memory.get("before")
    if not parts or step.step is None:
        return None
    lane.memory["before"] = parts
    if before is None or [item.shape for item in before] != [item.shape for item in parts]:
        return None
    pairs = list(zip(parts, before, strict=True))
    moved = sum((now - was).abs().sum(dtype=torch.float64) for now, was in pairs)
    size = sum(was.abs().sum(dtype=torch.float64) for _, was in pairs)
    ratios = torch.cat([(now.float().norm(dim=-1) / was.float().norm(dim=-1)).flatten() for now, was in pairs])
    return Record(step.request, step.step, step.total, lane.change[1], float(moved / size), float(ratios.mean()))
