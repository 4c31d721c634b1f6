"""Rows of Q, K and V as Triton device functions: load, QK-norm, rotary embedding, Hadamard transform, scale, store.

The channels of a head are held as four quarters. A thread loads up to eight neighbouring channels of each quarter, and
the Hadamard matrix mixes just those 4 x 8 channels. Rotation and transform therefore need no value of another thread;
a norm exchanges one sum.

Only modules of Triton kernels import this one: it needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rounding import store_rounded

# The least magnitude that a scale is made from, and the largest scale: products of scales neither under- nor overflow,
# and logits stay finite.
_TINY = tl.constexpr(1e-14)
_HUGE = tl.constexpr(1e12)


@triton.jit
def load_rows(base, stride, rows, inside, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    """Rows from `base` as float32, zero outside. KEEP: the rows are read again and should stay in L2."""
    POLICY: tl.constexpr = "evict_last" if KEEP else "evict_first"
    at = base + rows.to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def load_vector_quarters(pointer, D: tl.constexpr, W: tl.constexpr):
    """A vector of D channels as four quarters, float32 (W,) each, zero beyond D // 4."""
    Q: tl.constexpr = D // 4
    w = tl.arange(0, W)
    return (
        tl.load(pointer + w, mask=w < Q, other=0.0).to(tl.float32),
        tl.load(pointer + Q + w, mask=w < Q, other=0.0).to(tl.float32),
        tl.load(pointer + 2 * Q + w, mask=w < Q, other=0.0).to(tl.float32),
        tl.load(pointer + 3 * Q + w, mask=w < Q, other=0.0).to(tl.float32),
    )


@triton.jit
def rotate_interleaved(x, cos, sin):
    """A rotary embedding of rows whose neighbouring channels form a complex number."""
    real, imaginary = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    return x * cos + tl.join(-imaginary, real).reshape(x.shape) * sin


@triton.jit
def _table(base, stride, rows, inside, W: tl.constexpr):
    """W columns of a rotary table, for each row."""
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + tl.arange(0, W)[None, :], mask=inside, other=0.0)


@triton.jit
def load_head(
    base, stride, rows, length, norm_ptr, rstd_ptr, eps, cos_ptr, sin_ptr, table_stride,
    NORM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Rows of one head of K in one piece, float32 (rows, DP), with QK-norm and rotary embedding applied. The rows stay
    in L2 for a later read. NORM: "head" over the channels of the head, "all" over the channels of all heads, with the
    rows' 1 / RMS at `rstd_ptr`, "" for none. ROPE: "interleaved" or "half" as in `record.Rotary`, "" for none."""
    d = tl.arange(0, DP)
    inside = (rows < length)[:, None] & (d < D)[None, :]
    x = load_rows(base, stride, rows, inside, DP, True)
    if NORM != "":
        if NORM == "all":
            rstd = tl.load(rstd_ptr + rows, mask=rows < length, other=0.0)[:, None]
        else:
            rstd = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / D) + eps)[:, None]
        x *= rstd * tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if ROPE == "interleaved":
        cos = _table(cos_ptr, table_stride, rows, inside, DP)
        x = rotate_interleaved(x, cos, _table(sin_ptr, table_stride, rows, inside, DP))
    if ROPE == "half":
        # Another thread holds the other part of each complex number: it is read once more, from the cache.
        other = tl.where(d < D // 2, d + D // 2, d - D // 2)
        at = rows.to(tl.int64)[:, None]
        y = tl.load(base + at * stride + other[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM != "":
            y *= rstd * tl.load(norm_ptr + other, mask=d < D, other=0.0).to(tl.float32)[None, :]
        column = tl.where(d < D // 2, d, other)[None, :]
        cos = tl.load(cos_ptr + at * table_stride + column, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + at * table_stride + column, mask=inside, other=0.0)
        x = x * cos + tl.where((d < D // 2)[None, :], -y, y) * sin
    return x


@triton.jit
def load_quarters(base, stride, rows, inside, D: tl.constexpr, W: tl.constexpr):
    """Rows as four quarters, float32 (rows, W) each."""
    Q: tl.constexpr = D // 4
    return (
        load_rows(base, stride, rows, inside, W, False),
        load_rows(base + Q, stride, rows, inside, W, False),
        load_rows(base + 2 * Q, stride, rows, inside, W, False),
        load_rows(base + 3 * Q, stride, rows, inside, W, False),
    )


@triton.jit
def sum_of_squares(x):
    """The sum of squares of each row."""
    return tl.sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3], 1)


@triton.jit
def apply_rope(
    x, rows, inside, cos_ptr, sin_ptr, table_stride, ROPE: tl.constexpr, D: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """A rotary embedding of rows as quarters. ROPE: "interleaved" or "half" as in `record.Rotary`, "" for none."""
    Q: tl.constexpr = D // 4
    a, b, c, d = x[0], x[1], x[2], x[3]
    if ROPE != "":
        cos0 = _table(cos_ptr, table_stride, rows, inside, W)
        sin0 = _table(sin_ptr, table_stride, rows, inside, W)
        cos1 = _table(cos_ptr + Q, table_stride, rows, inside, W)
        sin1 = _table(sin_ptr + Q, table_stride, rows, inside, W)
        if ROPE == "half":
            a, c = a * cos0 - c * sin0, c * cos0 + a * sin0
            b, d = b * cos1 - d * sin1, d * cos1 + b * sin1
        else:
            a = rotate_interleaved(a, cos0, sin0)
            b = rotate_interleaved(b, cos1, sin1)
            cos2 = _table(cos_ptr + 2 * Q, table_stride, rows, inside, W)
            c = rotate_interleaved(c, cos2, _table(sin_ptr + 2 * Q, table_stride, rows, inside, W))
            cos3 = _table(cos_ptr + 3 * Q, table_stride, rows, inside, W)
            d = rotate_interleaved(d, cos3, _table(sin_ptr + 3 * Q, table_stride, rows, inside, W))
    return (a, b, c, d)


@triton.jit
def load_heads(
    base, stride, rows, length, norm_ptr, rstd_ptr, eps, cos_ptr, sin_ptr, table_stride,
    NORM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Rows of one head of Q or K as four quarters, float32 (rows, W) each, with QK-norm and rotary embedding applied;
    and the mask of values that exist. NORM: "head" over the channels of the head, "all" over the channels of all heads,
    with the rows' 1 / RMS at `rstd_ptr`, "" for none. ROPE: "interleaved", "half" or "" for none."""
    inside = (rows < length)[:, None] & (tl.arange(0, W) < D // 4)[None, :]
    x = load_quarters(base, stride, rows, inside, D, W)
    if NORM != "":
        weight = load_vector_quarters(norm_ptr, D, W)
        if NORM == "all":
            rstd = tl.load(rstd_ptr + rows, mask=rows < length, other=0.0)[:, None]
        else:
            rstd = tl.rsqrt(sum_of_squares(x) * (1.0 / D) + eps)[:, None]
        x = (
            x[0] * (rstd * weight[0][None, :]),
            x[1] * (rstd * weight[1][None, :]),
            x[2] * (rstd * weight[2][None, :]),
            x[3] * (rstd * weight[3][None, :]),
        )
    return apply_rope(x, rows, inside, cos_ptr, sin_ptr, table_stride, ROPE, D, W), inside


@triton.jit
def subtract_vector(x, mean, inside):
    """Rows minus a vector, zero where there is no row."""
    return (
        tl.where(inside, x[0] - mean[0][None, :], 0.0),
        tl.where(inside, x[1] - mean[1][None, :], 0.0),
        tl.where(inside, x[2] - mean[2][None, :], 0.0),
        tl.where(inside, x[3] - mean[3][None, :], 0.0),
    )


@triton.jit
def dot_vector(x, vector):
    """The dot product of each row with a vector."""
    a, b = x[0] * vector[0][None, :], x[1] * vector[1][None, :]
    return tl.sum(a + b + x[2] * vector[2][None, :] + x[3] * vector[3][None, :], 1)


@triton.jit
def quarters_abs_max(x):
    """The largest magnitude among the four quarters, element by element."""
    return tl.maximum(tl.maximum(tl.abs(x[0]), tl.abs(x[1])), tl.maximum(tl.abs(x[2]), tl.abs(x[3])))


@triton.jit
def _butterfly(x, LEVELS: tl.constexpr):
    """A fast Hadamard transform over the last LEVELS dimensions, of size 2 each."""
    one, two = tl.split(x)
    plus, minus = one + two, one - two
    if LEVELS > 1:
        plus, minus = _butterfly(plus, LEVELS - 1), _butterfly(minus, LEVELS - 1)
    return tl.join(plus, minus)


@triton.jit
def _butterflies(x, LEVELS: tl.constexpr):
    """A fast Hadamard transform over every 2^LEVELS neighbouring channels."""
    ROWS: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    if LEVELS == 3:
        return _butterfly(x.reshape(ROWS, W // 8, 2, 2, 2), 3).reshape(ROWS, W)
    elif LEVELS == 2:
        return _butterfly(x.reshape(ROWS, W // 4, 2, 2), 2).reshape(ROWS, W)
    elif LEVELS == 1:
        return _butterfly(x.reshape(ROWS, W // 2, 2), 1).reshape(ROWS, W)
    else:
        return x


@triton.jit
def hadamard(x, LEVELS: tl.constexpr):
    """Rows times the orthogonal `recipe.hadamard_matrix`, which leaves QK as it is, times `hadamard_gain`. The
    transform spreads the values of outlying channels over their group, so that their rounding does not decide the error
    alone."""
    a, b, c, d = x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3]
    return (
        _butterflies(a + c, LEVELS),
        _butterflies(b + d, LEVELS),
        _butterflies(a - c, LEVELS),
        _butterflies(b - d, LEVELS),
    )


@triton.constexpr_function
def hadamard_gain(levels):
    """The factor by which `hadamard` lengthens a row; also the bound of its growth of the largest value."""
    return 2.0 ** (0.5 * (levels + 2))


@triton.jit
def scale_from_amax(amax, LARGEST: tl.constexpr):
    """The scale that maps `amax` to the largest value of a type, so that no value leaves the type's range."""
    return tl.maximum(amax, _TINY) / LARGEST


@triton.jit
def bounded_scale(scale):
    """A scale for storage, bounded so that the product of two scales does not overflow."""
    return tl.minimum(scale, _HUGE)


@triton.jit
def store_heads(base, x, each, inside, INT8: tl.constexpr, Q: tl.constexpr, W: tl.constexpr):
    """Stores four quarters of rows, times one factor per row, rounded. `base`: pointers to the first channel of each
    row, (rows,). INT8: int8 instead of e4m3."""
    at = base[:, None] + tl.arange(0, W)[None, :]
    store_rounded(at, x[0] * each, inside, INT8)
    store_rounded(at + Q, x[1] * each, inside, INT8)
    store_rounded(at + 2 * Q, x[2] * each, inside, INT8)
    store_rounded(at + 3 * Q, x[3] * each, inside, INT8)
