"""Moments of a request: when a call began and ended, on the device that computed it, without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


def moment(device: torch.device) -> Any:
    """Now, as the device will reach it: an event on a GPU, seconds elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(begin: Any, end: Any) -> float:
    """Seconds from one moment to a later one. Waits for a GPU to reach it."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
