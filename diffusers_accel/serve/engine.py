"""The queue of a model's jobs, its replicas, and the Python interface to both. Handles of jobs: `generation.py`.

Jobs are taken oldest first, by whichever replica is free. A thread for each replica hands them on and hears of their
steps; a replica whose rank died is started again, and its job waits at its old place once more.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import logging
import os
import random
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import AccelConfig, read_yaml
from ..errors import ConfigError, Unsupported, shown
from .generation import Generation, JobFailed, Result
from .jobs import COMPLETED, FAILED, QUEUED, Job, JobStore
from .replica import Replica, ReplicaFailed

_LOG = logging.getLogger(__name__)
# Longest pause before a replica is started again, in seconds.
_LONGEST_PAUSE = 60.0
# Arguments of a pipeline's call that the engine sets -> what is given instead.
_OWN = {
    "generator": "seed.",
    "output_type": "nothing: results are files.",
    "return_dict": "nothing: results are files.",
    "callback_on_step_end": "Generation.watch().",
    "num_images_per_prompt": "n.",
    "num_videos_per_prompt": "n.",
}


@dataclass
class _Running:
    """A job's handles in this process."""

    generations: list[Generation] = field(default_factory=list)
    cancelled: bool = False


class Engine:
    """A model in processes of its own, behind a queue. These import the script that makes them, which therefore needs
    `if __name__ == "__main__":`.

    Args:
        model: A folder, a Hugging Face id, the name of a demo checkpoint, or a function that returns a stock pipeline.
            Workers import the function, so it is defined in a module.
        config: A preset's name, a configuration, its mapping, or a YAML file. `None` is the preset "lossless".
        replicas: Number of copies of the pipeline, each on GPUs of its own.
        dtype: Name of the weights' dtype; bfloat16 on GPUs and float32 elsewhere if `None`.
        device: The device of each worker; its own GPU, else the CPU, if `None`.
        load: Arguments of `from_pretrained`, or of the function.
        data: Folder of the jobs and their files. Jobs that wait there, or were in progress, are computed. A folder that
            ends with the engine if `None`.
        deadline: Seconds in which a replica must have loaded the model.
        sections: Fields of `AccelConfig`, over the fields of `config`.

    Raises:
        ConfigError: The configuration cannot be read.
        Unsupported: Workers cannot import the function, the number of ranks is not said, or another engine has the
            folder `data`.
        ReplicaFailed: A worker could not load or accelerate the pipeline.

    Example:
        with Engine("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "balanced", replicas=2) as engine:
            jobs = [engine.submit(prompt=text, num_frames=81) for text in prompts]
            videos = [job.result().videos[0] for job in jobs]
    """

    def __init__(
        self,
        model: str | Path | Callable[..., Any],
        config: str | Path | AccelConfig | Mapping[str, Any] | None = None,
        *,
        replicas: int = 1,
        dtype: str | None = None,
        device: str | None = None,
        load: Mapping[str, Any] | None = None,
        data: str | Path | None = None,
        deadline: float = 1800.0,
        **sections: Any,
    ):
        spec, ranks = _spec(model, config, sections)
        # Ranks on the CPU share its cores: threads of several that wait for each other's cores take many times as long.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // (replicas * ranks))
        spec |= {"dtype": dtype, "device": device, "load": dict(load or {}), "threads": threads}
        self.model = spec["model"] or spec["function"]
        self._temporary = data is None
        self._folder = Path(tempfile.mkdtemp(prefix="diffusers-accel-") if data is None else data).resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self._folder)
        self.jobs = JobStore(self._folder / "jobs.sqlite")
        self._deadline, self._closing = deadline, threading.Event()
        self._waiting = threading.Condition()
        self._running: dict[str, _Running] = {}
        # Jobs that replicas of this engine compute.
        self._claimed: set[str] = set()
        self._ready = threading.Event()
        self._replicas = [Replica(spec, ranks, number * ranks) for number in range(replicas)]
        self._started: list[concurrent.futures.Future[None]] = [concurrent.futures.Future() for _ in self._replicas]
        self._threads = [
            threading.Thread(target=self._work, args=pair, daemon=True, name=f"replica {number}")
            for number, pair in enumerate(zip(self._replicas, self._started, strict=True))
        ]
        self.jobs.recover(self.model)
        try:
            for thread in self._threads:
                thread.start()
            for started in self._started:
                started.result()
        except BaseException:
            self.close()
            raise
        # A replica begins no job of a folder whose engine may not start.
        self._ready.set()

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | None = None,
        *,
        seed: int | None = None,
        n: int = 1,
        stats: bool = False,
        owner: str = "",
        key: str | None = None,
        **arguments: Any,
    ) -> Generation:
        """Adds a job to the queue. It is on the disk when this returns.

        Args:
            prompt: The prompt, if the pipeline takes one.
            seed: Seed of the first result; the others have the numbers after it. Drawn if `None`.
            n: Number of results.
            stats: Whether the result has `stats` of the pipeline.
            owner: Whose job it is, for `key`.
            key: Idempotency key: a second job of the owner with it is the first one, also if that has failed.
            arguments: Arguments of the pipeline's call: plain values, and `PIL.Image` pictures or lists of them. Tuples
                arrive as lists.

        Raises:
            Unsupported: An argument is neither plain nor a picture, or the engine sets it.
            JobFailed: The engine is closed.
        """
        for argument, instead in _OWN.items():
            if argument in arguments:
                raise Unsupported(f"Engine.submit({argument}=)", "the engine sets it.", instead)
        if n < 1 or (n > 1 and isinstance(prompt, (list, tuple))):
            raise Unsupported("Engine.submit(n=)", f"there are {n} results of {shown(prompt)}.", "n=1, or one prompt.")
        name = f"job_{random.SystemRandom().getrandbits(96):024x}"
        given = {**({} if prompt is None else {"prompt": prompt}), **arguments}
        images = {argument: value for argument, value in given.items() if _are_pictures(value)}
        plain = {argument: value for argument, value in given.items() if argument not in images}
        for argument, value in plain.items():
            if not _is_plain(value):
                raise Unsupported(
                    f"Engine.submit({argument}=)", f"{shown(value)} cannot be sent to a worker.",
                    "plain values (texts, numbers, lists, mappings) or PIL pictures.",
                )  # fmt: skip
        folder = self._folder / "files" / name
        request = {
            "arguments": plain, "images": {each: _saved(value, folder, each) for each, value in images.items()},
            "seed": random.SystemRandom().getrandbits(31) if seed is None else int(seed), "n": int(n),
            "folder": str(folder), "stats": bool(stats),
        }  # fmt: skip
        with self._waiting:
            if self._closing.is_set():
                shutil.rmtree(folder, ignore_errors=True)
                raise JobFailed("The engine is closed.", "closed")
            job, new = self.jobs.add(self.model, request, owner=owner, key=key, name=name)
            generation = Generation(self, job)
            if job.ended:
                generation._ended(job)
            else:
                self._running.setdefault(job.id, _Running()).generations.append(generation)
            self._waiting.notify()
        if not new:
            shutil.rmtree(folder, ignore_errors=True)
        return generation

    def generate(self, prompt: str | None = None, **arguments: Any) -> Result:
        """The result of a job; waits for it. Arguments are those of `submit`.

        Raises:
            JobFailed: The job ended with an error.
        """
        return self.submit(prompt, **arguments).result()

    def cancel(self, name: str) -> bool:
        """Cancels a job: at once while it waits, at its next step while it is computed. Whether it had not ended."""
        with self._waiting:
            job = None if self._closing.is_set() else self.jobs.get(name)
            if job is None or job.ended:
                return False
            if job.status == QUEUED:
                ended = self.jobs.fail(name, "cancelled", "The job was cancelled.")
                if ended is not None:
                    self._end(ended)
                return ended is not None
            self._running.setdefault(name, _Running()).cancelled = True
        for replica in self._replicas:
            replica.cancel(name)
        return True

    def close(self) -> None:
        """Ends the workers. Jobs that have not ended wait in `data`, and end with an error in this process."""
        with self._waiting:
            if self._closing.is_set():
                return
            self._closing.set()
            self._waiting.notify_all()
        for replica in self._replicas:
            replica.close()
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        with self._waiting:
            for name in self._claimed:
                self.jobs.release(name)
            for running in self._running.values():
                for generation in running.generations:
                    if not generation._done.done():
                        generation._done.set_exception(JobFailed("The engine was closed.", "closed"))
            self.jobs.close()
        self._lock.close()
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # --- a replica's thread -------------------------------------------------------------------------------------------

    def _work(self, replica: Replica, started: concurrent.futures.Future[None]) -> None:
        pause = 0.0
        while not self._closing.is_set():
            if not replica.alive:
                if self._closing.wait(pause):
                    break
                replica.kill()
                try:
                    replica.start(self._deadline)
                except BaseException as error:  # the first start answers to the caller
                    replica.kill()
                    if not started.done():
                        started.set_exception(error)
                        return
                    if not self._closing.is_set():
                        _LOG.error("a replica of %s could not be started again: %s", self.model, error)
                    pause = min(_LONGEST_PAUSE, max(1.0, 2 * pause))
                    continue
                if not started.done():
                    started.set_result(None)
            if not self._ready.wait(1.0):
                continue
            try:
                job = self._next()
            except sqlite3.Error as error:
                _LOG.error("the jobs of %s cannot be read: %s", self.model, error)
                self._closing.wait(1.0)
                continue
            if job is not None:
                pause = self._compute(replica, job, pause)
        replica.kill()

    def _compute(self, replica: Replica, job: Job, pause: float) -> float:
        """Computes a job, and returns the pause before the replica's next start, in seconds."""
        try:
            answer = replica.run(job.id, job.request, functools.partial(self._step, job.id))
            self._answered(job, answer)
            return 0.0
        except ReplicaFailed as error:
            if self._closing.is_set():
                return pause
            _LOG.warning("%s: %s", job.id, error)
        except Exception:  # the job's row may be in any state, and its replica computes something unknown
            _LOG.exception("%s failed in the front", job.id)
            replica.kill()
        try:
            self._died(job)
        except sqlite3.Error as error:
            # The row cannot be written: it stays in progress until an engine with this folder begins anew.
            _LOG.exception("%s cannot be written", job.id)
            self._end(replace(job, status=FAILED, error={"code": "failed", "message": f"its row: {error}"}))
        return max(0.5, pause)

    def _next(self) -> Job | None:
        with self._waiting:
            job = None if self._closing.is_set() else self.jobs.claim(self.model)
            if job is None:
                self._waiting.wait(1.0)
            else:
                self._claimed.add(job.id)
            return job

    def _step(self, name: str, step: int, steps: int) -> None:
        running = self._running.get(name)
        if running is None:
            return
        for generation in list(running.generations):
            generation._stepped(step, steps)
        if running.cancelled and step < steps:
            # It was cancelled before the replica had begun it.
            for replica in self._replicas:
                replica.cancel(name)

    def _answered(self, job: Job, answer: Mapping[str, Any]) -> None:
        running = self._running.get(job.id)
        if running is not None and running.cancelled:
            ended = self.jobs.fail(job.id, "cancelled", "The job was cancelled.")
        elif answer["kind"] == "done":
            ended = self.jobs.complete(job.id, answer["result"])
        else:
            ended = self.jobs.fail(job.id, answer["code"], answer["message"])
        self._end(ended or self.jobs.get(job.id) or job)

    def _died(self, job: Job) -> None:
        running = self._running.get(job.id)
        if running is not None and running.cancelled:
            left = self.jobs.fail(job.id, "cancelled", "The job was cancelled.")
        else:
            left = self.jobs.requeue(job.id)
        self._claimed.discard(job.id)
        if left is None or left.ended:
            self._end(left or self.jobs.get(job.id) or job)

    def _end(self, job: Job) -> None:
        with self._waiting:
            self._claimed.discard(job.id)
            running = self._running.pop(job.id, None)
        if job.status != COMPLETED:
            shutil.rmtree(self._folder / "files" / job.id, ignore_errors=True)
        for generation in running.generations if running is not None else ():
            generation._ended(job)


def _spec(model: Any, config: Any, sections: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The model as `worker.load` reads it, and its number of ranks."""
    if isinstance(config, AccelConfig):
        config = config.to_dict()
    elif isinstance(config, Path) or (isinstance(config, str) and config.endswith((".yaml", ".yml"))):
        config = read_yaml(Path(config))
    elif isinstance(config, Mapping):
        config = AccelConfig.from_dict(config).to_dict()
    elif config is not None and not isinstance(config, str):
        raise ConfigError(f"Engine(config=): expected a preset's name, a mapping or a YAML file, got {shown(config)}.")
    given = AccelConfig.from_dict(dict(sections)).to_dict()
    off = {name: None for name, value in sections.items() if value is None}
    whole = {**(config if isinstance(config, dict) else {}), **given}
    parallel = AccelConfig.from_dict({"parallel": whole.get("parallel")}).parallel
    if parallel is not None and parallel.any_world_size:
        raise Unsupported(
            "Engine", "fsdp alone does not say how many ranks there are.", "ParallelConfig(fsdp=True, ulysses=2), say."
        )
    spec = {"model": None, "function": None, "config": config, "sections": {**given, **off}}
    if callable(model):
        name = f"{getattr(model, '__module__', '__main__')}:{getattr(model, '__qualname__', '')}"
        if "__main__" in name or "<" in name or "." in name.partition(":")[2]:
            raise Unsupported(
                "Engine", "its workers cannot import the function that makes the pipeline.",
                "a function of a module, or the pipeline's folder or Hugging Face id.",
            )  # fmt: skip
        spec["function"] = name
    else:
        # The name of its jobs is the same wherever a process has been started.
        folder = Path(model).expanduser()
        spec["model"] = str(folder.resolve() if folder.is_dir() else model)
    return spec, 1 if parallel is None else parallel.ranks


def _locked(folder: Path) -> Any:
    """The lock of a folder, held until it is closed: an engine takes the jobs there for its own.

    Raises:
        Unsupported: Another engine has it.
    """
    opened = (folder / "lock").open("w")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        opened.close()
        raise Unsupported(
            "Engine(data=)", f"another engine has {str(folder)!r}.", "a folder for each engine."
        ) from None
    return opened


def _are_pictures(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return bool(items) and all(hasattr(item, "save") and hasattr(item, "getbands") for item in items)


def _saved(value: Any, folder: Path, argument: str) -> list[str]:
    """The files of pictures, PNG each."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for place, picture in enumerate(value if isinstance(value, (list, tuple)) else [value]):
        file = folder / f"input-{argument}-{place}.png"
        with file.open("wb") as opened:
            picture.save(opened, "PNG")
            opened.flush()
            os.fsync(opened.fileno())
        files.append(str(file))
    return files


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
