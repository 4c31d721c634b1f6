"""Attention kernels: one record each, and the site through which a pipeline calls its kernel.

Importing this package registers the records and imports no kernel package.
"""

from __future__ import annotations

import torch

from ...core.platform import Device
from . import flash, torch_native  # noqa: F401  (each registers its records)
from .record import KERNELS, AttentionKernel, register_attention
from .site import SITES, AttentionSite

# Exact kernels to prefer over SDPA, best first; fa3's margin on Hopper is in benchmarks/results/flux.json.
_PREFERENCE: dict[tuple[int, int] | None, tuple[str, ...]] = {(9, 0): ("fa3", "fa4"), (10, 0): ("fa4",)}


def choose(device: Device, dtype: torch.dtype, head_dim: int | None) -> AttentionKernel:
    """The fastest exact kernel that can run such calls on `device`."""
    for name in _PREFERENCE.get(device.arch, ()):
        kernel = KERNELS.get(name)
        if kernel.missing(device) is None and kernel.refuses(dtype, head_dim) is None:
            return kernel
    return KERNELS.get("sdpa")


__all__ = ["KERNELS", "SITES", "AttentionKernel", "AttentionSite", "choose", "register_attention"]
