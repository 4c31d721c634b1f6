"""What a user waits for before the first image: `accelerate` itself, and the first request of a fresh process.

FLUX.1-dev's shape with random weights. Every configuration is run in two processes, one after the other: the first
finds no compiled code on disk (`disk cold`), the second what the first has left (`disk warm`). Making the weights is
not counted. The first image includes compilation, timing of attention kernels where none is on record, and recording
CUDA graphs.

    python benchmarks/cold_start.py                # benchmarks/results/cold-start.json
    python benchmarks/cold_start.py --tiny --device cpu
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import flux
import measure
import torch

from diffusers_accel import accelerate

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lossless": {"config": "lossless"},
    "balanced": {"config": "balanced"},
    "fp8, fa3-fp8, every step": {"attention": "fa3-fp8", **flux.EIGHT},
}


def child(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one configuration in this process."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    pipe = flux.build(options.device, dtype, options.tiny)
    config = pipe.transformer.config
    size, steps = (64, 2) if options.tiny else (1024, 28)
    arguments = {
        "prompt_embeds": torch.randn(1, 512, config.joint_attention_dim, device=options.device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, device=options.device, dtype=dtype),
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "guidance_scale": 3.5,
        "output_type": "pt",
    }
    found = {}
    sections = dict(CONFIGURATIONS[options.child])
    if options.device == "cpu":
        sections |= flux.DRY
    for name, function in {
        "accelerate": lambda: accelerate(pipe, **sections),
        "first image": lambda: pipe(**arguments),
        "second image": lambda: pipe(**arguments),
        "third image": lambda: pipe(**arguments),
    }.items():
        measure.synchronize()
        start = time.perf_counter()
        function()
        measure.synchronize()
        found[name] = round(time.perf_counter() - start, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", choices=list(CONFIGURATIONS))
    parser.add_argument("--tiny", action="store_true", help="a small model: a dry run of the script")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results if not given")
    parser.add_argument("--child", choices=list(CONFIGURATIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options)))
        return
    found: dict[str, Any] = {}
    for name in options.only or CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as folder:
            variables = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "DIFFUSERS_ACCEL_CACHE")
            places = {**os.environ, **{each: f"{folder}/{each}" for each in variables}}
            for disk in ("disk cold", "disk warm"):
                command = [sys.executable, __file__, "--child", name, "--device", options.device]
                run = subprocess.run(
                    command + ["--tiny"] * options.tiny, env=places, stdout=subprocess.PIPE, text=True, check=True
                )
                found.setdefault(name, {})[disk] = json.loads(run.stdout.splitlines()[-1])
                print(name, disk, found[name][disk], flush=True)
        work = "FLUX.1-dev shape, 1024x1024, 28 steps, seconds in a fresh process"
        measure.write("cold-start" + ("-dry-run" if options.tiny else ""), {"work": work, "runs": found}, options.out)


if __name__ == "__main__":
    main()
