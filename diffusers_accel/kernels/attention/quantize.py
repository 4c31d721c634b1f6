"""Fused quantization of Q, K and V in Triton: each element read at most twice, inputs left untouched.

The first launch reduces over the sequence what must be known beforehand: per channel the sum of K (for its mean) and
the largest |V|, or the largest values of all three for scales per head. Each program writes a partial result, so
nothing is added in an order that changes from run to run. The last launch rounds, and writes the layout the attention
kernel reads: Q and K as (batch, heads, sequence, head_dim), V transposed. QK-norm and a rotary embedding are applied in
passing (`rows.py`).

Imported only by the loaders of kernel records: it needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from ..rounding import store_rounded
from .norm import asked_norm, padded_dim, strides_of
from .recipe import Recipe, hadamard_levels
from .record import QKNorm, Rotary
from .rows import (
    bounded,
    largest,
    load_head,
    load_heads,
    load_quarters,
    load_rows,
    scale_of,
    spread,
    spread_factor,
    store_heads,
    times,
    without,
)

LOG2E = 1.4426950408889634
# Measured on an H200 (`benchmarks/attention.py --tiles`): partial results per head of the first launch, rows and warps
# of a program that reduces, and rows, tiles and warps of one that rounds.
_SPLITS = 16
_REDUCE_ROWS, _REDUCE_WARPS, _REDUCE_STAGES = 32, 2, 3
_ROWS, _ROUND_WARPS = 128, 4
# Of so many keys one is looked at for their mean, where nothing else must be known of them.
_KEY_SAMPLE = 4
_HEAD_ROWS, _HEAD_TILES, _HEAD_WARPS = 32, 16, 4


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len"])
def _reduce(
    q_ptr, k_ptr, v_ptr, kn_ptr, kf_ptr, cos_ptr, sin_ptr, qa_ptr, ks_ptr, ka_ptr, vs_ptr, va_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sv_b, sv_s, sv_h, st_b, st_s, st_h,
    q_len, k_len, heads, kv_heads, eps,
    PER_HEAD: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, FIRST: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Program (split, batch x head, which): which = 0 is K, 1 is V, 2 is Q. Of K the first SAMPLE-th of each split is
    looked at."""
    split, index, which = tl.program_id(0), tl.program_id(1), tl.program_id(2) + FIRST
    r, d = tl.arange(0, ROWS), tl.arange(0, DP)
    part = tl.cdiv(tl.cdiv(q_len if which == 2 else k_len, SPLITS), ROWS) * ROWS
    first = split * part
    out = (index * SPLITS + split) * DP
    # Element by element over the tiles, and across their rows only once at the end.
    if which == 2:
        if PER_HEAD:
            base = q_ptr + (index // heads).to(tl.int64) * sq_b + (index % heads) * sq_h
            high = tl.zeros([ROWS, DP], tl.float32)
            for start in tl.range(first, tl.minimum(first + part, q_len), ROWS, num_stages=STAGES):
                inside = (start + r < q_len)[:, None] & (d < D)[None, :]
                high = tl.maximum(high, tl.abs(load_rows(base, sq_s, start + r, inside, DP, True)))
            # A rotation lengthens a channel by no more than sqrt(2); see `_round_per_head` on bounds.
            tl.store(qa_ptr + index * SPLITS + split, tl.max(high) * (1.0 if ROTATE == "" else 1.4142136))
    elif index < tl.num_programs(1) // heads * kv_heads:
        b, h = (index // kv_heads).to(tl.int64), index % kv_heads
        last = tl.minimum(first + part, k_len)
        if which == 0:
            last = tl.minimum(first + tl.cdiv(part, SAMPLE * ROWS) * ROWS, k_len)
            base, turn = k_ptr + b * sk_b + h * sk_h, b * st_b + h * st_h
            weight = kn_ptr + (h * D if NORM == "all" else 0)
            total = tl.zeros([ROWS, DP], tl.float32)
            high = tl.zeros([ROWS, DP], tl.float32)
            for start in tl.range(first, last, ROWS, num_stages=STAGES):
                x = load_head(
                    base, sk_s, start + r, k_len, weight, kf_ptr + b * k_len, eps, cos_ptr + turn, sin_ptr + turn,
                    st_s, NORM, ROTATE, D, DP,
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
    """The mean of one head's keys that were looked at, `count` of them, as quarters."""
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
    """Program (batch x key head): the keys' mean and V's scale, per channel."""
    index = tl.program_id(0)
    d = tl.arange(0, DP)
    parts = (index * SPLITS + tl.arange(0, SPLITS))[:, None] * DP + d[None, :]
    if MEAN:
        tl.store(mean_ptr + index * DP + d, tl.sum(tl.load(ks_ptr + parts), 0) / k_len)
    if VALUES:
        v_max = tl.max(tl.load(va_ptr + parts), 0)
        tl.store(vscale_ptr + index * D + d, bounded(scale_of(v_max, 448.0)), mask=d < D)


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len"])
def _round(
    q_ptr, k_ptr, v_ptr, qn_ptr, kn_ptr, qf_ptr, kf_ptr, qcos_ptr, qsin_ptr, kcos_ptr, ksin_ptr, mean_ptr,
    qo_ptr, ko_ptr, vo_ptr, qscale_ptr, kscale_ptr, vscale_ptr, shift_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sv_b, sv_s, sv_h, sqt_b, sqt_s, sqt_h, skt_b, skt_s, skt_h,
    q_len, k_len, heads, kv_heads, eps, fold, logit_scale,
    NORM: tl.constexpr, ROTATE: tl.constexpr, LEVELS: tl.constexpr, INT8: tl.constexpr, KB: tl.constexpr,
    SHIFT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Program (rows, batch x head, which): which = 0 is V, 1 is K, 2 is Q: what the first launch read last comes
    first, while it may still lie in the L2 cache."""
    block, index, which = tl.program_id(0), tl.program_id(1), tl.program_id(2) + FIRST
    rows = block * ROWS + tl.arange(0, ROWS)
    W: tl.constexpr = DP // 4
    LARGEST: tl.constexpr = 127.0 if INT8 else 448.0
    LONGER: tl.constexpr = spread_factor(LEVELS)
    if which == 2:
        if block * ROWS < q_len:
            b, h = (index // heads).to(tl.int64), index % heads
            base, turn = q_ptr + b * sq_b + h * sq_h, b * sqt_b + h * sqt_h
            weight = qn_ptr + (h * D if NORM == "all" else 0)
            x, inside = load_heads(
                base, sq_s, rows, q_len, weight, qf_ptr + b * q_len, eps, qcos_ptr + turn, qsin_ptr + turn, sqt_s,
                NORM, ROTATE, D, W,
            )  # fmt: skip
            at = index.to(tl.int64) * q_len + rows
            if SHIFT:
                mean = load_quarters(mean_ptr + (b * kv_heads + h // (heads // kv_heads)) * DP, D, W)
                tl.store(shift_ptr + at, times(x, mean) * logit_scale, mask=rows < q_len)
            x = spread(x, LEVELS)
            scale = scale_of(tl.max(largest(x), 1), LARGEST)
            store_heads(qo_ptr + at * D, x, (1.0 / scale)[:, None], inside, INT8, D // 4, W)
            tl.store(qscale_ptr + at, bounded(scale) * (fold / LONGER), mask=rows < q_len)
    elif index < tl.num_programs(1) // heads * kv_heads:
        b, h = (index // kv_heads).to(tl.int64), index % kv_heads
        if which == 1:
            if block * ROWS < k_len:
                base, turn = k_ptr + b * sk_b + h * sk_h, b * skt_b + h * skt_h
                weight = kn_ptr + (h * D if NORM == "all" else 0)
                x, inside = load_heads(
                    base, sk_s, rows, k_len, weight, kf_ptr + b * k_len, eps, kcos_ptr + turn, ksin_ptr + turn, skt_s,
                    NORM, ROTATE, D, W,
                )  # fmt: skip
                x = spread(without(x, load_quarters(mean_ptr + index * DP, D, W), inside), LEVELS)
                scale = scale_of(tl.max(tl.max(largest(x), 1).reshape(ROWS // KB, KB), 1), LARGEST)
                each = tl.broadcast_to((1.0 / scale)[:, None], (ROWS // KB, KB)).reshape(ROWS)
                at = index.to(tl.int64) * k_len + rows
                store_heads(ko_ptr + at * D, x, each[:, None], inside, INT8, D // 4, W)
                blocks = tl.cdiv(k_len, KB)
                group = block * (ROWS // KB) + tl.arange(0, ROWS // KB)
                tl.store(kscale_ptr + index * blocks + group, bounded(scale) * (1.0 / LONGER), mask=group < blocks)
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
@triton.jit(do_not_specialize=["q_len", "k_len", "k_seen"])
def _round_per_head(
    q_ptr, k_ptr, v_ptr, qn_ptr, kn_ptr, qf_ptr, kf_ptr, qcos_ptr, qsin_ptr, kcos_ptr, ksin_ptr, qa_ptr, ks_ptr,
    ka_ptr, vs_ptr, va_ptr, qo_ptr, ko_ptr, vo_ptr, qscale_ptr, kscale_ptr, vscale_ptr, vmean_ptr, shift_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sv_b, sv_s, sv_h, sqt_b, sqt_s, sqt_h, skt_b, skt_s, skt_h,
    q_len, k_len, k_seen, heads, kv_heads, normed, eps, logit_scale,
    NORM: tl.constexpr, ROTATE: tl.constexpr, LEVELS: tl.constexpr, SHIFT: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """e4m3 with one scale per key head, outputs (batch, sequence, heads, head_dim); which = 0 is Q, 1 V, 2 K. A program
    takes several tiles of rows: means and scales are found once for all of them. `normed`: over how many channels the
    norm is."""
    block, index, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    W: tl.constexpr = DP // 4
    # What subtraction and mixing can make of the largest value is bounded, not measured: e4m3 has exponents to spare,
    # so a bound serves as well as the maximum, and costs no pass.
    LONGER: tl.constexpr = spread_factor(LEVELS)
    first = block * ROWS * TILES
    if which == 0:
        if first < q_len:
            b, h = (index // heads).to(tl.int64), index % heads
            kv = b * kv_heads + h // G
            base, turn = q_ptr + b * sq_b + h * sq_h, b * sqt_b + h * sqt_h
            weight = qn_ptr + (h * D if NORM == "all" else 0)
            if NORM != "":
                # A normed row is no longer than this, and neither rotation nor mixing lengthens it.
                amax = tl.max(largest(load_quarters(weight, D, W))) * tl.sqrt(normed * 1.0)
            else:
                amax = 0.0
                for member in tl.static_range(G):
                    amax = tl.maximum(amax, _largest_part(qa_ptr, kv * G + member, SPLITS))
                amax *= LONGER
            scale = bounded(scale_of(amax, 448.0))
            if SHIFT:
                mean = _mean(ks_ptr, kv, k_seen, D, DP, SPLITS)
            for tile in range(TILES):
                rows = first + tile * ROWS + tl.arange(0, ROWS)
                x, inside = load_heads(
                    base, sq_s, rows, q_len, weight, qf_ptr + b * q_len, eps, qcos_ptr + turn, qsin_ptr + turn, sqt_s,
                    NORM, ROTATE, D, W,
                )  # fmt: skip
                if SHIFT:
                    shift = times(x, mean) * logit_scale
                    tl.store(shift_ptr + index.to(tl.int64) * q_len + rows, shift, mask=rows < q_len)
                x = spread(x, LEVELS)
                at = (b * q_len + rows) * heads + h
                store_heads(qo_ptr + at * D, x, 1.0 / (scale * LONGER), inside, False, D // 4, W)
            if block == 0:
                tl.store(qscale_ptr + kv, scale)
    elif index < tl.num_programs(1) // heads * kv_heads and first < k_len:
        b, h = (index // kv_heads).to(tl.int64), index % kv_heads
        if which == 2:
            base, turn = k_ptr + b * sk_b + h * sk_h, b * skt_b + h * skt_h
            mean = _mean(ks_ptr, index, k_seen, D, DP, SPLITS)
            weight = kn_ptr + (h * D if NORM == "all" else 0)
            if NORM != "":
                # As of the query; what is taken away may add its own length.
                size = tl.sum(mean[0] * mean[0] + mean[1] * mean[1] + mean[2] * mean[2] + mean[3] * mean[3], 0)
                amax = tl.max(largest(load_quarters(weight, D, W))) * tl.sqrt(normed * 1.0) + tl.sqrt(size)
            else:
                amax = (_largest_part(ka_ptr, index, SPLITS) + tl.max(largest(mean))) * LONGER
            scale = bounded(scale_of(amax, 448.0))
            for tile in range(TILES):
                rows = first + tile * ROWS + tl.arange(0, ROWS)
                x, inside = load_heads(
                    base, sk_s, rows, k_len, weight, kf_ptr + b * k_len, eps, kcos_ptr + turn, ksin_ptr + turn, skt_s,
                    NORM, ROTATE, D, W,
                )  # fmt: skip
                x = spread(without(x, mean, inside), LEVELS)
                at = (b * k_len + rows) * kv_heads + h
                store_heads(ko_ptr + at * D, x, 1.0 / (scale * LONGER), inside, False, D // 4, W)
            if block == 0:
                tl.store(kscale_ptr + index, scale)
        else:
            d = tl.arange(0, DP)
            amax = tl.maximum(_largest_part(va_ptr, index, SPLITS), 1e-30)
            parts = (index * SPLITS + tl.arange(0, SPLITS))[:, None] * DP + d[None, :]
            v_mean = tl.sum(tl.load(vs_ptr + parts), 0) / k_len
            # A multiple of a power of two well above the steps of 16-bit values: what is taken away leaves values that
            # lie at midpoints of e4m3 there, and their rounding, to even, without a drift of its own.
            step = tl.exp2(tl.ceil(tl.log2(amax)) - 9.0)
            v_mean = tl.floor(v_mean / step + 0.5) * step
            scale = bounded(scale_of(amax + tl.max(tl.abs(v_mean)), 448.0))
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
    """Program (rows, columns, batch)."""
    b = tl.program_id(2).to(tl.int64)
    r, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = out_ptr + (b * rows + r)[:, None] * columns + c[None, :]
    mean = tl.load(mean_ptr + b * (columns // G) + c // (D * G) * D + c % D, mask=c < columns, other=0.0)
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32) + mean[None, :]
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask=inside)


def add_mean(out: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Adds what was taken from the values to what attention made of the rest, in place if it can, and returns it.

    Args:
        out: (batch, sequence, heads, head_dim).
        mean: float32 (batch, kv_heads, head_dim).
    """
    batch, rows, heads, dim = out.shape
    out, columns = out.contiguous(), heads * dim
    _add[(triton.cdiv(rows, 16), triton.cdiv(columns, 512), batch)](
        out, mean, rows, columns, D=dim, G=heads // mean.shape[1], ROWS=16, WIDTH=512, num_warps=4
    )
    return out


@dataclass
class Quantized:
    """Rounded operands and their scales, as an attention kernel reads them.

    Attributes:
        query: (batch, heads, sequence, head_dim) for a recipe, (batch, sequence, heads, head_dim) for per-head scales.
        key: The same with the keys' length and heads.
        value: (batch, kv_heads, head_dim, sequence padded to 128 with zeros), keys permuted within every 16; or laid
            out like the key for per-head scales; or the value as it was, where the recipe does not round it.
        query_scale: float32 (batch, heads, sequence), softmax scale and log2(e) folded in; or (batch, kv_heads).
        key_scale: float32 (batch, kv_heads, blocks); or (batch, kv_heads).
        value_scale: float32 (batch, kv_heads, head_dim); or (batch, kv_heads).
        value_mean: float32 (batch, kv_heads, head_dim), taken away from the value before it was rounded: the output
            lacks it. `None` for a recipe.
        shift: float32 (batch, heads, sequence): what the subtracted mean of K took from every logit of a row; `None`
            unless it was asked for.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_scale: torch.Tensor
    key_scale: torch.Tensor
    value_scale: torch.Tensor
    shift: torch.Tensor | None
    value_mean: torch.Tensor | None = None


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def quantize(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    recipe: Recipe,
    scale: float,
    shift: bool = False,
    rotary: Rotary | None = None,
    norm: QKNorm | None = None,
) -> Quantized:
    """Rounds the operands of one attention call by a recipe.

    Args:
        query: (batch, sequence, heads, head_dim), bf16, fp16 or float32, any strides; key and value with their own
            sequence and heads.
        recipe: What to round.
        scale: Of the logits.
        shift: Whether the logsumexp will be wanted, which needs what K's mean took away.
        rotary: A rotary embedding to apply to query and key first.
        norm: An RMS norm of every head's channels, to apply before the rotary embedding.
    """
    query, key, value = _dense(query), _dense(key), _dense(value)
    (batch, q_len, heads, dim), (_, k_len, kv_heads, _) = query.shape, key.shape
    device, padded = query.device, padded_dim(dim)
    low, values = recipe.qk is not None, recipe.pv is not None
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    nothing = new(1)
    asked, (tables, turns) = asked_norm(norm, query, key, nothing), _tables(rotary, nothing)
    k_sum = new(batch, kv_heads, _SPLITS, padded) if low else nothing
    v_max = new(batch, kv_heads, _SPLITS, padded) if values else nothing
    strides = (*strides_of(query), *strides_of(key), *strides_of(value))
    shape = {"D": dim, "DP": padded}
    first = {"NORM": asked.kind, "ROTATE": _form(rotary)}
    _reduce[(_SPLITS, batch * heads, low + values)](
        query, key, value, asked.weights[1], asked.factors[1], *tables[2:], nothing, k_sum, nothing, nothing,
        v_max, *strides, *turns[3:],
        q_len, k_len, heads, kv_heads, asked.eps, PER_HEAD=False, ROWS=_REDUCE_ROWS, SPLITS=_SPLITS, SAMPLE=1,
        FIRST=0 if low else 1, STAGES=_REDUCE_STAGES, num_warps=_REDUCE_WARPS, **first, **shape,
    )  # fmt: skip
    mean = new(batch, kv_heads, padded) if low else nothing
    v_scale = new(batch, kv_heads, dim) if values else nothing
    _combine[(batch * kv_heads,)](
        k_sum, v_max, mean, v_scale, k_len, MEAN=low, VALUES=values, SPLITS=_SPLITS, **shape,
    )  # fmt: skip
    v_len = triton.cdiv(k_len, _ROWS) * _ROWS
    kind = torch.int8 if recipe.qk == "int8" else torch.float8_e4m3fn
    q = new(batch, heads, q_len, dim, dtype=kind) if low else query.transpose(1, 2)
    k = new(batch, kv_heads, k_len, dim, dtype=kind) if low else key.transpose(1, 2)
    v = new(batch, kv_heads, dim, v_len, dtype=torch.float8_e4m3fn) if values else value.transpose(1, 2)
    q_scale = new(batch, heads, q_len) if low else nothing
    k_scale = new(batch, kv_heads, triton.cdiv(k_len, recipe.k_block)) if low else nothing
    shifted = new(batch, heads, q_len) if shift and low else None
    _round[(triton.cdiv(max(q_len if low else 0, v_len), _ROWS), batch * heads, 2 * low + values)](
        query, key, value, *asked.weights, *asked.factors, *tables, mean, q, k, v, q_scale, k_scale, v_scale,
        nothing if shifted is None else shifted, *strides, *turns, q_len, k_len, heads, kv_heads, asked.eps,
        scale * LOG2E, scale, LEVELS=hadamard_levels(dim), INT8=recipe.qk == "int8", KB=recipe.k_block or _ROWS,
        SHIFT=shifted is not None, ROWS=_ROWS, FIRST=0 if values else 1, num_warps=_ROUND_WARPS, **first, **shape,
    )  # fmt: skip
    return Quantized(q, k, v, q_scale, k_scale, v_scale, shifted)


def _seen(length: int, sample: int) -> int:
    """How many keys the first launch looks at."""
    part = triton.cdiv(triton.cdiv(length, _SPLITS), _REDUCE_ROWS) * _REDUCE_ROWS
    each = triton.cdiv(part, sample * _REDUCE_ROWS) * _REDUCE_ROWS
    return sum(max(0, min(each, length - split * part)) for split in range(_SPLITS))


def _tables(rotary: Rotary | None, nothing: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Cosines and sines of query and key, and strides of batch, sequence and heads of both."""
    if rotary is None:
        return [nothing] * 4, [0] * 6
    turns = [
        0 if table.shape[place] == 1 else table.stride(place)
        for table in (rotary.query[0], rotary.key[0])
        for place in range(3)
    ]
    return [*rotary.query, *rotary.key], turns


def _form(rotary: Rotary | None) -> str:
    return "" if rotary is None else "halves" if rotary.halves else "neighbours"


def quantize_per_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    shift: bool = False,
    rotary: Rotary | None = None,
    norm: QKNorm | None = None,
) -> Quantized:
    """Rounds to e4m3 with one scale per key head, as FlashAttention 3 reads it; see `quantize` for the arguments.

    The values' mean is taken away too, channel by channel. Weights of a row sum to one, so the output lacks just that
    mean. With it FlashAttention 3 is wrong: Hopper's matrix units add e4m3 products with about 14 bits and cut off the
    rest, and a sum that grows with every key loses a share that grows with it (`benchmarks/check_gpu.py`).
    """
    query, key, value = _dense(query), _dense(key), _dense(value)
    (batch, q_len, heads, dim), (_, k_len, kv_heads, _) = query.shape, key.shape
    device, padded = query.device, padded_dim(dim)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    q_max, k_max, v_max = new(batch, heads, _SPLITS), new(batch, kv_heads, _SPLITS), new(batch, kv_heads, _SPLITS)
    k_sum, v_sum = new(batch, kv_heads, _SPLITS, padded), new(batch, kv_heads, _SPLITS, padded)
    asked, (tables, turns) = asked_norm(norm, query, key, k_sum), _tables(rotary, k_sum)
    strides = (*strides_of(query), *strides_of(key), *strides_of(value))
    shape = {"D": dim, "DP": padded, "SPLITS": _SPLITS}
    first = {"NORM": asked.kind, "ROTATE": _form(rotary)}
    # A normed query has a bound that is known without reading it, and so has a normed key. Any vector may be taken from
    # the keys, so their mean can be that of a share of them, from all over the sequence.
    sample = 1 if norm is None else _KEY_SAMPLE
    _reduce[(_SPLITS, batch * heads, 3 if norm is None else 2)](
        query, key, value, asked.weights[1], asked.factors[1], *tables[2:], q_max, k_sum, k_max, v_sum, v_max,
        *strides, *turns[3:],
        q_len, k_len, heads, kv_heads, asked.eps, PER_HEAD=True, ROWS=_REDUCE_ROWS, FIRST=0, SAMPLE=sample,
        STAGES=_REDUCE_STAGES,
        num_warps=_REDUCE_WARPS, **first, **shape,
    )  # fmt: skip
    kind = torch.float8_e4m3fn
    q = new(batch, q_len, heads, dim, dtype=kind)
    k, v = new(batch, k_len, kv_heads, dim, dtype=kind), new(batch, k_len, kv_heads, dim, dtype=kind)
    scales, v_mean = new(3, batch, kv_heads), new(batch, kv_heads, dim)
    shifted = new(batch, heads, q_len) if shift else None
    _round_per_head[(triton.cdiv(max(q_len, k_len), _HEAD_ROWS * _HEAD_TILES), batch * heads, 3)](
        query, key, value, *asked.weights, *asked.factors, *tables, q_max, k_sum, k_max, v_sum, v_max, q, k, v,
        *scales, v_mean, scales if shifted is None else shifted, *strides, *turns, q_len, k_len,
        _seen(k_len, sample), heads, kv_heads, asked.channels, asked.eps, scale, LEVELS=hadamard_levels(dim),
        SHIFT=shifted is not None,
        G=heads // kv_heads, ROWS=_HEAD_ROWS, TILES=_HEAD_TILES, num_warps=_HEAD_WARPS, **first, **shape,
    )  # fmt: skip
    return Quantized(q, k, v, scales[0], scales[1], scales[2], shifted, v_mean)
