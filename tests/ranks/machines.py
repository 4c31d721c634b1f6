"""Two launchers of this machine, which stand for two machines: they share nothing but an address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

# Of a rendezvous, in which launchers find out who is the first.
FOUND = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:{port}")
# Of launchers that are told.
NUMBERED = ("--master-addr", "127.0.0.1", "--master-port", "{port}", "--node-rank", "{node}")


def two(options: Sequence[str], processes: int, *command: object) -> list[subprocess.CompletedProcess[str]]:
    """What has become of a command (`-m module ...`) that each of two launchers starts in so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
