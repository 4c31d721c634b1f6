"""16-bit linear layers fused with a neighbour: GELU after the product, or a concatenation before it.

Both are operators, so that a rewrite of a compiled graph can put one in place of two nodes. On CUDA they call cuBLASLt
through torch; elsewhere they are plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...compat.torch_private import addmm_activation
from ...core.operators import operator


def _linear_gelu_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator("linear_gelu", _linear_gelu_fake)
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x @ weight.T + bias) with the tanh approximation, in the product's epilogue.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), dtype of `x`.
        bias: (out_features,), dtype of `x`.

    Returns:
        (..., out_features), dtype of `x`.
    """
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    out = addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], weight.shape[0])


def _concat_linear_fake(inputs: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return inputs[0].new_empty((*inputs[0].shape[:-1], weight.shape[0]))


@operator("concat_linear", _concat_linear_fake)
def concat_linear(inputs: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """cat(inputs, -1) @ weight.T + bias without the concatenation: one accumulating product per input.

    The running sum is rounded to the dtype after each product.

    Args:
        inputs: Tensors (..., features of the input), equal in all other dimensions.
        weight: (out_features, features of all inputs), dtype of the inputs.
        bias: (out_features,), or `None`.

    Returns:
        (..., out_features), dtype of the inputs.
    """
    total, start = None, 0
    for item in inputs:
        width = item.shape[-1]
        x, columns = item.reshape(-1, width), weight[:, start : start + width].t()
        if total is not None:
            total.addmm_(x, columns)
        else:
            total = x @ columns if bias is None else torch.addmm(bias, x, columns)
        start += width
    assert total is not None
    return total.view(*inputs[0].shape[:-1], weight.shape[0])
