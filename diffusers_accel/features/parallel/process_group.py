"""The process group, and this rank's device: the first row of FEATURES, on which all parallelism stands.

The feature's section is `parallel`. The process group is started, and the rank's pipeline moves to a GPU of its own
(`rank_device.py`), before any other feature's edits. These then find weights on their final device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from ...config import ParallelConfig
from ...core.edits import Edit
from ...core.mesh import init_process_group, world_group, world_size
from ..context import PipelineContext
from ..feature import Plan
from . import rank_device


def check(context: PipelineContext, config: ParallelConfig) -> Plan:
    """The size of the process group. The number of ranks is judged with the mesh, by the row `"parallel"`."""
    world = world_size()
    action = (
        "no launcher has started one"
        if world is None
        else f"{world} ranks" + (", each on a GPU of its own" if context.device.type == "cuda" else "")
    )
    return Plan(action, 0, tuple(rank_device.notes(context)))


def edits(context: PipelineContext, config: ParallelConfig) -> Iterator[Edit]:
    """The process group, and the moves that give each rank a GPU of its own.

    Raises:
        Unsupported: Several ranks are on one GPU and cannot be moved.
    """
    if config.fsdp and context.home.type == "cuda":
        # Weights on the host are quantized on the current GPU.
        torch.cuda.set_device(context.home)
    context.outputs.rank_device = True
    device = context.device.type
    # A pipeline that is accelerated on the host may be moved to GPUs afterwards.
    init_process_group("cuda" if torch.cuda.is_available() and dist.is_nccl_available() else device)
    if device == "cuda":
        yield from rank_device.edits(context, world_group())
    elif torch.cuda.is_available():
        yield from rank_device.edits_on_host(context)
