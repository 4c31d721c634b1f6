"""What every benchmark shares: timing on the device, and results that say how to get them again.

A result is a JSON file with the figures, the hardware, the versions and the command line. Times are wall-clock seconds
of whole calls, with the device synchronized on both sides; the median of several calls is reported, and all are kept.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_accel.core.platform import default_device, versions

RESULTS = Path(__file__).parent / "results"


def cores(jobs: int) -> int:
    """Threads for each of so many processes beside each other."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], repeats: int, warm: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm` calls that are not counted."""
    for _ in range(warm):
        function()
    found = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        found.append(time.perf_counter() - start)
    return found


def alternate(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, so that a drift of the clocks meets all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name] += seconds(function, 1, warm=0)
    return found


def rounds(functions: dict[str, Callable[[], Any]], count: int, warmup: int = 15, rep: int = 60) -> dict[str, float]:
    """Median milliseconds of each on the GPU alone, called in turn, its cache emptied before every call."""
    from triton.testing import do_bench

    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(count):
        for name, function in functions.items():
            found[name].append(do_bench(function, warmup=warmup, rep=rep, return_mode="median"))
    return {name: statistics.median(times) for name, times in found.items()}


def summary(times: list[float]) -> dict[str, Any]:
    return {
        "seconds": round(statistics.median(times), 4),
        "min": round(min(times), 4),
        "max": round(max(times), 4),
        "all": [round(item, 4) for item in times],
    }


def environment() -> dict[str, Any]:
    """Hardware, versions and the command that is running."""
    found: dict[str, Any] = {"device": str(default_device()), "machine": platform.machine(), "versions": versions()}
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        except (OSError, subprocess.CalledProcessError):
            found["driver"] = "unknown"
    arguments = sys.argv[1:]
    if "--out" in arguments:  # where the file went says nothing about what was measured
        place = arguments.index("--out")
        del arguments[place : place + 2]
    launcher = ["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"]] if "WORLD_SIZE" in os.environ else ["python"]
    found["command"] = shlex.join([*launcher, f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    return found


def write(name: str, figures: dict[str, Any], folder: Path | None = None) -> Path:
    """Writes `name`.json with the figures and the environment, and returns its path."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**environment(), **figures}, indent=2) + "\n")
    return path
