"""Common code of benchmarks on several GPUs: options, the process group, and the time of communication in a request."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist

from diffusers_accel.core.mesh import init_process_group

# Parts of the names of kernels and copies that bring data to another GPU.
_EXCHANGES = ("nccl", "_scatter", "_hand_back", "_collect", "barrier", "Memcpy PtoP", "Memcpy DtoD")


def parser(about: str | None, repeats: int = 2) -> argparse.ArgumentParser:
    """The options of them all.

    Args:
        about: The script's docstring.
        repeats: Requests that are timed, if nothing else is said.
    """
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cuda")
    found.add_argument("--repeats", type=int, default=repeats)
    found.add_argument("--only", nargs="*", help="these variants alone")
    found.add_argument("--tiny", action="store_true", help="small models: a dry run of the script")
    found.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results if not given")
    return found


def start(device: str) -> tuple[int, int, torch.dtype]:
    """Begins the process group on the launcher's GPU.

    Returns:
        This rank, how many there are, and the type that models have.
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    init_process_group(device)
    return dist.get_rank(), dist.get_world_size(), torch.bfloat16 if device == "cuda" else torch.float32


def spans(generate: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one request on the GPU: all of it, with something on its way to another GPU, and with nothing
    else."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        generate()
        measure.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    others, exchanges = [], []
    kinds: Counter[str] = Counter()
    for event in kernels:
        # The whole of NCCL's calls is marked too, without being a kernel.
        if event.name.startswith("nccl:"):
            continue
        part = (event.time_range.start, event.time_range.end)
        kind = next((name for name in _EXCHANGES if name in event.name), None)
        (exchanges if kind is not None else others).append(part)
        if kind is not None:
            kinds[kind] += part[1] - part[0]
    both = _length(exchanges + others)
    return {
        "all": round(both / 1000, 2),
        "exchanges": round(_length(exchanges) / 1000, 2),
        "exchanges alone": round((both - _length(others)) / 1000, 2),
        **{f"of them, {kind}": round(length / 1000, 2) for kind, length in kinds.items()},
    }


def _length(parts: list[tuple[float, float]]) -> float:
    """Time that intervals cover."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(parts):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
