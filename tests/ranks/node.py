"""A script as a user writes one, for launchers on several machines: `node.py FOLDER` leaves what each rank has there.

When all have got their picture, one rank of the second machine fails in its next request.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from tiny import TINY, build

from diffusers_accel import ParallelConfig, accelerate

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
entry, pipe = TINY["wan"], build("wan")
accelerate(pipe, parallel=ParallelConfig(cfg=2, ulysses=2))
torch.save(entry.run(pipe, steps=2), folder / f"{rank}.pt")
torch.distributed.barrier()
if os.environ["GROUP_RANK"] == "1" and os.environ["LOCAL_RANK"] == "1":
    raise ValueError("this rank has had enough")
entry.run(pipe, steps=2)
