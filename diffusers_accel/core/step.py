"""Step state: which request, step, timestep and guidance branch a denoiser call belongs to.

The calling pipeline's scheduler already has the answer. Every stock pipeline calls `scheduler.set_timesteps` once per
request, and each such call makes a new `timesteps` tensor. The identity of that tensor is therefore the identity of the
request, and the scheduler's `step_index` is the step. Reading both needs no patch on the pipeline. No calls are counted
over a pipeline's life, so the answer stays right after an exception, an interrupt, another size or another scheduler.
Pipelines that share a denoiser have requests of their own (`request_queue.py`), each with its scheduler.

The guidance branch comes from `cache_context` where the pipeline sets one. Elsewhere it is the order of the calls
within one scheduler step.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from .request_queue import PipelineCall, RequestQueue


class Mode(str, Enum):
    """A denoiser call's mode: compute in full, or skip by reuse of an earlier step's results."""

    FULL = "full"
    SKIP = "skip"


@dataclass
class StepState:
    """The place of one denoiser call.

    Attributes:
        denoiser: The pipeline's name for the denoiser, e.g. `"transformer_2"`.
        branch: The guidance branch, e.g. `"cond"`.
        request: Number of the request, from 1.
        step: Index into the scheduler's timesteps; `None` if the scheduler does not tell it.
        first: Index of the request's first step (above 0 for image to image).
        total: Number of timesteps of the scheduler.
        repeated: Whether the same branch was already called at this step. The call's place in the request is then
            unknown, so nothing may be skipped or kept.
        mode: Full or skip; set by the cache.
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
    """A clock's state for one request, or for calls outside any pipeline."""

    number: int = 0
    timesteps: Any = None
    context: str | None = None
    current: StepState | None = None
    calls: dict[tuple[str, str], dict[int | None, Mode]] = field(default_factory=dict)
    first: int = 0
    step: int | None = None
    calls_in_step: int = 0


class StepClock:
    """The place (request, step, branch) of every call of a session's denoisers.

    Args:
        scheduler: Returns the present scheduler for denoiser calls outside any pipeline.
        timestep: Returns the present timestep for denoiser calls outside any pipeline, or `None`.
        queue: The queue of pipeline calls, each of which has a scheduler of its own; `None` if no pipeline calls the
            denoisers.

    Attributes:
        requests: Number of requests that have begun.
        on_request_end: Functions that are called with a request's number once it has ended, whether it returned, raised
            or was interrupted.
    """

    def __init__(
        self,
        scheduler: Callable[[], Any],
        timestep: Callable[[], Any] = lambda: None,
        queue: RequestQueue | None = None,
    ):
        self._scheduler, self._timestep, self._queue = scheduler, timestep, queue
        self.requests = 0
        self.on_request_end: list[Callable[[int], None]] = []
        self._default = self._active = _Request()
        self._call: weakref.ref[PipelineCall] | None = None
        self._requests: weakref.WeakKeyDictionary[PipelineCall, _Request] = weakref.WeakKeyDictionary()

    def acquire(self) -> None:
        """Makes the calling request the active one, after waiting in the queue.

        Raises:
            Busy: Another request runs, and waiting is switched off or impossible.
        """
        call = self._queue.current_call() if self._queue is not None else None
        if call is None:
            if self._queue is not None:
                self._queue.wait_idle()
            self._active, self._call = self._default, None
            return
        assert self._queue is not None
        self._queue.acquire(call)
        request = self._requests.get(call)
        if request is None:
            request = self._requests[call] = _Request()
            call.on_end.append(functools.partial(self._end, request))
        self._active, self._call = request, weakref.ref(call)

    def set_busy(self, busy: str) -> None:
        """Sets the treatment of a request that arrives while another one runs: `"wait"` or `"raise"`."""
        if self._queue is not None:
            self._queue.busy = busy

    def wait_idle(self) -> None:
        """Waits until no other thread's request runs. A change to the denoisers calls it first."""
        if self._queue is not None:
            self._queue.wait_idle()

    @property
    def pipe(self) -> Any:
        """The calling pipeline; `None` outside any pipeline."""
        call = self._call() if self._call is not None else None
        return call.pipe if call is not None else None

    @property
    def scheduler(self) -> Any:
        """The scheduler of the active request."""
        pipe = self.pipe
        return getattr(pipe, "scheduler", None) if pipe is not None else self._scheduler()

    @property
    def request(self) -> int:
        """Number of the active or the last request, from 1."""
        return self._active.number

    @property
    def timesteps(self) -> Any:
        """The timesteps of the active or the last request."""
        return self._active.timesteps

    @property
    def calls(self) -> dict[tuple[str, str], dict[int | None, Mode]]:
        """(denoiser, branch) -> step -> mode, of the active request's calls so far."""
        return self._active.calls

    @property
    def current(self) -> StepState | None:
        """The running denoiser call; `None` between calls."""
        return self._active.current

    @current.setter
    def current(self, state: StepState | None) -> None:
        self._active.current = state

    @property
    def context(self) -> str | None:
        """The branch that the pipeline has named with `cache_context`."""
        return self._active.context

    @context.setter
    def context(self, name: str | None) -> None:
        self._active.context = name

    def enter(
        self, denoiser: str, order: Sequence[str] = (), timestep: Any = None, special: str | None = None
    ) -> StepState:
        """The place of a denoiser call that begins active.

        Args:
            denoiser: The pipeline's name for the denoiser.
            order: Names of the branches in the pipeline's order of calls within a step. Pipelines that set no
                `cache_context` need it.
            timestep: The denoiser's timestep argument. Schedulers without a step index need it.
            special: Name of a branch outside the order, if this call is one (e.g. a perturbed branch).
        """
        self.acquire()
        active, scheduler = self._active, self.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        started = timesteps is not active.timesteps or active.number == 0
        if started:
            self._end(active)
            self.requests += 1
            # The held reference keeps the tensor's identity unique.
            active.timesteps, active.number, active.calls, active.step = timesteps, self.requests, {}, None
        total = len(timesteps) if timesteps is not None else 0
        step = self._step_index(scheduler, timesteps, timestep)
        if started:
            active.first = step or 0
        if started or step != active.step:
            active.step, active.calls_in_step = step, 0
        branch = active.context or special
        if branch is None:
            number = active.calls_in_step
            active.calls_in_step += 1
            branch = order[number] if number < len(order) else f"call {number}"
        seen = active.calls.setdefault((denoiser, branch), {})
        state = StepState(
            denoiser=denoiser,
            branch=branch,
            request=active.number,
            step=step,
            first=active.first,
            total=total,
            repeated=step is None or step in seen or step >= total,
        )
        active.current = state
        return state

    def leave(self, state: StepState) -> None:
        """Ends a call that returned."""
        self._active.calls.setdefault((state.denoiser, state.branch), {})[state.step] = state.mode
        self._active.current = None

    def abandon(self) -> None:
        """Drops a call that raised."""
        self._active.current = None

    def _end(self, request: _Request) -> None:
        if request.number:
            for each in self.on_request_end:
                each(request.number)

    def _step_index(self, scheduler: Any, timesteps: Any, timestep: Any) -> int | None:
        if timesteps is None:
            return None
        for name in ("step_index", "begin_index"):
            step = getattr(scheduler, name, None)
            if step is not None:
                return int(step)
        # No index exists before the first `scheduler.step`, nor in DDIM and DDPM: the timestep is looked up.
        named = getattr(self.pipe, "current_timestep", None) if self.pipe is not None else self._timestep()
        for candidate in (named, timestep):
            if isinstance(candidate, (int, float)):
                candidate = torch.tensor(candidate)
            if isinstance(candidate, torch.Tensor) and candidate.numel():
                found = (timesteps == candidate.flatten()[0].to(timesteps.device)).nonzero().flatten().tolist()
                if found:
                    return self._resolve_repeated(found, scheduler)
        return 0 if hasattr(scheduler, "step_index") else None

    def _resolve_repeated(self, places: list[int], scheduler: Any) -> int:
        """The present index among all indices of one timestep. PNDM visits some timesteps twice and counts its
        steps."""
        counted, last = getattr(scheduler, "counter", None), self._active.step
        if len(places) > 1 and isinstance(counted, int) and counted in places:
            return counted
        return next((place for place in places if last is None or place >= last), places[-1])
