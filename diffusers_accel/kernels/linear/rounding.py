"""The rounding of activations row by row, as an operator that compiled graphs name and rewrites of them find."""

from __future__ import annotations

import torch

from ...core.operators import operator
from . import formats

# Names of the types that a row is rounded to.
TYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}


def _quantize_rows_fake(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=TYPES[kind]), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@operator("quantize_rows", _quantize_rows_fake)
def quantize_rows(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row with a scale of its own.

    Args:
        x: (rows, columns).
        kind: `"e4m3"` or `"int8"`.

    Returns:
        Values, (rows, columns), and scales, float32 (rows, 1).
    """
    if not x.is_cuda:
        return formats.quantize_rows(x, TYPES[kind])
    from . import activations

    return activations.quantize_rows(x, TYPES[kind])
