"""Attention kernels that torch ships: SDPA's own choice, cuDNN's, and FlashAttention 2."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .record import KERNELS, AttentionFunction, AttentionKernel


def scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
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


def _forced(backend: str) -> Callable[[], AttentionFunction]:
    def load() -> AttentionFunction:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)

        def attention(*args: object, **kwargs: object) -> torch.Tensor:
            with sdpa_kernel(chosen):
                return scaled_dot_product(*args, **kwargs)  # type: ignore[arg-type]

        return attention

    return load


_HALF = (torch.bfloat16, torch.float16)

KERNELS.add("sdpa", AttentionKernel(name="sdpa", load=lambda: scaled_dot_product))
KERNELS.add(
    "cudnn",
    AttentionKernel(
        name="cudnn",
        load=_forced("CUDNN_ATTENTION"),
        architectures=((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)),
        dtypes=_HALF,
    ),
)
KERNELS.add(
    "flash2",
    AttentionKernel(
        name="flash2", load=_forced("FLASH_ATTENTION"), architectures=None, dtypes=_HALF, mask=False, gqa=True
    ),
)
