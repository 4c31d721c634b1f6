"""FlashAttention 4 in CuTe DSL for Hopper and Blackwell, from the `flash-attn-4` wheel. Forward only here; no mask.

Called directly: torch's own activation of it does not work with the released betas.
"""

from __future__ import annotations

import torch

from .record import KERNELS, AttentionFunction, AttentionKernel


def _load() -> AttentionFunction:
    from flash_attn.cute import flash_attn_func

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> torch.Tensor:
        out = flash_attn_func(query, key, value, softmax_scale=scale, causal=is_causal)
        return out[0] if isinstance(out, tuple) else out

    return attention


KERNELS.add(
    "fa4",
    AttentionKernel(
        name="fa4",
        load=_load,
        modules=("flash_attn.cute",),
        install="pip install 'diffusers-accel[fa4]'",
        architectures=((9, 0), (10, 0), (10, 3)),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=tuple(range(8, 257, 8)),
        mask=False,
    ),
)
