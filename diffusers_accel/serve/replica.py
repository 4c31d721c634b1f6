"""One replica of a model as the front sees it: a process for each rank, started, watched, and ended together.

Ranks of a replica need each other. When one dies, the others would wait in a collective for ever: all of them are ended
then. A request that raises is answered as failed and ends nothing, as long as every rank answers.
"""

from __future__ import annotations

import contextlib
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
    """A replica could not load its model, or one of its ranks died. All of its ranks have been ended."""


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
        # Processes are started and ended by two threads: the replica's, and the one that closes it.
        self._starting = threading.RLock()
        self._closed = False
        self._running: str | None = None

    @property
    def alive(self) -> bool:
        """Whether its ranks have been started and none has ended."""
        processes = self.processes
        return len(processes) == self.ranks and all(process.is_alive() for process in processes)

    def start(self, deadline: float) -> None:
        """Starts the ranks, and waits until all have loaded the model.

        Args:
            deadline: Seconds that this may take.

        Raises:
            ReplicaFailed: A rank could not load the model, died, or was not ready in time; or the replica was closed.
        """
        from .worker import work

        context, port = _context(), free_port()
        for rank in range(self.ranks):
            here, there = context.Pipe()
            environment = rank_environment(rank, self.ranks, port, self.first_device)
            arguments = (environment, there, dict(self.spec))
            process = context.Process(target=work, args=arguments, daemon=True, name=f"rank {rank}")
            with self._starting:
                if self._closed:
                    self.kill()
                    raise ReplicaFailed("the replica was closed.")
                process.start()
                self.processes.append(process)
                self._pipes.append(here)
            there.close()
        for _, message in self._answers(time.monotonic() + deadline):
            if message["kind"] == FAILED:
                self.kill()
                raise ReplicaFailed(message["message"])

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
            # A rank that is gone is found by the wait below.
            with contextlib.suppress(OSError):
                for pipe in list(self._pipes):
                    send(pipe, RUN, id=name, request=request)
        found: dict[str, Any] = {}
        ends = False
        try:
            for rank, message in self._answers(None):
                if message["kind"] == STEP:
                    step(message["step"], message["steps"])
                # Rank 0 has the result; one rank's error is everyone's.
                elif message["kind"] == FAILED or (rank == 0 and not found):
                    found = message if found.get("kind") != FAILED else found
                ends = ends or bool(message.get("ends"))
        except ReplicaFailed:
            # A rank that has said why is believed; the others waited for it until they were ended.
            if found.get("kind") != FAILED:
                raise
        finally:
            with self._sending:
                self._running = None
        if ends:
            self.kill()
        return found

    def cancel(self, name: str) -> bool:
        """Asks the ranks to end a job at its next step. Whether it is the one that runs."""
        with self._sending:
            pipes = list(self._pipes)
            if self._running != name or not pipes:
                return False
            try:
                send(pipes[0], CANCEL, id=name)
            except OSError:
                return False
            return True

    def kill(self) -> None:
        """Ends all ranks."""
        with self._starting:
            processes, self.processes, self._pipes = self.processes, [], []
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    def close(self) -> None:
        """Ends all ranks, and starts none from now on."""
        with self._starting:
            self._closed = True
        self.kill()

    def _answers(self, deadline: float | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(rank, message) of each message, until every rank has answered with other than a step.

        Raises:
            ReplicaFailed: A rank died, or the deadline has passed. All ranks have been ended.
        """
        with self._starting:
            processes, waiting = list(self.processes), {pipe: rank for rank, pipe in enumerate(self._pipes)}
        if len(waiting) < self.ranks:
            raise ReplicaFailed("its ranks have been ended.")
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
                    processes[rank].join(5)
                    code = processes[rank].exitcode
                    self.kill()
                    raise ReplicaFailed(f"rank {rank} died (exit code {code}).") from None
                if message["kind"] in (READY, DONE, FAILED):
                    del waiting[pipe]
                if message["kind"] == FAILED and deadline is None:
                    deadline = time.monotonic() + _GRACE
                yield rank, message
