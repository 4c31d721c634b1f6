"""Which groups of ranks exchange what they have through windows, and which by messages."""

from __future__ import annotations

import warnings

from ...config import ParallelConfig
from ...core.comm import Group
from ...core.windows import MAKERS, open_windows
from ...errors import Unsupported
from ..context import PipelineContext


def open_for(context: PipelineContext, group: Group, device: str, config: ParallelConfig) -> None:
    """Memory through which a group exchanges what it has, where it is asked for and can be had. All its ranks call it.

    Args:
        context: The pipeline, which is told of them.
        group: The ranks.
        device: Type of the device that tensors are on.
        config: What is asked for.

    Raises:
        Unsupported: Windows are asked for by name and cannot be had.
    """
    if config.exchange == "messages" or (config.exchange == "auto" and device not in MAKERS):
        return
    group.windows, reason = open_windows(group, device)
    if group.windows is not None:
        context.outputs.windows.append(group.windows)
    if reason is None:
        return
    if config.exchange == "windows":
        raise Unsupported("parallel.exchange='windows'", f"{reason}.", "exchange='messages' or 'auto'.")
    warnings.warn(f"parallel: ranks {list(group.ranks)} exchange by messages: {reason}.", stacklevel=2)
