"""Quantization of weights to NVFP4 in one pass, in Triton: bit for bit `formats.py`, without its float32 intermediates.

Only loaders of linear records import this module: it needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from .formats import GROUP, nvfp4_scales


@on_its_device
@triton.jit
def _pack(x_ptr, scale_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Program (rows, columns): e2m1 codes, two per byte."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * WIDTH
    c, group = first + tl.arange(0, WIDTH), first // 16 + tl.arange(0, WIDTH // 16)
    at = r.to(tl.int64)[:, None]
    x = tl.load(x_ptr + at * columns + c[None, :], mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    inside = (r < rows)[:, None] & (group < columns // 16)[None, :]
    scale = tl.load(scale_ptr + at * (columns // 16) + group[None, :], mask=inside, other=1.0)
    # A block whose scale rounded to zero stores zeros.
    scale = tl.where(scale == 0, float("inf"), scale)
    scale = tl.broadcast_to(scale[:, :, None], (ROWS, WIDTH // 16, 16)).reshape(ROWS, WIDTH)
    magnitude = tl.abs(tl.div_rn(x.to(tl.float32), scale))
    below = (magnitude > 0.25).to(tl.int32) + (magnitude > 0.75).to(tl.int32) + (magnitude > 1.25).to(tl.int32)
    below += (magnitude > 1.75).to(tl.int32) + (magnitude > 2.5).to(tl.int32) + (magnitude > 3.5).to(tl.int32)
    below += (magnitude > 5.0).to(tl.int32)
    # An exact midpoint rounds to the even code: an odd code moves up by one.
    middle = (magnitude == 0.75) | (magnitude == 1.75) | (magnitude == 3.5)
    code = below + middle.to(tl.int32) + tl.where((x < 0) & (scale < float("inf")), 8, 0)
    low, high = tl.split(code.reshape(ROWS, WIDTH // 2, 2))
    pair = first // 2 + tl.arange(0, WIDTH // 2)
    inside = (r < rows)[:, None] & (pair < columns // 2)[None, :]
    tl.store(out_ptr + at * (columns // 2) + pair[None, :], (low | (high << 4)).to(tl.uint8), mask=inside)


def quantize_nvfp4(x: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`formats.quantize_nvfp4` with a given global scale.

    Args:
        x: (rows, columns), contiguous, columns a multiple of 16.
        global_scale: float32 (1,).

    Returns:
        Packed codes uint8 (rows, columns / 2), block scales e4m3 (rows, columns / 16), and `global_scale`.
    """
    rows, columns = x.shape
    amax = torch.linalg.vector_norm(x.view(rows, -1, GROUP), float("inf"), dim=-1).float()
    block_scale = nvfp4_scales(amax, global_scale)
    packed = torch.empty((rows, columns // 2), dtype=torch.uint8, device=x.device)
    height, width = (16, 256)
    _pack[(triton.cdiv(rows, height), triton.cdiv(columns, width))](
        x, block_scale.float() * global_scale, packed, rows, columns, ROWS=height, WIDTH=width, num_warps=4
    )
    return packed, block_scale, global_scale


assert GROUP == 16  # `_pack` assumes it
