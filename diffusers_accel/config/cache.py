"""The cache section: one class per caching rule. What each rule is, and where it comes from, is said in `policies/`.

`kind` tells the classes apart in YAML and is their shorthand string. A user's own policy, once registered, has its name
for a kind.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, nearest

# Names of published step computation masks.
MASKS = ("slow", "medium", "fast", "ultra")


def _between(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name}: between {least:g} and {most:g}, got {value!r}.")


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise ConfigError(f"{name}: at least {least:g}, got {value!r}.")


def _check_mask(name: str, mask: str | tuple[float, ...] | None) -> None:
    if isinstance(mask, str) and mask not in MASKS:
        raise ConfigError(f"{name}: unknown mask {mask!r}. {nearest(mask, MASKS)}")
    if isinstance(mask, tuple) and (not mask or not set(mask) <= {0, 1} or not mask[0]):
        raise ConfigError(f"{name}: ones for computed and zeros for skipped steps, the first one computed.")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What every rule that skips whole steps takes.

    Args:
        taylorseer_order: Order of the Taylor polynomial that predicts a skipped step's residual; 0 reuses the last.
        guard: Share of the skipped steps that are computed after all, to see how far off the prediction would have
            been: 0.1 for the first and every tenth after it. Such a step costs what a computed one does.
        guard_bound: Relative error of the prediction, mean |predicted - computed| / mean |computed| of what the blocks
            add, above which the rest of the request is computed in full.

    Raises:
        ConfigError: A value is out of its range.
    """

    taylorseer_order: int = 0
    guard: float = 0.0
    guard_bound: float = 0.2

    kind: typing.ClassVar[str] = ""

    def validate(self) -> None:
        """Checks what types alone do not say."""
        _between("cache.taylorseer_order", self.taylorseer_order, 0, 4)
        _between("cache.guard", self.guard, 0, 1)
        _at_least("cache.guard_bound", self.guard_bound, 0)


@dataclass(frozen=True, kw_only=True)
class TeaCacheConfig(CacheConfig):
    """TeaCache: skip a step while the accumulated, rescaled change of the model's modulated input stays small.

    Args:
        threshold: Accumulated change below which a step reuses the last residual. 0 skips nothing. `None` takes the
            published threshold of the coefficients (about 1.5x).
        coefficients: The rescaling polynomial, highest degree first; or the name of a published row (see
            `diffusers_accel.models.adapter.TEACACHE_ROWS`); or `None` to find the row from the model's configuration.
        coefficients_2: The same for the second expert (`transformer_2`); `None` takes `coefficients`.
        use_ret_steps: Wan's other published variant: compare the projected time embedding and always compute the
            first five steps.
        taylorseer_order, guard, guard_bound: See `CacheConfig`.

    Raises:
        ConfigError: A value is out of its range.
    """

    threshold: float | None = None
    coefficients: tuple[float, ...] | str | None = None
    coefficients_2: tuple[float, ...] | str | None = None
    use_ret_steps: bool = False

    kind: typing.ClassVar[str] = "teacache"


@dataclass(frozen=True, kw_only=True)
class DBCacheConfig(CacheConfig):
    """DBCache: skip the blocks between the first and the last few while what the first few add changes little.

    Args:
        Fn_compute_blocks: Blocks at the beginning that are computed on every step; what they add is watched.
        Bn_compute_blocks: Blocks at the end that are computed on every step.
        max_warmup_steps: Steps at the beginning that are always computed.
        max_cached_steps: Steps that may be skipped in all; -1 for any number.
        max_continuous_cached_steps: Steps that may be skipped one after another; -1 for any number.
        residual_diff_threshold: Relative change below which a step is skipped. 0 skips nothing.
        force_refresh_step_hint: A step, counted from the request's first, that is computed in any case.
        force_refresh_step_policy: `"once"`, or `"repeat"` for every so many steps.
        enable_separate_cfg: Whether guidance branches have a state each. They have it wherever the pipeline calls the
            denoiser once per branch, which `None` and `True` accept; `False` is refused there.
        steps_computation_mask: `"slow"`, `"medium"`, `"fast"`, `"ultra"`, or ones and zeros, scaled to the request's
            number of steps.
        steps_computation_policy: `"dynamic"`: where the mask skips, the change decides; `"static"`: the mask decides.
        taylorseer_order, guard, guard_bound: See `CacheConfig`.

    Raises:
        ConfigError: A value is out of its range.
    """

    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    max_warmup_steps: int = 8
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    residual_diff_threshold: float = 0.08
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"
    enable_separate_cfg: bool | None = None
    steps_computation_mask: str | tuple[float, ...] | None = None
    steps_computation_policy: str = "dynamic"

    kind: typing.ClassVar[str] = "dbcache"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        super().validate()
        if self.Fn_compute_blocks < 1 or self.Bn_compute_blocks < 0:
            raise ConfigError("cache: Fn_compute_blocks is at least 1, Bn_compute_blocks at least 0.")
        if self.force_refresh_step_hint is not None and self.force_refresh_step_hint < 1:
            raise ConfigError("cache.force_refresh_step_hint: at least 1; the first step is computed in any case.")
        for name, values in (
            ("force_refresh_step_policy", ("once", "repeat")),
            ("steps_computation_policy", ("dynamic", "static")),
        ):
            if getattr(self, name) not in values:
                raise ConfigError(f"cache.{name}: {values[0]!r} or {values[1]!r}, got {getattr(self, name)!r}.")
        _check_mask("cache.steps_computation_mask", self.steps_computation_mask)


@dataclass(frozen=True, kw_only=True)
class FBCacheConfig(DBCacheConfig):
    """FBCache: DBCache that watches the first block alone, without warm-up; see there for the arguments."""

    Fn_compute_blocks: int = 1
    max_warmup_steps: int = 0

    kind: typing.ClassVar[str] = "fbcache"


@dataclass(frozen=True, kw_only=True)
class StepMaskConfig(CacheConfig):
    """A step computation mask: which steps are computed is said beforehand.

    Args:
        mask: `"slow"` (18 of 28 steps), `"medium"` (15), `"fast"` (11), `"ultra"` (8), or ones and zeros; scaled to the
            request's number of steps.
        taylorseer_order, guard, guard_bound: See `CacheConfig`.

    Raises:
        ConfigError: There is no such mask, or a value is out of its range.
    """

    mask: str | tuple[float, ...] = "medium"

    kind: typing.ClassVar[str] = "mask"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        super().validate()
        _check_mask("cache.mask", self.mask)


@dataclass(frozen=True, kw_only=True)
class IntervalConfig(CacheConfig):
    """A fixed interval: one of so many steps is computed, the others reuse it (or predict, with `taylorseer_order`).

    Args:
        interval: One of so many steps is computed.
        warmup: Steps at the beginning that are computed.
        taylorseer_order, guard, guard_bound: See `CacheConfig`.

    Raises:
        ConfigError: A value is out of its range.
    """

    interval: int = 2
    warmup: int = 1

    kind: typing.ClassVar[str] = "interval"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        super().validate()
        _at_least("cache.interval", self.interval, 1)
        _at_least("cache.warmup", self.warmup, 1)


@dataclass(frozen=True, kw_only=True)
class TaylorSeerConfig(IntervalConfig):
    """TaylorSeer: a fixed interval, and residuals between computed steps predicted by a Taylor polynomial.

    Args:
        order: Of the polynomial; 0 reuses the last residual. (`taylorseer_order` is for the other rules.)
        interval, warmup: See `IntervalConfig`.
        guard, guard_bound: See `CacheConfig`.

    Raises:
        ConfigError: A value is out of its range, or both orders were given.
    """

    order: int = 1
    interval: int = 3
    warmup: int = 3

    kind: typing.ClassVar[str] = "taylorseer"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        super().validate()
        _between("cache.order", self.order, 0, 4)
        if self.taylorseer_order:
            raise ConfigError("cache: taylorseer's own field is cache.order; leave taylorseer_order out.")


@dataclass(frozen=True, kw_only=True)
class MagCacheConfig(CacheConfig):
    """MagCache: skip while the error foretold by a table of the residual's magnitudes stays small. Reads nothing back.

    Args:
        threshold: Accumulated error up to which a step is skipped. 0 skips nothing.
        max_skip_steps: Steps that may be skipped one after another.
        retention_ratio: Share of the first steps that are always computed.
        mag_ratios: Mean ratio of the residual's magnitude to the last step's, for each step of a schedule of any length
            (the first is 1); or the name of a published table; or `None` to find the table from the model's
            configuration.
        mag_ratios_2: The same for the second expert (`transformer_2`); `None` takes `mag_ratios`.
        taylorseer_order, guard, guard_bound: See `CacheConfig`.

    Raises:
        ConfigError: A value is out of its range.
    """

    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    mag_ratios: tuple[float, ...] | str | None = None
    mag_ratios_2: tuple[float, ...] | str | None = None

    kind: typing.ClassVar[str] = "magcache"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        super().validate()
        _at_least("cache.threshold", self.threshold, 0)
        _at_least("cache.max_skip_steps", self.max_skip_steps, 0)
        _between("cache.retention_ratio", self.retention_ratio, 0, 1)
        for name in ("mag_ratios", "mag_ratios_2"):
            ratios = getattr(self, name)
            if isinstance(ratios, tuple) and (len(ratios) < 2 or not all(0 < ratio < 100 for ratio in ratios)):
                raise ConfigError(f"cache.{name}: two or more positive ratios, one for each step of a schedule.")


@dataclass(frozen=True, kw_only=True)
class EasyCacheConfig(CacheConfig):
    """EasyCache: skip the whole denoiser while the change of its output, foretold from that of its input, stays small.

    Args:
        threshold: Accumulated relative change below which a step is skipped. 0 skips nothing.
        warmup: Steps at the beginning that are computed; the last step is too.
        taylorseer_order, guard, guard_bound: See `CacheConfig`.

    Raises:
        ConfigError: A value is out of its range.
    """

    threshold: float = 0.05
    warmup: int = 7

    kind: typing.ClassVar[str] = "easycache"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        super().validate()
        _at_least("cache.threshold", self.threshold, 0)
        _at_least("cache.warmup", self.warmup, 1)


@dataclass(frozen=True, kw_only=True)
class SeaCacheConfig(CacheConfig):
    """SeaCache: skip while the accumulated change of the latents' signal, told from their noise by its spectrum, stays
    small. Needs no coefficients. Names and defaults are those of diffusers' own.

    Args:
        threshold: Accumulated relative change below which a step is skipped. 0 skips nothing.
        retention_steps: Steps at the beginning that are computed.
        cache_end_steps: Steps at the end that are computed.
        max_consecutive_cached: Steps that may be skipped one after another; 0 for any number.
        power_exp: Exponent by which the power of a clean picture falls with its frequency; `None` for 2 for pictures
            and 3 for videos.
        taylorseer_order, guard, guard_bound: See `CacheConfig`.

    Raises:
        ConfigError: A value is out of its range.
    """

    threshold: float = 0.25
    retention_steps: int = 1
    cache_end_steps: int = 1
    max_consecutive_cached: int = 2
    power_exp: float | None = None
    taylorseer_order: int = 1

    kind: typing.ClassVar[str] = "seacache"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        super().validate()
        for name in ("threshold", "retention_steps", "cache_end_steps", "max_consecutive_cached"):
            _at_least(f"cache.{name}", getattr(self, name), 0)
        if self.power_exp is not None and not self.power_exp > 0:
            raise ConfigError(f"cache.power_exp: above 0, got {self.power_exp!r}.")


@dataclass(frozen=True, kw_only=True)
class PABConfig:
    """Pyramid Attention Broadcast: within a window of timesteps, attention is computed every few steps only, and its
    output used again in between, for every layer and guidance branch by itself.

    Args:
        self_attention: Self-attention is computed on one of so many steps; `None` on all.
        temporal_attention: The same of attention along time, in models that have it apart.
        cross_attention: The same of cross-attention.
        layers: Globs of attention modules -> one of how many steps, which win over the kinds; the first that matches.
        window: Timesteps, of 1000, between which outputs are used again.

    Raises:
        ConfigError: A value is out of its range.
    """

    self_attention: int | None = 2
    temporal_attention: int | None = 4
    cross_attention: int | None = 3
    layers: dict[str, int] | None = None
    window: tuple[float, ...] = (100.0, 800.0)

    kind: typing.ClassVar[str] = "pab"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        for name in ("self_attention", "temporal_attention", "cross_attention"):
            _at_least(f"cache.{name}", getattr(self, name), 1)
        for glob, interval in (self.layers or {}).items():
            if not isinstance(glob, str) or not isinstance(interval, int) or interval < 1:
                raise ConfigError(f"cache.layers: globs to numbers of steps, got {glob!r}: {interval!r}.")
        if len(self.window) != 2 or not 0 <= self.window[0] <= self.window[1] <= 1000:
            raise ConfigError(f"cache.window: two timesteps between 0 and 1000, in order, got {self.window!r}.")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(CacheConfig):
    """A user's own policy, registered with `register_policy`. Its name alone is short for it.

    Args:
        name: As registered.
        options: What its factory is called with.
        taylorseer_order, guard, guard_bound: See `CacheConfig`.

    Raises:
        ConfigError: A value is out of its range.
    """

    name: str
    options: dict[str, Any] | None = None

    kind: typing.ClassVar[str] = "policy"


CACHE_CONFIGS: dict[str, type] = {
    kind.kind: kind
    for kind in (
        TeaCacheConfig,
        DBCacheConfig,
        FBCacheConfig,
        StepMaskConfig,
        IntervalConfig,
        TaylorSeerConfig,
        MagCacheConfig,
        EasyCacheConfig,
        SeaCacheConfig,
        PABConfig,
        PolicyConfig,
    )
}

# Names of registered policies (`policies.register_policy` adds to it): kinds of their own.
POLICY_NAMES: set[str] = set()
