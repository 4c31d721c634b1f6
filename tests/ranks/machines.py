"""Two launchers of this machine, which stand for two machines: they share nothing but an address."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from diffusers_accel.core.mesh import free_port

# Of a rendezvous, in which launchers find out who is the first.
FOUND = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:{port}")
# Of launchers that are told.
NUMBERED = ("--master-addr", "127.0.0.1", "--master-port", "{port}", "--node-rank", "{node}")


def two(options: Sequence[str], processes: int, *command: object) -> list[subprocess.CompletedProcess[str]]:
    """The completed processes of a command (`-m module ...`) that each of two launchers starts in `processes` ranks."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    started = []
    for node in range(2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(processes)]
        launcher += [option.format(port=port, node=node) for option in options]
        started.append(
            subprocess.Popen(
                [*launcher, *map(str, command)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, said, strict=True)
    ]
