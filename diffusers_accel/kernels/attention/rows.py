"""What happens to rows of Q, K and V between memory and their rounded values, as device functions in Triton.

The channels of a head are held as four quarters. QK-norm, rotary embedding and the Hadamard matrix then need no value
of another thread, but for the one sum of a norm: a thread loads up to eight neighbouring channels of each quarter, and
the matrix mixes just those 4 x 8.

Imported only by the loaders of kernel records: it needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rounding import store_rounded

# Bounds of largest magnitudes from below and of scales from above: no product of scales under- or overflows, and logits
# stay finite.
_TINY = tl.constexpr(1e-14)
_HUGE = tl.constexpr(1e12)


@triton.jit
def load_rows(base, stride, rows, inside, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    """Rows from `base` as float32, zero outside. KEEP: whether they will be read again, and should stay in L2."""
    POLICY: tl.constexpr = "evict_last" if KEEP else "evict_first"
    at = base + rows.to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def load_quarters(pointer, D: tl.constexpr, W: tl.constexpr):
    """A vector of D channels, float32, as quarters of W; zero beyond them."""
    Q: tl.constexpr = D // 4
    w = tl.arange(0, W)
    return (
        tl.load(pointer + w, mask=w < Q, other=0.0).to(tl.float32),
        tl.load(pointer + Q + w, mask=w < Q, other=0.0).to(tl.float32),
        tl.load(pointer + 2 * Q + w, mask=w < Q, other=0.0).to(tl.float32),
        tl.load(pointer + 3 * Q + w, mask=w < Q, other=0.0).to(tl.float32),
    )


@triton.jit
def rotated(x, cos, sin):
    """Channels times their cosines and sines: neighbours are the two parts of one complex number."""
    real, imaginary = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    return x * cos + tl.join(-imaginary, real).reshape(x.shape) * sin


@triton.jit
def _table(base, stride, rows, inside, W: tl.constexpr):
    """W columns of a rotary embedding's table."""
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + tl.arange(0, W)[None, :], mask=inside, other=0.0)


@triton.jit
def load_head(
    base, stride, rows, length, norm_ptr, factor_ptr, eps, cos_ptr, sin_ptr, table_stride,
    NORM: tl.constexpr, ROTATE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Rows of one head of K in one piece, float32 (rows, DP), with QK-norm and rotary embedding applied, to be read
    again later. NORM: "head" over its channels, "all" over those of all heads, with the rows' factors at `factor_ptr`,
    or "". ROTATE: "neighbours", "halves" or "", see `record.Rotary`."""
    d = tl.arange(0, DP)
    inside = (rows < length)[:, None] & (d < D)[None, :]
    x = load_rows(base, stride, rows, inside, DP, True)
    if NORM != "":
        if NORM == "all":
            factor = tl.load(factor_ptr + rows, mask=rows < length, other=0.0)[:, None]
        else:
            factor = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / D) + eps)[:, None]
        x *= factor * tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if ROTATE == "neighbours":
        cos = _table(cos_ptr, table_stride, rows, inside, DP)
        x = rotated(x, cos, _table(sin_ptr, table_stride, rows, inside, DP))
    if ROTATE == "halves":
        # The other part of each number belongs to another thread: it is read once more, from the cache.
        other = tl.where(d < D // 2, d + D // 2, d - D // 2)
        at = rows.to(tl.int64)[:, None]
        y = tl.load(base + at * stride + other[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM != "":
            y *= factor * tl.load(norm_ptr + other, mask=d < D, other=0.0).to(tl.float32)[None, :]
        column = tl.where(d < D // 2, d, other)[None, :]
        cos = tl.load(cos_ptr + at * table_stride + column, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + at * table_stride + column, mask=inside, other=0.0)
        x = x * cos + tl.where((d < D // 2)[None, :], -y, y) * sin
    return x


@triton.jit
def load_parted(base, stride, rows, inside, D: tl.constexpr, W: tl.constexpr):
    """Rows as four quarters, float32 (rows, W) each."""
    Q: tl.constexpr = D // 4
    return (
        load_rows(base, stride, rows, inside, W, False),
        load_rows(base + Q, stride, rows, inside, W, False),
        load_rows(base + 2 * Q, stride, rows, inside, W, False),
        load_rows(base + 3 * Q, stride, rows, inside, W, False),
    )


@triton.jit
def squares(x):
    """The rows' sums of squares."""
    return tl.sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3], 1)


@triton.jit
def turned(
    x, rows, inside, cos_ptr, sin_ptr, table_stride, ROTATE: tl.constexpr, D: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Quarters of rows with a rotary embedding applied: "neighbours", "halves" or "", see `record.Rotary`."""
    Q: tl.constexpr = D // 4
    a, b, c, d = x[0], x[1], x[2], x[3]
    if ROTATE != "":
        cos0 = _table(cos_ptr, table_stride, rows, inside, W)
        sin0 = _table(sin_ptr, table_stride, rows, inside, W)
        cos1 = _table(cos_ptr + Q, table_stride, rows, inside, W)
        sin1 = _table(sin_ptr + Q, table_stride, rows, inside, W)
        if ROTATE == "halves":
            a, c = a * cos0 - c * sin0, c * cos0 + a * sin0
            b, d = b * cos1 - d * sin1, d * cos1 + b * sin1
        else:
            a = rotated(a, cos0, sin0)
            b = rotated(b, cos1, sin1)
            cos2 = _table(cos_ptr + 2 * Q, table_stride, rows, inside, W)
            c = rotated(c, cos2, _table(sin_ptr + 2 * Q, table_stride, rows, inside, W))
            cos3 = _table(cos_ptr + 3 * Q, table_stride, rows, inside, W)
            d = rotated(d, cos3, _table(sin_ptr + 3 * Q, table_stride, rows, inside, W))
    return (a, b, c, d)


@triton.jit
def load_heads(
    base, stride, rows, length, norm_ptr, factor_ptr, eps, cos_ptr, sin_ptr, table_stride,
    NORM: tl.constexpr, ROTATE: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Rows of one head of Q or K as four quarters, float32 (rows, W) each, with QK-norm and rotary embedding applied;
    and which of their values exist. NORM and ROTATE as in `load_head`."""
    inside = (rows < length)[:, None] & (tl.arange(0, W) < D // 4)[None, :]
    x = load_parted(base, stride, rows, inside, D, W)
    if NORM != "":
        weight = load_quarters(norm_ptr, D, W)
        if NORM == "all":
            factor = tl.load(factor_ptr + rows, mask=rows < length, other=0.0)[:, None]
        else:
            factor = tl.rsqrt(squares(x) * (1.0 / D) + eps)[:, None]
        x = (
            x[0] * (factor * weight[0][None, :]),
            x[1] * (factor * weight[1][None, :]),
            x[2] * (factor * weight[2][None, :]),
            x[3] * (factor * weight[3][None, :]),
        )
    return turned(x, rows, inside, cos_ptr, sin_ptr, table_stride, ROTATE, D, W), inside


@triton.jit
def without(x, mean, inside):
    """Rows less a vector, zero where there is no row."""
    return (
        tl.where(inside, x[0] - mean[0][None, :], 0.0),
        tl.where(inside, x[1] - mean[1][None, :], 0.0),
        tl.where(inside, x[2] - mean[2][None, :], 0.0),
        tl.where(inside, x[3] - mean[3][None, :], 0.0),
    )


@triton.jit
def times(x, vector):
    """The rows' products with a vector."""
    a, b = x[0] * vector[0][None, :], x[1] * vector[1][None, :]
    return tl.sum(a + b + x[2] * vector[2][None, :] + x[3] * vector[3][None, :], 1)


@triton.jit
def largest(x):
    """Element by element, the largest magnitude among the quarters."""
    return tl.maximum(tl.maximum(tl.abs(x[0]), tl.abs(x[1])), tl.maximum(tl.abs(x[2]), tl.abs(x[3])))


@triton.jit
def _mixed(x, LEVELS: tl.constexpr):
    """(..., 2, 2) with LEVELS twos, times a Hadamard matrix over them."""
    one, two = tl.split(x)
    plus, minus = one + two, one - two
    if LEVELS > 1:
        plus, minus = _mixed(plus, LEVELS - 1), _mixed(minus, LEVELS - 1)
    return tl.join(plus, minus)


@triton.jit
def _mixed_within(x, LEVELS: tl.constexpr):
    """Every 2^LEVELS neighbouring channels times a Hadamard matrix."""
    ROWS: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    if LEVELS == 3:
        return _mixed(x.reshape(ROWS, W // 8, 2, 2, 2), 3).reshape(ROWS, W)
    elif LEVELS == 2:
        return _mixed(x.reshape(ROWS, W // 4, 2, 2), 2).reshape(ROWS, W)
    elif LEVELS == 1:
        return _mixed(x.reshape(ROWS, W // 2, 2), 1).reshape(ROWS, W)
    else:
        return x


@triton.jit
def spread(x, LEVELS: tl.constexpr):
    """Rows times the matrix of `recipe.hadamard` times `spread_factor`: up to that factor it leaves every QK as it is,
    and spreads what a few channels hold, so that their rounding does not decide the error alone."""
    a, b, c, d = x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3]
    return (
        _mixed_within(a + c, LEVELS),
        _mixed_within(b + d, LEVELS),
        _mixed_within(a - c, LEVELS),
        _mixed_within(b - d, LEVELS),
    )


@triton.constexpr_function
def spread_factor(levels):
    """By how much `spread` lengthens a row; what it can make of the largest value is the same."""
    return 2.0 ** (0.5 * (levels + 2))


@triton.jit
def scale_of(amax, LARGEST: tl.constexpr):
    """The scale that takes `amax` to the largest value of a type; no value can leave the type's range by it."""
    return tl.maximum(amax, _TINY) / LARGEST


@triton.jit
def bounded(scale):
    """A scale to be stored: no product of two overflows."""
    return tl.minimum(scale, _HUGE)


@triton.jit
def store_heads(base, x, each, inside, INT8: tl.constexpr, Q: tl.constexpr, W: tl.constexpr):
    """Four quarters of rows, times one factor per row, to `base`: pointers to the rows' first channels, (rows,)."""
    at = base[:, None] + tl.arange(0, W)[None, :]
    store_rounded(at, x[0] * each, inside, INT8)
    store_rounded(at + Q, x[1] * each, inside, INT8)
    store_rounded(at + 2 * Q, x[2] * each, inside, INT8)
    store_rounded(at + 3 * Q, x[3] * each, inside, INT8)
