"""Attention kernels of optional packages: SageAttention, xFormers, Transformer Engine, FlashInfer.

None of them is a dependency, and few have wheels. Each record is a thin adapter to the package's documented call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...core.platform import version
from .record import KERNELS, AttentionFunction, AttentionKernel, Inputs
from .torch_native import EIGHTS, HALF

# --- SageAttention ---------------------------------------------------------------------------------------------------


def _sage_major() -> int:
    return int((version("sageattention") or "0").split(".")[0])


def _sage(name: str) -> AttentionFunction:
    """A function of SageAttention 2. Its "NHD" is (batch, sequence, heads, head_dim); its LSE is a natural
    logarithm."""
    import sageattention

    function = getattr(sageattention, name)

    def attention(x: Inputs) -> Any:
        options = {"tensor_layout": "NHD", "is_causal": x.is_causal, "sm_scale": x.scale, "return_lse": x.return_lse}
        out = function(x.query, x.key, x.value, **options)
        return (out[0], out[1]) if x.return_lse else out

    return attention


def _sage_1() -> AttentionFunction:
    """SageAttention 1.0.6, guarded against two errors: it changes the caller's K in place, and it divides by zero in a
    block of zeros. The record refuses the lengths for which it is wrong."""
    from sageattention import sageattn

    def attention(x: Inputs) -> Any:
        query, key = x.query.clone(), x.key - x.key.mean(dim=1, keepdim=True)
        query[..., 0] += 1e-6
        key[..., 0] += 1e-6
        options = {"tensor_layout": "NHD", "is_causal": x.is_causal, "sm_scale": x.scale, "smooth_k": False}
        return sageattn(query, key, x.value.contiguous(), **options)

    return attention


def _default_sage() -> AttentionFunction:
    return _sage("sageattn") if _sage_major() >= 2 else _sage_1()


def _needs_sage_2() -> str | None:
    if _sage_major() >= 2:
        return None
    return f"needs SageAttention 2, and {version('sageattention')} is installed; build it from its repository."


# Variants by name -> function and least compute capability. `sageattn` itself picks a variant for the GPU.
_SAGE_VARIANTS: dict[str, tuple[str, tuple[int, int]]] = {
    "sageattention-int8-fp16-triton": ("sageattn_qk_int8_pv_fp16_triton", (8, 0)),
    "sageattention-int8-fp16-cuda": ("sageattn_qk_int8_pv_fp16_cuda", (8, 0)),
    "sageattention-int8-fp8-cuda": ("sageattn_qk_int8_pv_fp8_cuda", (8, 9)),
    "sageattention-int8-fp8-cuda-sm90": ("sageattn_qk_int8_pv_fp8_cuda_sm90", (9, 0)),
}
_SAGE: dict[str, Any] = {
    "modules": ("sageattention",),
    "install": "build SageAttention 2 from its repository",
    "dtypes": HALF,
    "mask": False,
    "causal_square": True,
    "exact": False,
}


def sageattention_record() -> AttentionKernel:
    """The record of the installed version: 1.x supports fewer calls than 2.x, and is wrong for some lengths."""
    old = _sage_major() < 2
    return AttentionKernel(
        name="sageattention",
        load=_default_sage,
        at_least=(8, 0),
        head_dims=(64, 96, 128),
        key_multiple=64 if old else 1,
        lse=not old,
        **_SAGE,
    )


KERNELS.add("sageattention", sageattention_record())
for _name, (_function, _arch) in _SAGE_VARIANTS.items():
    KERNELS.add(
        _name,
        AttentionKernel(
            name=_name,
            load=partial(_sage, _function),
            at_least=_arch,
            head_dims=(64, 128),
            lse=True,
            refusal=_needs_sage_2,
            **_SAGE,
        ),
    )


def _sage_3() -> AttentionFunction:
    """SageAttention 3 (NVFP4), heads first, for Blackwell."""
    from sageattn3 import sageattn3_blackwell

    def attention(x: Inputs) -> Any:
        if x.scale is not None:  # its scale is always head_dim ** -0.5
            x = replace(x, query=x.query * (x.scale * x.query.shape[-1] ** 0.5))
        tensors = (item.contiguous() for item in x.ungrouped().heads_first)
        return sageattn3_blackwell(*tensors, is_causal=x.is_causal).transpose(1, 2)

    return attention


KERNELS.add(
    "sageattention3",
    AttentionKernel(
        name="sageattention3",
        load=_sage_3,
        modules=("sageattn3",),
        install="build sageattention3_blackwell from SageAttention's repository",
        architectures=((10, 0), (10, 3), (12, 0)),
        dtypes=HALF,
        head_dims=(64, 128),
        mask=False,
        causal_square=True,
        exact=False,
    ),
)

# --- xFormers --------------------------------------------------------------------------------------------------------


def _xformers() -> AttentionFunction:
    import xformers.ops as ops

    def attention(x: Inputs) -> Any:
        x = x.ungrouped()
        options = {"attn_bias": ops.LowerTriangularMask() if x.is_causal else None, "scale": x.scale}
        if not x.return_lse:
            return ops.memory_efficient_attention(x.query, x.key, x.value, **options)
        forward = ops.fmha.memory_efficient_attention_forward_requires_grad
        out, lse = forward(x.query, x.key, x.value, **options)
        return out, lse[..., : x.query.shape[1]]  # some of its kernels pad the rows

    return attention


KERNELS.add(
    "xformers",
    AttentionKernel(
        name="xformers",
        load=_xformers,
        modules=("xformers",),
        install="pip install xformers",
        at_least=(8, 0),
        dtypes=HALF,
        head_dims=EIGHTS,
        mask=False,
        causal_square=True,
        lse=True,
    ),
)

# --- Transformer Engine ----------------------------------------------------------------------------------------------


def _transformer_engine() -> AttentionFunction:
    from transformer_engine.pytorch import DotProductAttention

    modules: dict[tuple[Any, ...], Callable[..., torch.Tensor]] = {}

    def attention(x: Inputs) -> Any:
        heads, dim, groups = x.query.shape[2], x.query.shape[3], x.key.shape[2]
        known = (heads, dim, groups, x.is_causal, x.scale)
        if known not in modules:
            modules[known] = DotProductAttention(
                num_attention_heads=heads,
                kv_channels=dim,
                num_gqa_groups=groups,
                attention_dropout=0.0,
                qkv_format="bshd",
                attn_mask_type="causal" if x.is_causal else "no_mask",
                softmax_scale=x.scale,
            )
        return modules[known](x.query, x.key, x.value).unflatten(-1, (heads, dim))

    return attention


KERNELS.add(
    "transformer-engine",
    AttentionKernel(
        name="transformer-engine",
        load=_transformer_engine,
        modules=("transformer_engine.pytorch",),
        install="pip install 'transformer-engine[pytorch]'",
        at_least=(8, 0),
        dtypes=HALF,
        head_dims=EIGHTS,
        mask=False,
        causal_square=True,
    ),
)

# --- FlashInfer ------------------------------------------------------------------------------------------------------

_LN2 = 0.6931471805599453


def _flashinfer() -> AttentionFunction:
    """FlashInfer's prefill, one sample at a time. Its LSE is in base 2 and (sequence, heads)."""
    from flashinfer import single_prefill_with_kv_cache

    def attention(x: Inputs) -> Any:
        options = {"causal": x.is_causal, "sm_scale": x.scale, "return_lse": x.return_lse}
        samples = zip(x.query, x.key, x.value, strict=True)
        found = [single_prefill_with_kv_cache(*sample, **options) for sample in samples]
        if not x.return_lse:
            return torch.stack(found)
        return torch.stack([item[0] for item in found]), torch.stack([item[1].t() for item in found]) * _LN2

    return attention


KERNELS.add(
    "flashinfer",
    AttentionKernel(
        name="flashinfer",
        load=_flashinfer,
        modules=("flashinfer",),
        install="pip install flashinfer-python",
        at_least=(8, 0),
        dtypes=HALF,
        head_dims=(64, 128, 256),
        mask=False,
        causal_square=True,
        lse=True,
    ),
)
