"""QK-norm and rotary embedding in one pass, in Triton: query and key are read once and written as attention wants them.

A program takes one token with all its heads, so a norm over each head and one over all heads at once cost the same, and
tables that all heads share are read once. Imported only where a GPU is met: it needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from .rows import load_heads, load_parted, squares, turned


@triton.jit
def token(
    base, stride, heads, norm_ptr, eps, cos_ptr, sin_ptr, table_stride,
    NORM: tl.constexpr, ROTATE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token's heads, normed and rotated, as four quarters, float32 (HEADS, W) each; and which of their values
    exist. NORM: "head" over each head's channels, "all" over those of all, or ""."""
    Q: tl.constexpr = D // 4
    h = tl.arange(0, HEADS)
    if NORM == "all":
        inside = (h < heads)[:, None] & (tl.arange(0, W) < Q)[None, :]
        x = load_parted(base, stride, h, inside, D, W)
        factor = tl.rsqrt(tl.sum(squares(x), 0) / (heads * D) + eps)
        weight = load_parted(norm_ptr, D, h, inside, D, W)
        x = (
            x[0] * (factor * weight[0]),
            x[1] * (factor * weight[1]),
            x[2] * (factor * weight[2]),
            x[3] * (factor * weight[3]),
        )
        x = turned(x, h, inside, cos_ptr, sin_ptr, table_stride, ROTATE, D, W)
    else:
        x, inside = load_heads(
            base, stride, h, heads, norm_ptr, norm_ptr, eps, cos_ptr, sin_ptr, table_stride, NORM, ROTATE, D, W
        )
    return x, inside


@triton.jit
def _written(
    base, stride, out, heads, norm_ptr, eps, cos_ptr, sin_ptr, table_stride,
    NORM: tl.constexpr, ROTATE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    Q: tl.constexpr = D // 4
    x, inside = token(
        base, stride, heads, norm_ptr, eps, cos_ptr, sin_ptr, table_stride, NORM, ROTATE, D, W, HEADS
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
def _prepare(
    q_ptr, k_ptr, qo_ptr, ko_ptr, qn_ptr, kn_ptr, qcos_ptr, qsin_ptr, kcos_ptr, ksin_ptr,
    sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, sqo_b, sqo_s, sko_b, sko_s, sqt_b, sqt_s, sqt_h, skt_b, skt_s, skt_h,
    q_len, k_len, q_heads, k_heads, eps,
    NORM: tl.constexpr, ROTATE: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, batch, which): which = 0 is the query, 1 the key."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        if s < q_len:
            turn = b * sqt_b + s * sqt_s
            _written(
                q_ptr + b * sq_b + s * sq_s, sq_h, qo_ptr + b * sqo_b + s * sqo_s, q_heads, qn_ptr, eps,
                qcos_ptr + turn, qsin_ptr + turn, sqt_h, NORM, ROTATE, D, W, HEADS,
            )  # fmt: skip
    elif s < k_len:
        turn = b * skt_b + s * skt_s
        _written(
            k_ptr + b * sk_b + s * sk_s, sk_h, ko_ptr + b * sko_b + s * sko_s, k_heads, kn_ptr, eps,
            kcos_ptr + turn, ksin_ptr + turn, skt_h, NORM, ROTATE, D, W, HEADS,
        )  # fmt: skip


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def turns(table: torch.Tensor | None) -> list[int]:
    """A rotary table's strides, with 0 where it has one for all."""
    if table is None:
        return [0, 0, 0]
    return [0 if table.shape[place] == 1 else table.stride(place) for place in range(3)]


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    query_out: torch.Tensor,
    key_out: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None,
    halves: bool,
    warps: int | None = None,
) -> None:
    """Writes query and key with their norm and rotation.

    Args:
        query: (batch, sequence, heads, head_dim), any strides but the last; `key` likewise.
        query_out: Of the same shape, heads and channels next to each other; `key_out` likewise.
        norms: Weights of RMS norms: (head_dim,) each, over the channels of a head, or (heads * head_dim,), over all.
        eps: The norms'.
        tables: The query's cosines and sines, then the key's, float32, as `record.Rotary` has them.
        halves: As there.
        warps: Of a program, instead of those measured (`benchmarks/rows.py --tiles`).
    """
    query, key = (item if item.stride(-1) == 1 else item.contiguous() for item in (query, key))
    batch, q_len, q_heads, dim = query.shape
    k_len, k_heads = key.shape[1:3]
    padded = max(64, triton.next_power_of_2(dim))
    heads = triton.next_power_of_2(max(q_heads, k_heads))
    weights = norms or (query, query)
    kind = "" if norms is None else "head" if weights[0].numel() == dim else "all"
    turning = tables or (query,) * 4
    steps = [*turns(tables[0]), *turns(tables[2])] if tables else [0] * 6
    _prepare[(max(q_len, k_len), batch, 2)](
        query, key, query_out, key_out, *weights, *turning, *_strides(query), *_strides(key),
        query_out.stride(0), query_out.stride(1), key_out.stride(0), key_out.stride(1), *steps, q_len, k_len, q_heads,
        k_heads, eps, NORM=kind, ROTATE="" if tables is None else "halves" if halves else "neighbours", D=dim,
        W=padded // 4, HEADS=heads, num_warps=warps or max(1, min(8, heads * padded // 1024)),
    )  # fmt: skip
