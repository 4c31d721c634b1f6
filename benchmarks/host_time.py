"""The host's time for one denoiser forward of small pipelines, here and in another checkout, in turn.

Small models on the CPU compute for microseconds an operator, so that the time of a forward is mostly Python: stock's,
and what each section adds to it. Each round starts fresh processes. A process takes the fastest of many forwards.

    python benchmarks/host_time.py
    git worktree add ../before COMMIT && python benchmarks/host_time.py --against ../before
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import measure

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys, time, torch
sys.path.insert(0, "tests")
from tiny import TINY, build
from diffusers_accel import accelerate
torch.set_num_threads(1)
found = {}
for family in ("flux", "wan", "ltx2"):
    for name, sections in json.loads(sys.argv[1]).items():
        pipe, entry, times = build(family), TINY[family], []
        if sections:
            accelerate(pipe, **sections)
        stock = type(pipe.transformer).__call__
        begin = 0.0
        def timed(module, *args, **kwargs):
            begin = time.perf_counter()
            out = stock(module, *args, **kwargs)
            times.append(time.perf_counter() - begin)
            return out
        type(pipe.transformer).__call__ = timed
        entry.run(pipe, steps=60)
        type(pipe.transformer).__call__ = stock
        found[f"{family}, {name}"] = sorted(times)[len(times) // 4]
print(json.dumps(found))
"""
SECTIONS = {
    "stock": {},
    "attention": {"attention": "sdpa"},
    "attention, cache": {
        "attention": "sdpa",
        "cache": {"kind": "teacache", "threshold": 0.0, "coefficients": [1.0, 0.0]},
    },
    "attention, fuse, int8": {"attention": "sdpa", "fuse": True, "linear": {"algo": "int8", "smallest": 0}},
}


def forwards(checkout: Path) -> dict[str, float]:
    """Seconds of a forward by family and sections, in a fresh process that imports the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(SECTIONS)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of this project, with its tests")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    checkouts = {"here": ROOT, **({"against": options.against.resolve()} if options.against else {})}
    rounds = [{name: forwards(path) for name, path in checkouts.items()} for _ in range(options.rounds)]
    figures: dict[str, dict[str, float]] = {}
    for case in rounds[0]["here"]:
        ms = {name: statistics.median(each[name][case] for each in rounds) * 1e3 for name in checkouts}
        figures[case] = {f"ms, {name}": round(value, 4) for name, value in ms.items()}
        if options.against:
            # Of neighbours in time, whose machine was as busy.
            ratios = [each["here"][case] / each["against"][case] for each in rounds]
            figures[case]["ratio"] = round(statistics.median(ratios), 4)
    print(measure.write("host-time", {"rounds": options.rounds, "forwards": figures}, options.out).read_text())


if __name__ == "__main__":
    main()
