"""Which caching rule keeps most of a picture: PSNR and SSIM against stock over held-out captions of the shipped
checkpoints, against the share of steps that are skipped, for every rule over a range of its settings.

cache-dit's DBCache runs on the same checkpoint, prompts and seeds, where it is installed (`pip install
'diffusers-accel[bench]'`). Steps skipped are counted alike for both: by calls of the attention in the middle of the
model. One caption is one request. LPIPS is left out: its weights do not come with any package.

The rules with the highest PSNR at their share of steps are drawn to docs/caching-<checkpoint>.png.

    python benchmarks/caching.py                       # both checkpoints, 32 captions: two hours on two cores
    python benchmarks/caching.py --only flux-shapes
    python benchmarks/caching.py --jobs 8              # so many processes beside each other
    python benchmarks/caching.py --only wan-shapes --orders 0   # without prediction, an hour on two cores
    python benchmarks/caching.py --only wan-shapes --orders 0 --rules mask cache-dit    # the rest of one broken off
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import torch
from fidelity import captions

from diffusers_accel import (
    AccelConfig,
    DBCacheConfig,
    EasyCacheConfig,
    FBCacheConfig,
    IntervalConfig,
    MagCacheConfig,
    PABConfig,
    SeaCacheConfig,
    StepMaskConfig,
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
DOCS = Path(__file__).resolve().parents[1] / "docs"


def rules(name: str) -> Iterator[tuple[str, Any]]:
    """Labels, "rule setting, order k", and configurations."""
    record = demo.CHECKPOINTS[name]
    shipped: Any = AccelConfig.from_yaml(record.config_file).cache
    for factor in (0.25, 0.5, 1.0, 1.5, 2.5):
        for order in (0, 1):
            yield (
                f"teacache, uncalibrated {shipped.threshold * factor:g}, order {order}",
                TeaCacheConfig(
                    threshold=shipped.threshold * factor,
                    coefficients=shipped.coefficients,
                    use_ret_steps=shipped.use_ret_steps,
                    taylorseer_order=order,
                ),
            )
    tea: Any = AccelConfig.from_yaml(record.folder / "calibrated-teacache.yaml").cache
    for threshold in (0.04, 0.08, 0.12, 0.17, 0.26, 0.4):
        for order in (0, 1):
            config = TeaCacheConfig(
                threshold=threshold, coefficients=tea.coefficients, use_ret_steps=True, taylorseer_order=order
            )
            yield f"teacache {threshold:g}, order {order}", config
    mag: Any = AccelConfig.from_yaml(record.folder / "calibrated-magcache.yaml").cache
    for threshold, most in ((0.04, 3), (0.08, 3), (0.12, 3), (0.2, 3), (0.4, 4), (0.8, 6)):
        for order in (0, 1):
            config = MagCacheConfig(
                threshold=threshold, max_skip_steps=most, mag_ratios=mag.mag_ratios, taylorseer_order=order
            )
            yield f"magcache {threshold:g} {most}, order {order}", config
    for threshold in (0.02, 0.05, 0.1, 0.2, 0.4):
        for order in (0, 1):
            config = EasyCacheConfig(threshold=threshold, warmup=5, taylorseer_order=order)
            yield f"easycache {threshold:g}, order {order}", config
    for threshold, most in ((0.05, 2), (0.1, 2), (0.25, 2), (0.25, 4), (0.5, 4)):
        for order in (0, 1):
            config = SeaCacheConfig(
                threshold=threshold, max_consecutive_cached=most, retention_steps=3, taylorseer_order=order
            )
            yield f"seacache {threshold:g} {most}, order {order}", config
    for threshold in THRESHOLDS:
        for order in (0, 1):
            yield (
                f"fbcache {threshold:g}, order {order}",
                FBCacheConfig(residual_diff_threshold=threshold, max_warmup_steps=2, taylorseer_order=order),
            )
    for threshold in THRESHOLDS:
        config = DBCacheConfig(Fn_compute_blocks=2, max_warmup_steps=4, residual_diff_threshold=threshold)
        yield f"dbcache F2 {threshold:g}, order 0", config
    for mask in ("slow", "medium", "fast", "ultra"):
        for order in (0, 1, 2):
            yield f"mask {mask}, order {order}", StepMaskConfig(mask=mask, taylorseer_order=order)
    for interval in (2, 3, 4):
        for order in (0, 1, 2):
            yield (
                f"interval {interval}, order {order}",
                IntervalConfig(interval=interval, warmup=3, taylorseer_order=order),
            )
    for interval in (2, 3, 4):
        yield f"pab {interval}", PABConfig(self_attention=interval, cross_attention=interval + 1)


def rivals() -> Iterator[tuple[str, dict[str, Any]]]:
    """Labels and settings of cache-dit's DBCache, over the same thresholds; none where it is not installed."""
    try:
        import cache_dit  # noqa: F401
    except ImportError:
        return
    for first, warmup in ((1, 2), (2, 4)):
        for threshold in THRESHOLDS:
            for order in (0, 1):
                settings = {
                    "Fn_compute_blocks": first,
                    "max_warmup_steps": warmup,
                    "residual_diff_threshold": threshold,
                    "order": order,
                }
                yield f"cache-dit F{first} {threshold:g}, order {order}", settings


def generate(name: str, pipe: Any, prompts: list[str]) -> tuple[torch.Tensor, float, float]:
    """All pictures (count, ...), the seconds they took, and calls of the attention in the middle per request."""
    record, calls = demo.CHECKPOINTS[name], []
    attentions = [module for module in pipe.transformer.modules() if hasattr(module, "processor")]
    middle = attentions[len(attentions) // 2]
    handle = middle.register_forward_hook(lambda *_: calls.append(1))
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


@functools.cache
def prepared(name: str, count: int) -> tuple[Any, list[str], Any]:
    """A process's own pipeline, the captions, and what stock makes of them."""
    prompts = captions(demo.CHECKPOINTS[name].kind, count, "held-out")
    pipe = demo.load(name)
    pipe.set_progress_bar_config(disable=True)
    generate(name, pipe, prompts[:1])
    return pipe, prompts, generate(name, pipe, prompts)


def row(task: tuple[str, int, str, Any]) -> tuple[str, dict[str, Any] | None]:
    """One rule's figures; `None` where the checkpoint cannot have it."""
    name, count, label, config = task
    pipe, prompts, stock = prepared(name, count)
    if isinstance(config, dict):
        return label, judged(generate(name, with_cache_dit(name, config), prompts), stock)
    try:
        accelerate(pipe, cache=config)
    except Unsupported as error:  # more first blocks than a checkpoint has
        print(name, label, error.reason, flush=True)
        return label, None
    found = judged(generate(name, pipe, prompts), stock)
    restore(pipe)
    return label, found


def retimed(name: str, count: int, rows: dict[str, Any], write: Any) -> None:
    """Speed-ups of rows that the result has: each in turn with stock, in this process alone."""
    prompts = captions(demo.CHECKPOINTS[name].kind, count, "held-out")
    pipe = demo.load(name)
    pipe.set_progress_bar_config(disable=True)
    generate(name, pipe, prompts[:1])
    for label, config in [*rules(name), *rivals()]:
        if rows.get(label, {}).get("psnr pooled", "exact") == "exact":
            continue
        times = {"stock": 0.0, label: 0.0}
        own = with_cache_dit(name, config) if isinstance(config, dict) else pipe
        for prompt in prompts:
            times["stock"] += generate(name, pipe, [prompt])[1]
            if own is pipe:
                accelerate(pipe, cache=config)
            times[label] += generate(name, own, [prompt])[1]
            if own is pipe:
                restore(pipe)
        rows[label]["speed-up"] = round(times["stock"] / times[label], 2)
        print(name, label, rows[label]["speed-up"], flush=True)
        write()


def with_cache_dit(name: str, settings: dict[str, Any]) -> Any:
    """A pipeline of its own under cache-dit, which leaves no way back."""
    import cache_dit

    settings = dict(settings)
    order = settings.pop("order")
    own = demo.load(name)
    own.set_progress_bar_config(disable=True)
    more = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)} if order else {}
    cache_dit.enable_cache(own, cache_config=cache_dit.DBCacheConfig(**settings), **more)
    return own


def evaluate(
    name: str, count: int, jobs: int, orders: list[int], wanted: list[str] | None, rows: dict[str, Any], write: Any
) -> dict[str, Any]:
    """All rows: those given, and those of the rules and orders that are wanted."""
    ends, begins = tuple(f"order {order}" for order in orders), tuple(wanted or [""])
    tasks = [
        (name, count, label, config)
        for label, config in [*rules(name), *rivals()]
        if ("order" not in label or label.endswith(ends)) and label.startswith(begins) and label not in rows
    ]
    with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (measure.cores(jobs),)) as pool:
        for label, found in pool.imap(row, tasks):
            if found is not None:
                rows[label] = found
                print(name, label, found, flush=True)
                write(summed(name, count, jobs, rows))  # so far
    return summed(name, count, jobs, rows)


def summed(name: str, count: int, jobs: int, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows, and the best at each share that a bound is given for."""
    best = {}
    for share, asked in ASKED[name].items():
        # Rows that skip at least so much, ours.
        fit = {
            label: found["psnr pooled"]
            for label, found in rows.items()
            if found["skipped"] >= share and not label.startswith("cache-dit") and found["psnr pooled"] != "exact"
        }
        label = max(fit, key=lambda item: fit[item], default=None)
        best[f"at {share:.0%} skipped, asked {asked} dB"] = {label: fit[label]} if label else "none"
    return {"captions": count, "processes": jobs, "best": best, "rules": rows}


def draw(name: str, rows: dict[str, dict[str, Any]], file: Path) -> None:
    """PSNR over the share of steps skipped: of each rule, the settings that no other of its settings beats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[tuple[float, float]]] = {}
    for label, found in rows.items():
        if found["psnr pooled"] != "exact" and found["skipped"] > 0:
            points = families.setdefault(label.split(" ")[0].rstrip(",") + (", uncalibrated" * ("unc" in label)), [])
            points.append((found["skipped"], found["psnr pooled"]))
    for number, (family, points) in enumerate(families.items()):
        front = sorted((x, y) for x, y in points if not any((p, q) != (x, y) and p >= x and q >= y for p, q in points))
        style = {"linestyle": "--", "color": "black"} if family == "cache-dit" else {"color": f"C{number}"}
        axes.plot([100 * x for x, _ in front], [y for _, y in front], marker="o", markersize=4, label=family, **style)
    axes.set(xlabel="steps skipped, %", ylabel="PSNR against stock, dB", title=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(demo.CHECKPOINTS))
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2], help="of the prediction, these alone")
    parser.add_argument("--rules", nargs="+", help="whose labels begin so, beside the rows that the result has already")
    parser.add_argument(
        "--times", type=int, help="measure the speed-ups of the result's rows again, on so many captions"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes beside each other")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result and the picture")
    options = parser.parse_args()
    for name in [options.only] if options.only else sorted(demo.CHECKPOINTS):

        def write(found: dict[str, Any], name: str = name) -> Path:
            return measure.write(f"caching-{name}", {name: found}, options.out)

        file, kept = (options.out or measure.RESULTS) / f"caching-{name}.json", {}
        if (options.rules or options.times) and file.exists():
            kept = json.loads(file.read_text())[name]["rules"]
        if options.times:
            torch.set_num_threads(measure.cores(1))
            before = json.loads(file.read_text())[name]
            again = functools.partial(write, before | {"rules": kept})
            retimed(name, options.times, kept, again)
            continue
        found = evaluate(name, options.count, options.jobs, options.orders, options.rules, kept, write)
        print(write(found))
        draw(name, found["rules"], (options.out or DOCS) / f"caching-{name}.png")


if __name__ == "__main__":
    main()
