"""Triton kernels of one pass over a row. A program reads the row once, holds it in registers and stores the result. For
a quantized layer the result is rounded to 8 bits.

All arithmetic is float32. Stock code rounds every intermediate result to its own type; these kernels round only the
residual stream, which is an output. Only operators on a GPU import this module: it needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from ..operands import row_contiguous
from ..rounding import store_rounded, symmetric_scale

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _vector(pointer, c, inside):
    return tl.load(pointer + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _summed(pointer, other, c, inside, COUNT: tl.constexpr):
    """One vector, or the sum of two."""
    x = _vector(pointer, c, inside)
    if COUNT == 2:
        x += _vector(other, c, inside)
    return x


@on_its_device
@triton.jit(do_not_specialize=["length"])
def _residual_norm(
    x_ptr, y_ptr, sum_ptr, weight_ptr, bias_ptr, gate_ptr, gate2_ptr, factor_ptr, factor2_ptr, shift_ptr, shift2_ptr,
    out_ptr, scale_ptr,
    sx_b, sx_s, sy_b, sy_s, sg_b, sg_s, sg2_b, sf_b, sf_s, sf2_b, sh_b, sh_s, sh2_b, length, columns, eps,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr,
    PLUS_ONE: tl.constexpr, SHIFT: tl.constexpr, RMS: tl.constexpr, ROUND: tl.constexpr, INT8: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (row, batch). GATE, FACTOR, SHIFT: the number of vectors, 0 to 2, whose sum each of them is."""
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, WIDTH)
    inside = c < columns
    at = (b * length + row) * columns + c
    x = _vector(x_ptr + b * sx_b + row * sx_s, c, inside)
    # All loads come before the first reduction, which waits for all threads.
    if FACTOR:
        factor = _summed(factor_ptr + b * sf_b + row * sf_s, factor2_ptr + b * sf2_b, c, inside, FACTOR)
    if SHIFT:
        shift = _summed(shift_ptr + b * sh_b + row * sh_s, shift2_ptr + b * sh2_b, c, inside, SHIFT)
    if RESIDUAL:
        y = _vector(y_ptr + b * sy_b + row * sy_s, c, inside)
        if GATE:
            y *= _summed(gate_ptr + b * sg_b + row * sg_s, gate2_ptr + b * sg2_b, c, inside, GATE)
        total = (x + y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    if not RMS:
        x = tl.where(inside, x - tl.sum(x, 0) / columns, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / columns + eps)
    if WEIGHT:
        x *= _vector(weight_ptr, c, inside)
    if BIAS:
        x += _vector(bias_ptr, c, inside)
    if FACTOR:
        x *= 1.0 + factor if PLUS_ONE else factor
    if SHIFT:
        x += shift
    if ROUND:
        scale = symmetric_scale(tl.max(tl.abs(x), 0), 127.0 if INT8 else 448.0)
        store_rounded(out_ptr + at, x * (1.0 / scale), inside, INT8)
        tl.store(scale_ptr + b * length + row, scale)
    else:
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    """tanh to 11 bits, in one instruction; the result is rounded to 8 bits next."""
    if _INTERPRETED:
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _activated(x, gate_ptr, c, inside, KIND: tl.constexpr):
    """An activation of `x`; a gated one multiplies it by the vector at `gate_ptr`."""
    if KIND == "gelu_tanh":
        x = 0.5 * x
        x += x * _tanh(x * (1.5957691216057308 + 0.2854192651 * x * x))
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "silu" or KIND == "swiglu":
        x = 0.5 * x
        x += x * _tanh(x)
        if KIND == "swiglu":
            x *= _vector(gate_ptr, c, inside)
    return x


@triton.jit
def _piece(x_ptr, gate_ptr, first, columns, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """A piece of a row with its activation; zero beyond the end of the row."""
    c = first + tl.arange(0, WIDTH)
    inside = c < columns
    return _activated(_vector(x_ptr, c, inside), gate_ptr, c, inside, KIND)


@triton.jit
def _store_piece(out_ptr, x, first, columns, INT8: tl.constexpr, WIDTH: tl.constexpr):
    c = first + tl.arange(0, WIDTH)
    store_rounded(out_ptr + c, x, c < columns, INT8)


@on_its_device
@triton.jit(do_not_specialize=["length"])
def _concat_quantize(
    a_ptr, ag_ptr, b_ptr, bg_ptr, out_ptr, scale_ptr,
    sa_b, sa_s, sag_b, sag_s, sb_b, sb_s, sbg_b, sbg_s, length, a_columns, b_columns,
    A: tl.constexpr, B: tl.constexpr, INT8: tl.constexpr,
    A1: tl.constexpr, A2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    """One or two tensors, each with its activation, concatenated along the columns and rounded together. Program (row,
    batch). Registers hold a tensor in up to two pieces whose widths are powers of two: 8960 columns as 8192 and 1024,
    not as 16384."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    a_ptr += batch * sa_b + row * sa_s
    ag_ptr += batch * sag_b + row * sag_s
    b_ptr += batch * sb_b + row * sb_s
    bg_ptr += batch * sbg_b + row * sbg_s
    a1 = _piece(a_ptr, ag_ptr, 0, a_columns, A, A1)
    amax = tl.max(tl.abs(a1), 0)
    if A2 > 0:
        a2 = _piece(a_ptr, ag_ptr, A1, a_columns, A, A2)
        amax = tl.maximum(amax, tl.max(tl.abs(a2), 0))
    if B1 > 0:
        b1 = _piece(b_ptr, bg_ptr, 0, b_columns, B, B1)
        amax = tl.maximum(amax, tl.max(tl.abs(b1), 0))
    if B2 > 0:
        b2 = _piece(b_ptr, bg_ptr, B1, b_columns, B, B2)
        amax = tl.maximum(amax, tl.max(tl.abs(b2), 0))
    scale = symmetric_scale(amax, 127.0 if INT8 else 448.0)
    tl.store(scale_ptr + batch * length + row, scale)
    each = 1.0 / scale
    out_ptr += (batch * length + row) * (a_columns + b_columns)
    _store_piece(out_ptr, a1 * each, 0, a_columns, INT8, A1)
    if A2 > 0:
        _store_piece(out_ptr, a2 * each, A1, a_columns, INT8, A2)
    if B1 > 0:
        _store_piece(out_ptr + a_columns, b1 * each, 0, b_columns, INT8, B1)
    if B2 > 0:
        _store_piece(out_ptr + a_columns, b2 * each, B1, b_columns, INT8, B2)


def _pieces(columns: int) -> tuple[int, int]:
    """Widths of two pieces that hold `columns` with little padding: powers of two, the second possibly 0."""
    if columns == 0:
        return 0, 0
    whole = triton.next_power_of_2(columns)
    rest = columns - whole // 2
    if whole <= 1024 or rest > whole // 4:
        return whole, 0
    return whole // 2, max(256, triton.next_power_of_2(rest))


def _row_strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Strides of batch and row, 0 for a dimension of size 1; zeros without a tensor."""
    if x is None:
        return 0, 0
    return (0 if x.shape[0] == 1 else x.stride(0)), (0 if x.shape[1] == 1 else x.stride(1))


def _warps(width: int) -> int:
    return 2 if width <= 2048 else 4 if width <= 4096 else 8 if width <= 16384 else 16


def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: list[torch.Tensor],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    factor: list[torch.Tensor],
    shift: list[torch.Tensor],
    eps: float,
    rms: bool,
    plus_one: bool,
    total: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    warps: int | None = None,
) -> None:
    """Writes the results of `operators.residual_norm`, whose arguments come first.

    Args:
        total: Receives the residual sum, contiguous; not written without `y`.
        out: Receives the result, contiguous: int8 or e4m3 to round it.
        scale: Receives the scales of the rows, float32 (rows, 1); not written without rounding.
        warps: Warps of a program; by default the number measured with `benchmarks/rows.py --tiles`.
    """
    x, y = row_contiguous(x), None if y is None else row_contiguous(y)
    batch, length, columns = x.shape
    width = triton.next_power_of_2(columns)
    vectors, strides = [], []
    for given in (gate, factor, shift):
        one, other = (*map(row_contiguous, given), None, None)[:2]
        vectors += [x if one is None else one, x if other is None else other]
        strides += [*_row_strides(one), _row_strides(other)[0]]
    optional = [x if item is None else item for item in (y, total, weight, bias)]
    _residual_norm[(length, batch)](
        x, *optional, *vectors, out, scale, x.stride(0), x.stride(1), *_row_strides(y), *strides, length, columns, eps,
        RESIDUAL=y is not None, GATE=len(gate), WEIGHT=weight is not None, BIAS=bias is not None, FACTOR=len(factor),
        PLUS_ONE=plus_one, SHIFT=len(shift), RMS=rms, ROUND=out.itemsize == 1, INT8=out.dtype == torch.int8,
        WIDTH=width, num_warps=warps or _warps(width),
    )  # fmt: skip


def concat_quantize(
    parts: list[torch.Tensor], gates: list[torch.Tensor | None], kinds: list[str], out: torch.Tensor,
    scale: torch.Tensor, warps: int | None = None,
) -> None:  # fmt: skip
    """Writes the results of `operators.concat_quantize`.

    Args:
        parts: One or two tensors, (batch, sequence, columns of the part).
        gates: For each part the factor of its `"swiglu"`, of the part's shape; `None` for other activations.
        kinds: For each part its activation: `""`, `"gelu_tanh"`, `"gelu"`, `"silu"` or `"swiglu"`.
        out: Receives the values, int8 or e4m3 (batch * sequence, columns).
        scale: Receives the scales, float32 (batch * sequence, 1).
        warps: Warps of a program; by default the number measured with `benchmarks/rows.py --tiles`.
    """
    parts = [row_contiguous(item) for item in parts]
    gates = [None if item is None else row_contiguous(item) for item in gates]
    batch, length, _ = parts[0].shape
    columns = [item.shape[2] for item in parts] + [0] * (2 - len(parts))
    (a1, a2), (b1, b2) = (_pieces(item) for item in columns)
    arguments, strides = [], []
    for place in (0, 1):
        part = parts[min(place, len(parts) - 1)]
        gate = gates[min(place, len(parts) - 1)]
        arguments += [part, part if gate is None else gate]
        strides += [*_row_strides(part), *_row_strides(gate)]
    _concat_quantize[(length, batch)](
        *arguments, out, scale, *strides, length, *columns, A=kinds[0], B=kinds[-1], INT8=out.dtype == torch.int8,
        A1=a1, A2=a2, B1=b1, B2=b2, num_warps=warps or _warps(a1 + a2 + b1 + b2),
    )  # fmt: skip
