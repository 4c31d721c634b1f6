"""A loop, for Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count(out_ptr, turns):
    total = tl.load(out_ptr)
    for _ in tl.range(turns):
        total += 1
    tl.store(out_ptr, total)
