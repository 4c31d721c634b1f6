"""What step caching costs in fidelity on the shipped checkpoints: PSNR against stock over held-out captions.

For each threshold: the share of steps skipped and the PSNR of the accelerated pictures against the stock ones of the
same seeds, pooled over all of them, on average, and at worst. Threshold 0 must give the stock pictures bit for bit. One
caption is one request, as users send them. Thresholds are chosen with `--split training` and judged with the default.

    python benchmarks/fidelity.py            # both checkpoints, 16 held-out captions
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import measure
import torch

from diffusers_accel import AccelConfig, accelerate, demo, restore, stats

sys.path.insert(0, str(Path(__file__).parent / "shapes"))
import scenes

THRESHOLDS = {"flux-shapes": (0.0, 0.1, 0.2, 0.4, 0.6), "wan-shapes": (0.0, 0.07, 0.12)}
BOUNDS = {"flux-shapes": 33.0, "wan-shapes": 30.0}
SKIPPED_SHARE = 0.4


def captions(kind: str, count: int, split: str) -> list[str]:
    if split == "training":
        return list(scenes.captions_of(scenes.sample_scenes(kind, count, seed=11)))
    return list(scenes.held_out_captions(kind, count, seed=7)[1])


def generate(
    name: str, pipe: Any, prompts: list[str], steps: int | None, accelerated: bool = True
) -> tuple[torch.Tensor, float, list[float]]:
    """All pictures (count, ...), the seconds they took, and the share of steps skipped in each request."""
    record = demo.CHECKPOINTS[name]
    arguments = {**record.arguments, **({"num_inference_steps": steps} if steps else {})}
    pictures, shares = [], []
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        out = pipe(prompt, generator=torch.Generator().manual_seed(number), output_type="pt", **arguments)
        pictures.append((out.images if record.kind == "image" else out.frames).float())
        if accelerated:
            found = stats(pipe)
            shares.append(found.steps_skipped / (found.steps_skipped + found.steps_computed))
    return torch.cat(pictures), time.perf_counter() - start, shares


def evaluate(name: str, count: int, split: str, steps: int | None) -> dict[str, Any]:
    pipe = demo.load(name)
    pipe.set_progress_bar_config(disable=True)
    prompts = captions(demo.CHECKPOINTS[name].kind, count, split)
    stock, stock_seconds, _ = generate(name, pipe, prompts, steps, accelerated=False)
    rows = []
    # The checkpoint's own configuration, over a range of thresholds.
    shipped = AccelConfig.from_yaml(demo.CHECKPOINTS[name].config_file)
    assert shipped.cache is not None
    configs = {
        f"threshold {threshold:g}": AccelConfig(cache=dataclasses.replace(shipped.cache, threshold=threshold))
        for threshold in THRESHOLDS[name]
    }
    configs["accel.yaml"] = shipped
    for label, config in configs.items():
        accelerate(pipe, config)
        found, seconds, shares = generate(name, pipe, prompts, steps)
        restore(pipe)
        errors = (found - stock).square().flatten(1).mean(1)
        decibels = [-10 * float(error.log10()) if error > 0 else float("inf") for error in errors]
        row = {
            "config": label,
            "steps skipped": round(statistics.mean(shares), 3),
            "psnr pooled": round(-10 * float(errors.mean().log10()), 2) if errors.any() else "exact",
            "psnr mean": round(statistics.mean(decibels), 2) if errors.any() else "exact",
            "psnr worst": round(min(decibels), 2) if errors.any() else "exact",
            "seconds": round(seconds, 2),
            "speed-up": round(stock_seconds / seconds, 2),
        }
        print(name, row, flush=True)
        rows.append(row)
    held = [
        row
        for row in rows
        if row["steps skipped"] >= SKIPPED_SHARE
        and isinstance(row["psnr pooled"], float)
        and row["psnr pooled"] >= BOUNDS[name]
    ]
    return {
        "captions": count,
        "split": split,
        "stock seconds": round(stock_seconds, 2),
        "rows": rows,
        "bound": f">= {BOUNDS[name]} dB with >= {SKIPPED_SHARE:.0%} of steps skipped",
        "bound held by": [row["config"] for row in held],
        "threshold 0 exact": rows[0]["psnr pooled"] == "exact",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(demo.CHECKPOINTS))
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=None, help="steps per request; the recommended ones if not given")
    parser.add_argument("--split", choices=("held-out", "training"), default="held-out")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    names = [options.only] if options.only else sorted(demo.CHECKPOINTS)
    found = {name: evaluate(name, options.count, options.split, options.steps) for name in names}
    suffix = "" if options.split == "held-out" else "-training"
    path = measure.write(f"fidelity{suffix}", found, options.out)
    print(path)
    sys.exit(0 if all(item["bound held by"] and item["threshold 0 exact"] for item in found.values()) else 1)


if __name__ == "__main__":
    main()
