"""The queue of requests on shared denoisers: which pipeline call a denoiser runs for, and which request runs next.

A request is one call of a pipeline's `__call__`. Pipelines that share a denoiser are made at any time (`from_pipe`, one
per request in a server), and do not tell the denoiser which of them is calling. The call is therefore found on the
Python stack: the nearest `__call__` of a pipeline that has this denoiser among its components. A marker among that
frame's local variables lives as long as the frame. So the request ends when the frame returns or raises.

A denoiser with state between steps (a cache) serves one request at a time. Requests of other threads wait in the order
of arrival, or are refused. A request inside another request's step callback cannot wait for it, because both are in one
thread. The outer request pauses, and each request has a state of its own.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..errors import Busy

# The name of the marker among a frame's local variables.
_MARKER_NAME = "_diffusers_accel_call"
# Seconds between two checks of whether the running request has ended. A request that raised may not announce it.
_POLL_SECONDS = 0.005
# Flags of code whose frames leave the stack and return to it.
_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class PipelineCall:
    """One call of a pipeline.

    Args:
        pipe: The called pipeline, held weakly.
        frame: The frame of its `__call__`.

    Attributes:
        ended: Whether the frame is gone.
        on_end: Functions that are called once when the frame is gone.
    """

    def __init__(self, pipe: Any, frame: FrameType):
        self.ended = False
        self.on_end: list[Callable[[], None]] = []
        self._pipe, self._frame, self._thread = weakref.ref(pipe), id(frame), threading.get_ident()

    @property
    def pipe(self) -> Any:
        """The pipeline that is called; `None` once it is freed."""
        return self._pipe()

    @property
    def in_this_thread(self) -> bool:
        """Whether the call was made by the current thread."""
        return self._thread == threading.get_ident()

    @property
    def running(self) -> bool:
        """Whether the call has neither returned nor raised. The stack decides, because a kept traceback keeps a frame
        that has ended."""
        frame = last = None if self.ended else sys._current_frames().get(self._thread)
        while frame is not None:
            if id(frame) == self._frame:
                return True
            frame, last = frame.f_back, frame
        # Another thread's stack is read while it runs. A generator that yielded in between has no caller in it, so the
        # answer is unknown, and the call counts as running.
        return last is not None and bool(last.f_code.co_flags & _SUSPENDABLE)

    def end(self) -> None:
        """Marks the call as ended and runs `on_end`."""
        self.ended = True
        while self.on_end:
            self.on_end.pop()()


class _FrameMarker:
    """A local variable of a call's frame, whose release ends the call."""

    def __init__(self, call: PipelineCall):
        self.call = call
        weakref.finalize(self, call.end).atexit = False


class RequestQueue:
    """The requests of all pipelines that share some denoisers. One runs at a time.

    Args:
        uses_denoiser: Whether an object is a pipeline that has one of the denoisers.
        between_steps: Whether the running request is outside a denoiser call, so that another may begin inside it.

    Attributes:
        busy: Treatment of a request that arrives while another one runs: `"wait"` or `"raise"`.
    """

    def __init__(
        self,
        uses_denoiser: Callable[[Any], bool],
        between_steps: Callable[[], bool] = lambda: True,
    ):
        self._uses_denoiser, self._between_steps, self.busy = uses_denoiser, between_steps, "wait"
        # By the identity of the frame, which is unique as long as the frame exists.
        self._calls: dict[int, PipelineCall] = {}
        # Reentrant: a call may end, and notify, while this thread holds the lock.
        self._changed = threading.Condition(threading.RLock())
        # The running request, with requests that began inside it behind it.
        self._running: list[PipelineCall] = []
        self._waiting: list[object] = []

    def current_call(self) -> PipelineCall | None:
        """The pipeline call that this thread is in; `None` outside the call of a pipeline that has the denoiser."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
                call = self._calls.get(id(frame))
                if call is not None:
                    return call
                names = frame.f_locals
                if self._uses_denoiser(names.get("self")):
                    return self._register(frame, names)
            frame = frame.f_back
        return None

    def _register(self, frame: FrameType, names: Any) -> PipelineCall:
        """Keeps a call for as long as its frame exists."""
        marker = names.get(_MARKER_NAME)
        if marker is None:  # another session's queue may have marked the frame already
            marker = names[_MARKER_NAME] = _FrameMarker(PipelineCall(names["self"], frame))
        call: PipelineCall = marker.call
        number = id(frame)
        self._calls[number] = call

        def unregister() -> None:
            self._calls.pop(number, None)
            with self._changed:
                self._changed.notify_all()

        call.on_end.append(unregister)
        return call

    def acquire(self, call: PipelineCall) -> None:
        """Waits until this request may run. The request then keeps the denoisers until it ends.

        Raises:
            Busy: Another request runs, and `busy="raise"` forbids waiting, or that request is in the middle of a step
                in this thread.
        """
        if self._running[-1:] == [call]:
            return
        with self._changed:
            self._remove_ended()
            if call in self._running:
                return  # a request inside it has ended
            holder = self._running[-1] if self._running else None
            if holder is not None and holder.in_this_thread:
                if not self._between_steps():
                    raise Busy(_BUSY.format("in the middle of a step in this thread"))
                self._running.append(call)
                return
            if self.busy == "raise" and (holder is not None or self._waiting):
                raise Busy(_BUSY.format("in another thread"))
            self._wait(object())
            self._running.append(call)

    def wait_idle(self) -> None:
        """Waits until no other thread's request runs. A change to the denoisers calls it first."""
        with self._changed:
            self._remove_ended()
            if self._running and not self._running[-1].in_this_thread:
                self._wait(object())

    def _wait(self, ticket: object) -> None:
        self._waiting.append(ticket)
        try:
            while self._running or self._waiting[0] is not ticket:
                self._changed.wait(_POLL_SECONDS)
                self._remove_ended()
        finally:
            self._waiting.remove(ticket)
            self._changed.notify_all()

    def _remove_ended(self) -> None:
        while self._running and not self._running[-1].running:
            self._running.pop()


_BUSY = (
    "request: another request is running {} on the same denoiser. Instead: wait for its end, give each thread a "
    "pipeline with a denoiser of its own, or restore(pipe)."
)
