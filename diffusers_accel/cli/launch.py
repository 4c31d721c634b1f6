"""Several processes for one command: it is run again in workers of torch's elastic launcher, each a rank."""

from __future__ import annotations

import os
import re
import sys
import uuid

import torch
import typer

from ..config import AccelConfig
from ..core.mesh import launched
from .common import CommandError


def read_parallel(text: str) -> list[str]:
    """`"cfg=2,attn2d=2x2"` as settings: `["parallel.cfg=2", "parallel.attn2d=[2,2]"]`.

    Raises:
        CommandError: It is not of that form.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(name and value for name, _, value in (part.partition("=") for part in parts)):
        raise CommandError(f"--parallel {text}: write what is divided among how many, as in cfg=2,ulysses=2.")
    # Rows and columns of a grid.
    return ["parallel." + re.sub(r"=(\d+)x(\d+)$", r"=[\1,\2]", part) for part in parts]


def in_workers(config: AccelConfig, device: torch.device) -> None:
    """Ends this process with workers' result, unless it is one of them: of ours, or of a launcher that has started the
    command on every machine. A worker on GPUs takes its own.

    Args:
        config: What is asked for.
        device: Where the work is to be done.

    Raises:
        CommandError: There are fewer GPUs here than ranks are asked for, or a launcher has started another number.
    """
    if config.parallel is None:
        return
    ranks, gpus, started = config.parallel.ranks, torch.cuda.device_count(), launched()
    if started is not None:
        if started != ranks and not (config.parallel.fsdp and ranks == 1):
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
    if config.parallel.fsdp and config.parallel.ranks == 1:
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
        # The worker has said why.
        raise typer.Exit(2) from error
    raise typer.Exit(0)


def first() -> bool:
    """Whether this process is the one that speaks and saves."""
    return int(os.environ.get("RANK", "0")) == 0 or launched() is None
