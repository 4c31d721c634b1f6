"""Attention kernels of torch itself: SDPA with its own choice of backend, cuDNN, FlashAttention 2, FlexAttention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...compat.torch_private import (
    cudnn_attention,
    efficient_attention,
    flash_attention,
    flash_attention_for_cpu,
    recompile_limit_at_least,
    recompile_limit_error,
)
from ...core.platform import has_module
from .record import KERNELS, AttentionFunction, AttentionKernel, Inputs, key_bias

# Sizes for which FlexAttention has a graph of its own.
_SIZES = 64
HALF = (torch.bfloat16, torch.float16)
EIGHTS = tuple(range(8, 257, 8))


def scaled_dot_product(x: Inputs) -> Any:
    """`F.scaled_dot_product_attention` with (batch, sequence, heads, head_dim) in and out. The public function returns
    no LSE, so `return_lse` calls an operator behind it."""
    if x.return_lse:
        return _with_lse(x.ungrouped())
    out = F.scaled_dot_product_attention(
        *x.heads_first, attn_mask=x.attn_mask, is_causal=x.is_causal, scale=x.scale, enable_gqa=x.grouped
    )
    return out.transpose(1, 2)


def _with_lse(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, LSE) in the layout of `record.py`: flash attention on the CPU, memory-efficient attention elsewhere."""
    query, key, value = x.heads_first
    mask = x.attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    if query.device.type == "cpu":
        mask = None if mask is None else mask.to(query.dtype)
        out, lse = flash_attention_for_cpu(query, key, value, 0.0, x.is_causal, attn_mask=mask, scale=x.scale)
        return out.transpose(1, 2), lse
    if mask is not None:
        # The operator needs a mask in the query's dtype, whose rows begin at multiples of 16 bytes.
        columns = -(-mask.shape[-1] // 16) * 16
        room = mask.new_empty((*query.shape[:3], columns), dtype=query.dtype)[..., : mask.shape[-1]]
        mask = room.copy_(mask)
    found = efficient_attention(query, key, value, mask, True, 0.0, x.is_causal, scale=x.scale)
    return found[0].transpose(1, 2), found[1][..., : query.shape[2]]


def _forced(backend: str, with_lse: Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]) -> AttentionFunction:
    """SDPA with one backend. `with_lse` calls the operator behind it: (output with heads first, LSE)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def attention(x: Inputs) -> Any:
        if not x.return_lse:
            with sdpa_kernel(chosen):
                return scaled_dot_product(x)
        out, lse = with_lse(x.ungrouped())
        return out.transpose(1, 2), lse

    return attention


def _cudnn() -> AttentionFunction:
    def with_lse(x: Inputs) -> Any:
        mask = x.attn_mask
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=x.query.dtype).masked_fill_(~mask, float("-inf"))
            batch, length, heads, _ = x.query.shape
            mask = mask.to(x.query.dtype).expand(batch, heads, length, x.key.shape[1])
        out, lse, *_ = cudnn_attention(*x.heads_first, mask, True, 0.0, x.is_causal, False, scale=x.scale)
        return out, lse.reshape(out.shape[:3])

    return _forced("CUDNN_ATTENTION", with_lse)


def _flash2() -> AttentionFunction:
    """An installed flash-attn 2, or torch's own build of it."""
    # The package `flash_attn` may be FlashAttention 4, which has no such module.
    if has_module("flash_attn.flash_attn_interface"):
        from flash_attn.flash_attn_interface import flash_attn_func

        def attention(x: Inputs) -> Any:
            options = {"softmax_scale": x.scale, "causal": x.is_causal, "return_attn_probs": x.return_lse}
            out = flash_attn_func(x.query, x.key, x.value, **options)
            return (out[0], out[1]) if x.return_lse else out

        return attention

    def with_lse(x: Inputs) -> Any:
        out, lse, *_ = flash_attention(*x.heads_first, 0.0, x.is_causal, False, scale=x.scale)
        return out, lse

    return _forced("FLASH_ATTENTION", with_lse)


def _flex(backend: str | None = "inductor") -> AttentionFunction:
    """FlexAttention, compiled by a backend of `torch.compile`, or not compiled without one."""
    from torch.nn.attention.flex_attention import flex_attention

    call: Any = flex_attention if backend is None else _compiled_by_size(flex_attention, backend)

    def attention(x: Inputs) -> Any:
        bias = key_bias(x)

        def score(score: Any, batch: Any, head: Any, row: Any, column: Any) -> Any:
            if bias is not None:
                score = score + bias[batch, column]
            if x.is_causal:
                score = torch.where(row >= column, score, -float("inf"))
            return score

        changed = bias is not None or x.is_causal
        out = call(
            *x.heads_first,
            score_mod=score if changed else None,
            scale=x.scale,
            enable_gqa=x.grouped,
            return_lse=x.return_lse,
        )
        return (out[0].transpose(1, 2), out[1]) if x.return_lse else out.transpose(1, 2)

    return attention


def _compiled_by_size(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A function with a graph for each of `_SIZES` sizes, and one graph for all further sizes, with a warning.

    Dynamo's own limit is eight. FlexAttention beyond it would run uncompiled, with the whole matrix of scores.
    """
    by_size = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
    any_size = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with recompile_limit_at_least(_SIZES):
                return by_size(*args, **kwargs)
        except recompile_limit_error():
            warnings.warn(f"attention 'flex': sizes beyond {_SIZES} share one graph.", stacklevel=2)
            # Both have one function's graphs, which are counted together.
            with recompile_limit_at_least(2 * _SIZES):
                return any_size(*args, **kwargs)

    return call


KERNELS.add("sdpa", AttentionKernel(name="sdpa", load=lambda: scaled_dot_product, shortest=0, lse=True))
KERNELS.add(
    "cudnn",
    AttentionKernel(
        name="cudnn",
        load=_cudnn,
        at_least=(8, 0),
        dtypes=HALF,
        head_dims=EIGHTS,
        shortest=2,  # "No available kernel" for one query and one key
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
        auto=False,  # it compiles for seconds, and has won no measurement
    ),
)
