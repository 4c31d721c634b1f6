"""Rounding to 8-bit types, as Triton device functions that attention, linear layers and elementwise passes share.

Only modules of Triton kernels import this one: it needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Triton's interpreter truncates where a GPU rounds to the nearest.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def symmetric_scale(amax, LARGEST: tl.constexpr):
    """The scale that maps `amax` to the largest value of a type; 1 where `amax` is too small for a normal scale."""
    scale = amax / LARGEST
    return tl.where(scale < _TINY, 1.0, scale)


@triton.jit
def to_e4m3(x):
    """`x` rounded to the nearest e4m3; magnitudes above 448 become 448."""
    if _INTERPRETED:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        # Subnormal steps are 2^-9: adding 1.5 * 2^14 rounds to them. Elsewhere four significant bits are kept.
        small = (x + 24576.0) - 24576.0
        split = x * 1048577.0  # 2^20 + 1
        x = tl.where(tl.abs(x) < 0.015625, small, split - (split - x))
    return x.to(tl.float8e4nv)


@triton.jit
def store_rounded(pointer, x, inside, INT8: tl.constexpr):
    """Rounds to the nearest, ties to even, and stores. The caller has scaled `x` to the range of the type.

    INT8: int8, whose range is -127 to 127, instead of e4m3.
    """
    if INT8:
        # Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum.
        x += 12582912.0
        tl.store(pointer, (x.to(tl.int32, bitcast=True) & 0xFF).to(tl.int8), mask=inside)
    else:
        tl.store(pointer, to_e4m3(x), mask=inside)
