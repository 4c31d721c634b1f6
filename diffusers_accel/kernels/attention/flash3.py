"""FlashAttention 3 for Hopper, from the `fa3-fwd` wheel or a user's own build of `flash_attn_interface`.

https://arxiv.org/abs/2407.08608. Forward only; no mask.
"""

from __future__ import annotations

import torch

from ...core.platform import has_module
from .record import KERNELS, AttentionFunction, AttentionKernel


def _load() -> AttentionFunction:
    if has_module("fa3_fwd_interface"):
        from fa3_fwd_interface import flash_attn_func
    else:
        from flash_attn_interface import flash_attn_func

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
    "fa3",
    AttentionKernel(
        name="fa3",
        load=_load,
        modules=("fa3_fwd_interface", "flash_attn_interface"),
        install="pip install 'diffusers-accel[fa3]'",
        architectures=((9, 0),),
        # The wheel leaves float16 out; a user's build may have it, but its dtypes cannot be read without running it.
        dtypes=(torch.bfloat16,),
        head_dims=(64, 96, 128, 192, 256),
        mask=False,
    ),
)
