"""The quality of quantized linear layers on the shipped checkpoints: PSNR of pictures against stock, held-out captions.

Everything but the linear layers runs in float32, so that only the formats' rounding is measured. On a GPU the kernels
run, elsewhere the references in plain torch. Every layer inside the blocks is quantized.

Two preprocessings are measured too, as modules around the layers that exist in this script only. `rotation` multiplies
activations by a Hadamard matrix over the input features, which spreads outlier channels. `smoothing`
(https://arxiv.org/abs/2211.10438, strength 0.5) moves the activations' range into the weights, channel by channel, by a
calibration on other captions.

    python benchmarks/linear_fidelity.py                            # benchmarks/results/linear-fidelity.json
    python benchmarks/linear_fidelity.py --count 2 --only flux-shapes
    # Two formats over more captions, since few captions decide a pooled figure: linear-fidelity-nvfp4.json
    python benchmarks/linear_fidelity.py --only wan-shapes --count 64 --formats nvfp4 svdq-nvfp4
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from attention_fidelity import generate, psnr
from fidelity import captions
from torch import nn

from diffusers_accel import Unsupported, accelerate, demo, restore, stats
from diffusers_accel.kernels.linear import LINEARS

# Lower bounds on the PSNR in dB, pooled over captions.
BOUNDS = {"fp8": 34.0, "fp8-tensor": 34.0, "fp8-block": 34.0, "int8": 39.0, "nvfp4": 26.0}
BETTER_THAN_NVFP4 = 3.0
# Formats that are measured with preprocessing.
PREPROCESSED = ("fp8", "fp8-tensor", "int8", "nvfp4")


class Preprocessed(nn.Module):
    """A quantized layer behind a factor on its input: an orthogonal matrix, or one number per channel."""

    def __init__(self, linear: nn.Linear, algo: str, factor: torch.Tensor):
        super().__init__()
        shell = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        inverse = factor.T if factor.ndim == 2 else 1 / factor  # the matrix is orthogonal
        weight = linear.weight.detach() @ inverse.T if factor.ndim == 2 else linear.weight.detach() * inverse
        shell.weight, shell.bias = nn.Parameter(weight, requires_grad=False), linear.bias
        self.layer, self.kind = LINEARS.get(algo).load()(shell), algo
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x @ self.factor if self.factor.ndim == 2 else x * self.factor)


def rotation(linear: nn.Linear) -> torch.Tensor:
    """A block-diagonal Hadamard matrix. The size of a block is the largest power of two, up to 256, that divides the
    number of channels."""
    size = linear.in_features
    block = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < min(block, 256):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return torch.block_diag(*[matrix / len(matrix) ** 0.5] * (size // len(matrix))).to(linear.weight.device)


def input_ranges(name: str, pipe: Any, device: str) -> dict[int, torch.Tensor]:
    """The largest magnitude of each layer's input channels over training captions: layer id -> (in_features,)."""
    found: dict[int, torch.Tensor] = {}

    def observe(module: nn.Module, given: Any) -> None:
        amax = given[0].detach().abs().flatten(0, -2).amax(0)
        found[id(module)] = torch.maximum(found.get(id(module), amax), amax)

    layers = [item for item in pipe.transformer.modules() if isinstance(item, nn.Linear)]
    handles = [layer.register_forward_pre_hook(observe) for layer in layers]
    generate(name, pipe, captions(demo.CHECKPOINTS[name].kind, 4, "training"), device)
    for handle in handles:
        handle.remove()
    return found


def register(algo: str, ranges: dict[int, torch.Tensor]) -> list[str]:
    """Registers a format with each preprocessing, and returns the names."""

    def smoothing(linear: nn.Linear) -> torch.Tensor:
        amax = ranges[id(linear)].clamp_min(1e-5)
        return (linear.weight.abs().amax(0).clamp_min(1e-5) / amax).sqrt()

    def load(factor: Any) -> Any:
        return lambda: lambda linear: Preprocessed(linear, algo, factor(linear))

    kernel, names = LINEARS.get(algo), []
    for label, factor in (("rotation", rotation), ("smoothing", smoothing)):
        names.append(f"{algo} + {label}")
        LINEARS.add(names[-1], replace(kernel, name=names[-1], load=load(factor)), replace=True)
    return names


def evaluate(name: str, count: int, device: str, formats: list[str] | None) -> dict[str, Any]:
    pipe = demo.load(name, torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    prompts = captions(demo.CHECKPOINTS[name].kind, count, "held-out")
    stock = generate(name, pipe, prompts, device)
    rows: dict[str, Any] = {}
    own = formats or [algo for algo in LINEARS if "+" not in algo]
    if not formats:
        ranges = input_ranges(name, pipe, device)
        own += [name for base in PREPROCESSED for name in register(base, ranges)]
    for algo in own:
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
    parser.add_argument("--formats", nargs="+", choices=list(LINEARS), help="only these formats, without preprocessing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    names = [options.only] if options.only else sorted(demo.CHECKPOINTS)
    found = {name: evaluate(name, options.count, options.device, options.formats) for name in names}
    short = []
    for name, rows in found.items():
        bounds = dict(BOUNDS)
        if "psnr pooled" in rows.get("nvfp4", {}):
            bounds["svdq-nvfp4"] = rows["nvfp4"]["psnr pooled"] + BETTER_THAN_NVFP4
        for algo, bound in bounds.items():
            figure = rows.get(algo, {}).get("psnr pooled")
            if isinstance(figure, float) and figure < bound:
                short.append(f"{name}, {algo}: {figure} dB, asked {round(bound, 2)}")
    result = {"captions": options.count, "bounds": BOUNDS, "under the bound": short, **found}
    label = "-".join(["linear-fidelity", *(options.formats or [])[:1]])
    print(measure.write(label, result, options.out))
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    main()
