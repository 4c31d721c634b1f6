"""Quantized linear layers on the models' shapes: speed of each format against bf16, and a whole FLUX.1-dev quantized.

Rates count the operations of the GEMM alone. Times include the quantization of activations, as in an eager model. `raw`
is torch's GEMM on quantized operands; `torchao` is its row-wise layer, where it is installed. The calls take turns over
several rounds. Errors are against float64 on a sample of rows, with Gaussian weights and activations that have outlier
channels.

    python benchmarks/linear.py            # benchmarks/results/linear.json
    python benchmarks/linear.py --tiles    # tilings of the INT8 GEMM, and launches of the activation quantization
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flux
import measure
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_accel import accelerate, restore, stats
from diffusers_accel.core.platform import describe
from diffusers_accel.kernels.linear import LINEARS, LinearSlice, PackedLinear, formats

# rows, input features, output features
SHAPES = {
    "FLUX.1 to_q": (4608, 3072, 3072),
    "FLUX.1 up": (4608, 3072, 12288),
    "FLUX.1 down": (4608, 12288, 3072),
    "FLUX.1 single proj_out": (4608, 15360, 3072),
    "Wan2.1 1.3B to_q": (32760, 1536, 1536),
    "Wan2.1 1.3B up": (32760, 1536, 8960),
    "Wan2.1 1.3B down": (32760, 8960, 1536),
    "Wan2.1 14B to_q": (32760, 5120, 5120),
    "Wan2.1 14B up": (32760, 5120, 13824),
}


def raw(x: torch.Tensor, linear: nn.Linear) -> dict[str, Callable[[], Any]]:
    """torch's GEMMs on quantized operands."""
    calls: dict[str, Callable[[], Any]] = {}
    weight = linear.weight.detach()
    for name, kind in (("fp8", F.ScalingType.RowWise), ("fp8-tensor", F.ScalingType.TensorWise)):
        quantize = formats.quantize_rows if name == "fp8" else formats.quantize_tensor
        (data, scale), (stored, stored_scale) = quantize(x), quantize(weight)
        stored_scale = stored_scale if name == "fp8-tensor" else stored_scale.t()
        calls[f"{name}, raw"] = partial(
            F.scaled_mm, data, stored.t(), scale, kind, stored_scale, kind, use_fast_accum=True
        )
    return calls


def torchao(linear: nn.Linear) -> nn.Module | None:
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError:
        return None
    layer = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, device="meta"))
    layer[0].weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    layer[0].bias = linear.bias
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return layer[0]


def uncached(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A call on a new tensor object: the activation cache misses."""
    return layer(x.view_as(x))


def threefold(layers: list[nn.Module], x: torch.Tensor) -> None:
    shared = x.view_as(x)
    for layer in layers:
        layer(shared)


def packed_slices(layers: list[Any]) -> list[nn.Module]:
    packed = PackedLinear(layers)
    return [LinearSlice(packed, index, layer) for index, layer in enumerate(layers)]


def products(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, (rows, inside, outside) in SHAPES.items():
        if options.shapes and not any(part in label for part in options.shapes):
            continue
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(rows, inside, device=device, generator=generator)
        x *= 1 + 7 * (torch.rand(inside, device=device, generator=generator) < 0.02)
        x = x.bfloat16()
        linear = nn.Linear(inside, outside, device=device, dtype=torch.bfloat16).requires_grad_(False)
        linear.weight.normal_(generator=generator).mul_(inside**-0.5)
        sample = torch.randint(rows, (64,), device=device, generator=generator)
        expected = x[sample].double() @ linear.weight.double().T + linear.bias.double()
        layers: dict[str, nn.Module] = {"bf16": linear}
        missing: dict[str, str] = {}
        for name in LINEARS:
            kernel = LINEARS.get(name)
            refused = kernel.missing(describe(device)) or kernel.refuses(linear)
            if refused is not None:
                missing[name] = refused
            else:
                layers[name] = kernel.load()(linear)
        other = torchao(linear)
        if other is not None:
            layers["torchao row-wise"] = other
        calls: dict[str, Callable[[], Any]] = {}
        figures: dict[str, Any] = {}
        for name, layer in layers.items():
            try:
                out = layer(x)[sample].double()
            except Exception as error:
                missing[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            figures[name] = {"relative error": round(float((out - expected).norm() / expected.norm()), 5)}
            calls[name] = partial(uncached, layer, x)
        calls |= raw(x, linear)
        if "fp8" in layers and inside == outside:
            # Q, K and V of one tensor: quantized once for three GEMMs, and packed into one GEMM.
            for name in {"bf16", "fp8", "fp8-block", "int8", "nvfp4"} & set(layers):
                calls[f"{name}, three layers of one input"] = partial(threefold, [layers[name]] * 3, x)
                calls[f"{name}, three layers as one"] = partial(threefold, packed_slices([layers[name]] * 3), x)
        times = measure.rounds(calls, options.rounds, warmup=10, rep=40)
        for name, milliseconds in times.items():
            layer_count = 3 if "three" in name else 1
            base = times["bf16, three layers of one input" if layer_count == 3 else "bf16"]
            figures.setdefault(name, {}).update({
                "ms": round(milliseconds, 4),
                "TFLOP/s": round(2e-9 * rows * inside * outside * layer_count / milliseconds, 1),
                "of bf16": round(base / milliseconds, 3),
            })  # fmt: skip
        found[label] = {"rows, in, out": (rows, inside, outside), "layers": figures, "missing": missing}
        for name, figure in figures.items():
            print(f"{label:26} {name:20} {figure}", flush=True)
        for name, reason in missing.items():
            print(f"{label:26} {name:20} {reason}", flush=True)
        del layers, calls
    return found


def whole(device: torch.device) -> dict[str, Any]:
    """Bytes, seconds and peak memory of quantizing FLUX.1-dev's transformer."""
    pipe = flux.build(str(device), torch.bfloat16, tiny=False)
    found: dict[str, Any] = {}
    for keep in ("drop", "cpu"):
        for name in LINEARS:
            if (keep == "cpu" and name != "fp8") or LINEARS.get(name).missing(describe(device)) is not None:
                continue
            pipe = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
            pipe = flux.build(str(device), torch.bfloat16, tiny=False)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            accelerate(pipe, linear={"algo": name, "keep_original": keep})
            torch.cuda.synchronize()
            taken = time.perf_counter() - start
            figure = stats(pipe)
            found[f"{name}, keep_original={keep}"] = {
                "seconds": round(taken, 2),
                "weights before, GiB": round(figure.weight_bytes_before / 2**30, 2),
                "weights after, GiB": round(figure.weight_bytes_after / 2**30, 2),
                "peak above before, GiB": round((torch.cuda.max_memory_allocated() - before) / 2**30, 3),
                "layers": figure.linear_layers,
            }
            print(name, keep, found[f"{name}, keep_original={keep}"], flush=True)
            if keep == "cpu":
                start = time.perf_counter()
                restore(pipe)
                torch.cuda.synchronize()
                found[f"{name}, keep_original={keep}"]["seconds to restore"] = round(time.perf_counter() - start, 2)
    return found


def tiles(device: torch.device) -> dict[str, Any]:
    """TFLOP/s of the INT8 GEMM over tilings, on quantized operands."""
    from triton.testing import do_bench

    from diffusers_accel.kernels.linear.gemm import Tile, int8_linear

    found: dict[str, Any] = {}
    tilings = [
        Tile(rows, columns, depth, warps, stages, band)
        for rows, columns, depth, warps, stages in (
            (128, 256, 128, 8, 3), (128, 256, 128, 8, 4), (128, 256, 64, 8, 4), (128, 128, 128, 8, 4),
            (128, 128, 128, 4, 3), (128, 128, 128, 8, 3), (256, 128, 128, 8, 3), (64, 256, 128, 4, 4),
            (128, 256, 128, 8, 2),
        )
        for band in (4, 8, 16)
    ]  # fmt: skip
    for label in ("FLUX.1 to_q", "FLUX.1 up", "FLUX.1 down", "Wan2.1 1.3B up"):
        rows, inside, outside = SHAPES[label]
        x = torch.randint(-127, 128, (rows, inside), device=device, dtype=torch.int8)
        weight = torch.randint(-127, 128, (outside, inside), device=device, dtype=torch.int8)
        scales = torch.rand(rows, 1, device=device), torch.rand(outside, 1, device=device)
        rates: dict[str, Any] = {}
        for tile in tilings:
            call = partial(int8_linear, x, scales[0], weight, scales[1], None, torch.bfloat16, tile)
            try:
                rate = 2e-9 * rows * inside * outside / do_bench(call, warmup=10, rep=30, return_mode="median")
            except Exception as error:  # a tiling that does not fit
                print(label, tile, type(error).__name__, flush=True)
                continue
            rates[
                f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, {tile.stages} stages, band {tile.band}"
            ] = round(rate, 1)
        found[label] = dict(sorted(rates.items(), key=lambda item: -item[1]))
        print(label, list(found[label].items())[:6], flush=True)
    return found


def activation_quantization(device: torch.device) -> dict[str, Any]:
    """GB/s of quantizing activations to e4m3 with a scale per row, over rows and warps of a program."""
    from triton.testing import do_bench

    from diffusers_accel.kernels.linear.quantize_activations import quantize_rows

    found: dict[str, Any] = {}
    for rows, columns in ((4608, 3072), (4608, 12288), (4608, 15360), (32760, 1536), (32760, 8960), (32760, 5120)):
        x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        rates = {}
        for launch in ((1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (2, 16), (4, 4), (4, 8), (8, 4), (8, 8)):
            if launch[0] * columns > 40000:
                continue
            call = partial(quantize_rows, x, torch.float8_e4m3fn, launch)
            milliseconds = do_bench(call, warmup=5, rep=25, return_mode="median")
            rates[f"{launch[0]} rows, {launch[1]} warps"] = round(3e-6 * rows * columns / milliseconds)
        found[f"{rows} x {columns}"] = dict(sorted(rates.items(), key=lambda item: -item[1]))
        print(rows, columns, found[f"{rows} x {columns}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="substrings of the shapes' names; all shapes if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--skip-whole", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    device = torch.device("cuda")
    if options.tiles:
        found = {"rounding rows, GB/s": activation_quantization(device), "INT8 product, TFLOP/s": tiles(device)}
        print(measure.write("linear-tiles", found, options.out))
        return
    result: dict[str, Any] = {"shapes": products(options, device)}
    if not options.skip_whole:
        result["FLUX.1-dev shape"] = whole(device)
    print(measure.write("linear", result, options.out))


if __name__ == "__main__":
    main()
