"""The QK-norm of a quantizing kernel: the norm's weights, and each token's 1 / RMS for a norm over all heads.

A quantizer reads one head at a time, so it computes a norm over the channels of a head itself. A norm over the channels
of all heads needs the whole token first: one launch computes 1 / RMS of each token beforehand.

Only modules of Triton kernels import this one: it needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from .record import QKNorm

# Tokens per program.
_TOKENS = 4


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len"])
def _rstd(
    q_ptr, k_ptr, q_rstd_ptr, k_rstd_ptr, sq_b, sq_s, sq_h, sk_b, sk_s, sk_h, q_len, k_len, heads, eps,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """1 / RMS of each token, over all heads. Program (tokens, batch, which): which = 0 is Q, 1 is K."""
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
            rstd = tl.rsqrt(tl.sum(x * x) / (heads * D) + eps)
            if which == 0:
                tl.store(q_rstd_ptr + b * q_len + s, rstd)
            else:
                tl.store(k_rstd_ptr + b * k_len + s, rstd)


def strides_of(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, sequence and heads."""
    return x.stride(0), x.stride(1), x.stride(2)


def padded_dim(head_dim: int) -> int:
    """Channels of a head in a kernel's registers: a power of two, 64 or more."""
    return max(64, triton.next_power_of_2(head_dim))


@dataclass(frozen=True)
class NormArguments:
    """A QK-norm in the form of a kernel's arguments.

    Attributes:
        kind: `"head"` for a norm over the channels of each head, `"all"` over the channels of all heads, `""` for none.
        channels: Number of channels that the norm is over.
        weights: Weights of query and key, (head_dim,) or (heads * head_dim,).
        rstd: 1 / RMS of each token of query and key, float32 (batch, sequence), for kind `"all"` alone.
        eps: Epsilon of the norm.
    """

    kind: str
    channels: int
    weights: tuple[torch.Tensor, torch.Tensor]
    rstd: tuple[torch.Tensor, torch.Tensor]
    eps: float


def norm_arguments(
    norm: QKNorm | None, query: torch.Tensor, key: torch.Tensor, placeholder: torch.Tensor
) -> NormArguments:
    """A QK-norm in the form of a quantizer's arguments.

    Args:
        norm: The norm; `None` without one.
        query: (batch, sequence, heads, head_dim).
        key: (batch, key sequence, kv_heads, head_dim).
        placeholder: A tensor for pointers that the kernel does not read.
    """
    if norm is None:
        return NormArguments("", 1, (placeholder, placeholder), (placeholder, placeholder), 0.0)
    (batch, q_len, heads, dim), k_len = query.shape, key.shape[1]
    if norm.query.numel() == dim:
        return NormArguments("head", dim, (norm.query, norm.key), (placeholder, placeholder), norm.eps)
    rstd = tuple(query.new_empty((batch, length), dtype=torch.float32) for length in (q_len, k_len))
    width, padded = triton.next_power_of_2(heads), padded_dim(dim)
    _rstd[(triton.cdiv(max(q_len, k_len), _TOKENS), batch, 2)](
        query, key, *rstd, *strides_of(query), *strides_of(key), q_len, k_len, heads, norm.eps, D=dim, DP=padded,
        HEADS=width, TOKENS=_TOKENS, num_warps=max(1, min(8, width * padded // 1024)),
    )  # fmt: skip
    return NormArguments("all", heads * dim, (norm.query, norm.key), (rstd[0], rstd[1]), norm.eps)
