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

The row of a request adds up its forwards: one of a dense step times the number of these, and one of a sparse step times
that of the others. Both are measured under one configuration, whose first 20% of steps are dense.
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

from diffusers_accel.core import platform
from diffusers_accel.kernels.attention import KERNELS, RECIPES, SELECTORS, Inputs, Span, Sparse
from diffusers_accel.kernels.attention.recipe import Recipe

# batch, heads, sequence, head_dim
SHAPES = {
    "Wan2.1 1.3B, 480p, 81 frames": (1, 12, 32760, 128),
    "Wan2.1 14B, 720p, 81 frames, on 4 GPUs": (1, 10, 75600, 128),
}
KEPT = (0.5, 0.25, 0.1)
# Shares of the running maximum below which skip-softmax leaves tiles out: none, some and most of them.
SKIPPED = (1e-30, 0.1, 0.5)
RECIPE_16 = Recipe(qk=None, k_block=0, pv=None)


def recipe_of(backend: str) -> Recipe:
    """The first recipe of a backend; `"triton"` rounds nothing."""
    return RECIPE_16 if backend == "triton" else next(iter(RECIPES[backend].values()))


def milliseconds(function: Callable[[], Any], repeat: int = 120) -> float:
    from triton.testing import do_bench

    return float(do_bench(function, warmup=20, rep=repeat, return_mode="median"))


def rule(kept: float, block: int, **more: Any) -> Sparse:
    """The default rule, sub-blocks, for a share of the blocks; in clusters with `order="clusters"`."""
    order = more.pop("order", "model")

    def span(queries: int, keys: int) -> Span:
        return Span((1, 1, queries), 0, 0, order, block)

    return Sparse(selector=SELECTORS.get("sub-blocks"), amount=kept, block=block, min_tokens=1, span=span, **more)


def call(kernel: Any, x: Inputs, sparse: Sparse) -> Any:
    """Sparse attention as a pipeline calls it."""
    x = replace(x, sparse=sparse)
    if not sparse.clusters(x):
        return kernel(x)
    ordered, back = sparse.clustered(x)
    return back(kernel(ordered))


# Backend and tokens of a block, where they are on the machine.
ENGINES = (
    ("sage-fp8", 128), ("sage-fp8", 64), ("sage", 128), ("qk16pv8", 128), ("triton", 128),
)  # fmt: skip


def kernels(names: list[str], out: Path | None) -> dict[str, Any]:
    """Dense and sparse attention, and the parts of a sparse call; written after each shape."""
    found: dict[str, Any] = {}
    for label, shape in SHAPES.items():
        x = Inputs(*inputs(*shape))
        work = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3] / 1e9
        row: dict[str, Any] = {"cudnn, ms": round(milliseconds(lambda x=x: KERNELS.get("cudnn").load()(x)), 3)}
        for backend, block in ENGINES:
            if backend not in names or KERNELS.get(backend).missing(platform.default_device()) is not None:
                continue
            row[f"{backend}, blocks of {block}"] = each = {}
            try:
                engine(each, backend, block, x, work)
            except Exception as error:  # the other kernels are of interest too
                each["failed"] = f"{type(error).__name__}: {error}"[:300]
            print(label, backend, block, each, flush=True)
        row["fastvideo-kernel, blocks of 64"] = each = {}
        try:
            fastvideo(each, x, work)
        except Exception as error:  # a package that is not there, or is built for another torch
            each["failed"] = f"{type(error).__name__}: {error}"[:300]
        print(label, "fastvideo-kernel", each, flush=True)
        found[label] = row
        measure.write("sparse", found, out)
    return found


def engine(each: dict[str, Any], backend: str, block: int, x: Inputs, work: float) -> None:
    """Rates of one kernel, and for those of ours the parts of a call and skip-softmax."""
    kernel = KERNELS.get(backend).load()
    dense = milliseconds(lambda: kernel(x))
    each["dense, ms"] = round(dense, 3)

    def rated(kept: float, **more: Any) -> dict[str, Any]:
        sparse = rule(kept, block, **more)
        time = milliseconds(lambda: call(kernel, x, sparse))
        return {
            "ms": round(time, 3), "TFLOP/s of dense work": round(work / time),
            "share of the dense rate": round(dense * kept / time, 3),
        }  # fmt: skip

    for kept in KEPT:
        each[f"{kept:.0%} kept"] = rated(kept)
    each["25% kept, centroids"] = rated(0.25, centroids=True)
    each["25% kept, clusters"] = rated(0.25, order="clusters")
    each["25% kept, clusters and centroids"] = rated(0.25, order="clusters", centroids=True)
    if block == 128:
        skips(each, recipe_of(backend), x)
    parts(each, recipe_of(backend), block, x)


def skips(each: dict[str, Any], recipe: Recipe, x: Inputs) -> None:
    """Skip-softmax. Of Gaussian inputs few tiles have a new maximum: the shares are what the threshold leaves."""
    from diffusers_accel.kernels.attention import low_bit

    for share in SKIPPED:
        computed = torch.zeros(1, dtype=torch.int32, device="cuda")
        low_bit.attention(x, recipe, skip=share, computed=computed)
        kept = int(computed) / low_bit.tiles_of(x, recipe)
        time = milliseconds(lambda c=computed, s=share: low_bit.attention(x, recipe, skip=s, computed=c))
        each[f"skip-softmax below {share:g}"] = {"ms": round(time, 3), "tiles computed": round(kept, 3)}


def parts(each: dict[str, Any], recipe: Recipe, block: int, x: Inputs) -> None:
    """Milliseconds of the parts of a call: rounding, means, the choice, clusters."""
    from diffusers_accel.kernels.attention.block_lists import centroids, long_first, operand_means
    from diffusers_accel.kernels.attention.clusters import cluster, ordered
    from diffusers_accel.kernels.attention.quantize import quantize

    choice, data = rule(0.25, block), quantize(x, recipe)
    lists = choice.choose(x, data)
    whole = ((0, x.query.shape[1]), (0, x.key.shape[1]))
    order = cluster(x.query, x.key, block, whole)[0]
    functions = {
        "rounding": lambda: quantize(x, recipe),
        "means": lambda: operand_means(x, data, block // 4, block // 4),
        "centroids": lambda: centroids(x, data, block),
        "choice": lambda: choice.choose(x, data),
        "order of uneven lists": lambda: long_first(lists.counts),
        "clusters": lambda: cluster(x.query, x.key, block, whole),
        "order of one operand": lambda: ordered(x.query, order),
    }
    each["parts, ms"] = {name: round(milliseconds(function), 3) for name, function in functions.items()}


def fastvideo(each: dict[str, Any], x: Inputs, work: float) -> None:
    """The kernel of FastVideo over random lists, which it is given: their choice is not measured. It is the one for
    Hopper where its library fits torch, or the one in Triton."""
    import importlib

    # A function of the package hides the module of its name.
    package = importlib.import_module("fastvideo_kernel.block_sparse_attn")
    hopper = package._get_sm90_ops()[0] is not None
    attention = package.block_sparse_attn_sm90 if hopper else package.block_sparse_attn_triton
    each["engine"] = "sm_90" if hopper else "Triton"
    pad = -x.query.shape[1] % 64
    q, k, v = (torch.nn.functional.pad(item, (0, 0, 0, pad)).contiguous() for item in x.heads_first)
    blocks = q.shape[2] // 64
    sizes = torch.full((blocks,), 64, dtype=torch.int32, device="cuda")
    sizes[-1] = 64 - pad
    for kept in (1.0, *KEPT):
        count = max(1, round(kept * blocks))
        scores = torch.rand(*q.shape[:2], blocks, blocks, device="cuda")
        index = scores.topk(count, -1).indices.sort(-1).values.to(torch.int32)
        number = torch.full(index.shape[:3], count, dtype=torch.int32, device="cuda")
        time = milliseconds(lambda i=index, n=number: attention(q, k, v, i, n, sizes))
        each[f"{kept:.0%} kept"] = {"ms": round(time, 3), "TFLOP/s of dense work": round(work / time)}


# Backend -> (block, tile) of each trial: queries, keys, warps, stages, logits ahead.
TRIALS: dict[str, list[tuple[tuple[int, int], tuple[Any, ...]]]] = {
    "sage-fp8": [
        ((128, 128), (64, 128, 4, 2, False)), ((128, 128), (64, 128, 4, 2, True)), ((128, 128), (64, 128, 4, 3, False)),
        ((128, 128), (128, 128, 8, 2, False)), ((64, 64), (64, 64, 4, 3, False)), ((64, 64), (64, 64, 4, 4, False)),
        ((64, 64), (64, 64, 4, 3, True)),
    ],
    "triton": [
        ((128, 128), (128, 128, 8, 2, False)), ((128, 128), (128, 128, 8, 2, True)),
        ((128, 128), (64, 128, 4, 2, True)),
    ],
    "qk16pv8": [((128, 128), (64, 128, 4, 2, True)), ((128, 128), (128, 128, 8, 2, False))],
    "sage": [((128, 128), (64, 128, 4, 2, False))],
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
                    choose = rule(kept, block[0]).choose
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
    "wan-14b": ("720x1280, 81 frames", (1, 16, 21, 90, 160), (0.25, 0.5)),
    "wan": ("480x832, 81 frames", (1, 16, 21, 60, 104), (0.5, 0.25)),
}
STEPS, DENSE_STEPS = 40, 0.2
_8BIT: dict[str, Any] = {"linear": "fp8", "compile": True}


def forwards(names: list[str], out: Path | None) -> dict[str, Any]:
    """Seconds of a forward: stock, lossless, 8 bits, 8 bits with sparse attention. Written after each of them."""
    from denoisers import MODELS, build
    from denoisers import inputs as arguments

    from diffusers_accel import accelerate, stats
    from diffusers_accel import restore as undo

    found: dict[str, Any] = {}
    for name in names:
        label, shape, shares = FORWARDS[name]
        pipe = build(MODELS[name])
        given = {**arguments(MODELS[name]), "hidden_states": torch.randn(shape, device="cuda", dtype=torch.bfloat16)}
        repeats = 2 if name == "wan-14b" else 5
        pipe.scheduler.set_timesteps(STEPS, device="cuda")

        def forward(pipe: Any = pipe, given: Any = given) -> torch.Tensor:
            with torch.no_grad():
                return pipe.transformer(**given, return_dict=False)[0]

        def seconds(step: int, repeats: int = repeats, pipe: Any = pipe, forward: Any = forward) -> float:
            pipe.scheduler.set_begin_index(step)
            return round(min(measure.seconds(forward, repeats, warm=0)), 4)

        variants: dict[str, Any] = {"stock": None, "8 bits": {"attention": "sage-fp8", **_8BIT}}
        orders = {
            ", clusters and centroids": {"order": "clusters", "centroids": True}, "": {},
            ", cubes and centroids": {"order": "cubes", "centroids": True},
        }  # fmt: skip
        for share in shares:
            for words, more in orders.items():
                sparse = {"keep": share, "min_tokens": 1, "dense_steps": DENSE_STEPS, **more}
                variants[f"8 bits, {share:.0%} kept{words}"] = {
                    "attention": {"backend": "sage-fp8", "cross_attention": "sage-fp8", "sparse": sparse}, **_8BIT
                }  # fmt: skip
        variants["lossless"] = {"attention": "auto", "compile": True}
        variants["8 bits, fastest"] = {"attention": {"backend": "auto", "fidelity": "8bit"}, **_8BIT}
        row: dict[str, Any] = {"work": f"{name}, {label}"}
        found[f"{name}, {label}"] = row
        for variant, config in variants.items():
            try:
                if config is not None:
                    accelerate(pipe, **config)
                # The first step of a request is what its phases are counted from.
                seconds(0, 1)
                row[variant] = {"seconds": seconds(STEPS // 2)}
                if config is not None:
                    row[variant]["kernels"] = stats(pipe).attention_kernels
                if "kept" in variant:
                    row[variant]["seconds of a dense step"] = seconds(0, 1)
                    row[variant] |= gains(row, row[variant])
            except Exception as error:  # the other variants are of interest too
                row[variant] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(name, variant, row[variant], flush=True)
            measure.write("sparse-forwards", found, out)
        undo(pipe)
        del pipe
        torch.cuda.empty_cache()
    return found


def gains(row: dict[str, Any], each: dict[str, Any]) -> dict[str, float]:
    """Speed-ups of a sparse forward, and of a request with its dense steps."""
    dense, sparse, first = row["8 bits"]["seconds"], each["seconds"], round(DENSE_STEPS * STEPS)
    request = first * each["seconds of a dense step"] + (STEPS - first) * sparse
    return {
        "speed-up over 8 bits": round(dense / sparse, 3),
        "speed-up over stock": round(row["stock"]["seconds"] / sparse, 3),
        f"speed-up of {STEPS} steps, first {DENSE_STEPS:.0%} dense": round(STEPS * dense / request, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--kernels", nargs="*", default=[name for name, _ in ENGINES], help="backends")
    parser.add_argument("--forwards", nargs="*", choices=list(FORWARDS), help="models; all of them without a name")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    if options.forwards is not None:
        forwards(options.forwards or list(FORWARDS), options.out)
    elif options.tiles:
        measure.write("sparse-tiles", tiles(), options.out)
    else:
        kernels(options.kernels, options.out)


if __name__ == "__main__":
    main()
