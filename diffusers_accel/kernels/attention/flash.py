"""FlashAttention 3 and 4, from their wheels or a user's own build. Forward only here; neither takes a mask.

FlashAttention 3 (https://arxiv.org/abs/2407.08608) is for Hopper: the `fa3-fwd` wheel, or a user's build of
`flash_attn_interface`. It also takes e4m3 operands: `fa3-fp8` rounds Q, K and V with one scale per head after taking
the keys' mean away and spreading channels by a Hadamard matrix (see `recipe.py`), in two fused launches.

FlashAttention 4 is CuTe DSL for Hopper and Blackwell: the `flash-attn-4` wheel, called directly because torch's own
activation of it does not work with the released betas.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...core.platform import has_module
from .record import KERNELS, AttentionFunction, AttentionKernel, Inputs, QKNorm


def _flash_attention_3() -> Any:
    if has_module("fa3_fwd_interface"):
        from fa3_fwd_interface import flash_attn_func
    else:
        from flash_attn_interface import flash_attn_func
    return flash_attn_func


def _flash3() -> AttentionFunction:
    flash_attn_func = _flash_attention_3()

    def attention(x: Inputs) -> Any:
        extra = {"return_attn_probs": True} if x.return_lse else {}
        out = flash_attn_func(x.query, x.key, x.value, softmax_scale=x.scale, causal=x.is_causal, **extra)
        return _output(out, x.return_lse)

    return attention


def _flash3_fp8() -> AttentionFunction:
    from .quantize import quantize_per_head

    flash_attn_func = _flash_attention_3()

    def attention(x: Inputs) -> Any:
        dim, rotary, norm = x.query.shape[-1], x.rotary, x.norm
        scale = dim**-0.5 if x.scale is None else x.scale
        tensors = x.query, x.key, x.value
        if dim not in _FP8_DIMS:  # zeros change neither logits nor the scales
            missing = min(size for size in _FP8_DIMS if size > dim) - dim
            tensors = tuple(torch.nn.functional.pad(item, (0, missing)) for item in tensors)  # type: ignore[assignment]
            rotary = rotary and tuple(torch.nn.functional.pad(item, (0, missing)) for item in rotary)  # type: ignore
            norm = norm and widened(norm, dim + missing)
        data = quantize_per_head(*tensors, scale, shift=x.return_lse, rotary=rotary, norm=norm)
        extra = {"return_attn_probs": True} if x.return_lse else {}
        found = flash_attn_func(
            data.query,
            data.key,
            data.value,
            softmax_scale=scale,
            causal=x.is_causal,
            q_descale=data.query_scale,
            k_descale=data.key_scale,
            v_descale=data.value_scale,
            **extra,
        )
        if x.return_lse:
            return found[0][..., :dim].to(x.query.dtype), found[1] + data.shift
        return _output(found, False)[..., :dim].to(x.query.dtype)

    return attention


def widened(norm: QKNorm, dim: int) -> QKNorm:
    """The same norm for heads padded with zeros, over which a mean square is smaller."""
    share = len(norm.query) / dim
    pad = partial(torch.nn.functional.pad, pad=(0, dim - len(norm.query)))
    return QKNorm(pad(norm.query.float() * share**0.5), pad(norm.key.float() * share**0.5), norm.eps * share)


def _flash4() -> AttentionFunction:
    from flash_attn.cute import flash_attn_func

    def attention(x: Inputs) -> Any:
        extra = {"return_lse": True} if x.return_lse else {}
        out = flash_attn_func(x.query, x.key, x.value, softmax_scale=x.scale, causal=x.is_causal, **extra)
        return _output(out, x.return_lse)

    return attention


def _output(found: Any, with_lse: bool) -> Any:
    """The packages return a tensor or a tuple that begins with output and LSE, by version and by what was asked."""
    if with_lse:
        return found[0], found[1]
    return found[0] if isinstance(found, tuple) else found


# What FlashAttention 3 takes in e4m3 and we quantize; smaller ones are padded.
_FP8_DIMS = (64, 96, 128)
_FA3: dict[str, Any] = {
    "modules": ("fa3_fwd_interface", "flash_attn_interface"),
    "install": "pip install 'diffusers-accel[fa3]'",
    "architectures": ((9, 0),),
    # The wheel leaves float16 out; a user's build may have it, but that cannot be read without running it.
    "dtypes": (torch.bfloat16,),
    "head_dims": (64, 96, 128, 192, 256),
    "mask": False,
    "causal_square": True,
    "lse": True,
}
KERNELS.add("fa3", AttentionKernel(name="fa3", load=_flash3, **_FA3))
KERNELS.add(
    "fa3-fp8",
    AttentionKernel(
        name="fa3-fp8",
        load=_flash3_fp8,
        **{**_FA3, "head_dims": tuple(range(8, 129, 8)), "exact": False, "folds": True},
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
        lse=True,
    ),
)
