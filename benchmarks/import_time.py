"""What `import diffusers_accel` costs over importing diffusers, in fresh processes called in turn.

python benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import measure

SCRIPT = """
import time
import diffusers
start = time.perf_counter()
import diffusers_accel
{names}
print(time.perf_counter() - start)
"""
NAMES = "from diffusers_accel import accelerate, restore, explain, stats, warmup, AccelConfig"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    found: dict[str, list[float]] = {"import diffusers_accel": [], "and every function of it": []}
    for _ in range(options.rounds):
        for label, names in zip(found, ("", NAMES), strict=True):
            command = [sys.executable, "-c", SCRIPT.format(names=names)]
            found[label].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    figures = {label: {"seconds": round(statistics.median(times), 4), "all": times} for label, times in found.items()}
    print(measure.write("import-time", figures, options.out).read_text())


if __name__ == "__main__":
    main()
