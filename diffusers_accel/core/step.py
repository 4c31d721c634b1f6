"""Step state: which request, step, timestep and guidance branch a denoiser call belongs to.

The idea: a pipeline's scheduler already knows. Every stock pipeline calls `scheduler.set_timesteps` once per request,
and each such call makes a new `timesteps` tensor, so the identity of that tensor is the identity of the request; the
scheduler's `step_index` is the place in it. Watching both needs no patch on the pipeline, holds after an exception, an
interrupt, another size or another scheduler, and never counts calls over the life of a pipeline.

The branch comes from `cache_context` where the pipeline sets one, and from the order of the calls within one scheduler
step where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch


class Mode(str, Enum):
    """What a denoiser call does: everything, or reuse of what an earlier step left."""

    FULL = "full"
    SKIP = "skip"


@dataclass
class StepState:
    """Where one denoiser call stands.

    Attributes:
        denoiser: The pipeline's name for the denoiser, e.g. `"transformer_2"`.
        branch: The guidance branch, e.g. `"cond"`.
        request: Number of the request, from 1.
        step: Index into the scheduler's timesteps, or `None` where the scheduler cannot tell.
        first: Index of the request's first step (above 0 for image to image).
        total: Number of timesteps of the scheduler.
        repeated: The same branch was already called at this step, so the call's place in the request is unknown:
            nothing may be skipped or remembered.
        mode: What the call does; caches set it.
    """

    denoiser: str
    branch: str
    request: int
    step: int | None
    first: int
    total: int
    repeated: bool = False
    mode: Mode = Mode.FULL

    @property
    def last(self) -> bool:
        """Whether this is the schedule's last step."""
        return self.step is not None and self.step >= self.total - 1


@dataclass
class StepClock:
    """Watches one pipeline's scheduler and places every denoiser call.

    Args:
        scheduler: Returns the pipeline's scheduler as it is now (a user may replace it between requests).
        timestep: Returns the timestep the pipeline says it is at, or `None`.
    """

    scheduler: Callable[[], Any]
    timestep: Callable[[], Any] = lambda: None
    request: int = 0
    context: str | None = None
    current: StepState | None = None
    calls: dict[tuple[str, str], dict[int | None, Mode]] = field(default_factory=dict)
    timesteps: Any = None
    _first: int = 0
    _step: int | None = None
    _calls_in_step: int = 0

    def enter(
        self, denoiser: str, order: Sequence[str] = (), timestep: Any = None, special: str | None = None
    ) -> StepState:
        """Places a call that begins now.

        Args:
            denoiser: The pipeline's name for it.
            order: Names of the branches in the order the pipeline calls them within a step, for pipelines that set
                no `cache_context`.
            timestep: The timestep the denoiser was called with, for schedulers that keep no index.
            special: Name of a branch that stands outside the order, if this call is one.
        """
        scheduler = self.scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        started = timesteps is not self.timesteps or self.request == 0
        if started:
            # Holding the tensor keeps its identity from being given to another one.
            self.timesteps = timesteps
            self.request += 1
            self.calls = {}
        total = len(timesteps) if timesteps is not None else 0
        step = self._place(scheduler, timesteps, timestep)
        if started:
            self._first = step or 0
        if started or step != self._step:
            self._step, self._calls_in_step = step, 0
        branch = self.context or special
        if branch is None:
            number = self._calls_in_step
            self._calls_in_step += 1
            branch = order[number] if number < len(order) else f"call {number}"
        seen = self.calls.setdefault((denoiser, branch), {})
        state = StepState(
            denoiser=denoiser,
            branch=branch,
            request=self.request,
            step=step,
            first=self._first,
            total=total,
            repeated=step is None or step in seen or step >= total,
        )
        self.current = state
        return state

    def leave(self, state: StepState) -> None:
        """Records a call that ended well."""
        self.calls[(state.denoiser, state.branch)][state.step] = state.mode
        self.current = None

    def abandon(self) -> None:
        """Forgets a call that raised."""
        self.current = None

    def _place(self, scheduler: Any, timesteps: Any, timestep: Any) -> int | None:
        if timesteps is None:
            return None
        for name in ("step_index", "begin_index"):
            step = getattr(scheduler, name, None)
            if step is not None:
                return int(step)
        # Before the first `scheduler.step`, or a scheduler that keeps no index (DDIM, DDPM): look the timestep up.
        for candidate in (self.timestep(), timestep):
            if isinstance(candidate, torch.Tensor) and candidate.numel():
                found = (timesteps == candidate.flatten()[0].to(timesteps.device)).nonzero()
                if len(found):
                    return int(found[0])
        return 0 if hasattr(scheduler, "step_index") else None
