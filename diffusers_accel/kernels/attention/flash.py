"""FlashAttention 3 and 4, from their wheels or a user's own build. Forward only here; neither takes a mask.

FlashAttention 3 (https://arxiv.org/abs/2407.08608) is for Hopper: the `fa3-fwd` wheel, or a user's build of
`flash_attn_interface`. FlashAttention 3 also supports e4m3 operands. In two fused launches `fa3-fp8` subtracts the
means of keys and values, applies the Hadamard transform of `recipe.py`, and rounds Q, K and V with one scale per head.
A third launch adds the values' mean to the output.

FlashAttention 4 is CuTe DSL for Hopper and Blackwell: the `flash-attn-4` wheel. The wheel is called directly, because
torch's `activate_flash_attention_impl` does not work with the released betas.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...core.platform import has_module
from .record import KERNELS, AttentionFunction, AttentionKernel, Inputs, QKNorm, Rotary


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
    from .quantize import add_mean, quantize_per_head

    flash_attn_func = _flash_attention_3()

    def attention(x: Inputs) -> Any:
        dim = x.query.shape[-1]
        x = replace(x, scale=x.softmax_scale)  # of the unpadded heads
        if dim not in _FP8_DIMS:
            x = padded(x, min(size for size in _FP8_DIMS if size > dim))
        data = quantize_per_head(x)
        extra = {"return_attn_probs": True} if x.return_lse else {}
        found = flash_attn_func(
            data.query,
            data.key,
            data.value,
            softmax_scale=x.scale,
            causal=x.is_causal,
            q_descale=data.query_scale,
            k_descale=data.key_scale,
            v_descale=data.value_scale,
            **extra,
        )
        assert data.value_mean is not None
        out = add_mean(found[0] if x.return_lse else _output(found, False), data.value_mean)
        out = out[..., :dim].to(x.query.dtype)
        return (out, found[1] + data.lse_correction) if x.return_lse else out

    return attention


def padded(x: Inputs, dim: int) -> Inputs:
    """The inputs with heads padded with zeros to `dim` channels, which changes neither logits nor scales. Where a
    rotation pairs the halves of a head, each half is padded by itself."""
    own = x.query.shape[-1]
    parts = 2 if x.rotary is not None and x.rotary.rope_style == "half" else 1
    pad = partial(torch.nn.functional.pad, pad=(0, (dim - own) // parts))

    def wider(item: torch.Tensor) -> torch.Tensor:
        return pad(item.unflatten(-1, (parts, -1))).flatten(-2)

    rotary, norm = x.rotary, x.norm
    if rotary is not None:  # tables have the channels of one half, or of the head
        (q_cos, q_sin), (k_cos, k_sin) = rotary.query, rotary.key
        rotary = Rotary((pad(q_cos), pad(q_sin)), (pad(k_cos), pad(k_sin)), rotary.rope_style)
    if norm is not None:  # zeros make the mean square smaller
        share = own / dim
        query, key = (wider(item.float() * share**0.5) for item in (norm.query, norm.key))
        norm = QKNorm(query, key, norm.eps * share)
    value = torch.nn.functional.pad(x.value, (0, dim - own))
    return replace(x, query=wider(x.query), key=wider(x.key), value=value, rotary=rotary, norm=norm)


def _flash4() -> AttentionFunction:
    from flash_attn.cute import flash_attn_func

    def attention(x: Inputs) -> Any:
        extra = {"return_lse": True} if x.return_lse else {}
        out = flash_attn_func(x.query, x.key, x.value, softmax_scale=x.scale, causal=x.is_causal, **extra)
        return _output(out, x.return_lse)

    return attention


def _output(found: Any, with_lse: bool) -> Any:
    """Output, or output and LSE. The packages return a tensor, or a tuple that begins with both, depending on version
    and arguments."""
    if with_lse:
        return found[0], found[1]
    return found[0] if isinstance(found, tuple) else found


# Head dimensions that FlashAttention 3 supports in e4m3 and `quantize.py` rounds; smaller heads are padded.
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
        **{**_FA3, "head_dims": tuple(range(8, 129, 8)), "exact": False, "fuses_qk_norm_rope": True},
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
