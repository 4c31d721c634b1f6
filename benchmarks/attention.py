"""Every attention kernel on the shapes of the models: TFLOP/s, error, and what the adapters add, in one run.

Inputs are Gaussian with outlying channels in K, as trained models have them. Rates are medians of `do_bench`, the
kernels called in turn over several rounds, so that a drift of the clocks meets all of them alike; quantization is
included. Errors are against float32 attention on a sample of queries. `raw` calls the library as its documentation
says, on tensors laid out as it wants them: the adapter's cost is what lies between.

    python benchmarks/attention.py                 # all kernels: benchmarks/results/attention.json
    python benchmarks/attention.py --tiles         # the tile shapes of our kernels and of the quantizers
    python benchmarks/attention.py --docs          # docs/results/attention-kernels.md; needs no GPU
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch

from diffusers_accel.core.platform import describe
from diffusers_accel.kernels.attention import KERNELS, RECIPES, AttentionKernel, Call, Inputs, recipes

# batch, heads, sequence, head_dim
SHAPES = {
    "Wan2.1 1.3B, 480p, 81 frames": (1, 12, 32760, 128),
    "FLUX.1, 1024 px": (1, 24, 4608, 128),
    "head_dim 64, video": (1, 24, 17550, 64),
    "Wan2.1 14B, 720p, 81 frames, on 4 GPUs": (1, 10, 75600, 128),
}
SIZES = "shape (batch, heads, sequence, head_dim)"
DOCS = Path(__file__).parents[1] / "docs" / "results" / "attention-kernels.md"


def inputs(batch: int, heads: int, length: int, dim: int, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """bf16 query, key and value, (batch, length, heads, dim)."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    query, value = draw(batch, length, heads, dim), draw(batch, length, heads, dim)
    outlying = 8 * draw(heads, dim) * (draw(heads, dim) > 1)
    return tuple(item.bfloat16() for item in (query, draw(batch, length, heads, dim) + outlying, value))


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32 attention of some queries, head by head: (batch, rows, heads, dim)."""
    out = []
    for head in range(query.shape[2]):
        q, k, v = (item[:, :, head].float() for item in (query[:, rows], key, value))
        out.append((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v)
    return torch.stack(out, 2)


def added(adapter: Callable[[], Any], library: Callable[[], Any], pairs: int = 60) -> float:
    """Share by which one call through the adapter takes longer than the library's own: the median over pairs of calls
    right after each other, in either order, so that heat and clocks meet both alike."""
    for function in (adapter, library):
        function()
    shares = []
    for pair in range(pairs):
        order = (adapter, library) if pair % 2 else (library, adapter)
        times = []
        for function in order:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Work that keeps the GPU busy while the call is prepared: what is timed is the GPU's part.
            torch.cuda._sleep(2_000_000)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        if not pair % 2:
            times.reverse()
        shares.append(times[0] / times[1] - 1)
    return statistics.median(shares)


def raw(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], Any] | None:
    """The library's own call, prepared outside the timing, for kernels that are another's."""
    heads_first = [item.transpose(1, 2) for item in (query, key, value)]
    if name == "fa3":
        from fa3_fwd_interface import flash_attn_func

        return lambda: flash_attn_func(query, key, value)
    if name == "fa4":
        from flash_attn.cute import flash_attn_func as flash_attn_4

        return lambda: flash_attn_4(query, key, value)
    if name in ("sdpa", "cudnn", "flash2"):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}.get(name)

        def call() -> torch.Tensor:
            if chosen is None:
                return torch.nn.functional.scaled_dot_product_attention(*heads_first)
            with sdpa_kernel(chosen):
                return torch.nn.functional.scaled_dot_product_attention(*heads_first)

        return call
    if name == "sageattention":
        from sageattention import sageattn

        copy = key.clone()  # 1.x writes to it
        return lambda: sageattn(query, copy, value, tensor_layout="NHD")
    if name == "xformers":
        import xformers.ops

        return lambda: xformers.ops.memory_efficient_attention(query, key, value)
    return None


def kernels(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {}
    able: dict[str, AttentionKernel] = {}
    missing = {}
    for name in KERNELS:
        kernel = KERNELS.get(name)
        backend, _, recipe = name.partition("/")
        if recipe and recipe == recipes(backend)[0]:
            continue  # the backend's own
        reason = kernel.missing(describe(device))
        if reason is None:
            able[name] = kernel
        else:
            missing[name] = reason
    for label, (batch, heads, length, dim) in SHAPES.items():
        if options.shapes and not any(part in label for part in options.shapes):
            continue
        query, key, value = inputs(batch, heads, length, dim)
        rows = torch.randint(length, (256,), device=device, generator=torch.Generator(device).manual_seed(1))
        expected = reference(query, key, value, rows)
        # Values of a trained model have a mean; a kernel whose sums lose what grows with every key shows it here.
        generator = torch.Generator(device).manual_seed(2)
        moved = (value + torch.randn(heads, dim, device=device, generator=generator)).bfloat16()
        expected_moved = reference(query, key, moved, rows)
        work = 4 * batch * heads * length**2 * dim / 1e9
        functions: dict[str, Callable[[], Any]] = {}
        figures: dict[str, dict[str, Any]] = {}
        for name, kernel in able.items():
            refused = kernel.refuses(Call.of(Inputs(query, key, value)))
            if refused is not None:
                figures[name] = {"refused": refused}
                continue
            try:
                function = kernel.load()
                call = partial(function, Inputs(query, key, value))
                before = [item.clone() for item in (query, key, value)]
                out = call()[:, rows].float()
                out_moved = function(Inputs(query, key, moved))[:, rows].float()
            except Exception as error:
                figures[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                continue
            assert all(map(torch.equal, before, (query, key, value))), f"{name} changed its inputs"
            figures[name] = {
                "relative error": float((out - expected).norm() / expected.norm()),
                "relative error, values with a mean": float(
                    (out_moved - expected_moved).norm() / expected_moved.norm()
                ),
                "cosine": float(torch.nn.functional.cosine_similarity(out.flatten(), expected.flatten(), 0)),
            }
            functions[name] = call
            library = raw(name, query, key, value)
            if library is not None:
                functions[f"{name}, raw"] = library
                figures[name]["adapter adds"] = round(added(call, library), 4)
        times = measure.rounds(functions, options.rounds)
        for name in able:
            if name not in times:
                continue
            figures[name]["ms"] = round(times[name], 4)
            figures[name]["TFLOP/s"] = round(work / times[name], 1)
            figures[name]["of cudnn"] = round(times["cudnn"] / times[name], 3)
            if f"{name}, raw" in times:
                figures[name]["raw TFLOP/s"] = round(work / times[f"{name}, raw"], 1)
        found[label] = {SIZES: (batch, heads, length, dim), "kernels": figures}
        for name, figure in figures.items():
            print(f"{label:40} {name:32} {figure}", flush=True)
    return {"shapes": found, "missing": missing}


def tiles(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Rates of our kernels over tile shapes, and microseconds of the quantizers over their constants."""
    from triton.testing import do_bench

    from diffusers_accel.kernels.attention import low_bit
    from diffusers_accel.kernels.attention.low_bit import Tile

    found: dict[str, Any] = {}
    tile_shapes = [
        Tile(queries, keys, warps, stages, ahead)
        for queries, keys, warps, stages, ahead in (
            (64, 128, 4, 2, False),
            (64, 128, 4, 2, True),
            (64, 128, 4, 3, False),
            (64, 64, 4, 2, False),
            (128, 64, 4, 2, False),
            (128, 64, 8, 3, False),
            (128, 64, 8, 4, False),
            (128, 128, 8, 3, False),
        )
    ]
    for label, (batch, heads, length, dim) in SHAPES.items():
        if options.shapes and not any(part in label for part in options.shapes):
            continue
        tensors = inputs(batch, heads, length, dim)
        work = 4 * batch * heads * length**2 * dim / 1e9
        rates: dict[str, Any] = {}
        for backend, known in RECIPES.items():
            recipe = next(iter(known.values()))
            for tile in tile_shapes:
                try:
                    call = partial(low_bit.attention, Inputs(*tensors), recipe, tile=tile)
                    rate = work / do_bench(call, warmup=15, rep=60, return_mode="median")
                except Exception as error:  # a tile that does not fit
                    rate = math.nan
                    print(label, backend, tile, type(error).__name__, flush=True)
                rates[f"{backend} {tile.queries}x{tile.keys}, {tile.warps} warps, {tile.stages} stages"
                      + (", ahead" if tile.prefetch_logits else "")] = round(rate, 1)  # fmt: skip
        found[label] = {"TFLOP/s": rates, "quantization, us": _quantizers(tensors)}
        print(json.dumps(found[label], indent=1), flush=True)
    return found


def _quantizers(tensors: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Microseconds of the quantizers over their constants."""
    from triton.testing import do_bench

    from diffusers_accel.kernels.attention import quantize

    times: dict[str, float] = {}
    recipe = RECIPES["sage-fp8"]["int8-1-128-1"]
    for call, names, several in (
        (
            partial(quantize.quantize_per_head, Inputs(*tensors)),
            ("_SPLITS", "_REDUCE_ROWS", "_REDUCE_WARPS", "_REDUCE_STAGES"),
            ((16, 32, 2, 3), (8, 32, 2, 3), (32, 32, 2, 3), (16, 16, 2, 4), (16, 64, 4, 3), (16, 32, 4, 3)),
        ),
        (
            partial(quantize.quantize_per_head, Inputs(*tensors)),
            ("_HEAD_ROWS", "_HEAD_TILES", "_HEAD_WARPS"),
            ((32, 4, 4), (16, 8, 2), (64, 2, 8), (64, 4, 8), (32, 16, 4)),
        ),
        (partial(quantize.quantize, Inputs(*tensors), recipe), ("_ROUND_WARPS",), ((4,), (8,), (16,))),
    ):
        kept = {name: getattr(quantize, name) for name in names}
        for constants in several:
            for name, constant in zip(names, constants, strict=True):
                setattr(quantize, name, constant)
            what = recipe.name if "_ROUND_WARPS" in names else "per head"
            label = ", ".join([what, *(f"{name[1:]} {value}" for name, value in zip(names, constants, strict=True))])
            times[label] = round(1e3 * do_bench(call, warmup=15, rep=40, return_mode="median"), 1)
        for name, constant in kept.items():
            setattr(quantize, name, constant)
    return times


def docs(path: Path) -> str:
    """The table of the documentation: what every kernel supports, from its record, and what was measured."""
    result = json.loads(path.read_text())
    shapes = result["shapes"]
    headings = [f"{label} {tuple(found[SIZES])}" for label, found in shapes.items()]
    lines = [
        "# Attention kernels",
        "",
        "Made by `python benchmarks/attention.py --docs` from the kernels' records and from",
        f"`benchmarks/results/{path.name}` ({result['device']}, torch {result['versions']['torch']}, CUDA "
        f"{result['cuda']}, driver {result['driver']}). `diffusers-accel env` prints what can run on your machine.",
        "",
        "Rates are TFLOP/s of one call, quantization included, non-causal, bf16 inputs; the error is relative to",
        "float32 attention on Gaussian inputs with outlying channels in K, at the first shape that the kernel takes.",
        "",
        f"| kernel | GPUs | types | head_dim | mask | causal | LSE | error | {' | '.join(headings)} |",
        "|---" * (8 + len(shapes)) + "|",
    ]
    for name in KERNELS:
        kernel = KERNELS.get(name)
        figures = [shape["kernels"].get(name, {}) for shape in shapes.values()]
        errors = [figure["relative error"] for figure in figures if "relative error" in figure]
        if "/" in name and not errors:
            continue
        cells = [
            f"`{name}`",
            kernel.gpus,
            ", ".join(
                str(item).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf") for item in kernel.dtypes
            )
            or "any",
            kernel.dims,
            "any" if kernel.mask else "keys" if kernel.key_mask else "no",
            ("equal lengths" if kernel.causal_square else "yes") if kernel.causal else "no",
            "yes" if kernel.lse else "no",
            f"{errors[0]:.2%}" if errors else "",
            *(str(figure.get("TFLOP/s", "")) for figure in figures),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "A kernel without rates was not installed on the machine that measured. A call that a kernel cannot take (see",
        "mask and causal) runs on SDPA; that is warned of and counted.",
        "",
    ]
    return "\n".join(lines)


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="parts of the names of shapes; all if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--name", default="attention", help="of the result's file")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    if options.docs:
        DOCS.write_text(docs((options.out or measure.RESULTS) / "attention.json"))
        print(DOCS)
        return
    device = torch.device("cuda")
    name, figures = (
        ("attention-tiles", tiles(options, device)) if options.tiles else (options.name, kernels(options, device))
    )
    print(measure.write(name, figures, options.out))


if __name__ == "__main__":
    main()
