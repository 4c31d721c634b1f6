"""What low-bit linear layers cost on the shipped checkpoints: PSNR of pictures against stock, over held-out captions.

In float32, so that nothing but the formats' rounding is measured: on a GPU the real kernels run, elsewhere the plain
references. Every layer inside the blocks is quantized.

    python benchmarks/linear_fidelity.py                            # benchmarks/results/linear-fidelity.json
    python benchmarks/linear_fidelity.py --count 2 --only flux-shapes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import measure
import torch
from attention_fidelity import generate, psnr
from fidelity import captions

from diffusers_accel import Unsupported, accelerate, demo, restore, stats
from diffusers_accel.kernels.linear import LINEARS

# Least PSNR, dB, pooled over captions.
BOUNDS = {"fp8": 34.0, "fp8-tensor": 34.0, "fp8-block": 34.0, "int8": 39.0, "nvfp4": 26.0}
BETTER_THAN_NVFP4 = 3.0


def evaluate(name: str, count: int, device: str) -> dict[str, Any]:
    pipe = demo.load(name, torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    prompts = captions(demo.CHECKPOINTS[name].kind, count, "held-out")
    stock = generate(name, pipe, prompts, device)
    rows: dict[str, Any] = {}
    for algo in LINEARS:
        try:
            accelerate(pipe, linear={"algo": algo, "smallest": 0})
        except Unsupported as error:
            rows[algo] = {"refused": str(error)}
            print(name, algo, rows[algo], flush=True)
            continue
        found = stats(pipe)
        rows[algo] = {
            **psnr(generate(name, pipe, prompts, device), stock),
            "layers": found.linear_layers,
            "weights, MiB": [round(size / 2**20, 2) for size in (found.weight_bytes_before, found.weight_bytes_after)],
        }
        restore(pipe)
        print(name, algo, rows[algo], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(demo.CHECKPOINTS))
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    names = [options.only] if options.only else sorted(demo.CHECKPOINTS)
    found = {name: evaluate(name, options.count, options.device) for name in names}
    short = []
    for name, rows in found.items():
        bounds = dict(BOUNDS)
        if "psnr pooled" in rows["nvfp4"]:
            bounds["svdq-nvfp4"] = rows["nvfp4"]["psnr pooled"] + BETTER_THAN_NVFP4
        for algo, bound in bounds.items():
            figure = rows[algo].get("psnr pooled")
            if isinstance(figure, float) and figure < bound:
                short.append(f"{name}, {algo}: {figure} dB, asked {round(bound, 2)}")
    result = {"captions": options.count, "bounds": BOUNDS, "under the bound": short, **found}
    print(measure.write("linear-fidelity", result, options.out))
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    main()
