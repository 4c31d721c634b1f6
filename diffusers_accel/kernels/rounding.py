"""Rounding to 8-bit types, as device functions in Triton that attention and linear layers share.

Imported only by other modules of Triton kernels: it needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter truncates where a GPU rounds to the nearest.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_e4m3(x):
    """Rounded to the nearest e4m3; what is larger than 448 becomes 448."""
    if _INTERPRETED:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        # Subnormal steps are 2^-9: adding 1.5 * 2^14 rounds to them. Elsewhere four significant bits are kept.
        small = (x + 24576.0) - 24576.0
        split = x * 1048577.0  # 2^20 + 1
        x = tl.where(tl.abs(x) < 0.015625, small, split - (split - x))
    return x.to(tl.float8e4nv)


@triton.jit
def store_rounded(pointer, x, inside, INT8: tl.constexpr):
    """Rounds to the nearest, ties to even, and stores; `x` is scaled already, for INT8 to -127 to 127."""
    if INT8:
        # Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum.
        x += 12582912.0
        tl.store(pointer, (x.to(tl.int32, bitcast=True) & 0xFF).to(tl.int8), mask=inside)
    else:
        tl.store(pointer, to_e4m3(x), mask=inside)
