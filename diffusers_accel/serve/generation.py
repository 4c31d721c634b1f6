"""A job as the caller holds it: the handle that is waited for, watched and cancelled, its result, and its errors."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AccelError
from .jobs import COMPLETED, FAILED, Job

if TYPE_CHECKING:
    from .engine import Engine


class JobFailed(AccelError):
    """A job ended with an error.

    Args:
        message: The reason.
        code: `"invalid_request"` for arguments that the pipeline refuses, `"out_of_memory"`, `"worker_died"` after two
            attempts, `"closed"`, or `"failed"`.
    """

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


class JobCancelled(JobFailed):
    """A job was cancelled before it was done."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The files of a job that is done, and their measures.

    Attributes:
        kind: `"image"` or `"video"`.
        files: The written files: PNG of a picture, NumPy's format of a video.
        width: Width in pixels.
        height: Height in pixels.
        frames: Number of frames of a video; `None` for a picture.
        seeds: The seed of each result.
        seconds: Seconds of the pipeline's call.
        stats: `stats` of the pipeline after the call as a table, if it was asked for.
        audio: The file of a video's sound, in NumPy's format; `None` without.
    """

    kind: str
    files: tuple[Path, ...]
    width: int
    height: int
    frames: int | None = None
    seeds: tuple[int, ...] = ()
    seconds: float = 0.0
    stats: str | None = None
    audio: Path | None = None

    @property
    def images(self) -> list[Any]:
        """The pictures, `PIL.Image` each."""
        from PIL import Image

        found = []
        for file in self.files if self.kind == "image" else ():
            with Image.open(file) as picture:
                found.append(picture.copy())
        return found

    @property
    def videos(self) -> list[Any]:
        """The videos: uint8 arrays (frames, height, width, channels)."""
        import numpy as np

        return [np.load(file) for file in self.files] if self.kind == "video" else []


class Generation:
    """A job that was handed to an engine. It can be waited for, awaited, watched and cancelled.

    Attributes:
        id: The job's name.
        step: The last step that is over, from 1; 0 before the first.
        steps: Number of steps; 0 before the first is over.
    """

    def __init__(self, engine: Engine, job: Job):
        self._engine, self.id = engine, job.id
        self.step = self.steps = 0
        self._done: concurrent.futures.Future[Result] = concurrent.futures.Future()
        # Who stops waiting for it (`asyncio.wait_for`) does not end it.
        self._done.set_running_or_notify_cancel()
        self._watchers: list[Callable[[], None]] = []

    @property
    def status(self) -> str:
        """`"queued"`, `"in_progress"`, `"completed"` or `"failed"`."""
        if self._done.done():
            return COMPLETED if self._done.exception() is None else FAILED
        job = self._engine.jobs.get(self.id)
        return FAILED if job is None else job.status

    @property
    def progress(self) -> float:
        """The share of the steps that is over, between 0 and 1."""
        if self._done.done() and self._done.exception() is None:
            return 1.0
        return self.step / self.steps if self.steps else 0.0

    def result(self, timeout: float | None = None) -> Result:
        """The result; waits for it.

        Args:
            timeout: Seconds to wait at most; `None` for no bound.

        Raises:
            JobCancelled: The job was cancelled.
            JobFailed: The job ended with an error.
            TimeoutError: It has not ended in time.
        """
        return self._done.result(timeout)

    def cancel(self) -> bool:
        """Cancels the job: at once while it waits, at its next step while it is computed. Whether it had not ended.

        A pipeline that tells no steps computes it to the end, and its result is dropped.
        """
        return self._engine.cancel(self.id)

    def __await__(self) -> Generator[Any, None, Result]:
        return asyncio.wrap_future(self._done).__await__()

    async def watch(self) -> AsyncIterator[tuple[int, int]]:
        """(step, steps) whenever a step is over, until the job ends. Steps that are over at once are one item."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake(*_: Any) -> None:
            # The loop may be closed before the job ends.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        self._watchers.append(wake)
        self._done.add_done_callback(wake)
        seen = 0
        try:
            while not self._done.done() or seen < self.step:
                if seen < self.step:
                    seen = self.step
                    yield self.step, self.steps
                    continue
                await changed.wait()
                changed.clear()
        finally:
            self._watchers.remove(wake)

    def _stepped(self, step: int, steps: int) -> None:
        self.step, self.steps = step, steps
        for watcher in list(self._watchers):
            watcher()

    def _ended(self, job: Job) -> None:
        if self._done.done():
            return
        if job.status == COMPLETED:
            self._done.set_result(result_of(job))
        else:
            self._done.set_exception(error_of(job))


def result_of(job: Job) -> Result:
    """The result of a job that is completed."""
    made = dict(job.result or {})
    return Result(
        kind=made["kind"], files=tuple(map(Path, made["files"])), width=made["width"], height=made["height"],
        frames=made.get("frames"), seeds=tuple(made["seeds"]), seconds=made["seconds"], stats=made.get("stats"),
        audio=Path(made["audio"]) if made.get("audio") else None,
    )  # fmt: skip


def error_of(job: Job) -> JobFailed:
    """The error of a job that has failed."""
    error = job.error or {"code": "failed", "message": "The job is not known any more."}
    kind = JobCancelled if error["code"] == "cancelled" else JobFailed
    return kind(error["message"], error["code"])
