"""The cost of sparse attention on a GPU: kernels over lists of key blocks, and the choice of the blocks.

Inputs are Gaussian with outlying channels in K. Times are medians of `do_bench`. A sparse call has the choice of its
blocks within it: means of tokens, their scores, lists. *Share of the dense rate* is the time that the same kernel would
take for the kept blocks at its dense rate, over the time that it takes. Rates are TFLOP/s of dense work. Beside it are
the kernel of dense attention, and cuDNN's.

Forwards are of Wan's shapes with random weights, in 8 bits and compiled, on the same kernel with and without lists. A
random weight costs as much as a trained one where the number of blocks is fixed.

    python benchmarks/sparse.py               # sparse.json
    python benchmarks/sparse.py --tiles       # every tile of our kernels; sparse-tiles.json
    python benchmarks/sparse.py --forwards    # sparse-forwards.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from attention import inputs

from diffusers_accel.kernels.attention import KERNELS, RECIPES, Inputs
from diffusers_accel.kernels.attention.recipe import Recipe

# batch, heads, sequence, head_dim
SHAPES = {
    "Wan2.1 1.3B, 480p, 81 frames": (1, 12, 32760, 128),
    "Wan2.1 14B, 720p, 81 frames, on 4 GPUs": (1, 10, 75600, 128),
}
KEPT = (0.5, 0.25, 0.1)
# Shares of the running maximum below which skip-softmax leaves tiles out: none, some and most of them.
SKIPPED = (1e-30, 0.1, 0.5)
# Parts of a block whose means are scored.
PARTS = 4
RECIPE_16 = Recipe(qk=None, k_block=0, pv=None)


def recipe_of(backend: str) -> Recipe:
    """The first recipe of a backend; `"16-bit"` rounds nothing."""
    return RECIPE_16 if backend == "16-bit" else next(iter(RECIPES[backend].values()))


def milliseconds(function: Callable[[], Any], repeat: int = 120) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=20, rep=repeat, return_mode="median"))


def with_centroids(choose: Any, block: int) -> Any:
    """The same choice, with the means of the blocks that are left out."""
    from diffusers_accel.kernels.attention.block_lists import centroids

    return lambda x, data: replace(choose(x, data), centroids=centroids(x, data, block))


def selection(shape: tuple[int, ...], kept: float, block: tuple[int, int], mark: bool = False) -> Any:
    """A function for `low_bit.attention(choose=)`."""
    from diffusers_accel.kernels.attention.block_lists import select

    budget = torch.full((shape[0] * shape[1],), float(round(kept * -(-shape[2] // block[1]))), device="cuda")

    def choose(x: Inputs, data: Any) -> Any:
        return select(scores(x, data, block), budget, *block, mark=mark)

    return choose


def scores(x: Inputs, data: Any, block: tuple[int, int]) -> torch.Tensor:
    """The scores of pairs of blocks, from means of their parts."""
    from diffusers_accel.kernels.attention.block_lists import block_scores, operand_means

    query, key = operand_means(x, data, block[0] // PARTS, block[1] // PARTS)
    return block_scores(query, key, PARTS, PARTS, x.softmax_scale)


def kernels(out: Path | None) -> dict[str, Any]:
    """Dense and sparse attention, and the parts of a sparse call; written after each shape."""
    from diffusers_accel.kernels.attention import low_bit
    from diffusers_accel.kernels.attention.block_lists import long_first, operand_means
    from diffusers_accel.kernels.attention.quantize import quantize

    found: dict[str, Any] = {}
    for label, shape in SHAPES.items():
        x = Inputs(*inputs(*shape))
        work = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3] / 1e9
        row: dict[str, Any] = {"cudnn, ms": round(milliseconds(lambda x=x: KERNELS.get("cudnn").load()(x)), 3)}
        for backend, block in (
            ("sage-fp8", (128, 128)), ("sage-fp8", (64, 64)), ("sage", (128, 64)), ("qk16pv8", (128, 128)),
            ("16-bit", (128, 128)),
        ):  # fmt: skip
            recipe = recipe_of(backend)
            each: dict[str, Any] = {}
            try:
                name = backend if backend in KERNELS else "cudnn"
                dense = milliseconds(lambda x=x, name=name: KERNELS.get(name).load()(x))
                each["dense, ms"] = round(dense, 3)
                for kept in KEPT:
                    choose = selection(shape, kept, block)
                    time = milliseconds(lambda x=x, r=recipe, c=choose: low_bit.attention(x, r, choose=c))
                    each[f"{kept:.0%} kept"] = {
                        "ms": round(time, 3), "TFLOP/s of dense work": round(work / time),
                        "share of the dense rate": round(dense * kept / time, 3),
                    }  # fmt: skip
                choose = with_centroids(selection(shape, 0.25, block, mark=True), block[1])
                time = milliseconds(lambda x=x, r=recipe, c=choose: low_bit.attention(x, r, choose=c))
                each["25% kept, centroids"] = {"ms": round(time, 3), "TFLOP/s of dense work": round(work / time)}
                if block[0] == 128:
                    # Of Gaussian inputs few tiles have a new maximum: the shares are what the threshold leaves.
                    for share in SKIPPED:
                        computed = torch.zeros(1, dtype=torch.int32, device="cuda")
                        low_bit.attention(x, recipe, skip=share, computed=computed)
                        kept = int(computed) / low_bit.tiles_of(x, recipe)
                        time = milliseconds(
                            lambda x=x, r=recipe, c=computed, s=share: low_bit.attention(x, r, skip=s, computed=c)
                        )
                        each[f"skip-softmax below {share:g}"] = {"ms": round(time, 3), "tiles computed": round(kept, 3)}
                data = quantize(x, recipe)
                choose = selection(shape, 0.25, block)
                lists, found_scores = choose(x, data), scores(x, data, block)
                parts = (block[0] // PARTS, block[1] // PARTS)
                each["parts, ms"] = {
                    "quantize": round(milliseconds(lambda x=x, r=recipe: quantize(x, r)), 3),
                    "means": round(milliseconds(lambda x=x, d=data, p=parts: operand_means(x, d, *p)), 3),
                    "means and scores": round(milliseconds(lambda x=x, d=data, b=block: scores(x, d, b)), 3),
                    "choice": round(milliseconds(lambda c=choose, x=x, d=data: c(x, d)), 3),
                    "order of uneven lists": round(milliseconds(lambda c=lists.counts: long_first(c)), 3),
                    "blocks": list(found_scores.shape[2:]),
                }
            except Exception as error:  # the other kernels are of interest too
                each["failed"] = f"{type(error).__name__}: {error}"[:300]
            row[f"{backend}, blocks {block[0]} x {block[1]}"] = each
            print(label, backend, block, each, flush=True)
        found[label] = row
        measure.write("sparse", found, out)
    return found


# Backend -> (block, tile) of each trial: queries, keys, warps, stages, logits ahead.
TRIALS: dict[str, list[tuple[tuple[int, int], tuple[Any, ...]]]] = {
    "sage-fp8": [
        ((128, 128), (64, 128, 4, 2, False)), ((128, 128), (64, 128, 4, 2, True)), ((128, 128), (64, 128, 4, 3, False)),
        ((128, 128), (128, 128, 8, 2, False)), ((64, 64), (64, 64, 4, 3, False)), ((64, 64), (64, 64, 4, 4, False)),
        ((64, 64), (64, 64, 4, 3, True)), ((128, 64), (128, 64, 8, 3, False)),
    ],
    "16-bit": [
        ((128, 128), (128, 128, 8, 2, False)), ((128, 128), (128, 128, 8, 2, True)),
        ((128, 64), (128, 64, 8, 3, False)), ((128, 64), (128, 64, 8, 3, True)), ((128, 128), (64, 128, 4, 2, True)),
    ],
    "qk16pv8": [((128, 128), (64, 128, 4, 2, True)), ((128, 128), (128, 128, 8, 2, False))],
    "sage": [((128, 64), (128, 64, 8, 3, False)), ((128, 128), (64, 128, 4, 2, False))],
}  # fmt: skip


def tiles() -> dict[str, Any]:
    """Milliseconds of each tile at each share kept, with the choice of blocks."""
    from diffusers_accel.kernels.attention import low_bit

    found: dict[str, Any] = {}
    label, shape = next(iter(SHAPES.items()))
    x = Inputs(*inputs(*shape))
    for backend, trials in TRIALS.items():
        recipe = recipe_of(backend)
        for block, values in trials:
            tile = low_bit.Tile(*values[:4], prefetch_logits=values[4])
            row: dict[str, Any] = {}
            try:
                row["dense"] = round(milliseconds(lambda r=recipe, t=tile: low_bit.attention(x, r, tile=t), 60), 3)
                for kept in KEPT:
                    choose = selection(shape, kept, block)
                    row[f"{kept:.0%}"] = round(
                        milliseconds(
                            lambda r=recipe, t=tile, c=choose: low_bit.attention(x, r, choose=c, tile=t),
                            60,
                        ),
                        3,
                    )
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            found[f"{backend}, blocks {block}, tile {values}"] = row
            print(backend, block, values, row, flush=True)
    return {label: found}


# Model -> shape of the latents, and the shares that are kept.
FORWARDS = {
    "wan": ("480x832, 81 frames", (1, 16, 21, 60, 104), (0.5, 0.25)),
    "wan-14b": ("720x1280, 81 frames", (1, 16, 21, 90, 160), (0.5, 0.25)),
}
_8BIT: dict[str, Any] = {"linear": "fp8", "compile": True}


def forwards(out: Path | None) -> dict[str, Any]:
    """Seconds of a forward: stock, lossless, 8 bits, 8 bits with sparse attention. Written after each model."""
    from denoisers import MODELS, build
    from denoisers import inputs as arguments

    from diffusers_accel import accelerate, stats
    from diffusers_accel import restore as undo

    found: dict[str, Any] = {}
    for name, (label, shape, shares) in FORWARDS.items():
        pipe = build(MODELS[name])
        given = {**arguments(MODELS[name]), "hidden_states": torch.randn(shape, device="cuda", dtype=torch.bfloat16)}
        pipe.scheduler.set_timesteps(28, device="cuda")
        pipe.scheduler.set_begin_index(14)

        def forward(pipe: Any = pipe, given: Any = given) -> torch.Tensor:
            with torch.no_grad():
                return pipe.transformer(**given, return_dict=False)[0]

        variants: dict[str, Any] = {
            "stock": None,
            "lossless": {"attention": "auto", "compile": True},
            "8 bits": {"attention": "sage-fp8", **_8BIT},
            "8 bits, fastest": {"attention": {"backend": "auto", "fidelity": "8bit"}, **_8BIT},
        }
        for share in shares:
            for words, more in (("", {}), (", cubes", {"order": "cubes"}), (
                ", cubes and centroids", {"order": "cubes", "centroids": True})):  # fmt: skip
                sparse = {"keep": share, "min_tokens": 1, **more}
                variants[f"8 bits, {share:.0%} kept{words}"] = {
                    "attention": {"backend": "sage-fp8", "cross_attention": "sage-fp8", "sparse": sparse}, **_8BIT
                }  # fmt: skip
        row: dict[str, Any] = {"work": f"{name}, {label}"}
        for variant, config in variants.items():
            try:
                if config is not None:
                    accelerate(pipe, **config)
                forward()
                measure.synchronize()
                times = measure.seconds(forward, 2 if name == "wan-14b" else 5)
                row[variant] = {"seconds": round(min(times), 4)}
                if config is not None:
                    row[variant]["kernels"] = stats(pipe).attention_kernels
            except Exception as error:  # the other variants are of interest too
                row[variant] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(name, variant, row[variant], flush=True)
        undo(pipe)
        dense = row["8 bits"].get("seconds", float("nan"))
        for variant, each in row.items():
            if isinstance(each, dict) and "kept" in variant and "seconds" in each:
                each["speed-up over 8 bits"] = round(dense / each["seconds"], 3)
                each["speed-up over stock"] = round(row["stock"]["seconds"] / each["seconds"], 3)
                each["40 steps, first 20% dense"] = round(40 * dense / (8 * dense + 32 * each["seconds"]), 3)
        found[f"{name}, {label}"] = row
        measure.write("sparse-forwards", found, out)
        del pipe
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--forwards", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    if options.forwards:
        forwards(options.out)
    elif options.tiles:
        measure.write("sparse-tiles", tiles(), options.out)
    else:
        kernels(options.out)


if __name__ == "__main__":
    main()
