"""Processes that communicate over Gloo, for tests of several ranks.

A pool of ranks is started once and asked many times: `pool.run(function, ...)` calls the function in each with the same
arguments and returns what each gave. Functions are found by name, so they stand in a module beside this one. A rank
that raises ends the call with its error, and the pool; the next call starts another.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from diffusers_accel.core.processes import free_port, rank_environment

SECONDS = 240


class RankFailed(AssertionError):
    """The error of a rank."""


def preloaded() -> Any:
    """Where processes come from that need not import anything: a server, started once, that has loaded
    `ranks.preload`, and is forked for each."""
    # The server looks for modules where a new process does.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks.preload"])
    return context


class Pool:
    """`size` ranks of one process group."""

    def __init__(self, size: int):
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def _start(self) -> None:
        context, port = preloaded(), free_port()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank_environment(rank, self.size, port), there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of `function(*args)`, one for each rank."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        found: list[Any] = [None] * self.size
        # A rank that fails answers first; other ranks may wait for it in vain.
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout=SECONDS)
            if not ready:
                self.close()
                raise RankFailed(f"ranks {sorted(waiting)} gave no answer within {SECONDS} s")
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    fine, value = waiting.pop(rank).recv()
                except EOFError:
                    fine, value = False, "it ended"
                if not fine:
                    self.close()
                    raise RankFailed(f"rank {rank}: {value}")
                found[rank] = value
        return found

    def close(self) -> None:
        """Ends the ranks."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(environment: dict[str, str], pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
