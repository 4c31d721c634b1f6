"""The functions that ranks run on several machines: a user's script, and a command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from tiny import TINY, build

from diffusers_accel import ParallelConfig, accelerate


def main(folder: Path) -> None:
    """Leaves each rank's picture in the folder. When all have got it, one rank of the second machine fails in its next
    request."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    entry, pipe = TINY["wan"], build("wan")
    accelerate(pipe, parallel=ParallelConfig(cfg=2, ulysses=2))
    torch.save(entry.run(pipe, steps=2), folder / f"{rank}.pt")
    torch.distributed.barrier()
    if os.environ["GROUP_RANK"] == "1" and os.environ["LOCAL_RANK"] == "1":
        raise ValueError("this rank has had enough")
    entry.run(pipe, steps=2)


def command(*arguments: str) -> None:
    """`diffusers-accel ...`, as `torchrun -m diffusers_accel ...` starts it."""
    from diffusers_accel.cli.main import main as command

    torch.set_num_threads(1)
    sys.argv = ["diffusers-accel", *arguments]
    command()
