"""QK-norm and rotary embedding in one pass, in Triton: query and key are read once and written in attention's layout.

A program takes one token with all its heads. A norm over each head and a norm over all heads therefore cost the same.
Rotary tables that all heads share are read once. Only functions that run on a GPU import this module: it needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from ..operands import row_contiguous
from .norm import padded_dim, strides_of
from .record import QKNorm, Rotary
from .rows import apply_rope, load_heads, load_quarters, sum_of_squares


@triton.jit
def load_token(
    base, stride, heads, norm_ptr, eps, cos_ptr, sin_ptr, table_stride,
    NORM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """(four quarters of the channels, mask of existing values) of one token's heads, normed and rotated: float32
    (HEADS, W) each. NORM: "head" over the channels of each head, "all" over the channels of all heads, "" for none.
    ROPE: "interleaved" or "half" as in `record.Rotary`, "" for none."""
    Q: tl.constexpr = D // 4
    h = tl.arange(0, HEADS)
    if NORM == "all":
        inside = (h < heads)[:, None] & (tl.arange(0, W) < Q)[None, :]
        x = load_quarters(base, stride, h, inside, D, W)
        rstd = tl.rsqrt(tl.sum(sum_of_squares(x), 0) / (heads * D) + eps)
        weight = load_quarters(norm_ptr, D, h, inside, D, W)
        x = (
            x[0] * (rstd * weight[0]),
            x[1] * (rstd * weight[1]),
            x[2] * (rstd * weight[2]),
            x[3] * (rstd * weight[3]),
        )
        x = apply_rope(x, h, inside, cos_ptr, sin_ptr, table_stride, ROPE, D, W)
    else:
        x, inside = load_heads(
            base, stride, h, heads, norm_ptr, norm_ptr, eps, cos_ptr, sin_ptr, table_stride, NORM, ROPE, D, W
        )
    return x, inside


@triton.jit
def _store_token(
    base, stride, out, heads, norm_ptr, eps, cos_ptr, sin_ptr, table_stride,
    NORM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    Q: tl.constexpr = D // 4
    x, inside = load_token(
        base, stride, heads, norm_ptr, eps, cos_ptr, sin_ptr, table_stride, NORM, ROPE, D, W, HEADS
    )  # fmt: skip
    h = tl.arange(0, HEADS)
    at = out + h[:, None] * D + tl.arange(0, W)[None, :]
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(at, x[0].to(kind), mask=inside)
    tl.store(at + Q, x[1].to(kind), mask=inside)
    tl.store(at + 2 * Q, x[2].to(kind), mask=inside)
    tl.store(at + 3 * Q, x[3].to(kind), mask=inside)


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len"])
def _qk_norm_rope(
    q_ptr, k_ptr, qo_ptr, ko_ptr, qn_ptr, kn_ptr, qcos_ptr, qsin_ptr, kcos_ptr, ksin_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sqo_b, sqo_s, sko_b, sko_s, sqt_b, sqt_s, sqt_h, skt_b, skt_s, skt_h,
    q_len, k_len, q_heads, k_heads, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, batch, which): which = 0 is the query, 1 the key."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        if s < q_len:
            table_at = b * sqt_b + s * sqt_s
            _store_token(
                q_ptr + b * sq_b + s * sq_s, sq_h, qo_ptr + b * sqo_b + s * sqo_s, q_heads, qn_ptr, eps,
                qcos_ptr + table_at, qsin_ptr + table_at, sqt_h, NORM, ROPE, D, W, HEADS,
            )  # fmt: skip
    elif s < k_len:
        table_at = b * skt_b + s * skt_s
        _store_token(
            k_ptr + b * sk_b + s * sk_s, sk_h, ko_ptr + b * sko_b + s * sko_s, k_heads, kn_ptr, eps,
            kcos_ptr + table_at, ksin_ptr + table_at, skt_h, NORM, ROPE, D, W, HEADS,
        )  # fmt: skip


def table_strides(table: torch.Tensor | None) -> list[int]:
    """Strides of batch, sequence and heads of a rotary table. 0 for a dimension of size 1, or without a table."""
    if table is None:
        return [0, 0, 0]
    return [0 if table.shape[dim] == 1 else table.stride(dim) for dim in range(3)]


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    query_out: torch.Tensor,
    key_out: torch.Tensor,
    norm: QKNorm | None,
    rotary: Rotary | None,
    warps: int | None = None,
) -> None:
    """Writes query and key with norm and rotation applied.

    Args:
        query: (batch, sequence, heads, head_dim), any strides. head_dim is a multiple of 8.
        key: (batch, key sequence, key heads, head_dim), any strides.
        query_out: Receives the query: the query's shape, with heads and channels contiguous.
        key_out: Receives the key: the key's shape, with heads and channels contiguous.
        norm: An RMS norm to apply to query and key; `None` without one.
        rotary: A rotary embedding to apply to query and key, after the norm; `None` without one.
        warps: Warps of a program; by default the number measured with `benchmarks/rows.py --tiles`.
    """
    query, key = row_contiguous(query), row_contiguous(key)
    batch, q_len, q_heads, dim = query.shape
    k_len, k_heads = key.shape[1:3]
    padded = padded_dim(dim)
    heads = triton.next_power_of_2(max(q_heads, k_heads))
    weights, eps, norm_over = (query, query), 0.0, ""
    if norm is not None:
        weights, eps, norm_over = (norm.query, norm.key), norm.eps, "head" if norm.query.numel() == dim else "all"
    tables, strides, rope = [query] * 4, [0] * 6, ""
    if rotary is not None:
        tables, rope = [*rotary.query, *rotary.key], rotary.rope_style
        strides = [*table_strides(rotary.query[0]), *table_strides(rotary.key[0])]
    _qk_norm_rope[(max(q_len, k_len), batch, 2)](
        query, key, query_out, key_out, *weights, *tables, *strides_of(query), *strides_of(key),
        query_out.stride(0), query_out.stride(1), key_out.stride(0), key_out.stride(1), *strides, q_len, k_len,
        q_heads, k_heads, eps, NORM=norm_over, ROPE=rope, D=dim,
        W=padded // 4, HEADS=heads, num_warps=warps or max(1, min(8, heads * padded // 1024)),
    )  # fmt: skip
