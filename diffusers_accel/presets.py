"""Presets: named configurations, as plain data, filled in for the pipeline at hand.

- `lossless`: the same arithmetic up to rounding.
- `balanced`: adds step caching at the published threshold of the model's own coefficients (about 1.5x by itself).
- `fast`: the same at the larger published threshold (about 2x).

A preset chooses; it never refuses. What a model has no published constants for is left off, and `explain` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import AccelConfig, TeaCacheConfig
from .errors import ConfigError, nearest
from .features.feature import Denoiser, Target
from .models import Checkpoint, TeaCacheRow


@dataclass(frozen=True)
class Preset:
    """What a preset turns on besides the lossless part; `cache` names the field of the published row to use."""

    cache: str | None = None


PRESETS = {"lossless": Preset(), "balanced": Preset(cache="threshold"), "fast": Preset(cache="fast_threshold")}


def resolve(name: str, target: Target) -> tuple[AccelConfig, tuple[str, ...]]:
    """The configuration of a preset for this pipeline, and notes on what it left off.

    Raises:
        ConfigError: There is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}. {nearest(name, PRESETS)}")
    preset = PRESETS[name]
    config: dict[str, object] = {"attention": "auto", "compile": "auto"}
    if preset.cache is None:
        return AccelConfig.from_dict(config), ()
    rows = [_row(target, denoiser) for denoiser in target.denoisers]
    if any(row is None for row in rows):
        return AccelConfig.from_dict(config), (
            f"preset {name!r}: caching is off, since no TeaCache coefficients are published for this configuration.",
        )
    threshold = max(getattr(row, preset.cache) or row.threshold for row in rows if row is not None)
    return AccelConfig.from_dict({**config, "cache": TeaCacheConfig(threshold=threshold)}), ()


def _row(target: Target, denoiser: Denoiser) -> TeaCacheRow | None:
    pipeline = type(target.pipe).__name__
    checkpoint = Checkpoint(denoiser.config, pipeline, dict(getattr(target.pipe, "config", {})))
    name = denoiser.adapter.row(checkpoint)
    return denoiser.adapter.rows.get(name) if name is not None else None
