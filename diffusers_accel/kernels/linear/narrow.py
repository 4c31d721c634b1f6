"""A linear layer of a few rows: what modulates all tokens of a step is made from one embedding, in every block.

Such a product reads its weight once and computes next to nothing, so it runs at the memory's rate or not at all: no
tile of a matrix unit is filled, and rounding a row of activations costs a launch of its own. Here 8-bit weights are
widened in registers, the activations stay as they are, and SiLU in front of the layer is part of it. Where the product
was made beforehand (`known.py`), it is looked up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...core.operators import operator
from .known import known_of

# Rows that are few.
MOST = 4


def _narrow_linear_fake(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@operator("narrow_linear", _narrow_linear_fake)
def narrow_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    """x @ (weight * scale).T + bias, summed in float32.

    Args:
        x: (rows, in_features), up to `MOST` rows.
        weight: (out_features, in_features), as wide as `x`, or e4m3 or INT8.
        scale: float32 (out_features, 1), of a weight of 8 bits.
        bias: (out_features,), or `None`.
        silu: Whether SiLU is applied to `x` first.

    Returns:
        (rows, out_features) of the type of `x`.
    """
    known = known_of(weight) if silu else None
    if known is not None and known.inputs.rows.shape[1:] != x.shape:
        known = None
    if x.is_cuda:
        from .products import known_product, narrow_product

        if known is not None:
            return known_product(x, weight, scale, bias, known)
        return narrow_product(x, weight, scale, bias, silu)
    found = known.plain(x) if known is not None else None
    if found is not None:
        return found.clone()
    wide = weight.float() if scale is None else weight.float() * scale
    out = F.linear(F.silu(x.float()) if silu else x.float(), wide, None if bias is None else bias.float())
    return out.to(x.dtype)
