"""Operands of Triton kernels: the layouts that a launch needs, for attention, linear layers and elementwise passes.

Imported only by modules of Triton kernels: it needs triton.
"""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


def row_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension has stride 1, a contiguous copy otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tensor_descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor of the whole tensor for bulk copies (TMA) of blocks of the given shape."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
