"""What the quantizers are told of a QK-norm. Over a head's channels they do it in passing. Over the channels of all
heads a token must have been read whole before: one launch finds by what the norm multiplies each token.

Imported only by the loaders of kernel records: it needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from .record import QKNorm

# Tokens of a program.
_TOKENS = 4


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len"])
def _factors(
    q_ptr, k_ptr, qf_ptr, kf_ptr, sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, q_len, k_len, heads, eps,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Program (tokens, batch, which): by what an RMS norm over all heads multiplies a token; which = 0 is Q, 1 is K."""
    b, which = tl.program_id(1).to(tl.int64), tl.program_id(2)
    h, d = tl.arange(0, HEADS), tl.arange(0, DP)
    inside = (h < heads)[:, None] & (d < D)[None, :]
    length = q_len if which == 0 else k_len
    for each in tl.static_range(TOKENS):
        s = tl.program_id(0) * TOKENS + each
        if s < length:
            if which == 0:
                at = q_ptr + b * sq_b + s.to(tl.int64) * sq_s + h[:, None] * sq_h + d[None, :]
            else:
                at = k_ptr + b * sk_b + s.to(tl.int64) * sk_s + h[:, None] * sk_h + d[None, :]
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            factor = tl.rsqrt(tl.sum(x * x) / (heads * D) + eps)
            if which == 0:
                tl.store(qf_ptr + b * q_len + s, factor)
            else:
                tl.store(kf_ptr + b * k_len + s, factor)


def strides_of(x: torch.Tensor) -> tuple[int, int, int]:
    """Of batch, sequence and heads."""
    return x.stride(0), x.stride(1), x.stride(2)


def padded_dim(head_dim: int) -> int:
    """Channels that a kernel holds of a head."""
    return max(64, triton.next_power_of_2(head_dim))


@dataclass(frozen=True)
class AskedNorm:
    """A norm, as kernels take it.

    Attributes:
        kind: Over which channels: see `rows.load_head`.
        channels: How many these are.
        weights: Of query and key.
        factors: Float32 (batch, sequence) of query and key, of a norm over all heads.
        eps: The norm's.
    """

    kind: str
    channels: int
    weights: tuple[torch.Tensor, torch.Tensor]
    factors: tuple[torch.Tensor, torch.Tensor]
    eps: float


def asked_norm(norm: QKNorm | None, query: torch.Tensor, key: torch.Tensor, nothing: torch.Tensor) -> AskedNorm:
    """A norm of query and key, (batch, sequence, heads, head_dim), for their quantizer; `nothing` stands for what there
    is none of."""
    if norm is None:
        return AskedNorm("", 1, (nothing, nothing), (nothing, nothing), 0.0)
    (batch, q_len, heads, dim), k_len = query.shape, key.shape[1]
    if norm.query.numel() == dim:
        return AskedNorm("head", dim, (norm.query, norm.key), (nothing, nothing), norm.eps)
    factors = tuple(query.new_empty((batch, length), dtype=torch.float32) for length in (q_len, k_len))
    width, padded = triton.next_power_of_2(heads), padded_dim(dim)
    _factors[(triton.cdiv(max(q_len, k_len), _TOKENS), batch, 2)](
        query, key, *factors, *strides_of(query), *strides_of(key), q_len, k_len, heads, norm.eps, D=dim, DP=padded,
        HEADS=width, TOKENS=_TOKENS, num_warps=max(1, min(8, width * padded // 1024)),
    )  # fmt: skip
    return AskedNorm("all", heads * dim, (norm.query, norm.key), (factors[0], factors[1]), norm.eps)
