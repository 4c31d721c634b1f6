"""The cache section: one class per caching rule. What each rule is, and where it comes from, is said in `policies/`.

`kind` tells the classes apart in YAML and is their shorthand string. A user's own policy, once registered, has its name
for a kind.
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
# Kinds of names in the configuration, as their registries call them.
POLICY, TEACACHE_ROW, MAGCACHE_ROW = "caching policy", "row of TeaCache's coefficients", "table of MagCache's ratios"

_MASK: dict[str, Any] = {
    "choices": MASKS,
    "condition": lambda mask: isinstance(mask, str) or (set(mask) <= {0, 1} and mask[0] == 1),
    "min_items": 1,
    "examples": ("slow", (1,), (1, 0, 0, 1)),
}
_MASK_WANTS = (
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
    """What every rule that skips whole steps takes.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range.
    """

    taylorseer_order: int = option(
        0,
        "Order of the Taylor polynomial that predicts a skipped step's residual; 0 reuses the last.",
        minimum=0,
        maximum=4,
    )
    guard: float = option(
        0.0,
        """Share of the skipped steps that are computed after all, to see how far off the prediction would have been:
        0.1 for the first and every tenth after it. Such a step costs what a computed one does.""",
        minimum=0,
        maximum=1,
    )
    guard_bound: float = option(
        0.2,
        """Relative error of the prediction, mean |predicted - computed| / mean |computed| of what the blocks add, above
        which the rest of the request is computed in full.""",
        minimum=0,
    )

    section: typing.ClassVar[str] = "cache"


@dataclass(frozen=True, kw_only=True)
class TeaCacheConfig(CacheConfig):
    """TeaCache: skip a step while the accumulated, rescaled change of the model's modulated input stays small.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range.
    """

    threshold: float | None = option(
        None,
        """Accumulated change below which a step reuses the last residual. 0 skips nothing. `None` takes the published
        threshold of the coefficients (about 1.5x).""",
        **_THRESHOLD,
    )
    coefficients: tuple[float, ...] | str | None = option(
        None,
        """The rescaling polynomial, highest degree first; or the name of a published row (see
        `diffusers_accel.models.adapter.TEACACHE_ROWS`); or `None` to find the row from the model's configuration.""",
        **_COEFFICIENTS,
    )
    coefficients_2: tuple[float, ...] | str | None = option(
        None, "The same for the second expert (`transformer_2`); `None` takes `coefficients`.", **_COEFFICIENTS
    )
    use_ret_steps: bool = option(
        False,
        """Wan's other published variant: compare the projected time embedding and always compute the first five
        steps.""",
    )

    kind: typing.ClassVar[str] = "teacache"


@dataclass(frozen=True, kw_only=True)
class DBCacheConfig(CacheConfig):
    """DBCache: skip the blocks between the first and the last few while what the first few add changes little.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range.
    """

    Fn_compute_blocks: int = option(
        8, "Blocks at the beginning that are computed on every step; what they add is watched.", minimum=1
    )
    Bn_compute_blocks: int = option(0, "Blocks at the end that are computed on every step.", minimum=0)
    max_warmup_steps: int = option(8, "Steps at the beginning that are always computed.", minimum=0)
    max_cached_steps: int = option(-1, "Steps that may be skipped in all; -1 for any number.", minimum=-1)
    max_continuous_cached_steps: int = option(
        -1, "Steps that may be skipped one after another; -1 for any number.", minimum=-1
    )
    residual_diff_threshold: float = option(
        0.08, "Relative change below which a step is skipped. 0 skips nothing.", **_THRESHOLD
    )
    force_refresh_step_hint: int | None = option(
        None,
        """A step, counted from the request's first, that is computed in any case; at least 1, since the first step is
        computed anyway.""",
        minimum=1,
    )
    force_refresh_step_policy: str = option(
        "once", """`"once"`, or `"repeat"` for every so many steps.""", choices=("once", "repeat")
    )
    enable_separate_cfg: bool | None = option(
        None,
        """Whether guidance branches have a state each. They have it wherever the pipeline calls the denoiser once per
        branch, which `None` and `True` accept; `False` is refused there.""",
    )
    steps_computation_mask: str | tuple[float, ...] | None = option(
        None,
        """`"slow"`, `"medium"`, `"fast"`, `"ultra"`, or ones and zeros, scaled to the request's number of steps.""",
        expected=f"{_MASK_WANTS}, or None",
        **_MASK,
    )
    steps_computation_policy: str = option(
        "dynamic",
        """`"dynamic"`: where the mask skips, the change decides; `"static"`: the mask decides.""",
        choices=("dynamic", "static"),
    )

    kind: typing.ClassVar[str] = "dbcache"


@dataclass(frozen=True, kw_only=True)
class FBCacheConfig(DBCacheConfig):
    """FBCache: DBCache that watches the first block alone, without warm-up; see there."""

    Fn_compute_blocks: int = option_like(DBCacheConfig, "Fn_compute_blocks", 1)
    max_warmup_steps: int = option_like(DBCacheConfig, "max_warmup_steps", 0)

    kind: typing.ClassVar[str] = "fbcache"


@dataclass(frozen=True, kw_only=True)
class StepMaskConfig(CacheConfig):
    """A step computation mask: which steps are computed is said beforehand.

    Raises:
        ConfigError: There is no such mask, or a value is out of its range.
    """

    mask: str | tuple[float, ...] = option(
        "medium",
        """`"slow"` (18 of 28 steps), `"medium"` (15), `"fast"` (11), `"ultra"` (8), or ones and zeros; scaled to the
        request's number of steps.""",
        expected=_MASK_WANTS,
        **_MASK,
    )

    kind: typing.ClassVar[str] = "mask"


@dataclass(frozen=True, kw_only=True)
class IntervalConfig(CacheConfig):
    """A fixed interval: one of so many steps is computed, the others reuse it (or predict, with `taylorseer_order`).

    Raises:
        ConfigError: A value is not of its field's type, or out of its range.
    """

    interval: int = option(2, "One of so many steps is computed.", minimum=1)
    warmup: int = option(1, "Steps at the beginning that are computed.", minimum=1)

    kind: typing.ClassVar[str] = "interval"


@dataclass(frozen=True, kw_only=True)
class TaylorSeerConfig(IntervalConfig):
    """TaylorSeer: a fixed interval, and residuals between computed steps predicted by a Taylor polynomial.

    Raises:
        ConfigError: A value is out of its range, or both orders were given.
    """

    order: int = option(
        1,
        "Of the polynomial; 0 reuses the last residual. (`taylorseer_order` is for the other rules.)",
        minimum=0,
        maximum=4,
    )
    interval: int = option_like(IntervalConfig, "interval", 3)
    warmup: int = option_like(IntervalConfig, "warmup", 3)

    kind: typing.ClassVar[str] = "taylorseer"

    def validate(self) -> None:
        """Refuses two orders."""
        if self.taylorseer_order:
            raise ConfigError(
                f"cache.taylorseer_order: taylorseer's own field is cache.order; got {self.taylorseer_order} here. "
                "Nearest: 0."
            )


@dataclass(frozen=True, kw_only=True)
class MagCacheConfig(CacheConfig):
    """MagCache: skip while the error foretold by a table of the residual's magnitudes stays small. Reads nothing back.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range.
    """

    threshold: float = option(0.06, "Accumulated error up to which a step is skipped. 0 skips nothing.", **_THRESHOLD)
    max_skip_steps: int = option(3, "Steps that may be skipped one after another.", minimum=0)
    retention_ratio: float = option(0.2, "Share of the first steps that are always computed.", minimum=0, maximum=1)
    mag_ratios: tuple[float, ...] | str | None = option(
        None,
        """Mean ratio of the residual's magnitude to the last step's, for each step of a schedule of any length (the
        first is 1); or the name of a published table; or `None` to find the table from the model's configuration.""",
        **_RATIOS,
    )
    mag_ratios_2: tuple[float, ...] | str | None = option(
        None, "The same for the second expert (`transformer_2`); `None` takes `mag_ratios`.", **_RATIOS
    )

    kind: typing.ClassVar[str] = "magcache"


@dataclass(frozen=True, kw_only=True)
class EasyCacheConfig(CacheConfig):
    """EasyCache: skip the whole denoiser while the change of its output, foretold from that of its input, stays small.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range.
    """

    threshold: float = option(
        0.05, "Accumulated relative change below which a step is skipped. 0 skips nothing.", **_THRESHOLD
    )
    warmup: int = option(7, "Steps at the beginning that are computed; the last step is too.", minimum=1)

    kind: typing.ClassVar[str] = "easycache"


@dataclass(frozen=True, kw_only=True)
class SeaCacheConfig(CacheConfig):
    """SeaCache: skip while the accumulated change of the latents' signal, told from their noise by its spectrum, stays
    small. Needs no coefficients. Names and defaults are those of diffusers' own.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range.
    """

    threshold: float = option(
        0.25, "Accumulated relative change below which a step is skipped. 0 skips nothing.", **_THRESHOLD
    )
    retention_steps: int = option(1, "Steps at the beginning that are computed.", minimum=0)
    cache_end_steps: int = option(1, "Steps at the end that are computed.", minimum=0)
    max_consecutive_cached: int = option(2, "Steps that may be skipped one after another; 0 for any number.", minimum=0)
    power_exp: float | None = option(
        None,
        """Exponent by which the power of a clean picture falls with its frequency; `None` for 2 for pictures and 3 for
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
    """Pyramid Attention Broadcast: within a window of timesteps, attention is computed every few steps only, and its
    output used again in between, for every layer and guidance branch by itself.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range.
    """

    self_attention: int | None = option(
        2, "Self-attention is computed on one of so many steps; `None` on all.", minimum=1
    )
    temporal_attention: int | None = option(
        4, "Steps between two computations of attention along time, in models that have it apart.", minimum=1
    )
    cross_attention: int | None = option(3, "Steps between two computations of cross-attention.", minimum=1)
    layers: dict[str, int] | None = option(
        None,
        "Globs of attention modules -> one of how many steps, which win over the kinds; the first that matches.",
        minimum=1,
    )
    window: tuple[float, float] = option(
        (100.0, 800.0),
        "Timesteps, of 1000, between which outputs are used again.",
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
    """A user's own policy, registered with `register_policy`. Its name alone is short for it.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range; or no policy is named.
    """

    name: str = option(REQUIRED, "The policy's name, as registered with register_policy(name, ...).", registry=POLICY)
    options: dict[str, Any] | None = option(None, "Keyword arguments of its factory.", key_kind="names")

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

# Names of registered policies (`policies.register_policy` adds to it): kinds of their own.
POLICY_NAMES: set[str] = set()
