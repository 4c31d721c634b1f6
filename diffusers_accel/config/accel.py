"""`AccelConfig`, the whole configuration: one field per feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest, shown
from .cache import CACHE_CONFIGS, CacheConfig, PABConfig
from .fields import plain
from .offload import OffloadConfig
from .parallel import ParallelConfig
from .reading import build_section, read_yaml
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


@dataclass(frozen=True, kw_only=True)
class AccelConfig:
    """A configuration of all features. Every section is off (`None`) by default; its class documents the fields.

    Raises:
        ConfigError: A value has another type than its field or is out of its range, or a section has an unknown key.
    """

    linear: LinearConfig | None = field(default=None, metadata={"section": LinearConfig})
    fuse: FuseConfig | None = field(default=None, metadata={"section": FuseConfig})
    attention: AttentionConfig | None = field(default=None, metadata={"section": AttentionConfig})
    compile: CompileConfig | None = field(default=None, metadata={"section": CompileConfig})
    cuda_graph: CudaGraphConfig | None = field(default=None, metadata={"section": CudaGraphConfig})
    cache: CacheConfig | PABConfig | None = field(default=None, metadata={"section": CACHE_CONFIGS})
    parallel: ParallelConfig | None = field(default=None, metadata={"section": ParallelConfig})
    vae: VAEConfig | None = field(default=None, metadata={"section": VAEConfig})
    offload: OffloadConfig | None = field(default=None, metadata={"section": OffloadConfig})
    request: RequestConfig | None = field(default=None, metadata={"section": RequestConfig})
    warmup: WarmupConfig | None = field(default=None, metadata={"section": WarmupConfig})

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, build_section(entry, getattr(self, entry.name)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AccelConfig:
        """A configuration from nested mappings with the fields' names as keys.

        Raises:
            ConfigError: A key is unknown or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"A configuration is a mapping of sections, not {shown(values)}.")
        known = {entry.name for entry in fields(cls)}
        for key in values:
            if key not in known:
                written = key if isinstance(key, str) else ""
                raise ConfigError(f"Unknown configuration key {shown(key)}. {nearest(written, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested plain values: `from_dict(config.to_dict()) == config`. Sections that are off are
        left out."""
        result: dict[str, Any] = {}
        for entry in fields(self):
            section = getattr(self, entry.name)
            if section is not None:
                kind = {"kind": section.kind} if section.kind else {}
                result[entry.name] = kind | {item.name: plain(getattr(section, item.name)) for item in fields(section)}
        return result

    def registry_names(self) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
        """(dotted field, kind of registry, name, extra choices) of every name that must be registered."""
        for entry in fields(self):
            section = getattr(self, entry.name)
            if section is not None:
                yield from section.registry_names()

    @classmethod
    def from_yaml(cls, path: str | Path) -> AccelConfig:
        """A configuration from a YAML file with the fields' names as keys.

        Raises:
            ConfigError: The file is missing, is not YAML, or holds an unknown key.
        """
        return cls.from_dict(read_yaml(path))

    def to_yaml(self, path: str | Path) -> None:
        """Writes a YAML file for `from_yaml`."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")
