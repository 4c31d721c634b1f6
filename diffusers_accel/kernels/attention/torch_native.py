"""Attention kernels that torch ships: SDPA's own choice, cuDNN's, FlashAttention 2, and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...core.platform import has_module
from .record import KERNELS, AttentionFunction, AttentionKernel, key_bias

HALF = (torch.bfloat16, torch.float16)
EIGHTS = tuple(range(8, 257, 8))


def scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` in our layout: (batch, sequence, heads, head_dim) in and out."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return out.transpose(1, 2)


def repeat_heads(query: torch.Tensor, *grouped: torch.Tensor) -> list[torch.Tensor]:
    """Key and value with as many heads as the query, for kernels that want them so."""
    groups = query.shape[2] // grouped[0].shape[2]
    return [item.repeat_interleave(groups, dim=2) if groups > 1 else item for item in grouped]


def _forced(backend: str, with_lse: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> AttentionFunction:
    """SDPA with one backend; the LSE, which the public function does not give, by the operator behind it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        return_lse: bool = False,
    ) -> Any:
        if not return_lse:
            with sdpa_kernel(chosen):
                return scaled_dot_product(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        key, value = repeat_heads(query, key, value)
        heads_first = (item.transpose(1, 2) for item in (query, key, value))
        out, lse = with_lse(*heads_first, attn_mask, is_causal, scale)
        return out.transpose(1, 2), lse

    return attention


def _cudnn() -> AttentionFunction:
    def with_lse(query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None) -> Any:
        operator = torch.ops.aten._scaled_dot_product_cudnn_attention
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
            attn_mask = attn_mask.to(query.dtype).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        out, lse, *_ = operator(query, key, value, attn_mask, True, 0.0, is_causal, False, scale=scale)
        return out, lse.reshape(out.shape[:3])

    return _forced("CUDNN_ATTENTION", with_lse)


def _flash2() -> AttentionFunction:
    """A user's own build of flash-attn 2 where there is one, torch's otherwise."""
    # `flash_attn` may be FlashAttention 4's package, which holds no such module.
    if has_module("flash_attn.flash_attn_interface"):
        from flash_attn.flash_attn_interface import flash_attn_func

        def attention(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None,
            is_causal: bool,
            scale: float | None,
            enable_gqa: bool,
            return_lse: bool = False,
        ) -> Any:
            out = flash_attn_func(
                query, key, value, softmax_scale=scale, causal=is_causal, return_attn_probs=return_lse
            )
            return (out[0], out[1]) if return_lse else out

        return attention

    def with_lse(query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None) -> Any:
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = operator(query, key, value, 0.0, is_causal, False, scale=scale)
        return out, lse

    return _forced("FLASH_ATTENTION", with_lse)


def _flex(compiled: bool = True) -> AttentionFunction:
    from torch.nn.attention.flex_attention import flex_attention

    call: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        return_lse: bool = False,
    ) -> Any:
        bias = key_bias(attn_mask, query.shape[0])

        def score(score: Any, batch: Any, head: Any, row: Any, column: Any) -> Any:
            if bias is not None:
                score = score + bias[batch, column]
            if is_causal:
                score = torch.where(row >= column, score, -float("inf"))
            return score

        out = call(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            score_mod=score if bias is not None or is_causal else None,
            scale=scale,
            enable_gqa=enable_gqa,
            return_lse=return_lse,
        )
        return (out[0].transpose(1, 2), out[1]) if return_lse else out.transpose(1, 2)

    return attention


KERNELS.add("sdpa", AttentionKernel(name="sdpa", load=lambda: scaled_dot_product))
KERNELS.add(
    "cudnn",
    AttentionKernel(
        name="cudnn",
        load=_cudnn,
        architectures=((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)),
        dtypes=HALF,
        head_dims=EIGHTS,
        causal_square=True,
        lse=True,
    ),
)
KERNELS.add(
    "flash2",
    AttentionKernel(
        name="flash2",
        load=_flash2,
        at_least=(8, 0),
        dtypes=HALF,
        head_dims=EIGHTS,
        mask=False,
        causal_square=True,
        lse=True,
    ),
)
KERNELS.add(
    "flex",
    AttentionKernel(
        name="flex",
        load=_flex,
        modules=("triton",),
        install="pip install triton",
        at_least=(8, 0),
        dtypes=(*HALF, torch.float32),
        head_dims=(16, 32, 64, 128, 256),
        mask=False,
        key_mask=True,
        lse=True,
        auto=False,  # it compiles for seconds, and has not been seen to win
    ),
)
