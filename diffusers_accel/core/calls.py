"""Calls of pipelines: which one a denoiser is running for, and whose turn it is.

A request is one call of a pipeline's `__call__`. Pipelines that share a denoiser are made at any time (`from_pipe`, one
per request in a server). None of them says to the denoiser who is calling, so that is read off the Python stack: it is
the nearest `__call__` of a pipeline that has this denoiser among its components. A mark of ours is kept among that
frame's local variables. It lives as long as the frame does, so the request ends with it, whether it returned or raised.

A denoiser that keeps anything from step to step serves one request at a time. Requests of other threads wait their turn
in the order they came, or are refused. A request that begins inside another one's step callback, in the same thread,
cannot wait for it: the outer one rests meanwhile, and each has a state of its own.
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

# Under this name a call is found among the local variables of its frame.
_KEY = "_diffusers_accel_call"
# Seconds between two looks at whether a request that others wait for has ended. One that raised may not say so.
_PATIENCE = 0.005
# Flags of code whose frames are taken off the stack and put on it again.
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class PipelineCall:
    """One call of a pipeline.

    Args:
        pipe: The pipeline that is called.
        frame: Of its `__call__`.

    Attributes:
        over: Whether its frame is gone.
        ended: Called then, once each.
    """

    def __init__(self, pipe: Any, frame: FrameType):
        self.over = False
        self.ended: list[Callable[[], None]] = []
        self._pipe, self._frame, self._thread = weakref.ref(pipe), id(frame), threading.get_ident()

    @property
    def pipe(self) -> Any:
        """The pipeline that is called."""
        return self._pipe()

    @property
    def here(self) -> bool:
        """Whether it belongs to this thread."""
        return self._thread == threading.get_ident()

    @property
    def running(self) -> bool:
        """Whether it has neither returned nor raised: a traceback that is kept holds a frame that has ended."""
        frame = last = None if self.over else sys._current_frames().get(self._thread)
        while frame is not None:
            if id(frame) == self._frame:
                return True
            frame, last = frame.f_back, frame
        # The thread runs on meanwhile. A generator that has yielded since then has lost its caller: nothing is known.
        return last is not None and bool(last.f_code.co_flags & _SUSPENDS)

    def end(self) -> None:
        """Says that its frame is gone."""
        self.over = True
        while self.ended:
            self.ended.pop()()


class _Mark:
    """Stands among the local variables of a call's frame, and goes with it."""

    def __init__(self, call: PipelineCall):
        self.call = call
        weakref.finalize(self, call.end).atexit = False


class Calls:
    """The calls of all pipelines that share some denoisers, one at a time.

    Args:
        owns: Whether an object is a pipeline that has one of the denoisers.
        resting: Whether the call whose turn it is is between two calls of a denoiser.

    Attributes:
        busy: A request that arrives while another one is running: `"wait"` or `"raise"`.
    """

    def __init__(
        self,
        owns: Callable[[Any], bool],
        resting: Callable[[], bool] = lambda: True,
    ):
        self._owns, self._resting, self.busy = owns, resting, "wait"
        # By the identity of its frame, which is nobody else's as long as the frame exists.
        self._known: dict[int, PipelineCall] = {}
        # A lock that its owner may take again: a call may end, and say so, while this thread holds it.
        self._changed = threading.Condition(threading.RLock())
        # Whose turn it is: a call, and calls that began inside it.
        self._turn: list[PipelineCall] = []
        self._waiting: list[object] = []

    def calling(self) -> PipelineCall | None:
        """The call that this thread is in; `None` where no pipeline that has the denoiser is calling."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
                known = self._known.get(id(frame))
                if known is not None:
                    return known
                names = frame.f_locals
                if self._owns(names.get("self")):
                    return self._mark(frame, names)
            frame = frame.f_back
        return None

    def _mark(self, frame: FrameType, names: Any) -> PipelineCall:
        """Makes a call known for as long as its frame exists."""
        mark = names.get(_KEY)
        if mark is None:  # denoisers of one pipeline may be of several sessions
            mark = names[_KEY] = _Mark(PipelineCall(names["self"], frame))
        call: PipelineCall = mark.call
        number = id(frame)
        self._known[number] = call

        def ended() -> None:
            self._known.pop(number, None)
            with self._changed:
                self._changed.notify_all()

        call.ended.append(ended)
        return call

    def take(self, call: PipelineCall) -> None:
        """Waits until it is this call's turn, which stays its own until it ends.

        Raises:
            Busy: Another request is running, and was not to be waited for, or cannot be.
        """
        if self._turn[-1:] == [call]:
            return
        with self._changed:
            self._drop()
            if call in self._turn:
                return  # a call inside it has ended
            holder = self._turn[-1] if self._turn else None
            if holder is not None and holder.here:
                if not self._resting():
                    raise Busy(_BUSY.format("in the middle of a step of this thread's own"))
                self._turn.append(call)
                return
            if self.busy == "raise" and (holder is not None or self._waiting):
                raise Busy(_BUSY.format("in another thread"))
            self._wait(object())
            self._turn.append(call)

    def idle(self) -> None:
        """Waits until no request of another thread is running, for who is about to change what it runs on."""
        with self._changed:
            self._drop()
            if self._turn and not self._turn[-1].here:
                self._wait(object())

    def _wait(self, ticket: object) -> None:
        self._waiting.append(ticket)
        try:
            while self._turn or self._waiting[0] is not ticket:
                self._changed.wait(_PATIENCE)
                self._drop()
        finally:
            self._waiting.remove(ticket)
            self._changed.notify_all()

    def _drop(self) -> None:
        """Forgets calls that have ended."""
        while self._turn and not self._turn[-1].running:
            self._turn.pop()


_BUSY = (
    "request: another request is running {} on the same denoiser. Instead: wait for its end, give each thread a "
    "pipeline with a denoiser of its own, or restore(pipe)."
)
