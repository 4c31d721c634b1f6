"""FlashAttention 3 and 4, from their wheels or a user's own build. Forward only here; neither takes a mask.

FlashAttention 3 (https://arxiv.org/abs/2407.08608) is for Hopper: the `fa3-fwd` wheel, or a user's build of
`flash_attn_interface`. FlashAttention 4 is CuTe DSL for Hopper and Blackwell: the `flash-attn-4` wheel, called directly
because torch's own activation of it does not work with the released betas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...core.platform import has_module
from .record import KERNELS, AttentionFunction, AttentionKernel


def _adapted(flash_attn_func: Callable[..., Any]) -> AttentionFunction:
    """The packages' common call, in the contract of a record; grouped heads are native to it."""

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


def _flash3() -> AttentionFunction:
    if has_module("fa3_fwd_interface"):
        from fa3_fwd_interface import flash_attn_func
    else:
        from flash_attn_interface import flash_attn_func
    return _adapted(flash_attn_func)


def _flash4() -> AttentionFunction:
    from flash_attn.cute import flash_attn_func

    return _adapted(flash_attn_func)


KERNELS.add(
    "fa3",
    AttentionKernel(
        name="fa3",
        load=_flash3,
        modules=("fa3_fwd_interface", "flash_attn_interface"),
        install="pip install 'diffusers-accel[fa3]'",
        architectures=((9, 0),),
        # The wheel leaves float16 out; a user's build may have it, but that cannot be read without running it.
        dtypes=(torch.bfloat16,),
        head_dims=(64, 96, 128, 192, 256),
        mask=False,
        causal_square=True,
    ),
)
KERNELS.add(
    "fa4",
    AttentionKernel(
        name="fa4",
        load=_flash4,
        modules=("flash_attn.cute",),
        install="pip install 'diffusers-accel[fa4]'",
        architectures=((9, 0), (10, 0), (10, 3)),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=tuple(range(8, 257, 8)),
        mask=False,
        causal_square=True,
    ),
)
