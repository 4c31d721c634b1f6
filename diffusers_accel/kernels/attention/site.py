"""A site: the place where one pipeline's attention calls enter a kernel, and are counted.

All kernels are reached through one custom operator, so that under `torch.compile` a call is an opaque node: no graph
break, one compiled graph for all blocks, and the Python that counts runs on every call. A call the kernel cannot take
(a mask, a causal mask, another dtype or head dimension) runs on SDPA; that is counted under SDPA's name and warned of
once, never silent.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch

from .record import AttentionKernel
from .torch_native import scaled_dot_product


class AttentionSite:
    """One kernel as one pipeline uses it.

    Args:
        kernel: The record.
        counts: Kernel name -> calls; shared with the pipeline's statistics.
    """

    def __init__(self, kernel: AttentionKernel, counts: Counter[str]):
        self.kernel, self.counts = kernel, counts
        self.function = kernel.load()
        self.number = _free_number()
        self._warned: set[str] = set()

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> torch.Tensor:
        """Attention on (batch, sequence, heads, head_dim) tensors by the kernel that can take the call."""
        masked = attn_mask is not None
        square = query.shape[1] == key.shape[1]
        reason = self.kernel.refuses(query.dtype, query.shape[-1], query.device, masked, is_causal, enable_gqa, square)
        if reason is None:
            self.counts[self.kernel.name] += 1
            return self.function(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"attention {self.kernel.name!r} {reason}: such calls run on 'sdpa'.", stacklevel=2)
        self.counts["sdpa"] += 1
        return scaled_dot_product(query, key, value, attn_mask, is_causal, scale, enable_gqa)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        enable_gqa = enable_gqa and query.shape[2] != key.shape[2]
        if torch.compiler.is_compiling():
            return _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, self.number)
        return self.run(query, key, value, attn_mask, is_causal, scale, enable_gqa)


# Sites in use, by number. The number is a constant in compiled graphs: freed numbers are used again, so that a restored
# and accelerated pipeline finds its compiled graphs.
SITES: dict[int, AttentionSite] = {}


def _free_number() -> int:
    return next(number for number in range(len(SITES) + 1) if number not in SITES)


@torch.library.custom_op("diffusers_accel::attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    site: int,
) -> torch.Tensor:
    out = SITES[site].run(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return out.contiguous()


@_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))
