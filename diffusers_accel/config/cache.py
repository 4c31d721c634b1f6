"""The cache section: one class per caching rule. `policies/` documents each rule and its source.

A class's `kind` selects it in YAML, and so does the string `kind` alone. The kind of a registered policy is its name.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .fields import REQUIRED, Section, option, option_like

# Names of published step computation masks.
MASKS = ("slow", "medium", "fast", "ultra")
# Kinds of registered names (`FieldSpec.registry`).
POLICY, TEACACHE_ROW, MAGCACHE_ROW = "caching policy", "row of TeaCache's coefficients", "table of MagCache's ratios"

_MASK: dict[str, Any] = {
    "choices": MASKS,
    "condition": lambda mask: isinstance(mask, str) or (set(mask) <= {0, 1} and mask[0] == 1),
    "min_items": 1,
    "examples": ("slow", (1,), (1, 0, 0, 1)),
}
_MASK_EXPECTED = (
    f"one of {', '.join(map(repr, MASKS))}, or a list of ones for computed and zeros for skipped steps, the first one "
    "computed"
)
_COEFFICIENTS: dict[str, Any] = {
    "registry": TEACACHE_ROW,
    "min_items": 1,
    "condition": lambda found: isinstance(found, str) or any(found),
    "expected": "a list of one or more finite numbers, not all 0, the name of a row of TeaCache's coefficients, or "
    "None",
    "examples": ((1.0, 0.0), (0.5,), "flux.1-dev", None),
}
_RATIOS: dict[str, Any] = {
    "registry": MAGCACHE_ROW,
    "exclusive_minimum": 0,
    "maximum": 100,
    "min_items": 2,
    "expected": "a list of two or more numbers above 0 and up to 100, one for each step of a schedule, the name of a "
    "table of MagCache's ratios, or None",
}
_THRESHOLD = {"minimum": 0}


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Section):
    """The fields of every rule that skips whole steps.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    taylorseer_order: int = option(
        0,
        "Order of the Taylor polynomial that predicts a skipped step's residual; 0 reuses the last.",
        minimum=0,
        maximum=4,
    )
    guard: float = option(
        0.0,
        """Share of the skippable steps that are computed to measure the prediction's error: 0.1 computes the first and
        every tenth after it. Such a step costs as much as a computed one.""",
        minimum=0,
        maximum=1,
    )
    guard_bound: float = option(
        0.2,
        """Relative error of the prediction, mean |predicted - computed| / mean |computed| of the residual, above which
        the rest of the request is computed in full.""",
        minimum=0,
    )

    section: typing.ClassVar[str] = "cache"


@dataclass(frozen=True, kw_only=True)
class TeaCacheConfig(CacheConfig):
    """TeaCache: a step is skipped while the accumulated, rescaled change of the modulated input stays small.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    threshold: float | None = option(
        None,
        """Accumulated change below which a step is skipped. 0 skips nothing. `None` takes the published threshold of
        the coefficients (a speed-up of about 1.5).""",
        **_THRESHOLD,
    )
    coefficients: tuple[float, ...] | str | None = option(
        None,
        """The rescaling polynomial's coefficients, highest degree first; or the name of a published row (see
        `diffusers_accel.models.TEACACHE_ROWS`). `None` finds the row from the model's configuration.""",
        **_COEFFICIENTS,
    )
    coefficients_2: tuple[float, ...] | str | None = option(
        None,
        "Coefficients, or the name of a row, of the second expert (`transformer_2`). `None` takes `coefficients`.",
        **_COEFFICIENTS,
    )
    use_ret_steps: bool = option(
        False,
        """Whether to use the second published variant for Wan: the signal is the projected time embedding, and the
        first five steps are always computed.""",
    )

    kind: typing.ClassVar[str] = "teacache"


@dataclass(frozen=True, kw_only=True)
class DBCacheConfig(CacheConfig):
    """DBCache: the blocks between the first and the last few are skipped while the first blocks' residual changes
    little.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    Fn_compute_blocks: int = option(
        8, "Number of blocks at the beginning that are computed on every step; their residual is measured.", minimum=1
    )
    Bn_compute_blocks: int = option(0, "Number of blocks at the end that are computed on every step.", minimum=0)
    max_warmup_steps: int = option(8, "Number of steps at the beginning that are always computed.", minimum=0)
    max_cached_steps: int = option(-1, "Largest number of skipped steps; -1 for no bound.", minimum=-1)
    max_continuous_cached_steps: int = option(
        -1, "Largest number of consecutive skipped steps; -1 for no bound.", minimum=-1
    )
    residual_diff_threshold: float = option(
        0.08, "Relative change below which a step is skipped. 0 skips nothing.", **_THRESHOLD
    )
    force_refresh_step_hint: int | None = option(
        None,
        """Index of a step that is always computed, counted from the request's first (0), which is computed anyway.""",
        minimum=1,
    )
    force_refresh_step_policy: str = option(
        "once",
        """`"once"` computes the step of the hint; `"repeat"` computes every step that is a multiple of it.""",
        choices=("once", "repeat"),
    )
    enable_separate_cfg: bool | None = option(
        None,
        """Whether each guidance branch has a state of its own. A pipeline that calls the denoiser once per branch needs
        it, so `False` is refused there; `None` and `True` are accepted.""",
    )
    steps_computation_mask: str | tuple[float, ...] | None = option(
        None,
        """Steps to compute: `"slow"`, `"medium"`, `"fast"`, `"ultra"`, or ones and zeros, scaled to the request's
        number of steps. `None` sets no mask.""",
        expected=f"{_MASK_EXPECTED}, or None",
        **_MASK,
    )
    steps_computation_policy: str = option(
        "dynamic",
        """`"dynamic"`: the change decides on steps that the mask does not compute; `"static"`: the mask alone
        decides.""",
        choices=("dynamic", "static"),
    )

    kind: typing.ClassVar[str] = "dbcache"


@dataclass(frozen=True, kw_only=True)
class FBCacheConfig(DBCacheConfig):
    """FBCache: DBCache with one measured block and no warm-up; see `DBCacheConfig`."""

    Fn_compute_blocks: int = option_like(DBCacheConfig, "Fn_compute_blocks", 1)
    max_warmup_steps: int = option_like(DBCacheConfig, "max_warmup_steps", 0)

    kind: typing.ClassVar[str] = "fbcache"


@dataclass(frozen=True, kw_only=True)
class StepMaskConfig(CacheConfig):
    """A step computation mask: the computed steps are fixed in advance.

    Raises:
        ConfigError: The mask is unknown, or a value is out of its range.
    """

    mask: str | tuple[float, ...] = option(
        "medium",
        """Steps to compute: `"slow"` (18 of 28), `"medium"` (15), `"fast"` (11), `"ultra"` (8), or ones and zeros. A
        mask is scaled to the request's number of steps.""",
        expected=_MASK_EXPECTED,
        **_MASK,
    )

    kind: typing.ClassVar[str] = "mask"


@dataclass(frozen=True, kw_only=True)
class IntervalConfig(CacheConfig):
    """A fixed interval: one step of each interval is computed; the others reuse its residual or predict their own.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    interval: int = option(2, "Steps per computed step.", minimum=1)
    warmup: int = option(1, "Number of steps at the beginning that are always computed.", minimum=1)

    kind: typing.ClassVar[str] = "interval"


@dataclass(frozen=True, kw_only=True)
class TaylorSeerConfig(IntervalConfig):
    """TaylorSeer: a fixed interval, with residuals between computed steps predicted by a Taylor polynomial.

    Raises:
        ConfigError: A value is out of its range, or both orders are given.
    """

    order: int = option(
        1,
        "Order of the polynomial; 0 reuses the last residual. It replaces `taylorseer_order` of the other rules.",
        minimum=0,
        maximum=4,
    )
    interval: int = option_like(IntervalConfig, "interval", 3)
    warmup: int = option_like(IntervalConfig, "warmup", 3)

    kind: typing.ClassVar[str] = "taylorseer"

    def validate(self) -> None:
        """Refuses two orders.

        Raises:
            ConfigError: `taylorseer_order` is given beside `order`.
        """
        if self.taylorseer_order:
            raise ConfigError(
                f"cache.taylorseer_order: taylorseer's own field is cache.order; got {self.taylorseer_order} here. "
                "Nearest: 0."
            )


@dataclass(frozen=True, kw_only=True)
class MagCacheConfig(CacheConfig):
    """MagCache: a step is skipped while the error estimated from a table of magnitude ratios stays small.

    The rule measures no tensor, so nothing is read from the device.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    threshold: float = option(0.06, "Accumulated error up to which a step is skipped. 0 skips nothing.", **_THRESHOLD)
    max_skip_steps: int = option(3, "Largest number of consecutive skipped steps.", minimum=0)
    retention_ratio: float = option(
        0.2, "Share of the steps, at the beginning, that are always computed.", minimum=0, maximum=1
    )
    mag_ratios: tuple[float, ...] | str | None = option(
        None,
        """Mean ratio of the residual's magnitude to the previous step's, for each step of a schedule of any length (the
        first is 1); or the name of a published table. `None` finds the table from the model's configuration.""",
        **_RATIOS,
    )
    mag_ratios_2: tuple[float, ...] | str | None = option(
        None,
        "Ratios, or the name of a table, of the second expert (`transformer_2`). `None` takes `mag_ratios`.",
        **_RATIOS,
    )

    kind: typing.ClassVar[str] = "magcache"


@dataclass(frozen=True, kw_only=True)
class EasyCacheConfig(CacheConfig):
    """EasyCache: the whole denoiser is skipped while the estimated change of its output stays small.

    The change of the denoiser's input gives the estimate.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    threshold: float = option(
        0.05, "Accumulated relative change below which a step is skipped. 0 skips nothing.", **_THRESHOLD
    )
    warmup: int = option(
        7, "Number of steps at the beginning that are always computed. The last step is always computed too.", minimum=1
    )

    kind: typing.ClassVar[str] = "easycache"


@dataclass(frozen=True, kw_only=True)
class SeaCacheConfig(CacheConfig):
    """SeaCache: a step is skipped while the accumulated change of the latents' signal stays small.

    A filter separates signal from noise by their spectra. The rule needs no coefficients. The fields have the names
    and defaults of diffusers' implementation.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    threshold: float = option(
        0.25, "Accumulated relative change below which a step is skipped. 0 skips nothing.", **_THRESHOLD
    )
    retention_steps: int = option(1, "Number of steps at the beginning that are always computed.", minimum=0)
    cache_end_steps: int = option(1, "Number of steps at the end that are always computed.", minimum=0)
    max_consecutive_cached: int = option(2, "Largest number of consecutive skipped steps; 0 for no bound.", minimum=0)
    power_exp: float | None = option(
        None,
        """Exponent of the power spectrum of clean pictures, frequency^-power_exp. `None` takes 2 for pictures and 3 for
        videos.""",
        exclusive_minimum=0,
        maximum=16,
    )
    taylorseer_order: int = option_like(CacheConfig, "taylorseer_order", 1)

    kind: typing.ClassVar[str] = "seacache"


def _in_order(window: Sequence[float]) -> bool:
    return window[0] <= window[1]


@dataclass(frozen=True, kw_only=True)
class PABConfig(Section):
    """Pyramid Attention Broadcast: within a window of timesteps, attention is computed every few steps.

    In between, each attention module reuses its last output, separately for each guidance branch.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    self_attention: int | None = option(
        2, "Steps per computation of self-attention; `None` computes it on every step.", minimum=1
    )
    temporal_attention: int | None = option(
        4,
        "Steps per computation of temporal attention, in models that have it; `None` computes it on every step.",
        minimum=1,
    )
    cross_attention: int | None = option(
        3, "Steps per computation of cross-attention; `None` computes it on every step.", minimum=1
    )
    layers: dict[str, int] | None = option(
        None,
        "Globs of attention modules -> steps per computation. The first matching glob overrides the intervals above.",
        minimum=1,
    )
    window: tuple[float, float] = option(
        (100.0, 800.0),
        "Lowest and highest timestep (0 to 1000) between which outputs are reused.",
        minimum=0,
        maximum=1000,
        condition=_in_order,
        expected="two timesteps between 0 and 1000, in order",
        examples=((0.0, 1000.0), (100, 100)),
    )

    section: typing.ClassVar[str] = "cache"
    kind: typing.ClassVar[str] = "pab"


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(CacheConfig):
    """A user's own policy, registered with `register_policy`. The policy's name is its shorthand.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range; or no policy is named.
    """

    name: str = option(REQUIRED, "The policy's registered name (`register_policy(name, ...)`).", registry=POLICY)
    options: dict[str, Any] | None = option(None, "Keyword arguments of the policy's factory.", key_kind="names")

    kind: typing.ClassVar[str] = "policy"


CACHE_CONFIGS: dict[str, type[CacheConfig] | type[PABConfig]] = {
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

# Names of registered policies, which are kinds too. `policies.register_policy` adds to the set.
POLICY_NAMES: set[str] = set()
