"""Processes of one machine that work as ranks: the variables that tell them so, and a port where they meet. It imports
no torch, so that a process that only starts them stays small."""

from __future__ import annotations

import socket


def rank_environment(rank: int, ranks: int, port: int, first_device: int = 0) -> dict[str, str]:
    """The variables with which a launcher on one machine tells a process its rank.

    Args:
        rank: The process's rank.
        ranks: The number of processes.
        port: A free TCP port of this machine, the same for all of them.
        first_device: The GPU of rank 0; the others follow.
    """
    return {
        "RANK": str(rank), "LOCAL_RANK": str(first_device + rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    """A free TCP port of this machine, for ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
