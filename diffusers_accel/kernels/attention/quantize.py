"""Fused quantization of Q, K and V in Triton: each element read at most twice, inputs left untouched.

The first launch reduces over the sequence what must be known beforehand: per channel the sum of K (for its mean) and
the largest |V|, or the largest values of all three for scales per head. Each program writes a partial result, so
nothing is added in an order that changes from run to run. The last launch rounds, and writes the layout the attention
kernel reads: Q and K as (batch, heads, sequence, head_dim), V transposed. A rotary embedding is applied in passing.

Imported only by the loaders of kernel records: it needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .recipe import Recipe, hadamard_block

LOG2E = 1.4426950408889634
# Measured on an H200 (`benchmarks/attention.py --tiles`): partial results per head of the first launch, rows and warps
# of a program that reduces, and rows, tiles and warps of one that rounds.
_SPLITS = 16
_REDUCE_ROWS, _REDUCE_WARPS, _REDUCE_STAGES = 32, 2, 3
_ROWS, _ROUND_WARPS = 128, 4
_HEAD_ROWS, _HEAD_TILES, _HEAD_WARPS = 32, 4, 4
# Largest magnitudes are bounded from both sides, so that no product of scales over- or underflows: logits stay finite.
_TINY = tl.constexpr(1e-14)
_HUGE = tl.constexpr(1e14)
# Triton's interpreter truncates where a GPU rounds to the nearest.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_e4m3(x):
    """Rounded to the nearest e4m3; |x| is at most 448."""
    if _INTERPRETED:
        split = x * 1048577.0  # 2^20 + 1: what is left of a float32 are the four significant bits of e4m3
        x = split - (split - x)
    return x.to(tl.float8e4nv)


@triton.jit
def _rotated(x, cos_ptr, sin_ptr, rows, inside, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Rows with their rotary embedding applied: neighbouring channels are the two parts of one complex number."""
    at = rows.to(tl.int64)[:, None] * D + tl.arange(0, DP)[None, :]
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
    real, imaginary = tl.split(x.reshape(ROWS, DP // 2, 2))
    return x * cos + tl.join(-imaginary, real).reshape(ROWS, DP) * sin


@triton.jit
def _hadamard(BLOCK: tl.constexpr):
    """The signs of a Hadamard matrix: (BLOCK, BLOCK)."""
    parity = tl.arange(0, BLOCK)[:, None] & tl.arange(0, BLOCK)[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return (1 - 2 * (parity & 1)).to(tl.float16)


@triton.jit
def _spread(x, signs, ROWS: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """Rows times the orthogonal Hadamard matrix, block by block of channels: it leaves every QK as it is, and spreads
    what a few channels hold over the block, so that their rounding does not decide the error alone."""
    # Rows are brought to [-1, 1], where fp16 is finer than what they are rounded to.
    length = tl.maximum(tl.max(tl.abs(x), 1), _TINY)
    x = (x * (1.0 / length)[:, None]).to(tl.float16).reshape(ROWS * DP // BLOCK, BLOCK)
    return tl.dot(x, signs).reshape(ROWS, DP) * (length * (1.0 / BLOCK) ** 0.5)[:, None]


@triton.jit
def _rows(
    x_ptr, stride_b, stride_s, stride_h, b, h, rows, inside, D: tl.constexpr, DP: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """Rows of one head as float32, zero outside. KEEP: whether they will be read again, and should stay in L2."""
    POLICY: tl.constexpr = "evict_last" if KEEP else "evict_first"
    at = x_ptr + b.to(tl.int64) * stride_b + h * stride_h + rows.to(tl.int64)[:, None] * stride_s
    return tl.load(at + tl.arange(0, DP)[None, :], mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit(do_not_specialize=["q_len", "k_len"])
def _reduce(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, qa_ptr, ks_ptr, ka_ptr, va_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sv_b, sv_s, sv_h,
    q_len, k_len, heads, kv_heads,
    PER_HEAD: tl.constexpr, ROTATE: tl.constexpr, FIRST: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (split, batch x head, which): which = 0 is K, 1 is V, 2 is Q."""
    split, index, which = tl.program_id(0), tl.program_id(1), tl.program_id(2) + FIRST
    d = tl.arange(0, DP)
    r = tl.arange(0, ROWS)
    part = tl.cdiv(tl.cdiv(q_len if which == 2 else k_len, SPLITS), ROWS) * ROWS
    first = split * part
    out = (index * SPLITS + split) * DP + d
    # Element by element over the tiles, and across their rows only once at the end.
    if which == 2:
        if PER_HEAD:
            b, h = index // heads, index % heads
            high = tl.zeros([ROWS, DP], tl.float32)
            for start in tl.range(first, tl.minimum(first + part, q_len), ROWS, num_stages=STAGES):
                inside = (start + r < q_len)[:, None] & (d < D)[None, :]
                high = tl.maximum(high, tl.abs(_rows(q_ptr, sq_b, sq_s, sq_h, b, h, start + r, inside, D, DP, True)))
            # A rotation lengthens a channel by no more than sqrt(2); see `_round_per_head` on bounds.
            tl.store(qa_ptr + index * SPLITS + split, tl.max(high) * (1.4142136 if ROTATE else 1.0))
    elif index < tl.num_programs(1) // heads * kv_heads:
        b, h = index // kv_heads, index % kv_heads
        last = tl.minimum(first + part, k_len)
        if which == 0:
            total = tl.zeros([ROWS, DP], tl.float32)
            high = tl.zeros([ROWS, DP], tl.float32)
            for start in tl.range(first, last, ROWS, num_stages=STAGES):
                inside = (start + r < k_len)[:, None] & (d < D)[None, :]
                x = _rows(k_ptr, sk_b, sk_s, sk_h, b, h, start + r, inside, D, DP, True)
                if ROTATE:
                    x = _rotated(x, cos_ptr, sin_ptr, start + r, inside, D, DP, ROWS)
                total += x
                if PER_HEAD:
                    high = tl.maximum(high, tl.abs(x))
            tl.store(ks_ptr + out, tl.sum(total, 0))
            if PER_HEAD:
                tl.store(ka_ptr + index * SPLITS + split, tl.max(high))
        else:
            high = tl.zeros([ROWS, DP], tl.float32)
            for start in tl.range(first, last, ROWS, num_stages=STAGES):
                inside = (start + r < k_len)[:, None] & (d < D)[None, :]
                high = tl.maximum(high, tl.abs(_rows(v_ptr, sv_b, sv_s, sv_h, b, h, start + r, inside, D, DP, True)))
            if PER_HEAD:
                tl.store(va_ptr + index * SPLITS + split, tl.max(high))
            else:
                tl.store(va_ptr + out, tl.max(high, 0))


@triton.jit
def _parts(part_ptr, index, DP: tl.constexpr, SPLITS: tl.constexpr):
    """The partial results of one head: (SPLITS, DP)."""
    rows = index * SPLITS + tl.arange(0, SPLITS)
    return tl.load(part_ptr + rows[:, None] * DP + tl.arange(0, DP)[None, :])


@triton.jit
def _scale(amax, LARGEST: tl.constexpr):
    return tl.minimum(tl.maximum(amax, _TINY), _HUGE) / LARGEST


@triton.jit
def _store_rounded(pointer, x, inside, INT8: tl.constexpr):
    """Rounds to the nearest, ties to even, and stores; `x` is scaled already."""
    if INT8:
        # Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum.
        x = tl.minimum(tl.maximum(x, -127.0), 127.0) + 12582912.0
        tl.store(pointer, (x.to(tl.int32, bitcast=True) & 0xFF).to(tl.int8), mask=inside)
    else:
        tl.store(pointer, to_e4m3(tl.minimum(tl.maximum(x, -448.0), 448.0)), mask=inside)


@triton.jit
def _mean(ks_ptr, index, k_len, DP: tl.constexpr, SPLITS: tl.constexpr):
    """The keys' mean of one head, per channel."""
    return tl.sum(_parts(ks_ptr, index, DP, SPLITS), 0) / k_len


@triton.jit(do_not_specialize=["k_len"])
def _combine(
    ks_ptr, va_ptr, mean_ptr, vscale_ptr, k_len, MEAN: tl.constexpr, VALUES: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (batch x key head): the keys' mean and V's scale, per channel."""
    index = tl.program_id(0)
    d = tl.arange(0, DP)
    if MEAN:
        tl.store(mean_ptr + index * DP + d, _mean(ks_ptr, index, k_len, DP, SPLITS))
    if VALUES:
        v_max = tl.max(_parts(va_ptr, index, DP, SPLITS), 0)
        tl.store(vscale_ptr + index * D + d, _scale(v_max, 448.0), mask=d < D)


@triton.jit(do_not_specialize=["q_len", "k_len", "v_len"])
def _round(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, mean_ptr,
    qo_ptr, ko_ptr, vo_ptr, qscale_ptr, kscale_ptr, vscale_ptr, shift_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sv_b, sv_s, sv_h,
    q_len, k_len, v_len, heads, kv_heads, fold, logit_scale,
    ROTATE: tl.constexpr, BLOCK: tl.constexpr, QK: tl.constexpr, KB: tl.constexpr, SHIFT: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Program (rows, batch x head, which): which = 0 is V, 1 is K, 2 is Q: what the first launch read last comes
    first, while it may still lie in the L2 cache. QK: 0 int8, 1 e4m3, 2 untouched."""
    block, index, which = tl.program_id(0), tl.program_id(1), tl.program_id(2) + FIRST
    d = tl.arange(0, DP)
    rows = block * ROWS + tl.arange(0, ROWS)
    LARGEST: tl.constexpr = 127.0 if QK == 0 else 448.0
    if which == 2:
        if block * ROWS < q_len:
            b, h = index // heads, index % heads
            inside = (rows < q_len)[:, None] & (d < D)[None, :]
            x = _rows(q_ptr, sq_b, sq_s, sq_h, b, h, rows, inside, D, DP, False)
            if ROTATE:
                x = _rotated(x, cos_ptr, sin_ptr, rows, inside, D, DP, ROWS)
            at = index.to(tl.int64) * q_len + rows
            if SHIFT:
                mean = tl.load(mean_ptr + (b * kv_heads + h // (heads // kv_heads)) * DP + d)
                tl.store(shift_ptr + at, tl.sum(x * mean[None, :], 1) * logit_scale, mask=rows < q_len)
            if QK == 1:
                x = _spread(x, _hadamard(BLOCK), ROWS, DP, BLOCK)
            scale = _scale(tl.max(tl.abs(x), 1), LARGEST)
            _store_rounded(qo_ptr + at[:, None] * D + d[None, :], x * (1.0 / scale)[:, None], inside, QK == 0)
            tl.store(qscale_ptr + at, scale * fold, mask=rows < q_len)
    elif index < tl.num_programs(1) // heads * kv_heads:
        b, h = index // kv_heads, index % kv_heads
        if which == 1:
            if block * ROWS < k_len:
                inside = (rows < k_len)[:, None] & (d < D)[None, :]
                x = _rows(k_ptr, sk_b, sk_s, sk_h, b, h, rows, inside, D, DP, False)
                if ROTATE:
                    x = _rotated(x, cos_ptr, sin_ptr, rows, inside, D, DP, ROWS)
                x = tl.where(inside, x - tl.load(mean_ptr + index * DP + d)[None, :], 0.0)
                if QK == 1:
                    x = _spread(x, _hadamard(BLOCK), ROWS, DP, BLOCK)
                scale = _scale(tl.max(tl.max(tl.abs(x), 1).reshape(ROWS // KB, KB), 1), LARGEST)
                each = tl.broadcast_to((1.0 / scale)[:, None], (ROWS // KB, KB)).reshape(ROWS)
                at = index.to(tl.int64) * k_len + rows
                _store_rounded(ko_ptr + at[:, None] * D + d[None, :], x * each[:, None], inside, QK == 0)
                blocks = tl.cdiv(k_len, KB)
                group = block * (ROWS // KB) + tl.arange(0, ROWS // KB)
                tl.store(kscale_ptr + index * blocks + group, scale, mask=group < blocks)
        else:
            if block * ROWS < v_len:
                # Position 16g + 4a + 2b + c of the transposed V holds key 16g + 8b + 2a + c (see low_bit.py).
                r = rows % 16
                keys = rows - r + 8 * ((r // 2) % 2) + 2 * (r // 4) + r % 2
                inside = (keys < k_len)[:, None] & (d < D)[None, :]
                x = _rows(v_ptr, sv_b, sv_s, sv_h, b, h, keys, inside, D, DP, False)
                scale = tl.load(vscale_ptr + index * D + d, mask=d < D, other=1.0)
                x = tl.trans(x * (1.0 / scale)[None, :])
                to = vo_ptr + index.to(tl.int64) * D * v_len + d.to(tl.int64)[:, None] * v_len + rows[None, :]
                _store_rounded(to, x, (d < D)[:, None] & (rows < v_len)[None, :], False)


@triton.jit
def _largest(part_ptr, index, SPLITS: tl.constexpr):
    return tl.max(tl.load(part_ptr + index * SPLITS + tl.arange(0, SPLITS)))


@triton.jit(do_not_specialize=["q_len", "k_len"])
def _round_per_head(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, qa_ptr, ks_ptr, ka_ptr, va_ptr,
    qo_ptr, ko_ptr, vo_ptr, qscale_ptr, kscale_ptr, vscale_ptr, shift_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sv_b, sv_s, sv_h, q_len, k_len, heads, kv_heads, logit_scale,
    ROTATE: tl.constexpr, BLOCK: tl.constexpr, SMOOTH: tl.constexpr, SHIFT: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """e4m3 with one scale per key head, outputs (batch, sequence, heads, head_dim); which = 0 is Q, 1 V, 2 K. A program
    takes several tiles of rows: means, scales and the Hadamard matrix are found once for all of them."""
    block, index, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, DP)
    first = block * ROWS * TILES
    if which == 0:
        if first < q_len:
            b, h = index // heads, index % heads
            kv = b * kv_heads + h // G
            amax = 0.0
            for member in tl.static_range(G):
                amax = tl.maximum(amax, _largest(qa_ptr, kv * G + member, SPLITS))
            scale = _scale(amax * BLOCK**0.5, 448.0)
            if BLOCK > 1:
                signs = _hadamard(BLOCK)
            if SHIFT:
                mean = _mean(ks_ptr, kv, k_len, DP, SPLITS)
            for tile in range(TILES):
                rows = first + tile * ROWS + tl.arange(0, ROWS)
                inside = (rows < q_len)[:, None] & (d < D)[None, :]
                x = _rows(q_ptr, sq_b, sq_s, sq_h, b, h, rows, inside, D, DP, False)
                if ROTATE:
                    x = _rotated(x, cos_ptr, sin_ptr, rows, inside, D, DP, ROWS)
                if SHIFT:
                    shift = tl.sum(x * mean[None, :], 1) * logit_scale
                    tl.store(shift_ptr + index.to(tl.int64) * q_len + rows, shift, mask=rows < q_len)
                at = (b.to(tl.int64) * q_len + rows) * heads + h
                if BLOCK > 1:
                    x = _spread(x, signs, ROWS, DP, BLOCK)
                _store_rounded(qo_ptr + at[:, None] * D + d[None, :], x * (1.0 / scale), inside, False)
            if block == 0:
                tl.store(qscale_ptr + kv, scale)
    elif index < tl.num_programs(1) // heads * kv_heads and first < k_len:
        b, h = index // kv_heads, index % kv_heads
        if which == 2:
            amax = _largest(ka_ptr, index, SPLITS)
            if SMOOTH:
                mean = _mean(ks_ptr, index, k_len, DP, SPLITS)
                amax += tl.max(tl.abs(mean))
            # Bounds of what subtraction and spreading can make of the largest value: e4m3 has exponents to spare, so a
            # bound serves as well as the maximum, and costs no pass.
            scale = _scale(amax * BLOCK**0.5, 448.0)
            if BLOCK > 1:
                signs = _hadamard(BLOCK)
            for tile in range(TILES):
                rows = first + tile * ROWS + tl.arange(0, ROWS)
                inside = (rows < k_len)[:, None] & (d < D)[None, :]
                x = _rows(k_ptr, sk_b, sk_s, sk_h, b, h, rows, inside, D, DP, False)
                if ROTATE:
                    x = _rotated(x, cos_ptr, sin_ptr, rows, inside, D, DP, ROWS)
                if SMOOTH:
                    x = tl.where(inside, x - mean[None, :], 0.0)
                at = (b.to(tl.int64) * k_len + rows) * kv_heads + h
                if BLOCK > 1:
                    x = _spread(x, signs, ROWS, DP, BLOCK)
                _store_rounded(ko_ptr + at[:, None] * D + d[None, :], x * (1.0 / scale), inside, False)
            if block == 0:
                tl.store(kscale_ptr + index, scale)
        else:
            scale = _scale(_largest(va_ptr, index, SPLITS), 448.0)
            for tile in range(TILES):
                rows = first + tile * ROWS + tl.arange(0, ROWS)
                inside = (rows < k_len)[:, None] & (d < D)[None, :]
                x = _rows(v_ptr, sv_b, sv_s, sv_h, b, h, rows, inside, D, DP, False)
                at = (b.to(tl.int64) * k_len + rows) * kv_heads + h
                _store_rounded(vo_ptr + at[:, None] * D + d[None, :], x * (1.0 / scale), inside, False)
            if block == 0:
                tl.store(vscale_ptr + index, scale)


# Cosines and sines.
Rotary = tuple[torch.Tensor, torch.Tensor]


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


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def padded_dim(head_dim: int) -> int:
    return max(64, triton.next_power_of_2(head_dim))


def quantize(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    recipe: Recipe,
    scale: float,
    shift: bool = False,
    rotary: Rotary | None = None,
) -> Quantized:
    """Rounds the operands of one attention call by a recipe.

    Args:
        query: (batch, sequence, heads, head_dim), bf16, fp16 or float32, any strides; key and value with their own
            sequence and heads.
        recipe: What to round.
        scale: Of the logits.
        shift: Whether the logsumexp will be wanted, which needs what K's mean took away.
        rotary: A rotary embedding to apply to query and key first: cosines and sines, float32 (sequence, head_dim),
            where channels 2i and 2i + 1 are the parts of one complex number and hold the same values.
    """
    query, key, value = _dense(query), _dense(key), _dense(value)
    (batch, q_len, heads, dim), (_, k_len, kv_heads, _) = query.shape, key.shape
    device, padded = query.device, padded_dim(dim)
    qk = {"int8": 0, "fp8": 1, None: 2}[recipe.qk]
    low, values = qk != 2, recipe.pv is not None
    kind = torch.int8 if qk == 0 else torch.float8_e4m3fn
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    nothing = new(1)
    tables = rotary or (nothing, nothing)
    k_sum = new(batch, kv_heads, _SPLITS, padded) if low else nothing
    v_max = new(batch, kv_heads, _SPLITS, padded) if values else nothing
    strides = (*_strides(query), *_strides(key), *_strides(value))
    shape = {"D": dim, "DP": padded}
    _reduce[(_SPLITS, batch * heads, low + values)](
        query, key, value, *tables, nothing, k_sum, nothing, v_max, *strides, q_len, k_len, heads, kv_heads,
        PER_HEAD=False, ROTATE=rotary is not None, ROWS=_REDUCE_ROWS, SPLITS=_SPLITS, FIRST=0 if low else 1,
        STAGES=_REDUCE_STAGES, num_warps=_REDUCE_WARPS, **shape,
    )  # fmt: skip
    mean = new(batch, kv_heads, padded) if low else nothing
    v_scale = new(batch, kv_heads, dim) if values else nothing
    _combine[(batch * kv_heads,)](
        k_sum, v_max, mean, v_scale, k_len, MEAN=low, VALUES=values, SPLITS=_SPLITS, **shape,
    )  # fmt: skip
    v_len = triton.cdiv(k_len, _ROWS) * _ROWS
    q = new(batch, heads, q_len, dim, dtype=kind) if low else query.transpose(1, 2)
    k = new(batch, kv_heads, k_len, dim, dtype=kind) if low else key.transpose(1, 2)
    v = new(batch, kv_heads, dim, v_len, dtype=torch.float8_e4m3fn) if values else value.transpose(1, 2)
    q_scale = new(batch, heads, q_len) if low else nothing
    k_scale = new(batch, kv_heads, triton.cdiv(k_len, recipe.k_block)) if low else nothing
    shifted = new(batch, heads, q_len) if shift and low else None
    _round[(triton.cdiv(max(q_len if low else 0, v_len), _ROWS), batch * heads, 2 * low + values)](
        query, key, value, *tables, mean, q, k, v, q_scale, k_scale, v_scale, nothing if shifted is None else shifted,
        *strides, q_len, k_len, v_len, heads, kv_heads, scale * LOG2E, scale,
        ROTATE=rotary is not None, BLOCK=hadamard_block(dim), QK=qk, KB=recipe.k_block or _ROWS,
        SHIFT=shifted is not None,
        ROWS=_ROWS, FIRST=0 if values else 1, num_warps=2 * _ROUND_WARPS if qk == 1 else _ROUND_WARPS, **shape,
    )  # fmt: skip
    return Quantized(q, k, v, q_scale, k_scale, v_scale, shifted)


def quantize_per_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    smooth: bool = True,
    spread: bool = True,
    shift: bool = False,
    rotary: Rotary | None = None,
) -> Quantized:
    """Rounds to e4m3 with one scale per key head, as FlashAttention 3 reads it; see `quantize` for the arguments.

    Args:
        smooth: Subtract the keys' mean first.
        spread: Multiply query and key by a Hadamard matrix; see `recipe.py`.
    """
    query, key, value = _dense(query), _dense(key), _dense(value)
    (batch, q_len, heads, dim), (_, k_len, kv_heads, _) = query.shape, key.shape
    device, padded = query.device, padded_dim(dim)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    q_max, k_max, v_max = new(batch, heads, _SPLITS), new(batch, kv_heads, _SPLITS), new(batch, kv_heads, _SPLITS)
    k_sum = new(batch, kv_heads, _SPLITS, padded)
    tables = rotary or (k_sum, k_sum)
    strides = (*_strides(query), *_strides(key), *_strides(value))
    shape = {"D": dim, "DP": padded, "SPLITS": _SPLITS}
    _reduce[(_SPLITS, batch * heads, 3)](
        query, key, value, *tables, q_max, k_sum, k_max, v_max, *strides, q_len, k_len, heads, kv_heads,
        PER_HEAD=True, ROTATE=rotary is not None, ROWS=_REDUCE_ROWS, FIRST=0,
        STAGES=_REDUCE_STAGES, num_warps=_REDUCE_WARPS, **shape,
    )  # fmt: skip
    kind = torch.float8_e4m3fn
    q = new(batch, q_len, heads, dim, dtype=kind)
    k, v = new(batch, k_len, kv_heads, dim, dtype=kind), new(batch, k_len, kv_heads, dim, dtype=kind)
    scales = new(3, batch, kv_heads)
    shifted = new(batch, heads, q_len) if shift and smooth else None
    rows, tiles = (_HEAD_ROWS, _HEAD_TILES) if spread else (_ROWS, 1)
    _round_per_head[(triton.cdiv(max(q_len, k_len), rows * tiles), batch * heads, 3)](
        query, key, value, *tables, q_max, k_sum, k_max, v_max, q, k, v, scales[0], scales[1], scales[2],
        scales if shifted is None else shifted, *strides, q_len, k_len, heads, kv_heads, scale,
        ROTATE=rotary is not None, BLOCK=hadamard_block(dim) if spread else 1, SMOOTH=smooth,
        SHIFT=shifted is not None, G=heads // kv_heads,
        ROWS=rows, TILES=tiles, num_warps=_HEAD_WARPS, **shape,
    )  # fmt: skip
    return Quantized(q, k, v, scales[0], scales[1], scales[2], shifted)
