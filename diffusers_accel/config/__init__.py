"""The configuration: a tree of frozen keyword-only dataclasses, one per feature, `None` meaning off.

A section accepts its class, a mapping of its fields, or a shorthand string for the common case. Everything here is
plain data: it imports nothing of the package but its errors, holds no run-time state, and round-trips through YAML.

- `declared.py`: what a field may hold, and the check. `sections.py`, `cache.py`, `parallel.py`: the classes.
  `accel.py`: the whole. `reading.py`: from what a user may write to them.
"""

from __future__ import annotations

from .accel import AccelConfig
from .cache import (
    CACHE_CONFIGS,
    MASKS,
    POLICY_NAMES,
    CacheConfig,
    DBCacheConfig,
    EasyCacheConfig,
    FBCacheConfig,
    IntervalConfig,
    MagCacheConfig,
    PABConfig,
    PolicyConfig,
    SeaCacheConfig,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
)
from .declared import Section, plain
from .parallel import ParallelConfig
from .reading import parsed, read_yaml
from .sections import (
    AttentionConfig,
    CompileConfig,
    CudaGraphConfig,
    FuseConfig,
    LinearConfig,
    RequestConfig,
    VAEConfig,
    WarmupConfig,
)

__all__ = [
    "CACHE_CONFIGS",
    "MASKS",
    "POLICY_NAMES",
    "AccelConfig",
    "AttentionConfig",
    "CacheConfig",
    "CompileConfig",
    "CudaGraphConfig",
    "DBCacheConfig",
    "EasyCacheConfig",
    "FBCacheConfig",
    "FuseConfig",
    "IntervalConfig",
    "LinearConfig",
    "MagCacheConfig",
    "PABConfig",
    "ParallelConfig",
    "PolicyConfig",
    "RequestConfig",
    "SeaCacheConfig",
    "Section",
    "StepMaskConfig",
    "TaylorSeerConfig",
    "TeaCacheConfig",
    "VAEConfig",
    "WarmupConfig",
    "parsed",
    "plain",
    "read_yaml",
]
