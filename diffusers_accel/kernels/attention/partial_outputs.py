"""Partial outputs of attention, over some of the keys, and how they are merged by their logsumexp (LSE)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .record import Inputs

# A kernel: it returns the output, or the output and its LSE with `Inputs.return_lse`.
Kernel = Callable[[Inputs], Any]
# (batch, sequence, heads, head_dim) and (batch, heads, sequence).
OutputLSE = tuple[torch.Tensor, torch.Tensor]


def partial_output(x: Inputs, kernel: Kernel) -> OutputLSE:
    """The kernel's output and LSE. Without queries or keys: zeros and -inf."""
    batch, length, heads, _ = x.query.shape
    if 0 in (length, x.key.shape[1]):
        out = x.query.new_zeros((batch, length, heads, x.value.shape[3]))
        return out, torch.full((batch, heads, length), float("-inf"), device=out.device)
    out, lse = kernel(x)
    if x.attn_mask is not None:
        # Kernels differ in the LSE of a row whose keys are all masked.
        hidden = ~x.attn_mask if x.attn_mask.dtype == torch.bool else x.attn_mask == float("-inf")
        lse = lse.masked_fill(hidden.all(-1), float("-inf"))
    return out, lse


class Merger:
    """Merges partial outputs of the same queries by their LSE, in float32, or in float64 for float64 outputs."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._sum: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, part: OutputLSE) -> None:
        """Adds an output (batch, sequence, heads, head_dim) with its LSE (batch, heads, sequence)."""
        wide = torch.promote_types(part[0].dtype, torch.float32)
        out, lse = part[0].to(wide), part[1].to(wide).transpose(1, 2).unsqueeze(-1)
        # Rows without keys have no weight, and their output may be NaN.
        out = out.masked_fill(lse == float("-inf"), 0.0)
        if self._sum is None or self._lse is None:
            self._sum, self._lse = out, lse
            return
        both = torch.logaddexp(self._lse, lse)
        before, now = ((item - both).exp().nan_to_num(0.0) for item in (self._lse, lse))
        self._sum, self._lse = self._sum * before + out * now, both

    @property
    def out(self) -> torch.Tensor:
        """The merged output, in the dtype of the queries."""
        assert self._sum is not None
        return self._sum.to(self._dtype)
