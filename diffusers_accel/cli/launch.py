"""Ranks of the command line: a command with `--parallel` runs again in workers of torch's elastic launcher.

Every rank runs the whole command; rank 0 alone prints and saves. A process that a launcher has started is a rank
already, and starts no workers.
"""

from __future__ import annotations

import os
import re
import sys
import uuid

import torch
import typer

from ..config import AccelConfig
from ..core.mesh import world_size
from .common import CommandError


def read_parallel(text: str) -> list[str]:
    """Reads `"cfg=2,attn2d=2x2"` as settings: `["parallel.cfg=2", "parallel.attn2d=[2,2]"]`.

    Raises:
        CommandError: The text has another form.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(name and value for name, _, value in (part.partition("=") for part in parts)):
        raise CommandError(f"--parallel {text}: write names and numbers of ranks, as in cfg=2,ulysses=2.")
    # Rows and columns of a grid.
    return ["parallel." + re.sub(r"=(\d+)x(\d+)$", r"=[\1,\2]", part) for part in parts]


def in_workers(config: AccelConfig, device: torch.device) -> None:
    """Runs the command in workers on this machine and exits. In a worker, selects the rank's GPU and returns.

    A process that a launcher has started, here or on several machines, is a worker. Its GPU is the one numbered
    LOCAL_RANK.

    Args:
        config: The configuration; without `parallel` nothing is done.
        device: The pipeline's device, of which the type alone is read.

    Raises:
        typer.Exit: The workers have ended, with status 0, or 2 if one has failed.
        CommandError: This machine has fewer GPUs than ranks, a launcher has started another number of ranks, or `fsdp`
            alone leaves the number open.
    """
    if config.parallel is None:
        return
    ranks, gpus, started = config.parallel.ranks, torch.cuda.device_count(), world_size()
    if started is not None:
        if started != ranks and not config.parallel.any_world_size:
            raise CommandError(f"--parallel: {config.parallel.product} ranks, and {started} processes were started.")
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if device.type == "cuda" and number >= gpus:
            raise CommandError(
                f"--parallel: this machine has {gpus} GPUs, and this is process {number + 1} on it. Give torchrun "
                f"--nproc-per-node {gpus} or less."
            )
        if device.type == "cuda":
            torch.cuda.set_device(number)
        return
    if config.parallel.any_world_size:
        raise CommandError(
            "--parallel: fsdp alone does not say how many ranks there are; write another number beside it, as in "
            "fsdp=true,ulysses=2."
        )
    if device.type == "cuda" and gpus < ranks:
        raise CommandError(
            f"--parallel: {config.parallel.product} ranks, and this machine has {gpus} GPUs. On several machines, "
            "start the command on each: torchrun --nnodes 2 --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint "
            "HOST:29500 -m diffusers_accel run ..."
        )
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    try:
        elastic_launch(launch, sys.executable)("-m", "diffusers_accel", *sys.argv[1:])
    except ChildFailedError as error:
        # The worker has printed its error.
        raise typer.Exit(2) from error
    raise typer.Exit(0)


def first() -> bool:
    """Whether this process prints and saves: rank 0, or a process without a launcher."""
    return int(os.environ.get("RANK", "0")) == 0 or world_size() is None
