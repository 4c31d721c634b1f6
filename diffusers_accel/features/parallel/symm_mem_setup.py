"""Allocates symmetric memory for the groups that use it, as `parallel.comm` asks.

Hands each allocation to its group (`Group.symm_mem`) and to the input check, which resynchronizes it as a request
begins. Where `"auto"` cannot allocate any, the group uses collectives, with a warning.
"""

from __future__ import annotations

import warnings

from ...config import ParallelConfig
from ...core.comm import Group
from ...core.symm_mem import ALLOCATORS, allocate_symm_mem
from ...errors import Unsupported
from ..context import PipelineContext


def set_up_symm_mem(context: PipelineContext, group: Group, device: str, config: ParallelConfig) -> None:
    """Allocates a group's symmetric memory if the configuration asks for it. A collective of the group.

    Args:
        context: The pipeline; the allocation is appended to its `outputs.symm_mem`.
        group: The ranks; the allocation becomes their `symm_mem`.
        device: Device type of the tensors.
        config: The section `parallel`.

    Raises:
        Unsupported: `comm="symm_mem"` is asked for and memory cannot be allocated.
    """
    if config.comm == "collectives" or (config.comm == "auto" and device not in ALLOCATORS):
        return
    group.symm_mem, reason = allocate_symm_mem(group, device)
    if group.symm_mem is not None:
        context.outputs.symm_mem.append(group.symm_mem)
    if reason is None:
        return
    if config.comm == "symm_mem":
        raise Unsupported("parallel.comm='symm_mem'", f"{reason}.", "comm='collectives' or 'auto'.")
    warnings.warn(f"parallel: ranks {list(group.ranks)} communicate by collectives: {reason}.", stacklevel=2)
