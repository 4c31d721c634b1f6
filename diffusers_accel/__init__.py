"""diffusers_accel: makes stock diffusers pipelines as fast as the chip allows, in place, and takes it back on request.

>>> from diffusers_accel import accelerate, explain, restore, stats
>>> pipe = accelerate(FluxPipeline.from_pretrained(MODEL, dtype=torch.bfloat16).to("cuda"))

Importing the package loads no kernel package and no triton; names are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import accelerate, explain, from_pretrained, restore, stats, warmup
    from .checkpoints.modelopt import CheckpointError
    from .checkpoints.saving import save_quantized
    from .config import (
        AccelConfig,
        AttentionConfig,
        CompileConfig,
        CudaGraphConfig,
        DBCacheConfig,
        EasyCacheConfig,
        FBCacheConfig,
        FuseConfig,
        IntervalConfig,
        LinearConfig,
        MagCacheConfig,
        OffloadConfig,
        PABConfig,
        ParallelConfig,
        PolicyConfig,
        RequestConfig,
        SeaCacheConfig,
        SparseConfig,
        StepMaskConfig,
        TaylorSeerConfig,
        TeaCacheConfig,
        VAEConfig,
        WarmupConfig,
    )
    from .errors import (
        AccelError,
        Busy,
        ConfigError,
        NotAccelerated,
        PolicyFailed,
        RanksDiffer,
        UnknownName,
        Unsupported,
    )
    from .kernels.attention import register_attention, register_sparse
    from .kernels.linear import register_linear
    from .policies import register_policy
    from .quality.calibrate import calibrate
    from .workers import WorkerFailed, launch

__version__ = "0.1.0"

_HOMES = {
    "api": ("accelerate", "explain", "from_pretrained", "restore", "stats", "warmup"),
    "config": (
        "AccelConfig",
        "AttentionConfig",
        "CompileConfig",
        "CudaGraphConfig",
        "DBCacheConfig",
        "EasyCacheConfig",
        "FBCacheConfig",
        "FuseConfig",
        "IntervalConfig",
        "LinearConfig",
        "MagCacheConfig",
        "OffloadConfig",
        "PABConfig",
        "ParallelConfig",
        "PolicyConfig",
        "RequestConfig",
        "SeaCacheConfig",
        "SparseConfig",
        "StepMaskConfig",
        "TaylorSeerConfig",
        "TeaCacheConfig",
        "VAEConfig",
        "WarmupConfig",
    ),
    "checkpoints.modelopt": ("CheckpointError",),
    "checkpoints.saving": ("save_quantized",),
    "errors": (
        "AccelError",
        "Busy",
        "ConfigError",
        "NotAccelerated",
        "PolicyFailed",
        "RanksDiffer",
        "UnknownName",
        "Unsupported",
    ),
    "kernels.attention": ("register_attention", "register_sparse"),
    "kernels.linear": ("register_linear",),
    "policies": ("register_policy",),
    "quality.calibrate": ("calibrate",),
    "workers": ("WorkerFailed", "launch"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AccelConfig",
    "AccelError",
    "AttentionConfig",
    "Busy",
    "CheckpointError",
    "CompileConfig",
    "ConfigError",
    "CudaGraphConfig",
    "DBCacheConfig",
    "EasyCacheConfig",
    "FBCacheConfig",
    "FuseConfig",
    "IntervalConfig",
    "LinearConfig",
    "MagCacheConfig",
    "NotAccelerated",
    "OffloadConfig",
    "PABConfig",
    "ParallelConfig",
    "PolicyConfig",
    "PolicyFailed",
    "RanksDiffer",
    "RequestConfig",
    "SeaCacheConfig",
    "SparseConfig",
    "StepMaskConfig",
    "TaylorSeerConfig",
    "TeaCacheConfig",
    "UnknownName",
    "Unsupported",
    "VAEConfig",
    "WarmupConfig",
    "WorkerFailed",
    "accelerate",
    "calibrate",
    "explain",
    "from_pretrained",
    "launch",
    "register_attention",
    "register_linear",
    "register_policy",
    "register_sparse",
    "restore",
    "save_quantized",
    "stats",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
