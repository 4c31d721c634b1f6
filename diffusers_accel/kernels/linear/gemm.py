"""Triton kernels around GEMMs that torch lacks: an INT8 GEMM, dequantization of NVFP4 weights, and skinny GEMMs.

The INT8 GEMM applies the scales in its epilogue. The skinny GEMM (a few rows) streams the weight once and can copy a
precomputed output (`precomputed.py`) instead. Only loaders of linear records import this module: it needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from ..operands import tensor_descriptor
from ..rounding import to_e4m3
from .formats import GROUP
from .precomputed import PrecomputedOutputs


@on_its_device
@triton.jit(do_not_specialize=["rows"])
def _int8(
    x_desc, w_desc, out_desc, x_scale_ptr, w_scale_ptr, bias_ptr, rows, columns, depth,
    BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile). Tiles run down a band of BAND rows of tiles before the next column, so that both operands hit the
    L2 cache."""
    tile = tl.program_id(0)
    down, across = tl.cdiv(rows, M), tl.cdiv(columns, N)
    band = tile // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    i = band * BAND + (tile % (BAND * across)) % height
    j = (tile % (BAND * across)) // height
    acc = tl.zeros([M, N], tl.int32)
    for start in tl.range(0, depth, K, num_stages=STAGES):
        x = x_desc.load([i * M, start])
        w = w_desc.load([j * N, start])
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    r, c = i * M + tl.arange(0, M), j * N + tl.arange(0, N)
    x_scale = tl.load(x_scale_ptr + r, mask=r < rows, other=0.0)
    w_scale = tl.load(w_scale_ptr + c, mask=c < columns, other=0.0)
    out = acc.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if BIAS:
        out += tl.load(bias_ptr + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    out_desc.store([i * M, j * N], out.to(out_desc.dtype))


@dataclass(frozen=True)
class Tile:
    """Tiling of the INT8 GEMM.

    Attributes:
        rows, columns, depth: Sizes of a tile.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        band: Rows of tiles that share a column of tiles before the next column begins.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int = 8


# Measured by `benchmarks/linear.py --tiles`. Two programs of the first tiling fit on a multiprocessor, so that one
# multiplies while the other writes. The second needs less shared memory than Hopper has.
_HOPPER = Tile(128, 128, 128, 4, 3, band=4)
_SMALL = Tile(128, 128, 64, 8, 3)


def int8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(x * x_scale) @ (weight * weight_scale).T + bias, summed in int32 and scaled in float32.

    Args:
        x: int8 (rows, depth), depth a multiple of 16.
        x_scale: float32 (rows, 1).
        weight: int8 (columns, depth), columns a multiple of 16.
        weight_scale: float32 (columns, 1).
        bias: (columns,), or `None`.
        dtype: Dtype of the output.
        tile: The tiling; `None` takes the measured one for the GPU.

    Returns:
        (rows, columns) of `dtype`.
    """
    rows, depth = x.shape
    columns = weight.shape[0]
    out = torch.empty((rows, columns), dtype=dtype, device=x.device)
    if tile is None:
        tile = _HOPPER if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0) else _SMALL
    _int8[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        tensor_descriptor(x, [tile.rows, tile.depth]),
        tensor_descriptor(weight, [tile.columns, tile.depth]),
        tensor_descriptor(out, [tile.rows, tile.columns]),
        x_scale, weight_scale, weight_scale if bias is None else bias, rows, columns, depth,
        BIAS=bias is not None, M=tile.rows, N=tile.columns, K=tile.depth, BAND=tile.band, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@on_its_device
@triton.jit
def _dequantize_nvfp4(
    packed_ptr, scale_ptr, global_ptr, left_ptr, right_ptr, out_ptr, rows, columns,
    PER_ROW: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (rows, columns). PER_ROW: whether each row has a global scale. RANK: of the low-rank branch, or 0."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * WIDTH
    pair = first // 2 + tl.arange(0, WIDTH // 2)
    inside = (r < rows)[:, None] & (pair < columns // 2)[None, :]
    packed = tl.load(packed_ptr + r.to(tl.int64)[:, None] * (columns // 2) + pair[None, :], mask=inside, other=0)
    codes = tl.join(packed & 15, packed >> 4).reshape(ROWS, WIDTH).to(tl.int32)
    # Two exponent bits and one mantissa bit move to their places in a float32; 0 and 0.5 (subnormals) are separate.
    magnitude = codes & 7
    bits = ((magnitude >> 1) + 126 << 23) | ((magnitude & 1) << 22)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, bits.to(tl.float32, bitcast=True))
    value = tl.where(codes >= 8, -value, value)
    group = first // 16 + tl.arange(0, WIDTH // 16)
    inside = (r < rows)[:, None] & (group < columns // 16)[None, :]
    scale = tl.load(scale_ptr + r.to(tl.int64)[:, None] * (columns // 16) + group[None, :], mask=inside, other=0.0)
    if PER_ROW:
        scale = scale.to(tl.float32) * tl.load(global_ptr + r, mask=r < rows, other=0.0)[:, None]
    else:
        scale = scale.to(tl.float32) * tl.load(global_ptr)
    value = (value.reshape(ROWS, WIDTH // 16, 16) * scale[:, :, None]).reshape(ROWS, WIDTH)
    c = first + tl.arange(0, WIDTH)
    if RANK > 0:
        d = tl.arange(0, R)
        left = tl.load(
            left_ptr + r[:, None] * RANK + d[None, :], mask=(r < rows)[:, None] & (d < RANK)[None, :], other=0.0
        )
        right = tl.load(
            right_ptr + d.to(tl.int64)[:, None] * columns + c[None, :],
            mask=(d < RANK)[:, None] & (c < columns)[None, :],
            other=0.0,
        )
        value += tl.dot(left, right)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = out_ptr + r.to(tl.int64)[:, None] * columns + c[None, :]
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        tl.store(at, to_e4m3(value), mask=inside)
    else:
        tl.store(at, value.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize_nvfp4(
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    dtype: torch.dtype,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
) -> torch.Tensor:
    """`formats.dequantize_nvfp4` plus a low-rank branch, left @ right, rounded once to `dtype`.

    Args:
        packed: uint8 (rows, columns / 2): two e2m1 codes per byte.
        block_scale: e4m3 (rows, columns / 16).
        global_scale: float32 (1,) or (rows, 1). With `dtype` e4m3 it must bring the values into e4m3's range.
        dtype: Dtype of the output: float32, bf16, fp16 or e4m3.
        left: (rows, rank), of `dtype`; `None` without a branch.
        right: (rank, columns), of `dtype`; `None` without a branch.

    Returns:
        (rows, columns) of `dtype`.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    rank = 0 if left is None else left.shape[1]
    unused = global_scale  # a pointer that the kernel does not read
    height, width = (32, 128)
    _dequantize_nvfp4[(triton.cdiv(rows, height), triton.cdiv(columns, width))](
        packed, block_scale, global_scale, unused if left is None else left, unused if right is None else right, out,
        rows, columns, PER_ROW=global_scale.numel() > 1, RANK=rank, R=max(16, triton.next_power_of_2(rank)),
        ROWS=height, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return out


assert GROUP == 16  # `_dequantize_nvfp4` assumes it


@triton.jit
def _gemv(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, n, columns, depth,
    SILU: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Output features `n` of one row (a GEMV), float32."""
    total = tl.zeros([WIDTH, DEPTH], tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        x = tl.load(x_ptr + k, mask=k < depth, other=0.0).to(tl.float32)
        if SILU:
            x = x / (1.0 + tl.exp(-x))
        inside = (n < columns)[:, None] & (k < depth)[None, :]
        at = weight_ptr + n.to(tl.int64)[:, None] * depth + k[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32) * x[None, :]
    out = tl.sum(total, 1)
    if SCALE:
        out *= tl.load(scale_ptr + n, mask=n < columns, other=0.0)
    if BIAS:
        out += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)
    return out


@on_its_device
@triton.jit
def _skinny_gemm(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, stride, columns, depth,
    SILU: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (output features, row)."""
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    row = tl.program_id(1)
    out = _gemv(
        x_ptr + row * stride, weight_ptr, scale_ptr, bias_ptr, n, columns, depth, SILU, SCALE, BIAS, WIDTH, DEPTH
    )
    tl.store(out_ptr + row * columns + n, out.to(out_ptr.dtype.element_ty), mask=n < columns)


@on_its_device
@triton.jit
def _precomputed_gemm(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, step_ptr, rows_ptr, outputs_ptr, misses_ptr, stride, columns,
    depth, SCALE: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Program (output features, row). A row that equals the current step's input has its precomputed output copied; any
    other row is computed, and counted as a miss. WHOLE: a power of two that holds a row."""
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    row, rows = tl.program_id(1), tl.num_programs(1)
    x_ptr += row * stride
    step = tl.load(step_ptr)
    at = step.to(tl.int64) * rows + row
    missed = step < 0
    if step >= 0:
        k = tl.arange(0, WHOLE)
        x = tl.load(x_ptr + k, mask=k < depth, other=0.0)
        expected = tl.load(rows_ptr + at * depth + k, mask=k < depth, other=0.0)
        missed = tl.sum((x != expected).to(tl.int32), 0) > 0
    if missed:
        out = _gemv(x_ptr, weight_ptr, scale_ptr, bias_ptr, n, columns, depth, True, SCALE, BIAS, WIDTH, DEPTH)
        tl.store(out_ptr + row * columns + n, out.to(out_ptr.dtype.element_ty), mask=n < columns)
        tl.atomic_add(misses_ptr, 1, mask=(tl.program_id(0) == 0) & (row == 0))
    else:
        copied = tl.load(outputs_ptr + at * columns + n, mask=n < columns, other=0.0)
        tl.store(out_ptr + row * columns + n, copied, mask=n < columns)


def skinny_gemm(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    """The kernel of `skinny.skinny_linear`, which documents the arguments."""
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
    (rows, depth), columns = x.shape, weight.shape[0]
    out = x.new_empty((rows, columns))
    _skinny_gemm[(triton.cdiv(columns, 8), rows)](
        x, weight, x if scale is None else scale, x if bias is None else bias, out, x.stride(0), columns, depth,
        SILU=silu, SCALE=scale is not None, BIAS=bias is not None, WIDTH=8, DEPTH=1024, num_warps=8,
    )  # fmt: skip
    return out


def precomputed_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    precomputed: PrecomputedOutputs,
) -> torch.Tensor:
    """`skinny_gemm` with SiLU, or a copy of the precomputed output where `x` equals the input that it was made from.

    Args:
        x: (rows, in_features), the input before SiLU.
        weight: (out_features, in_features), in the dtype of `x`, e4m3 or int8.
        scale: float32 (out_features, 1) of an 8-bit weight; `None` for a weight in the dtype of `x`.
        bias: (out_features,), or `None`.
        precomputed: Outputs of this layer. A row that differs from the current step's counts as a miss.

    Returns:
        (rows, out_features), dtype of `x`.
    """
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
    (rows, depth), columns, inputs = x.shape, weight.shape[0], precomputed.inputs
    out = x.new_empty((rows, columns))
    _precomputed_gemm[(triton.cdiv(columns, 32), rows)](
        x, weight, x if scale is None else scale, x if bias is None else bias, out, inputs.step, inputs.rows,
        precomputed.outputs, inputs.misses, x.stride(0), columns, depth, SCALE=scale is not None, BIAS=bias is not None,
        WIDTH=32, DEPTH=256, WHOLE=triton.next_power_of_2(depth), num_warps=8,
    )  # fmt: skip
    return out
