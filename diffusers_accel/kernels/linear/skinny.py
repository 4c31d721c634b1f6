"""Skinny GEMMs: linear layers of a few rows, such as the layers that compute every block's modulation.

Such a GEMM reads its whole weight and computes next to nothing, so memory bandwidth bounds it. A matrix-unit kernel
would fill no tile, and quantizing one row of activations would cost a launch of its own. This operator therefore
dequantizes 8-bit weights in registers, leaves activations unquantized, and applies the SiLU in front of the layer.

Outputs that were precomputed for the input (`precomputed.py`) are looked up instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...core.operators import operator
from .precomputed import precomputed_for

# Largest number of rows that counts as few.
MAX_ROWS = 4


def _skinny_linear_fake(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@operator("skinny_linear", _skinny_linear_fake)
def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    """x @ (weight * scale).T + bias, summed in float32.

    Args:
        x: (rows, in_features), up to `MAX_ROWS` rows.
        weight: (out_features, in_features), in the dtype of `x`, e4m3 or int8.
        scale: float32 (out_features, 1) of an 8-bit weight; `None` for a weight in the dtype of `x`.
        bias: (out_features,), or `None`.
        silu: Whether SiLU is applied to `x` first.

    Returns:
        (rows, out_features) in the dtype of `x`.
    """
    precomputed = precomputed_for(weight) if silu else None
    if precomputed is not None and precomputed.inputs.rows.shape[1:] != x.shape:
        precomputed = None
    if x.is_cuda:
        from .gemm import precomputed_gemm, skinny_gemm

        if precomputed is not None:
            return precomputed_gemm(x, weight, scale, bias, precomputed)
        return skinny_gemm(x, weight, scale, bias, silu)
    found = precomputed.lookup(x) if precomputed is not None else None
    if found is not None:
        return found.clone()
    dequantized = weight.float() if scale is None else weight.float() * scale
    out = F.linear(F.silu(x.float()) if silu else x.float(), dequantized, None if bias is None else bias.float())
    return out.to(x.dtype)
