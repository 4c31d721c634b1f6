"""Row-wise quantization of activations as an operator: an opaque node that rewrites of compiled graphs find.

A rewrite fuses the node with the norm or activation before it (`features/compile/rewrites/rows.py`). The definition is
`formats.quantize_rows`; on CUDA the operator runs the Triton kernel in `quantize_activations.py`.
"""

from __future__ import annotations

import torch

from ...core.operators import operator
from . import formats

# Names of the dtypes that a row is quantized to: an operator's schema takes strings.
TYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}


def _quantize_rows_fake(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=TYPES[kind]), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@operator("quantize_rows", _quantize_rows_fake)
def quantize_rows(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes each row with a scale of its own.

    Args:
        x: (rows, columns), bf16, fp16 or float32.
        kind: `"e4m3"` or `"int8"`.

    Returns:
        Values, e4m3 or int8 (rows, columns), and scales, float32 (rows, 1).
    """
    if not x.is_cuda:
        return formats.quantize_rows(x, TYPES[kind])
    from . import quantize_activations

    return quantize_activations.quantize_rows(x, TYPES[kind])
