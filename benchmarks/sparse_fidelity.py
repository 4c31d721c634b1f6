"""The cost of sparse attention in fidelity: PSNR of videos of 4,096 tokens against the same kernel without lists.

The checkpoint is wan-shapes-long (`benchmarks/shapes/`), over held-out captions and equal seeds. Every rule keeps the
same shares of blocks of 32 tokens, beside a random choice and an oracle: the blocks with the most softmax, which needs
all of attention. Rules for a speed-up at this size would be of no use: figures are of fidelity alone.

    python benchmarks/sparse_fidelity.py              # on a GPU: sparse-fidelity.json
    python benchmarks/sparse_fidelity.py --only auto  # rows with that in their names; the file keeps its others
    python benchmarks/sparse_fidelity.py --plot       # docs/sparse-fidelity.png from that
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import measure
import torch

sys.path.insert(0, str(Path(__file__).parent / "shapes"))

from diffusers_accel import accelerate, register_sparse, restore, stats
from diffusers_accel.kernels.attention import SELECTORS, Selector
from diffusers_accel.kernels.attention.selectors import Blocks

BLOCK, SHARES = 32, (0.5, 0.25, 0.125)
PLOT = Path(__file__).parents[1] / "docs" / "sparse-fidelity.png"
# Name -> fields of SparseConfig.
RULES: dict[str, dict[str, Any]] = {
    "random": {"selector": "random"},
    "oracle": {"selector": "oracle"},
    "oracle, cubes": {"selector": "oracle", "order": "cubes"},
    "window": {"selector": "window"},
    "window, cubes": {"selector": "window", "order": "cubes"},
    "radial": {"selector": "radial"},
    "bands": {"selector": "bands"},
    "means": {"selector": "means"},
    "means, cubes": {"selector": "means", "order": "cubes"},
    "means, cubes, centroids": {"selector": "means", "order": "cubes", "centroids": True},
    "sub-blocks": {"selector": "sub-blocks"},
    "sub-blocks, centroids": {"selector": "sub-blocks", "centroids": True},
    "sub-blocks, cubes": {"selector": "sub-blocks", "order": "cubes"},
    "sub-blocks, morton": {"selector": "sub-blocks", "order": "morton"},
    "sub-blocks, cubes, centroids": {"selector": "sub-blocks", "order": "cubes", "centroids": True},
    "sub-blocks, morton, centroids": {"selector": "sub-blocks", "order": "morton", "centroids": True},
    "means, clusters": {"selector": "means", "order": "clusters"},
    "sub-blocks, clusters": {"selector": "sub-blocks", "order": "clusters"},
    "means, clusters, centroids": {"selector": "means", "order": "clusters", "centroids": True},
    "sub-blocks, clusters, centroids": {"selector": "sub-blocks", "order": "clusters", "centroids": True},
    "oracle, clusters": {"selector": "oracle", "order": "clusters"},
}
# Rules whose share is found by values, and shares of the automatic rule.
OTHERS: dict[str, dict[str, Any]] = {
    **{f"means, cubes, centroids, tau {tau:g}": {"selector": "means", "order": "cubes", "centroids": True, "tau": tau}
       for tau in (0.0, 1.0)},
    **{f"sub-blocks, cubes, centroids, top_p {p:g}": {"selector": "sub-blocks", "order": "cubes", "centroids": True,
                                                      "top_p": p} for p in (0.5, 0.8)},
    "similarity, top_p 0.8": {"selector": "similarity", "top_p": 0.8},
    **{f"auto, {keep:.0%}": {"selector": "auto", "keep": keep} for keep in (0.0625, 0.125, 0.25, 0.35, 0.5, 0.65, 0.8)},
    "auto, 50%, no dense steps": {"selector": "sub-blocks", "order": "cubes", "centroids": True, "keep": 0.5,
                                  "dense_steps": 0.0},
}  # fmt: skip


@register_sparse("random", parts=1)
def random_blocks(blocks: Blocks) -> torch.Tensor:
    """Any blocks, others in each call."""
    rows, columns = blocks.query_means.shape[2], blocks.key_means.shape[2]
    return torch.rand(*blocks.query_means.shape[:2], rows, columns, device=blocks.query_means.device)


def most_softmax(blocks: Blocks) -> torch.Tensor:
    """The softmax that each block of queries gives to each block of keys; every part is a token."""
    shares = []
    for query, key in zip(blocks.query_means, blocks.key_means, strict=True):
        weights = (query.float() @ key.float().transpose(1, 2) * blocks.scale).softmax(-1)
        heads, queries, keys = weights.shape
        shares.append(weights.view(heads, queries // BLOCK, BLOCK, keys // BLOCK, BLOCK).sum((2, 4)))
    return torch.stack(shares)


SELECTORS.add("oracle", Selector(name="oracle", parts=BLOCK, scores=most_softmax))


def videos(pipe: Any, captions: list[str], steps: int, batch: int, size: int, frames: int) -> torch.Tensor:
    import score

    call = {"num_inference_steps": steps, "guidance_scale": 4.0, "num_frames": frames}
    return score.generate(pipe, captions, size, 7, batch, call).cpu()


def psnr(found: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    errors = (found - expected).square().flatten(1).mean(1).clamp_min(1e-10)
    decibels = sorted((-10 * errors.log10()).tolist())
    return {"psnr mean": round(statistics.mean(decibels), 2), "psnr worst": round(decibels[0], 2),
            "psnr median": round(statistics.median(decibels), 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=61)
    parser.add_argument("--seconds", type=float, default=1e9, help="rows that begin later are left out")
    parser.add_argument("--only", nargs="*", help="parts of names of rows, one of which a row has")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads((measure.RESULTS / "sparse-fidelity.json").read_text()))
        return
    import scenes
    import score
    from long import load_long

    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A GPU's dtype; Triton's interpreter, which runs without one, multiplies fp16 alone.
    pipe = load_long(dtype=torch.bfloat16 if device == "cuda" else torch.float16, device=device)
    pipe.set_progress_bar_config(disable=True)
    _, captions = scenes.held_out_captions("video", options.count, score.SEED_OF_HELD_OUT)
    made = (captions, options.steps, options.batch, options.size, options.frames)
    attention = {"backend": "triton", "cross_attention": "sdpa"}
    stock = videos(pipe, *made)
    accelerate(pipe, attention=attention)
    dense = videos(pipe, *made)
    rows: dict[str, Any] = {"stock": {"kept": 1.0, **psnr(stock, dense)}}
    if options.only:
        rows = json.loads((measure.RESULTS / "sparse-fidelity.json").read_text())["rows"] | rows
    wanted = {f"{name}, {share:.1%}": {**rule, "keep": share} for name, rule in RULES.items() for share in SHARES}
    for name, rule in (wanted | OTHERS).items():
        if options.only and not any(part in name for part in options.only):
            continue
        if time.monotonic() - begin > options.seconds:
            rows.setdefault(name, {"left out": "no time"})
            continue
        settings = {"dense_steps": 0.2, **rule, "block": BLOCK, "min_tokens": 1}
        accelerate(pipe, attention={**attention, "sparse": settings})
        found = videos(pipe, *made)
        shares = stats(pipe).sparse_by_step.values()
        rows[name] = {"kept": round(sum(shares) / len(shares), 4), **psnr(found, dense), "sparse": settings}
        print(name, rows[name], f"{time.monotonic() - begin:.0f} s", flush=True)
    restore(pipe)
    work = (
        f"wan-shapes-long, {options.size}x{options.size}, {options.frames} frames, {options.steps} steps, guidance 4, "
        f"{options.count} held-out captions, blocks of {BLOCK} tokens, 16-bit kernel, first 20% of steps dense"
    )
    result = {"work": work, "against": "the same kernel without lists", "rows": rows}
    print(measure.write("sparse-fidelity", result, options.out))


def plot(result: dict[str, Any]) -> None:
    """PSNR over the share kept, a line for each rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    selectors = list(dict.fromkeys(rule["selector"] for rule in RULES.values()))
    styles = {"model": "-", "cubes": "--", "morton": ":", "clusters": "-."}
    for name, rule in RULES.items():
        points = [result["rows"].get(f"{name}, {share:.1%}") for share in SHARES]
        known = [(100 * point["kept"], point["psnr mean"]) for point in points if point and "kept" in point]
        if known:
            axes.plot(
                *zip(*sorted(known), strict=True), styles[rule.get("order", "model")], label=name,
                color=f"C{selectors.index(rule['selector'])}", marker="*" if rule.get("centroids") else "o",
                markersize=9 if rule.get("centroids") else 4, linewidth=1.2,
            )  # fmt: skip
    axes.axhline(30, color="grey", linewidth=0.5)
    axes.set_xlabel("blocks kept, %")
    axes.set_ylabel("PSNR against dense, dB")
    axes.set_title(f"{BLOCK}-token blocks of 4,096-token videos, {result['work'].split(', ')[5]}")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
    print(PLOT)


if __name__ == "__main__":
    main()
