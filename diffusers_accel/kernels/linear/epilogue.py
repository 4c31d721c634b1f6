"""Linear layers with something done in the product itself. Operators, so that a compiled graph can name them.

On CUDA they are cuBLASLt's, through torch; elsewhere plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...core.operators import operator


def _linear_gelu_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator("linear_gelu", _linear_gelu_fake)
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x @ weight.T + bias) in the tanh form.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,).
    """
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    out = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], weight.shape[0])


def _linear_of_parts_fake(parts: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return parts[0].new_empty((*parts[0].shape[:-1], weight.shape[0]))


@operator("linear_of_parts", _linear_of_parts_fake)
def linear_of_parts(parts: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """cat(parts, -1) @ weight.T + bias, one product for each part; sums are rounded to the type in between.

    Args:
        parts: (..., features of the part).
        weight: (out_features, features of all parts).
        bias: (out_features,), or `None`.
    """
    found, start = None, 0
    for part in parts:
        width = part.shape[-1]
        x, columns = part.reshape(-1, width), weight[:, start : start + width].t()
        if found is not None:
            found.addmm_(x, columns)
        else:
            found = x @ columns if bias is None else torch.addmm(bias, x, columns)
        start += width
    assert found is not None
    return found.view(*parts[0].shape[:-1], weight.shape[0])
