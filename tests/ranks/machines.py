"""Several machines, which share nothing but an address: each is a process that runs torch's elastic launcher.

`torchrun` is a command around this launcher. Machines and ranks are forked from a process that has loaded what they
need, so that none of them imports it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_accel.core.processes import free_port

from . import SECONDS, preloaded

# Launchers find out in a rendezvous which of them is the first, or are told.
FOUND, NUMBERED = "c10d", "static"


class Machine(NamedTuple):
    """How a machine's launcher has ended, and what it and its ranks have written."""

    returncode: int
    stdout: str
    stderr: str


def two(rendezvous: str, processes: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Machine]:
    """Calls `function(*args)` in `processes` ranks on each of two machines, which write to files in `folder`."""
    context, port = preloaded(), free_port()
    files = [tuple(folder / f"{node}.{name}" for name in ("stdout", "stderr")) for node in range(2)]
    started = [
        context.Process(target=_machine, args=(rendezvous, processes, node, port, files[node], function, args))
        for node in range(2)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(SECONDS)
    finally:
        for process in started:
            process.kill()
            process.join()
    return [
        Machine(process.exitcode, *(path.read_text() for path in paths))
        for process, paths in zip(started, files, strict=True)
    ]


def _machine(rendezvous: str, processes: int, node: int, port: int, paths: Any, function: Any, args: Any) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for path, stream in zip(paths, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    # The streams of Python's that ranks inherit, whatever a test runner had made of them.
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    config = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=processes, run_id="machines", start_method="fork", max_restarts=0,
        monitor_interval=0.2, rdzv_backend=rendezvous, rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": node, "timeout": SECONDS} if rendezvous == NUMBERED else {},
    )  # fmt: skip
    try:
        elastic_launch(config, _rank)(function, args)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def _rank(function: Callable[..., Any], args: Any) -> None:
    """A rank, which ends as a script does."""
    try:
        function(*args)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit status {end.code}") from end
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
