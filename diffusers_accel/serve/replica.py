"""One replica of a model as the front sees it: a process for each rank, started, watched, and ended together.

Ranks of a replica need each other. When one dies, the others would wait in a collective for ever: all of them are ended
then. A request that raises is answered as failed and ends nothing, as long as every rank answers.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..core.processes import free_port, rank_environment
from ..errors import AccelError
from .messages import CANCEL, DONE, FAILED, READY, RUN, STEP, receive, send

# Seconds that other ranks have to answer after one has failed.
_GRACE = 10.0


def _context() -> Any:
    """Where ranks come from: new processes, since a fork of one with threads may hang."""
    return multiprocessing.get_context("spawn")


class ReplicaFailed(AccelError):
    """A replica could not load its model, or one of its ranks died. All of its ranks have been ended.

    Args:
        message: The rank and the reason.
        deliberate: Whether the model cannot be loaded, so that another start would fail alike.
    """

    def __init__(self, message: str, deliberate: bool = False):
        super().__init__(message)
        self.deliberate = deliberate


class Replica:
    """The ranks of one replica.

    Args:
        spec: The model as `worker.load` reads it, plain values.
        ranks: Number of processes.
        first_device: Number of the GPU of rank 0.
    """

    def __init__(self, spec: Mapping[str, Any], ranks: int = 1, first_device: int = 0):
        self.spec, self.ranks, self.first_device = spec, ranks, first_device
        self.processes: list[Any] = []
        self._pipes: list[Any] = []
        self._sending = threading.Lock()
        self._running: str | None = None

    @property
    def alive(self) -> bool:
        """Whether its ranks have been started and none has ended."""
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def start(self, deadline: float) -> None:
        """Starts the ranks, and waits until all have loaded the model.

        Args:
            deadline: Seconds that this may take.

        Raises:
            ReplicaFailed: A rank could not load the model, died, or was not ready in time.
        """
        from .worker import work

        context = _context()
        port = free_port()
        for rank in range(self.ranks):
            here, there = context.Pipe()
            environment = rank_environment(rank, self.ranks, port, self.first_device)
            process = context.Process(
                target=work, args=(environment, there, dict(self.spec)), daemon=True, name=f"rank {rank}"
            )
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)
        for _, message in self._answers(time.monotonic() + deadline):
            if message["kind"] == FAILED:
                self.kill()
                raise ReplicaFailed(message["message"], deliberate=True)

    def run(self, name: str, request: Mapping[str, Any], step: Callable[[int, int], None]) -> dict[str, Any]:
        """Computes a job.

        Args:
            name: The job's id.
            request: What is to be computed, as `worker.compute` reads it.
            step: Is told of each step: its number from 1, and the number of steps.

        Returns:
            Rank 0's answer: `kind` is `"done"` with a `result`, or `"failed"` with `code` and `message`.

        Raises:
            ReplicaFailed: A rank died.
        """
        with self._sending:
            self._running = name
            try:
                for pipe in self._pipes:
                    send(pipe, RUN, id=name, request=request)
            except OSError:
                pass  # the wait below finds out which rank died
        found: dict[str, Any] = {}
        try:
            for rank, message in self._answers(None):
                if message["kind"] == STEP:
                    step(message["step"], message["steps"])
                # Rank 0 has the result; one rank's error is everyone's.
                elif message["kind"] == FAILED or (rank == 0 and not found):
                    found = message if found.get("kind") != FAILED else found
        finally:
            with self._sending:
                self._running = None
        return found

    def cancel(self, name: str) -> bool:
        """Asks the ranks to end a job at its next step. Whether it is the one that runs."""
        with self._sending:
            if self._running != name or not self._pipes:
                return False
            try:
                send(self._pipes[0], CANCEL, id=name)
            except OSError:
                return False
            return True

    def kill(self) -> None:
        """Ends all ranks."""
        processes, self.processes, self._pipes = self.processes, [], []
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    def _answers(self, deadline: float | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(rank, message) of each message, until every rank has answered with other than a step.

        Raises:
            ReplicaFailed: A rank died, or the deadline has passed. All ranks have been ended.
        """
        waiting = dict(zip(self._pipes, range(self.ranks), strict=True))
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = multiprocessing.connection.wait(list(waiting), left)
            if not ready:
                ranks = ", ".join(map(str, waiting.values()))
                self.kill()
                raise ReplicaFailed(f"rank {ranks} has not answered in time.")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    message = receive(pipe)
                except (EOFError, OSError):
                    process = self.processes[rank]
                    process.join(5)
                    code = process.exitcode
                    self.kill()
                    raise ReplicaFailed(f"rank {rank} died (exit code {code}).") from None
                if message["kind"] in (READY, DONE, FAILED):
                    del waiting[pipe]
                if message["kind"] == FAILED and deadline is None:
                    deadline = time.monotonic() + _GRACE
                yield rank, message
