"""Timestamps of denoiser calls, taken on the computing device without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


def timestamp(device: torch.device, *, in_graph: bool = False) -> Any:
    """A timestamp of a device: on a GPU, of the end of the work queued so far.

    Args:
        device: The device.
        in_graph: Whether a CUDA graph is being captured. The timestamp is then the last replay's.

    Returns:
        A CUDA event on the current stream of a GPU; `time.perf_counter()` in seconds for any other device.
    """
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True, external=in_graph)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds from one timestamp to a later one of the same device. Waits until a GPU has reached the later one."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
