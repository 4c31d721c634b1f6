"""Step state: which request, step, timestep and guidance branch a denoiser call belongs to.

The idea: the scheduler of the pipeline that is calling already knows. Every stock pipeline calls
`scheduler.set_timesteps` once per request, and each such call makes a new `timesteps` tensor, so the identity of that
tensor is the identity of the request; the scheduler's `step_index` is the place in it. Watching both needs no patch on
the pipeline, holds after an exception, an interrupt, another size or another scheduler, and never counts calls over the
life of a pipeline. Pipelines that share a denoiser have requests of their own (`calls.py`), each with its scheduler.

The branch comes from `cache_context` where the pipeline sets one, and from the order of the calls within one scheduler
step where it does not.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from .calls import Calls, PipelineCall


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
class _Request:
    """What a clock knows of one request, or of calls that belong to no pipeline's."""

    number: int = 0
    timesteps: Any = None
    context: str | None = None
    current: StepState | None = None
    calls: dict[tuple[str, str], dict[int | None, Mode]] = field(default_factory=dict)
    first: int = 0
    step: int | None = None
    calls_in_step: int = 0


class StepClock:
    """Places every call of the denoisers that a session has.

    Args:
        scheduler: Returns the scheduler, as it is now, of calls that no pipeline makes.
        timestep: Returns the timestep they are at, or `None`.
        calls: The calls of pipelines, which have their own; `None` where there are none.

    Attributes:
        requests: Requests that have begun.
        ended: Called with a request's number once it has ended, whether it returned, raised or was interrupted.
    """

    def __init__(
        self,
        scheduler: Callable[[], Any],
        timestep: Callable[[], Any] = lambda: None,
        calls: Calls | None = None,
    ):
        self._scheduler, self._timestep, self._calls = scheduler, timestep, calls
        self.requests = 0
        self.ended: list[Callable[[int], None]] = []
        self._apart = self._now = _Request()
        self._call: weakref.ref[PipelineCall] | None = None
        self._requests: weakref.WeakKeyDictionary[PipelineCall, _Request] = weakref.WeakKeyDictionary()

    def arrive(self) -> None:
        """Finds the request that is calling, and waits for its turn.

        Raises:
            Busy: Another request is running, and was not to be waited for, or cannot be.
        """
        call = self._calls.calling() if self._calls is not None else None
        if call is None:
            if self._calls is not None:
                self._calls.idle()
            self._now, self._call = self._apart, None
            return
        assert self._calls is not None
        self._calls.take(call)
        request = self._requests.get(call)
        if request is None:
            request = self._requests[call] = _Request()
            call.ended.append(functools.partial(self._over, request))
        self._now, self._call = request, weakref.ref(call)

    def when_busy(self, busy: str) -> None:
        """Sets what a request does that arrives while another one is running: `"wait"` or `"raise"`."""
        if self._calls is not None:
            self._calls.busy = busy

    def settle(self) -> None:
        """Waits until no other thread's request is running, for who is about to change what it runs on."""
        if self._calls is not None:
            self._calls.idle()

    @property
    def pipe(self) -> Any:
        """The pipeline that is calling; `None` where it is none."""
        call = self._call() if self._call is not None else None
        return call.pipe if call is not None else None

    @property
    def scheduler(self) -> Any:
        """The scheduler of the request that is running."""
        pipe = self.pipe
        return getattr(pipe, "scheduler", None) if pipe is not None else self._scheduler()

    @property
    def request(self) -> int:
        """Number of the request that is running or was the last to run, from 1."""
        return self._now.number

    @property
    def timesteps(self) -> Any:
        """Its timesteps."""
        return self._now.timesteps

    @property
    def calls(self) -> dict[tuple[str, str], dict[int | None, Mode]]:
        """(denoiser, branch) -> step -> mode, of its calls so far."""
        return self._now.calls

    @property
    def current(self) -> StepState | None:
        """The denoiser call that is running."""
        return self._now.current

    @current.setter
    def current(self, state: StepState | None) -> None:
        self._now.current = state

    @property
    def context(self) -> str | None:
        """The branch that the pipeline has named."""
        return self._now.context

    @context.setter
    def context(self, name: str | None) -> None:
        self._now.context = name

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
        self.arrive()
        now, scheduler = self._now, self.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        started = timesteps is not now.timesteps or now.number == 0
        if started:
            self._over(now)
            self.requests += 1
            # Holding the tensor keeps its identity from being given to another one.
            now.timesteps, now.number, now.calls, now.step = timesteps, self.requests, {}, None
        total = len(timesteps) if timesteps is not None else 0
        step = self._place(scheduler, timesteps, timestep)
        if started:
            now.first = step or 0
        if started or step != now.step:
            now.step, now.calls_in_step = step, 0
        branch = now.context or special
        if branch is None:
            number = now.calls_in_step
            now.calls_in_step += 1
            branch = order[number] if number < len(order) else f"call {number}"
        seen = now.calls.setdefault((denoiser, branch), {})
        state = StepState(
            denoiser=denoiser,
            branch=branch,
            request=now.number,
            step=step,
            first=now.first,
            total=total,
            repeated=step is None or step in seen or step >= total,
        )
        now.current = state
        return state

    def leave(self, state: StepState) -> None:
        """Records a call that ended well."""
        self._now.calls.setdefault((state.denoiser, state.branch), {})[state.step] = state.mode
        self._now.current = None

    def abandon(self) -> None:
        """Forgets a call that raised."""
        self._now.current = None

    def _over(self, request: _Request) -> None:
        if request.number:
            for each in self.ended:
                each(request.number)

    def _place(self, scheduler: Any, timesteps: Any, timestep: Any) -> int | None:
        if timesteps is None:
            return None
        for name in ("step_index", "begin_index"):
            step = getattr(scheduler, name, None)
            if step is not None:
                return int(step)
        # Before the first `scheduler.step`, or a scheduler that keeps no index (DDIM, DDPM): look the timestep up.
        said = getattr(self.pipe, "current_timestep", None) if self.pipe is not None else self._timestep()
        for candidate in (said, timestep):
            if isinstance(candidate, (int, float)):
                candidate = torch.tensor(candidate)
            if isinstance(candidate, torch.Tensor) and candidate.numel():
                found = (timesteps == candidate.flatten()[0].to(timesteps.device)).nonzero().flatten().tolist()
                if found:
                    return self._among(found, scheduler)
        return 0 if hasattr(scheduler, "step_index") else None

    def _among(self, places: list[int], scheduler: Any) -> int:
        """The place at hand among those of one timestep: PNDM comes to some twice, and counts its steps."""
        counted, last = getattr(scheduler, "counter", None), self._now.step
        if len(places) > 1 and isinstance(counted, int) and counted in places:
            return counted
        return next((place for place in places if last is None or place >= last), places[-1])
