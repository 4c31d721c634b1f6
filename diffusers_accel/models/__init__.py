"""Adapters: data about each denoiser class. The table `ADAPTERS` lists the models that this package supports."""

from __future__ import annotations

from torch import nn

from .adapter import Adapter, Checkpoint, MagCacheRow, Stack, TeaCacheRow, default_adapter
from .cosmos import COSMOS
from .cosmos3 import COSMOS3
from .flux import FLUX
from .flux2 import FLUX2
from .ltx2 import LTX2
from .qwen import QWEN
from .sd3 import SD3
from .wan import WAN, WAN_VACE

ADAPTERS: tuple[Adapter, ...] = (FLUX, FLUX2, WAN, WAN_VACE, LTX2, QWEN, COSMOS, COSMOS3, SD3)

_BY_CLASS = {name: adapter for adapter in ADAPTERS for name in adapter.classes}

# Every published TeaCache row by name, for `coefficients="..."`.
TEACACHE_ROWS: dict[str, TeaCacheRow] = {
    name: row for adapter in ADAPTERS for name, row in adapter.teacache_rows.items()
}

# Every published MagCache table by name, for `mag_ratios="..."`.
MAGCACHE_ROWS: dict[str, MagCacheRow] = {
    name: row for adapter in ADAPTERS for name, row in adapter.magcache_rows.items()
}


def adapter_for(denoiser: nn.Module) -> Adapter:
    """The adapter of a denoiser's class, or a default adapter."""
    return _BY_CLASS.get(type(denoiser).__name__) or default_adapter(denoiser)


__all__ = [
    "ADAPTERS",
    "MAGCACHE_ROWS",
    "TEACACHE_ROWS",
    "Adapter",
    "Checkpoint",
    "MagCacheRow",
    "Stack",
    "TeaCacheRow",
    "adapter_for",
]
