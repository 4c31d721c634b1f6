"""Fused quantization of Q, K and V in Triton: each element is read at most twice, and the inputs stay as they are.

The first launch reduces over the sequence. Per channel it computes the sum of K (for the mean) and the largest |V|; for
scales per head, the largest values of Q, K and V. Each program writes a partial result, so the order of additions is
the same in every run. The last launch rounds, and writes the layout that the attention kernel reads: Q and K as (batch,
heads, sequence, head_dim), V transposed. Both launches apply QK-norm and rotary embedding as they read (`rows.py`).

Only the loaders of kernel records import this module: it needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from ..operands import row_contiguous
from ..rounding import store_rounded
from .norm import norm_arguments, padded_dim, strides_of
from .qk_norm_rope import table_strides
from .recipe import Recipe, hadamard_levels
from .record import Inputs, Rotary
from .rows import (
    bounded_scale,
    dot_vector,
    hadamard,
    hadamard_gain,
    load_head,
    load_heads,
    load_rows,
    load_vector_quarters,
    quarters_abs_max,
    scale_from_amax,
    store_heads,
    subtract_vector,
)

LOG2E = 1.4426950408889634
# Measured on an H200 with `benchmarks/attention.py --tiles`. Partial results per head of the first launch; rows, warps
# and stages of its programs; rows and warps of the programs that round; rows, tiles and warps of `_round_per_head`.
_SPLITS = 16
_REDUCE_ROWS, _REDUCE_WARPS, _REDUCE_STAGES = 32, 2, 3
_ROWS, _ROUND_WARPS = 128, 4
# With a norm, the keys' mean is taken over the first 1 / `_KEY_SAMPLE` of each split: scales then need no keys' values.
_KEY_SAMPLE = 4
_HEAD_ROWS, _HEAD_TILES, _HEAD_WARPS = 32, 16, 4


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len"])
def _reduce(
    q_ptr, k_ptr, v_ptr, kn_ptr, k_rstd_ptr, cos_ptr, sin_ptr, qa_ptr, ks_ptr, ka_ptr, vs_ptr, va_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sv_b, sv_s, sv_h, st_b, st_s, st_h,
    q_len, k_len, heads, kv_heads, eps,
    PER_HEAD: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, FIRST: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Partial sums and largest magnitudes. Program (split, batch x head, which): which = 0 is K, 1 is V, 2 is Q. Of K
    the first SAMPLE-th of each split is read."""
    split, index, which = tl.program_id(0), tl.program_id(1), tl.program_id(2) + FIRST
    r, d = tl.arange(0, ROWS), tl.arange(0, DP)
    part = tl.cdiv(tl.cdiv(q_len if which == 2 else k_len, SPLITS), ROWS) * ROWS
    first = split * part
    out = (index * SPLITS + split) * DP
    # Accumulated element by element over the tiles; their rows are reduced once, at the end.
    if which == 2:
        if PER_HEAD:
            base = q_ptr + (index // heads).to(tl.int64) * sq_b + (index % heads) * sq_h
            high = tl.zeros([ROWS, DP], tl.float32)
            for start in tl.range(first, tl.minimum(first + part, q_len), ROWS, num_stages=STAGES):
                inside = (start + r < q_len)[:, None] & (d < D)[None, :]
                high = tl.maximum(high, tl.abs(load_rows(base, sq_s, start + r, inside, DP, True)))
            # A rotation enlarges a channel by sqrt(2) at most. A bound serves e4m3 as well as the maximum.
            tl.store(qa_ptr + index * SPLITS + split, tl.max(high) * (1.0 if ROPE == "" else 1.4142136))
    elif index < tl.num_programs(1) // heads * kv_heads:
        b, h = (index // kv_heads).to(tl.int64), index % kv_heads
        last = tl.minimum(first + part, k_len)
        if which == 0:
            last = tl.minimum(first + tl.cdiv(part, SAMPLE * ROWS) * ROWS, k_len)
            base, table_at = k_ptr + b * sk_b + h * sk_h, b * st_b + h * st_h
            weight = kn_ptr + (h * D if NORM == "all" else 0)
            total = tl.zeros([ROWS, DP], tl.float32)
            high = tl.zeros([ROWS, DP], tl.float32)
            for start in tl.range(first, last, ROWS, num_stages=STAGES):
                x = load_head(
                    base, sk_s, start + r, k_len, weight, k_rstd_ptr + b * k_len, eps, cos_ptr + table_at,
                    sin_ptr + table_at, st_s, NORM, ROPE, D, DP,
                )  # fmt: skip
                total += x
                if PER_HEAD and NORM == "":
                    high = tl.maximum(high, tl.abs(x))
            tl.store(ks_ptr + out + d, tl.sum(total, 0))
            if PER_HEAD and NORM == "":
                tl.store(ka_ptr + index * SPLITS + split, tl.max(high))
        else:
            base = v_ptr + b * sv_b + h * sv_h
            total = tl.zeros([ROWS, DP], tl.float32)
            high = tl.zeros([ROWS, DP], tl.float32)
            for start in tl.range(first, last, ROWS, num_stages=STAGES):
                inside = (start + r < k_len)[:, None] & (d < D)[None, :]
                x = load_rows(base, sv_s, start + r, inside, DP, True)
                high = tl.maximum(high, tl.abs(x))
                if PER_HEAD:
                    total += x
            if PER_HEAD:
                tl.store(vs_ptr + out + d, tl.sum(total, 0))
                tl.store(va_ptr + index * SPLITS + split, tl.max(high))
            else:
                tl.store(va_ptr + out + d, tl.max(high, 0))


@triton.jit
def _mean(ks_ptr, index, count, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """The mean of the `count` sampled keys of one head, as four quarters."""
    Q: tl.constexpr = D // 4
    w = tl.arange(0, DP // 4)
    at = ks_ptr + (index * SPLITS + tl.arange(0, SPLITS))[:, None] * DP + w[None, :]
    inside = (w < Q)[None, :]
    return (
        tl.sum(tl.load(at, mask=inside, other=0.0), 0) / count,
        tl.sum(tl.load(at + Q, mask=inside, other=0.0), 0) / count,
        tl.sum(tl.load(at + 2 * Q, mask=inside, other=0.0), 0) / count,
        tl.sum(tl.load(at + 3 * Q, mask=inside, other=0.0), 0) / count,
    )


@on_its_device
@triton.jit(do_not_specialize=["k_len"])
def _combine(
    ks_ptr, va_ptr, mean_ptr, vscale_ptr, k_len, MEAN: tl.constexpr, VALUES: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The mean of K and the scale of V, per channel. Program (batch x key head)."""
    index = tl.program_id(0)
    d = tl.arange(0, DP)
    parts = (index * SPLITS + tl.arange(0, SPLITS))[:, None] * DP + d[None, :]
    if MEAN:
        tl.store(mean_ptr + index * DP + d, tl.sum(tl.load(ks_ptr + parts), 0) / k_len)
    if VALUES:
        v_max = tl.max(tl.load(va_ptr + parts), 0)
        tl.store(vscale_ptr + index * D + d, bounded_scale(scale_from_amax(v_max, 448.0)), mask=d < D)


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len"])
def _round(
    q_ptr, k_ptr, v_ptr, qn_ptr, kn_ptr, q_rstd_ptr, k_rstd_ptr, qcos_ptr, qsin_ptr, kcos_ptr, ksin_ptr, mean_ptr,
    qo_ptr, ko_ptr, vo_ptr, qscale_ptr, kscale_ptr, vscale_ptr, correction_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sv_b, sv_s, sv_h, sqt_b, sqt_s, sqt_h, skt_b, skt_s, skt_h,
    q_len, k_len, heads, kv_heads, eps, softmax_scale_log2, logit_scale,
    NORM: tl.constexpr, ROPE: tl.constexpr, LEVELS: tl.constexpr, INT8: tl.constexpr, KB: tl.constexpr,
    CORRECT_LSE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Rounds Q, K and V by a recipe. Program (rows, batch x head, which): which = 0 is V, 1 is K, 2 is Q. The tensor
    that the first launch read last comes first, while it may still lie in the L2 cache."""
    block, index, which = tl.program_id(0), tl.program_id(1), tl.program_id(2) + FIRST
    rows = block * ROWS + tl.arange(0, ROWS)
    W: tl.constexpr = DP // 4
    LARGEST: tl.constexpr = 127.0 if INT8 else 448.0
    GAIN: tl.constexpr = hadamard_gain(LEVELS)
    if which == 2:
        if block * ROWS < q_len:
            b, h = (index // heads).to(tl.int64), index % heads
            base, table_at = q_ptr + b * sq_b + h * sq_h, b * sqt_b + h * sqt_h
            weight = qn_ptr + (h * D if NORM == "all" else 0)
            x, inside = load_heads(
                base, sq_s, rows, q_len, weight, q_rstd_ptr + b * q_len, eps, qcos_ptr + table_at,
                qsin_ptr + table_at, sqt_s, NORM, ROPE, D, W,
            )  # fmt: skip
            at = index.to(tl.int64) * q_len + rows
            if CORRECT_LSE:
                mean = load_vector_quarters(mean_ptr + (b * kv_heads + h // (heads // kv_heads)) * DP, D, W)
                tl.store(correction_ptr + at, dot_vector(x, mean) * logit_scale, mask=rows < q_len)
            x = hadamard(x, LEVELS)
            scale = scale_from_amax(tl.max(quarters_abs_max(x), 1), LARGEST)
            store_heads(qo_ptr + at * D, x, (1.0 / scale)[:, None], inside, INT8, D // 4, W)
            tl.store(qscale_ptr + at, bounded_scale(scale) * (softmax_scale_log2 / GAIN), mask=rows < q_len)
    elif index < tl.num_programs(1) // heads * kv_heads:
        b, h = (index // kv_heads).to(tl.int64), index % kv_heads
        if which == 1:
            if block * ROWS < k_len:
                base, table_at = k_ptr + b * sk_b + h * sk_h, b * skt_b + h * skt_h
                weight = kn_ptr + (h * D if NORM == "all" else 0)
                x, inside = load_heads(
                    base, sk_s, rows, k_len, weight, k_rstd_ptr + b * k_len, eps, kcos_ptr + table_at,
                    ksin_ptr + table_at, skt_s, NORM, ROPE, D, W,
                )  # fmt: skip
                x = hadamard(subtract_vector(x, load_vector_quarters(mean_ptr + index * DP, D, W), inside), LEVELS)
                scale = scale_from_amax(tl.max(tl.max(quarters_abs_max(x), 1).reshape(ROWS // KB, KB), 1), LARGEST)
                each = tl.broadcast_to((1.0 / scale)[:, None], (ROWS // KB, KB)).reshape(ROWS)
                at = index.to(tl.int64) * k_len + rows
                store_heads(ko_ptr + at * D, x, each[:, None], inside, INT8, D // 4, W)
                blocks = tl.cdiv(k_len, KB)
                group = block * (ROWS // KB) + tl.arange(0, ROWS // KB)
                tl.store(kscale_ptr + index * blocks + group, bounded_scale(scale) * (1.0 / GAIN), mask=group < blocks)
        else:
            v_len = tl.cdiv(k_len, ROWS) * ROWS
            if block * ROWS < v_len:
                # Position 16g + 4a + 2b + c of the transposed V holds key 16g + 8b + 2a + c (see low_bit.py).
                d = tl.arange(0, DP)
                r = rows % 16
                keys = rows - r + 8 * ((r // 2) % 2) + 2 * (r // 4) + r % 2
                inside = (keys < k_len)[:, None] & (d < D)[None, :]
                x = load_rows(v_ptr + b * sv_b + h * sv_h, sv_s, keys, inside, DP, False)
                scale = tl.load(vscale_ptr + index * D + d, mask=d < D, other=1.0)
                x = tl.trans(x * (1.0 / scale)[None, :])
                to = vo_ptr + index.to(tl.int64) * D * v_len + d.to(tl.int64)[:, None] * v_len + rows[None, :]
                store_rounded(to, x, (d < D)[:, None] & (rows < v_len)[None, :], False)


@triton.jit
def _largest_part(part_ptr, index, SPLITS: tl.constexpr):
    return tl.max(tl.load(part_ptr + index * SPLITS + tl.arange(0, SPLITS)))


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len", "k_sampled"])
def _round_per_head(
    q_ptr, k_ptr, v_ptr, qn_ptr, kn_ptr, q_rstd_ptr, k_rstd_ptr, qcos_ptr, qsin_ptr, kcos_ptr, ksin_ptr, qa_ptr, ks_ptr,
    ka_ptr, vs_ptr, va_ptr, qo_ptr, ko_ptr, vo_ptr, qscale_ptr, kscale_ptr, vscale_ptr, vmean_ptr, correction_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sv_b, sv_s, sv_h, sqt_b, sqt_s, sqt_h, skt_b, skt_s, skt_h,
    q_len, k_len, k_sampled, heads, kv_heads, norm_channels, eps, logit_scale,
    NORM: tl.constexpr, ROPE: tl.constexpr, LEVELS: tl.constexpr, CORRECT_LSE: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Rounds to e4m3 with one scale per key head, to (batch, sequence, heads, head_dim). Program (tiles of rows, batch
    x head, which): which = 0 is Q, 1 is V, 2 is K. A program takes several tiles and computes means and scales once for
    all of them. `norm_channels`: number of channels that the norm is over."""
    block, index, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    W: tl.constexpr = DP // 4
    # The largest value after subtraction and Hadamard transform is bounded, not measured. e4m3 has exponents to spare,
    # so the bound costs no accuracy, and saves a pass.
    GAIN: tl.constexpr = hadamard_gain(LEVELS)
    first = block * ROWS * TILES
    if which == 0:
        if first < q_len:
            b, h = (index // heads).to(tl.int64), index % heads
            kv = b * kv_heads + h // G
            base, table_at = q_ptr + b * sq_b + h * sq_h, b * sqt_b + h * sqt_h
            weight = qn_ptr + (h * D if NORM == "all" else 0)
            if NORM != "":
                # This bounds the length of a normed row; neither rotation nor transform changes a length.
                amax = tl.max(quarters_abs_max(load_vector_quarters(weight, D, W))) * tl.sqrt(norm_channels * 1.0)
            else:
                amax = 0.0
                for member in tl.static_range(G):
                    amax = tl.maximum(amax, _largest_part(qa_ptr, kv * G + member, SPLITS))
                amax *= GAIN
            scale = bounded_scale(scale_from_amax(amax, 448.0))
            if CORRECT_LSE:
                mean = _mean(ks_ptr, kv, k_sampled, D, DP, SPLITS)
            for tile in range(TILES):
                rows = first + tile * ROWS + tl.arange(0, ROWS)
                x, inside = load_heads(
                    base, sq_s, rows, q_len, weight, q_rstd_ptr + b * q_len, eps, qcos_ptr + table_at,
                    qsin_ptr + table_at, sqt_s, NORM, ROPE, D, W,
                )  # fmt: skip
                if CORRECT_LSE:
                    correction = dot_vector(x, mean) * logit_scale
                    tl.store(correction_ptr + index.to(tl.int64) * q_len + rows, correction, mask=rows < q_len)
                x = hadamard(x, LEVELS)
                at = (b * q_len + rows) * heads + h
                store_heads(qo_ptr + at * D, x, 1.0 / (scale * GAIN), inside, False, D // 4, W)
            if block == 0:
                tl.store(qscale_ptr + kv, scale)
    elif index < tl.num_programs(1) // heads * kv_heads and first < k_len:
        b, h = (index // kv_heads).to(tl.int64), index % kv_heads
        if which == 2:
            base, table_at = k_ptr + b * sk_b + h * sk_h, b * skt_b + h * skt_h
            mean = _mean(ks_ptr, index, k_sampled, D, DP, SPLITS)
            weight = kn_ptr + (h * D if NORM == "all" else 0)
            if NORM != "":
                # The bound of a normed row, plus the length of the mean that is subtracted.
                size = tl.sum(mean[0] * mean[0] + mean[1] * mean[1] + mean[2] * mean[2] + mean[3] * mean[3], 0)
                amax = tl.max(quarters_abs_max(load_vector_quarters(weight, D, W))) * tl.sqrt(
                    norm_channels * 1.0
                ) + tl.sqrt(size)
            else:
                amax = (_largest_part(ka_ptr, index, SPLITS) + tl.max(quarters_abs_max(mean))) * GAIN
            scale = bounded_scale(scale_from_amax(amax, 448.0))
            for tile in range(TILES):
                rows = first + tile * ROWS + tl.arange(0, ROWS)
                x, inside = load_heads(
                    base, sk_s, rows, k_len, weight, k_rstd_ptr + b * k_len, eps, kcos_ptr + table_at,
                    ksin_ptr + table_at, skt_s, NORM, ROPE, D, W,
                )  # fmt: skip
                x = hadamard(subtract_vector(x, mean, inside), LEVELS)
                at = (b * k_len + rows) * kv_heads + h
                store_heads(ko_ptr + at * D, x, 1.0 / (scale * GAIN), inside, False, D // 4, W)
            if block == 0:
                tl.store(kscale_ptr + index, scale)
        else:
            d = tl.arange(0, DP)
            amax = tl.maximum(_largest_part(va_ptr, index, SPLITS), 1e-30)
            parts = (index * SPLITS + tl.arange(0, SPLITS))[:, None] * DP + d[None, :]
            v_mean = tl.sum(tl.load(vs_ptr + parts), 0) / k_len
            # The mean is rounded to a multiple of a power of two well above the steps of 16-bit values. Values at
            # midpoints of e4m3 stay at midpoints, where rounding to even has no drift.
            step = tl.exp2(tl.ceil(tl.log2(amax)) - 9.0)
            v_mean = tl.floor(v_mean / step + 0.5) * step
            scale = bounded_scale(scale_from_amax(amax + tl.max(tl.abs(v_mean)), 448.0))
            base = v_ptr + b * sv_b + h * sv_h
            for tile in range(TILES):
                rows = first + tile * ROWS + tl.arange(0, ROWS)
                inside = (rows < k_len)[:, None] & (d < D)[None, :]
                x = load_rows(base, sv_s, rows, inside, DP, False) - v_mean[None, :]
                at = (b * k_len + rows) * kv_heads + h
                store_rounded(vo_ptr + at[:, None] * D + d[None, :], x * (1.0 / scale), inside, False)
            if block == 0:
                tl.store(vscale_ptr + index, scale)
                tl.store(vmean_ptr + index * D + d, v_mean, mask=d < D)


@on_its_device
@triton.jit(do_not_specialize=["rows"])
def _add(out_ptr, mean_ptr, rows, columns, D: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Adds a vector per head to rows. Program (rows, columns, batch)."""
    b = tl.program_id(2).to(tl.int64)
    r, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = out_ptr + (b * rows + r)[:, None] * columns + c[None, :]
    mean = tl.load(mean_ptr + b * (columns // G) + c // (D * G) * D + c % D, mask=c < columns, other=0.0)
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32) + mean[None, :]
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask=inside)


def add_mean(out: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Adds the subtracted mean of the values to the output of attention.

    Args:
        out: (batch, sequence, heads, head_dim). A contiguous tensor is changed in place.
        mean: float32 (batch, kv_heads, head_dim).

    Returns:
        The sum, contiguous.
    """
    batch, rows, heads, dim = out.shape
    out, columns = out.contiguous(), heads * dim
    _add[(triton.cdiv(rows, 16), triton.cdiv(columns, 512), batch)](
        out, mean, rows, columns, D=dim, G=heads // mean.shape[1], ROWS=16, WIDTH=512, num_warps=4
    )
    return out


@dataclass
class Quantized:
    """Rounded operands and their scales, in the layout of an attention kernel.

    Attributes:
        query: (batch, heads, sequence, head_dim) for a recipe; (batch, sequence, heads, head_dim) for scales per head.
        key: (batch, kv_heads, key sequence, head_dim) for a recipe; (batch, key sequence, kv_heads, head_dim) for
            scales per head.
        value: Rounded by a recipe: (batch, kv_heads, head_dim, key sequence padded to 128 with zeros), keys permuted
            within every 16. With scales per head: (batch, key sequence, kv_heads, head_dim). Not rounded: a view of the
            input, (batch, kv_heads, key sequence, head_dim).
        query_scale: float32 (batch, heads, sequence), with the softmax scale and log2(e) included, for a recipe;
            float32 (batch, kv_heads) for scales per head.
        key_scale: float32 (batch, kv_heads, blocks of keys) for a recipe; float32 (batch, kv_heads) for scales per
            head.
        value_scale: float32 (batch, kv_heads, head_dim) for a recipe; float32 (batch, kv_heads) for scales per head.
        lse_correction: float32 (batch, heads, sequence), the amount that K's subtracted mean took from every logit of a
            row, to be added to the LSE. `None` if no LSE is wanted.
        value_mean: float32 (batch, kv_heads, head_dim), subtracted from the value before rounding, to be added to the
            output. `None` for a recipe.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_scale: torch.Tensor
    key_scale: torch.Tensor
    value_scale: torch.Tensor
    lse_correction: torch.Tensor | None
    value_mean: torch.Tensor | None = None


def quantize(x: Inputs, recipe: Recipe) -> Quantized:
    """Rounds the operands of one attention call by a recipe.

    Args:
        x: The call. Query, key and value are bf16, fp16 or float32 with any strides; a mask plays no part. `norm` and
            `rotary` are applied to query and key in this order, and `return_lse` asks for `Quantized.lse_correction`.
        recipe: The types and scales of the rounding.
    """
    query, key, value = row_contiguous(x.query), row_contiguous(x.key), row_contiguous(x.value)
    (batch, q_len, heads, dim), (_, k_len, kv_heads, _) = query.shape, key.shape
    device, padded = query.device, padded_dim(dim)
    low, values = recipe.qk is not None, recipe.pv is not None
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    unused = new(1)
    norms, (tables, t_strides) = norm_arguments(x.norm, query, key, unused), _tables(x.rotary, unused)
    k_sum = new(batch, kv_heads, _SPLITS, padded) if low else unused
    v_max = new(batch, kv_heads, _SPLITS, padded) if values else unused
    strides = (*strides_of(query), *strides_of(key), *strides_of(value))
    shape = {"D": dim, "DP": padded}
    first = {"NORM": norms.kind, "ROPE": _rope(x.rotary)}
    mean = new(batch, kv_heads, padded) if low else unused
    v_scale = new(batch, kv_heads, dim) if values else unused
    if low or values:
        _reduce[(_SPLITS, batch * heads, low + values)](
            query, key, value, norms.weights[1], norms.rstd[1], *tables[2:], unused, k_sum, unused, unused,
            v_max, *strides, *t_strides[3:],
            q_len, k_len, heads, kv_heads, norms.eps, PER_HEAD=False, ROWS=_REDUCE_ROWS, SPLITS=_SPLITS, SAMPLE=1,
            FIRST=0 if low else 1, STAGES=_REDUCE_STAGES, num_warps=_REDUCE_WARPS, **first, **shape,
        )  # fmt: skip
        _combine[(batch * kv_heads,)](
            k_sum, v_max, mean, v_scale, k_len, MEAN=low, VALUES=values, SPLITS=_SPLITS, **shape,
        )  # fmt: skip
    v_len = triton.cdiv(k_len, _ROWS) * _ROWS
    kind = torch.int8 if recipe.qk == "int8" else torch.float8_e4m3fn
    q = new(batch, heads, q_len, dim, dtype=kind) if low else query.transpose(1, 2)
    k = new(batch, kv_heads, k_len, dim, dtype=kind) if low else key.transpose(1, 2)
    v = new(batch, kv_heads, dim, v_len, dtype=torch.float8_e4m3fn) if values else value.transpose(1, 2)
    q_scale = new(batch, heads, q_len) if low else unused
    k_scale = new(batch, kv_heads, triton.cdiv(k_len, recipe.k_block)) if low else unused
    lse_correction = new(batch, heads, q_len) if x.return_lse and low else None
    if not (low or values):
        return Quantized(q, k, v, q_scale, k_scale, v_scale, None)
    _round[(triton.cdiv(max(q_len if low else 0, v_len), _ROWS), batch * heads, 2 * low + values)](
        query, key, value, *norms.weights, *norms.rstd, *tables, mean, q, k, v, q_scale, k_scale, v_scale,
        unused if lse_correction is None else lse_correction, *strides, *t_strides, q_len, k_len, heads, kv_heads,
        norms.eps, x.softmax_scale * LOG2E, x.softmax_scale, LEVELS=hadamard_levels(dim), INT8=recipe.qk == "int8",
        KB=recipe.k_block or _ROWS, CORRECT_LSE=lse_correction is not None, ROWS=_ROWS, FIRST=0 if values else 1,
        num_warps=_ROUND_WARPS,
        **first, **shape,
    )  # fmt: skip
    return Quantized(q, k, v, q_scale, k_scale, v_scale, lse_correction)


def _sampled(length: int, sample: int) -> int:
    """The number of keys that the first launch reads for their mean."""
    part = triton.cdiv(triton.cdiv(length, _SPLITS), _REDUCE_ROWS) * _REDUCE_ROWS
    each = triton.cdiv(part, sample * _REDUCE_ROWS) * _REDUCE_ROWS
    return sum(max(0, min(each, length - split * part)) for split in range(_SPLITS))


def _tables(rotary: Rotary | None, unused: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Cosines and sines of the query, then of the key; and their strides of batch, sequence and heads."""
    if rotary is None:
        return [unused] * 4, [0] * 6
    return [*rotary.query, *rotary.key], [*table_strides(rotary.query[0]), *table_strides(rotary.key[0])]


def _rope(rotary: Rotary | None) -> str:
    return "" if rotary is None else rotary.rope_style


def quantize_per_head(x: Inputs) -> Quantized:
    """Rounds to e4m3 with one scale per key head, as FlashAttention 3 reads it.

    The mean of the values is subtracted too, channel by channel. The weights of a row sum to one, so the output lacks
    exactly that mean. With the mean, FlashAttention 3 is inaccurate: Hopper's matrix units add e4m3 products with about
    14 bits and truncate. The larger the sum, the larger the share that it loses (`benchmarks/check_gpu.py`).

    Args:
        x: The call. Query, key and value are bf16, fp16 or float32 with any strides; a mask plays no part. `norm` and
            `rotary` are applied to query and key in this order, and `return_lse` asks for `Quantized.lse_correction`.
    """
    query, key, value = row_contiguous(x.query), row_contiguous(x.key), row_contiguous(x.value)
    (batch, q_len, heads, dim), (_, k_len, kv_heads, _) = query.shape, key.shape
    device, padded = query.device, padded_dim(dim)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    q_max, k_max, v_max = new(batch, heads, _SPLITS), new(batch, kv_heads, _SPLITS), new(batch, kv_heads, _SPLITS)
    k_sum, v_sum = new(batch, kv_heads, _SPLITS, padded), new(batch, kv_heads, _SPLITS, padded)
    norms, (tables, t_strides) = norm_arguments(x.norm, query, key, k_sum), _tables(x.rotary, k_sum)
    strides = (*strides_of(query), *strides_of(key), *strides_of(value))
    shape = {"D": dim, "DP": padded, "SPLITS": _SPLITS}
    first = {"NORM": norms.kind, "ROPE": _rope(x.rotary)}
    # A normed query or key has a bound that is known without reading it. Any vector may be subtracted from the keys, so
    # the mean of a sample from all over the sequence serves.
    sample = 1 if x.norm is None else _KEY_SAMPLE
    _reduce[(_SPLITS, batch * heads, 3 if x.norm is None else 2)](
        query, key, value, norms.weights[1], norms.rstd[1], *tables[2:], q_max, k_sum, k_max, v_sum, v_max,
        *strides, *t_strides[3:],
        q_len, k_len, heads, kv_heads, norms.eps, PER_HEAD=True, ROWS=_REDUCE_ROWS, FIRST=0, SAMPLE=sample,
        STAGES=_REDUCE_STAGES,
        num_warps=_REDUCE_WARPS, **first, **shape,
    )  # fmt: skip
    kind = torch.float8_e4m3fn
    q = new(batch, q_len, heads, dim, dtype=kind)
    k, v = new(batch, k_len, kv_heads, dim, dtype=kind), new(batch, k_len, kv_heads, dim, dtype=kind)
    scales, v_mean = new(3, batch, kv_heads), new(batch, kv_heads, dim)
    lse_correction = new(batch, heads, q_len) if x.return_lse else None
    _round_per_head[(triton.cdiv(max(q_len, k_len), _HEAD_ROWS * _HEAD_TILES), batch * heads, 3)](
        query, key, value, *norms.weights, *norms.rstd, *tables, q_max, k_sum, k_max, v_sum, v_max, q, k, v,
        *scales, v_mean, scales if lse_correction is None else lse_correction, *strides, *t_strides, q_len, k_len,
        _sampled(k_len, sample), heads, kv_heads, norms.channels, norms.eps, x.softmax_scale,
        LEVELS=hadamard_levels(dim), CORRECT_LSE=lse_correction is not None,
        G=heads // kv_heads, ROWS=_HEAD_ROWS, TILES=_HEAD_TILES, num_warps=_HEAD_WARPS, **first, **shape,
    )  # fmt: skip
    return Quantized(q, k, v, scales[0], scales[1], scales[2], lse_correction, v_mean)
