"""Which caching rule keeps most of a picture: PSNR and SSIM against stock over held-out captions of the shipped
checkpoints, against the share of steps that are skipped, for every rule over a range of its settings.

cache-dit's DBCache runs on the same checkpoint, prompts and seeds, where it is installed (`pip install
'diffusers-accel[bench]'`). Steps skipped are counted alike for both: by calls of the attention in the middle of the
model. One caption is one request.

    python benchmarks/caching.py                       # both checkpoints, 32 captions: an hour on two cores
    python benchmarks/caching.py --only flux-shapes
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import torch
from fidelity import captions

from diffusers_accel import (
    DBCacheConfig,
    FBCacheConfig,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
    Unsupported,
    accelerate,
    demo,
    restore,
)
from diffusers_accel.quality.metrics import ssim

# Share of steps skipped -> least PSNR, pooled, that the best rule is asked for.
ASKED = {"flux-shapes": {0.45: 38.0, 0.6: 33.0}, "wan-shapes": {0.45: 34.0, 0.6: 29.0}}
THRESHOLDS = (0.02, 0.04, 0.08, 0.12, 0.2, 0.3, 0.5)


def rules(name: str) -> Iterator[tuple[str, Any]]:
    """Labels and configurations."""
    from diffusers_accel import AccelConfig

    shipped: Any = AccelConfig.from_yaml(demo.CHECKPOINTS[name].config_file).cache
    for factor in (0.25, 0.5, 1.0, 1.5, 2.5, 4.0):
        for order in (0, 1):
            yield (
                f"teacache {shipped.threshold * factor:g}, order {order}",
                TeaCacheConfig(
                    threshold=shipped.threshold * factor,
                    coefficients=shipped.coefficients,
                    use_ret_steps=shipped.use_ret_steps,
                    taylorseer_order=order,
                ),
            )
    for threshold in THRESHOLDS:
        for order in (0, 1):
            yield (
                f"fbcache {threshold:g}, order {order}",
                FBCacheConfig(residual_diff_threshold=threshold, max_warmup_steps=2, taylorseer_order=order),
            )
    for threshold in THRESHOLDS:
        yield (
            f"dbcache F2 {threshold:g}",
            DBCacheConfig(Fn_compute_blocks=2, max_warmup_steps=4, residual_diff_threshold=threshold),
        )
    for mask in ("slow", "medium", "fast", "ultra"):
        for order in (0, 1, 2):
            yield f"mask {mask}, order {order}", StepMaskConfig(mask=mask, taylorseer_order=order)
    for interval in (2, 3, 4):
        for order in (0, 1, 2):
            yield f"interval {interval}, order {order}", TaylorSeerConfig(interval=interval, order=order, warmup=3)


def generate(name: str, pipe: Any, prompts: list[str]) -> tuple[torch.Tensor, float, float]:
    """All pictures (count, ...), the seconds they took, and calls of the attention in the middle per request."""
    record, calls = demo.CHECKPOINTS[name], []
    attentions = [module for module in pipe.transformer.modules() if hasattr(module, "processor")]
    handle = attentions[len(attentions) // 2].register_forward_hook(lambda *_: calls.append(1))
    pictures, start = [], time.perf_counter()
    try:
        for number, prompt in enumerate(prompts):
            out = pipe(prompt, generator=torch.Generator().manual_seed(number), output_type="pt", **record.arguments)
            pictures.append((out.images if record.kind == "image" else out.frames).float())
    finally:
        handle.remove()
    return torch.cat(pictures), time.perf_counter() - start, len(calls) / len(prompts)


def judged(found: Any, stock: Any) -> dict[str, Any]:
    (pictures, seconds, calls), (expected, stock_seconds, stock_calls) = found, stock
    errors = (pictures - expected).square().flatten(1).mean(1)
    decibels = [-10 * float(error.log10()) if error > 0 else float("inf") for error in errors]
    return {
        "skipped": round(1 - calls / stock_calls, 3),
        "psnr pooled": round(-10 * float(errors.mean().log10()), 2) if errors.any() else "exact",
        "psnr mean": round(statistics.mean(decibels), 2) if errors.any() else "exact",
        "psnr worst": round(min(decibels), 2) if errors.any() else "exact",
        "ssim": round(ssim(pictures, expected, channel_axis=-3), 4),
        "speed-up": round(stock_seconds / seconds, 2),
    }


def rival(name: str, prompts: list[str], stock: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """cache-dit's DBCache over the same thresholds, on a pipeline of its own."""
    try:
        import cache_dit
    except ImportError:
        return
    for first, warmup in ((1, 2), (2, 4)):
        for threshold in THRESHOLDS:
            for order in (0, 1):
                pipe = demo.load(name)
                pipe.set_progress_bar_config(disable=True)
                config = cache_dit.DBCacheConfig(
                    Fn_compute_blocks=first, max_warmup_steps=warmup, residual_diff_threshold=threshold
                )
                more = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)} if order else {}
                cache_dit.enable_cache(pipe, cache_config=config, **more)
                label = f"cache-dit F{first} {threshold:g}, order {order}"
                yield label, judged(generate(name, pipe, prompts), stock)


def evaluate(name: str, count: int) -> dict[str, Any]:
    prompts = captions(demo.CHECKPOINTS[name].kind, count, "held-out")
    pipe = demo.load(name)
    pipe.set_progress_bar_config(disable=True)
    stock = generate(name, pipe, prompts)
    rows = {}
    for label, config in rules(name):
        try:
            accelerate(pipe, cache=config)
        except Unsupported as error:  # more first blocks than a checkpoint has
            print(name, label, error.reason, flush=True)
            continue
        rows[label] = judged(generate(name, pipe, prompts), stock)
        restore(pipe)
        print(name, label, rows[label], flush=True)
    for label, row in rival(name, prompts, stock):
        rows[label] = row
        print(name, label, row, flush=True)
    best = {}
    for share, asked in ASKED[name].items():
        # Rows that skip at least so much, ours.
        fit = {
            label: row["psnr pooled"]
            for label, row in rows.items()
            if row["skipped"] >= share and not label.startswith("cache-dit") and row["psnr pooled"] != "exact"
        }
        label = max(fit, key=lambda item: fit[item], default=None)
        best[f"at {share:.0%} skipped, asked {asked} dB"] = {label: fit[label]} if label else "none"
    return {"captions": count, "best": best, "rules": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(demo.CHECKPOINTS))
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    names = [options.only] if options.only else sorted(demo.CHECKPOINTS)
    suffix = f"-{options.only}" if options.only else ""
    print(measure.write(f"caching{suffix}", {name: evaluate(name, options.count) for name in names}, options.out))


if __name__ == "__main__":
    main()
