"""The configuration: a tree of frozen keyword-only dataclasses, one per feature, `None` meaning off.

A section accepts its class, a mapping of its fields, or a shorthand string for the common case. Everything here is
plain data: it imports nothing of the package but its errors, holds no run-time state, and round-trips through YAML.

- `fields.py`: the declaration and validation of fields.
- `sections.py`, `sparse.py`, `cache.py`, `parallel.py`, `offload.py`: the classes of sections.
- `accel.py`: `AccelConfig`, the whole.
- `reading.py`: sections from mappings, shorthands and YAML files.
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
from .fields import Section, plain
from .offload import OffloadConfig
from .parallel import ParallelConfig
from .reading import parse_yaml, read_yaml
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
from .sparse import SparseConfig

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
    "OffloadConfig",
    "PABConfig",
    "ParallelConfig",
    "PolicyConfig",
    "RequestConfig",
    "SeaCacheConfig",
    "SparseConfig",
    "Section",
    "StepMaskConfig",
    "TaylorSeerConfig",
    "TeaCacheConfig",
    "VAEConfig",
    "WarmupConfig",
    "parse_yaml",
    "plain",
    "read_yaml",
]
