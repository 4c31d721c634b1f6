"""The passes between two products: bytes per second of ours, and of what inductor makes of the same, at the shapes of
FLUX.1, Wan2.1 1.3B, Wan2.2 5B and Qwen-Image.

Every pass is timed on the GPU alone, with its caches emptied; bytes count each input read once and each output written
once. With `--tiles`, ours with other numbers of warps.

    python benchmarks/rows.py            # benchmarks/results/rows.json
    python benchmarks/rows.py --tiles
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F

from diffusers_accel.kernels.attention import quantize
from diffusers_accel.kernels.attention.qk_norm_rope import qk_norm_rope
from diffusers_accel.kernels.attention.record import Inputs, QKNorm, Rotary
from diffusers_accel.kernels.elementwise import operators, rows
from diffusers_accel.kernels.linear import formats, quantize_activations

# Rows, channels, heads, channels of the feed-forward, and whether the QK-norm is over all heads at once.
SHAPES = {
    "FLUX.1": (4608, 3072, 24, 12288, False),
    "Wan2.1 1.3B": (32760, 1536, 12, 8960, True),
    "Wan2.2 5B": (27280, 3072, 24, 14336, True),
    "Qwen-Image": (6889, 3072, 24, 12288, False),
}
Function = Callable[[], Any]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def passes(name: str) -> dict[str, tuple[Callable[[int | None], Any], Function, int]]:
    """Pass -> ours by warps, the same in torch, and the bytes it must move."""
    length, channels, heads, wide, across = SHAPES[name]
    x, y = random(1, length, channels), random(1, length, channels)
    gate, factor, shift = (random(1, 1, channels) for _ in range(3))
    size = length * channels
    found: dict[str, Any] = {}

    def norm(kind: str, residual: bool) -> Callable[[int | None], Any]:
        made = operators._residual_norm_empty(x, y if residual else None, kind, x.dtype)
        given = (x, y if residual else None, [gate] if residual else [], None, None, [factor], [shift])
        return lambda warps: rows.residual_norm(*given, 1e-6, False, True, *made, warps)

    def plain_norm(kind: str, residual: bool) -> Any:
        total = x + gate * y if residual else x
        out = F.layer_norm(total, (channels,), eps=1e-6) * (1 + factor) + shift
        return total, formats.quantize_rows(out[0]) if kind else out

    for kind in ("", "e4m3"):
        for residual in (False, True):
            label = "norm, modulated" + (", of a gated sum" if residual else "") + (", to e4m3" if kind else "")
            moved = size * (2 + (1 if kind else 2) + (4 if residual else 0))
            plain = torch.compile(plain_norm, dynamic=False)
            found[label] = norm(kind, residual), lambda f=plain, a=(kind, residual): f(*a), moved

    hidden = random(1, length, wide)
    values, scale = operators._concat_quantize_empty([hidden], "e4m3")
    plain_gelu = torch.compile(lambda: formats.quantize_rows(F.gelu(hidden, approximate="tanh")[0]), dynamic=False)
    found["GELU, to e4m3"] = (
        lambda warps: rows.concat_quantize([hidden], [None], ["gelu_tanh"], values, scale, warps),
        plain_gelu, length * wide * 3,
    )  # fmt: skip
    if name == "FLUX.1":
        both, scales = operators._concat_quantize_empty([x, hidden], "e4m3")
        plain_both = torch.compile(
            lambda: formats.quantize_rows(torch.cat([x, F.gelu(hidden, approximate="tanh")], -1)[0]), dynamic=False
        )
        found["attention and GELU side by side, to e4m3"] = (
            lambda warps: rows.concat_quantize([x, hidden], [None, None], ["", "gelu_tanh"], both, scales, warps),
            plain_both, length * (wide + channels) * 3,
        )  # fmt: skip
    plain_rows = torch.compile(lambda: formats.quantize_rows(x[0]), dynamic=False)
    found["to e4m3"] = (
        lambda warps: quantize_activations.quantize_rows(x[0], launch=None if warps is None else (1, warps)),
        plain_rows, size * 3,
    )  # fmt: skip

    dim = channels // heads
    query, key, value = (random(1, length, heads, dim) for _ in range(3))
    weights = random(channels if across else dim), random(channels if across else dim)
    angles = torch.rand(1, length, 1, dim // 2, device="cuda").repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    out = torch.empty_like(query), torch.empty_like(key)
    rotary = Rotary((cos, sin), (cos, sin))

    def plain_qk_norm_rope() -> Any:
        def one(item: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            item = F.rms_norm(item.flatten(2) if across else item, weight.shape, weight, 1e-6).view(item.shape)
            real, imaginary = item.unflatten(-1, (-1, 2)).unbind(-1)
            rotated = torch.stack([-imaginary, real], -1).flatten(3)
            return (item.float() * cos + rotated.float() * sin).to(item.dtype)

        return one(query, weights[0]), one(key, weights[1])

    found["QK-norm and rotation"] = (
        lambda warps: qk_norm_rope(query, key, *out, QKNorm(*weights, 1e-6), rotary, warps),
        torch.compile(plain_qk_norm_rope, dynamic=False), size * 8,
    )  # fmt: skip
    norm_ = None if across else QKNorm(*weights, 1e-6)
    found["QKV to e4m3 for attention"] = (
        lambda warps: quantize.quantize_per_head(Inputs(query, key, value, rotary=rotary, norm=norm_)),
        None, size * 9,
    )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SHAPES))
    parser.add_argument("--tiles", action="store_true", help="other numbers of warps")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.only or SHAPES:
        for label, (ours, plain, moved) in passes(name).items():
            functions: dict[str, Function] = {"ours": lambda f=ours: f(None)}
            if options.tiles:
                functions |= {f"{count} warps": lambda f=ours, n=count: f(n) for count in (1, 2, 4, 8, 16)}
            elif plain is not None:
                plain()
                functions["inductor"] = plain
            times = measure.rounds(functions, 3, warmup=5, rep=25)
            found.setdefault(name, {})[label] = {
                each: {"us": round(1000 * ms, 1), "TB/s": round(moved / ms / 1e9, 2)} for each, ms in times.items()
            }
            print(name, label, found[name][label], flush=True)
        torch.compiler.reset()
    print(measure.write("rows-tiles" if options.tiles else "rows", {"passes": found}, options.out))


if __name__ == "__main__":
    main()
