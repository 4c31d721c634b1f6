"""Dynamic quantization of activations in one pass, in Triton: each row is read once and its maximum kept in registers.

`formats.py` defines the formats. The kernels multiply with the scale's reciprocal instead of dividing, so a value at a
midpoint may round to its other neighbour. Only loaders of linear records import this module: it needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from ..operands import row_contiguous
from ..rounding import store_rounded, symmetric_scale
from .formats import BLOCK


@on_its_device
@triton.jit(do_not_specialize=["rows"])
def _rows(
    x_ptr, out_ptr, scale_ptr, stride, rows, columns, INT8: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Program (rows)."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    x = tl.load(x_ptr + r[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = symmetric_scale(tl.max(tl.abs(x), 1), 127.0 if INT8 else 448.0)
    store_rounded(out_ptr + r[:, None] * columns + k[None, :], x * (1.0 / scale)[:, None], inside, INT8)
    tl.store(scale_ptr + r, scale, mask=r < rows)


@on_its_device
@triton.jit(do_not_specialize=["rows", "padded"])
def _groups(x_ptr, out_ptr, scale_ptr, stride, rows, columns, padded, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Program (rows, group of columns). Rows from `rows` to `padded` are stored as zeros."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    x = tl.load(x_ptr + r.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = symmetric_scale(tl.max(tl.abs(x), 1), 448.0)
    inside = (r < padded)[:, None] & (k < columns)[None, :]
    store_rounded(out_ptr + r.to(tl.int64)[:, None] * columns + k[None, :], x * (1.0 / scale)[:, None], inside, False)
    tl.store(scale_ptr + tl.program_id(1) * padded + r, scale, mask=r < padded)


@on_its_device
@triton.jit
def _amax(x_ptr, amax_ptr, stride, columns, WIDTH: tl.constexpr):
    """Program (row): its largest magnitude, float32."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * stride + k, mask=k < columns, other=0.0).to(tl.float32)
    tl.store(amax_ptr + row, tl.max(tl.abs(x)))


@on_its_device
@triton.jit
def _tensor(x_ptr, out_ptr, scale_ptr, stride, columns, WIDTH: tl.constexpr):
    """Program (row): quantized with a given scale."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    inside = k < columns
    x = tl.load(x_ptr + row * stride + k, mask=inside, other=0.0).to(tl.float32)
    store_rounded(out_ptr + row * columns + k, x * (1.0 / tl.load(scale_ptr)), inside, False)


def _warps(width: int) -> int:
    return 4 if width <= 8192 else 8


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, launch: tuple[int, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`formats.quantize_rows` in one kernel.

    Args:
        x: (rows, columns), bf16, fp16 or float32, with any stride between rows.
        dtype: Dtype of the values: e4m3 or int8.
        launch: Rows and warps of a program; `None` takes the measured ones (`benchmarks/linear.py --tiles`).

    Returns:
        Values of `dtype`, (rows, columns), and scales, float32 (rows, 1).
    """
    x = row_contiguous(x)
    rows, columns = x.shape
    values = torch.empty((rows, columns), dtype=dtype, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(columns)
    rows_each, warps = launch or (1, _warps(width))
    _rows[(triton.cdiv(rows, rows_each),)](
        x,
        values,
        scale,
        x.stride(0),
        rows,
        columns,
        INT8=dtype == torch.int8,
        ROWS=rows_each,
        WIDTH=width,
        num_warps=warps,
    )
    return values, scale


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`formats.quantize_groups` in one kernel, in the layout that cuBLASLt reads.

    Args:
        x: (rows, columns), bf16, fp16 or float32, with any stride between rows.

    Returns:
        e4m3 values (rows padded with zeros to a multiple of 4, columns), and scales, float32 (padded rows,
        columns / 128) in column-major order.
    """
    x = row_contiguous(x)
    rows, columns = x.shape
    groups, padded = triton.cdiv(columns, BLOCK), triton.cdiv(rows, 4) * 4
    values = torch.empty((padded, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((groups, padded), dtype=torch.float32, device=x.device)
    _groups[(triton.cdiv(rows, 32), groups)](
        x, values, scale, x.stride(0), rows, columns, padded, ROWS=32, WIDTH=BLOCK, num_warps=4
    )
    return values, scale.t()


def quantize_tensor(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`formats.quantize_tensor` in one kernel, or two where the scale is computed.

    Args:
        x: (rows, columns), bf16, fp16 or float32, with any stride between rows.
        scale: float32 (1,): a calibrated scale; `None` computes it from `x`.

    Returns:
        e4m3 values (rows, columns), and the scale, float32 (1,).
    """
    x = row_contiguous(x)
    rows, columns = x.shape
    width = triton.next_power_of_2(columns)
    if scale is None:
        row_amax = torch.empty(rows, dtype=torch.float32, device=x.device)
        _amax[(rows,)](x, row_amax, x.stride(0), columns, WIDTH=width, num_warps=_warps(width))
        scale = row_amax.amax().div_(448.0).reshape(1)
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    values = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    _tensor[(rows,)](x, values, scale, x.stride(0), columns, WIDTH=width, num_warps=_warps(width))
    return values, scale
