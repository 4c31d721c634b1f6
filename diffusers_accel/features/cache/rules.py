"""Caching rules from configurations: one function per configuration class, and `RULES`, the table of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ...config import (
    CacheConfig,
    DBCacheConfig,
    EasyCacheConfig,
    FBCacheConfig,
    IntervalConfig,
    MagCacheConfig,
    PolicyConfig,
    SeaCacheConfig,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
    plain,
)
from ...errors import Unsupported, nearest
from ...models import MAGCACHE_ROWS, TEACACHE_ROWS, Checkpoint
from ...policies import POLICIES, DBCache, EasyCache, MagCache, SeaCache, StepMask, TeaCache, named_mask
from ..context import Denoiser, PipelineContext
from .rule import Rule
from .signals import (
    SIGNALS,
    ChangeSignal,
    EstimatedOutput,
    FilteredLatents,
    FirstResidual,
    ModulatedInput,
    ProjectedTimestepSignal,
    SignalFactory,
    TimestepSignal,
)


def rule_of(context: PipelineContext, denoiser: Denoiser, config: CacheConfig) -> Rule:
    """The caching rule of a configuration for one denoiser.

    Raises:
        Unsupported: The denoiser has too few blocks, or the rule needs constants and none are published for the model
            or given.
    """
    return RULES[type(config)](context, denoiser, config)


def _common(config: CacheConfig) -> dict[str, Any]:
    return {"order": config.taylorseer_order, "guard": config.guard, "bound": config.guard_bound}


def _mask_of(mask: str | tuple[float, ...]) -> tuple[bool, ...]:
    return named_mask(mask) if isinstance(mask, str) else tuple(bool(item) for item in mask)


def _mask(context: PipelineContext, denoiser: Denoiser, config: StepMaskConfig) -> Rule:
    mask = _mask_of(config.mask)
    label = f"step mask {config.mask!r}" if isinstance(config.mask, str) else f"a step mask of {len(mask)} steps"
    return Rule(lambda branch: StepMask(mask), label, **_common(config))


def _interval(context: PipelineContext, denoiser: Denoiser, config: IntervalConfig) -> Rule:
    interval, warmup, common = config.interval, config.warmup, _common(config)
    label = f"one step of {interval} computed after {warmup}"
    if isinstance(config, TaylorSeerConfig):
        label, common["order"] = f"taylorseer, order {config.order}, {label}", config.order
    return Rule(lambda branch: StepMask(interval=interval, warmup=warmup), label, **common)


def _dbcache(context: PipelineContext, denoiser: Denoiser, config: DBCacheConfig) -> Rule:
    first, last = config.Fn_compute_blocks, config.Bn_compute_blocks
    _refuse_too_few_blocks(denoiser, f"cache={config.kind!r}", first, last)
    if config.enable_separate_cfg is False and denoiser.adapter.guidance == "separate":
        raise Unsupported(
            f"cache={config.kind!r}",
            "its pipeline calls the denoiser once per guidance branch: one state for both would mix them.",
            "enable_separate_cfg=None.",
            str(denoiser),
        )
    mask = None if config.steps_computation_mask is None else _mask_of(config.steps_computation_mask)
    if mask is not None and config.steps_computation_policy == "static":
        label = "step mask" if not isinstance(config.steps_computation_mask, str) else config.steps_computation_mask
        label = f"{config.kind}, {label}, static"
        return Rule(lambda branch: StepMask(mask), label, ChangeSignal, first, last, **_common(config))

    def policy(branch: str) -> DBCache:
        return DBCache(
            config.residual_diff_threshold,
            config.max_warmup_steps,
            config.max_cached_steps,
            config.max_continuous_cached_steps,
            config.force_refresh_step_hint,
            config.force_refresh_step_policy == "repeat",
            None if mask is None else StepMask(mask),
        )

    label = (
        f"{config.kind}, threshold {config.residual_diff_threshold:g}, {first} first and {last} last blocks computed"
    )
    return Rule(policy, label, FirstResidual, first, last, **_common(config))


def _refuse_too_few_blocks(
    denoiser: Denoiser, feature: str, first: int, last: int, measured: str | None = None
) -> None:
    """Refuses a rule that leaves no block to skip.

    The decision is made within the first stack, behind its first blocks, so one of its blocks must be left.

    Args:
        denoiser: The denoiser.
        feature: The cache, as the user wrote it.
        first: Number of blocks computed at the beginning of the first stack.
        last: Number of blocks computed at the end of the last stack.
        measured: The measured blocks in words, for a rule without fields `Fn_compute_blocks` and `Bn_compute_blocks`.
    """
    counts = [len(stack.blocks(denoiser.module)) for stack in denoiser.stacks]
    beginning, end = counts[0], counts[-1]
    if len(counts) > 1 and first < beginning and last <= end:
        return
    if len(counts) == 1 and (first + last < beginning):
        return
    have = f"its stacks have {', '.join(map(str, counts))}" if len(counts) > 1 else f"it has {beginning}"
    if measured is not None:
        reason = f"{measured} leaves no other of the first stack, where skipping is decided: {have}."
    elif first >= beginning:
        reason = f"Fn_compute_blocks={first} leaves no block of the first stack, where skipping is decided: {have}."
    else:
        reason = f"Fn_compute_blocks={first} and Bn_compute_blocks={last} leave no block to skip: {have}."
    other_rules = "cache='mask' or 'easycache', which measure no block."
    fewer = f"Fn_compute_blocks={min(first, beginning - 1)} and Bn_compute_blocks={{}} or fewer"
    most = min(last, end) if len(counts) > 1 else beginning - 1 - min(first, beginning - 1)
    instead = f"{fewer.format(min(last, most))}, or {other_rules}" if beginning > 1 else other_rules
    raise Unsupported(feature, reason, instead, str(denoiser))


def signal_of(denoiser: Denoiser, projected: bool = False) -> SignalFactory:
    """TeaCache's signal for a model.

    Args:
        denoiser: The denoiser.
        projected: Whether the projected time embedding is meant (Wan's `use_ret_steps`).

    Raises:
        Unsupported: The denoiser's adapter defines no signal.
    """
    if denoiser.adapter.timestep_signal is not None:
        return ProjectedTimestepSignal if projected else TimestepSignal
    if denoiser.adapter.block_signal is None:
        raise Unsupported("cache", "no adapter defines its signal.", "cache=None for this model.", str(denoiser))
    return ModulatedInput


def _teacache(context: PipelineContext, denoiser: Denoiser, config: TeaCacheConfig) -> Rule:
    signal = signal_of(denoiser, config.use_ret_steps)
    given = config.coefficients
    if denoiser.name == "transformer_2" and config.coefficients_2 is not None:
        given = config.coefficients_2
    if isinstance(given, tuple):
        if config.threshold is None:
            raise Unsupported(
                "cache='teacache'",
                "given coefficients have no published threshold.",
                "cache.threshold together with them.",
                str(denoiser),
            )
        threshold, coefficients, source = config.threshold, given, "given coefficients"
    else:
        name = _constants_name(
            context,
            denoiser,
            "cache='teacache'",
            given,
            denoiser.adapter.teacache_rows,
            TEACACHE_ROWS,
            config.use_ret_steps,
        )
        row = TEACACHE_ROWS[name]
        if row.use_ret_steps != config.use_ret_steps:
            raise Unsupported(
                "cache='teacache'",
                f"row {name!r} was fitted with use_ret_steps={row.use_ret_steps}.",
                f"use_ret_steps={row.use_ret_steps}, or another row.",
                str(denoiser),
            )
        threshold = row.threshold if config.threshold is None else config.threshold
        coefficients, source = row.coefficients, f"row {name!r}"
    return Rule(
        lambda branch: TeaCache.published(threshold, coefficients, config.use_ret_steps),
        f"teacache, threshold {threshold:g}, {source}",
        signal,
        **_common(config),
    )


def _magcache(context: PipelineContext, denoiser: Denoiser, config: MagCacheConfig) -> Rule:
    given = config.mag_ratios
    if denoiser.name == "transformer_2" and config.mag_ratios_2 is not None:
        given = config.mag_ratios_2
    if isinstance(given, tuple):
        ratios, source = given, "a given table"
    else:
        name = _constants_name(
            context, denoiser, "cache='magcache'", given, denoiser.adapter.magcache_rows, MAGCACHE_ROWS
        )
        ratios, source = MAGCACHE_ROWS[name].ratios, f"table {name!r}"
    return Rule(
        lambda branch: MagCache(config.threshold, ratios, config.max_skip_steps, config.retention_ratio),
        f"magcache, threshold {config.threshold:g}, {source}",
        **_common(config),
    )


def _constants_name(
    context: PipelineContext,
    denoiser: Denoiser,
    feature: str,
    given: str | None,
    rows: Any,
    published: Any,
    use_ret_steps: bool = False,
) -> str:
    """The name of the published constants for a model.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        feature: The cache, as the user wrote it.
        given: The configured name; `None` finds it from the model's configuration.
        rows: Names of the constants that the denoiser's adapter lists.
        published: Name -> constants, of all models.
        use_ret_steps: Whether TeaCache's second variant for Wan is meant.

    Raises:
        Unsupported: No constants are published for the model, or there are none of the configured name.
    """
    checkpoint = Checkpoint(
        config=denoiser.config,
        pipeline=type(context.pipe).__name__,
        pipeline_config=dict(getattr(context.pipe, "config", {})),
        use_ret_steps=use_ret_steps,
    )
    name = given if given is not None else denoiser.adapter.published_row(checkpoint)
    missing = "ratios" if published is MAGCACHE_ROWS else "coefficients"
    if name is None or (given is None and name not in published):
        names = f", or the name of published ones ({', '.join(rows)})" if rows else ""
        raise Unsupported(
            feature,
            f"no {missing} are published for this configuration.",
            f"calibrate(pipe, prompts), which fits them{names}.",
            str(denoiser),
        )
    if name not in published:
        raise Unsupported(feature, f"there are no published constants {name!r}.", nearest(name, published))
    return name


def _easycache(context: PipelineContext, denoiser: Denoiser, config: EasyCacheConfig) -> Rule:
    return Rule(
        lambda branch: EasyCache(config.threshold, config.warmup),
        f"easycache, threshold {config.threshold:g}, {config.warmup} steps computed first",
        EstimatedOutput,
        whole_denoiser=True,
        shared_decision=True,
        **_common(config),
    )


def _seacache(context: PipelineContext, denoiser: Denoiser, config: SeaCacheConfig) -> Rule:
    max_consecutive = config.max_consecutive_cached or -1
    return Rule(
        lambda branch: SeaCache(config.threshold, config.retention_steps, config.cache_end_steps, max_consecutive),
        f"seacache, threshold {config.threshold:g}",
        partial(FilteredLatents, power=config.power_exp),
        **_common(config),
    )


def _registered(context: PipelineContext, denoiser: Denoiser, config: PolicyConfig) -> Rule:
    record = POLICIES.get(config.name)
    signal: SignalFactory = signal_of(denoiser) if record.signal == "modulated_input" else SIGNALS[record.signal]
    options = plain(config.options or {})
    record.make(options)  # an invalid policy is refused before any change
    _refuse_too_few_blocks(denoiser, f"cache={config.name!r}", record.first, 0, "the block that it measures")
    label = f"{config.name}, a registered policy"
    return Rule(lambda branch: record.make(options), label, signal, record.first, **_common(config))


RULES: dict[type, Callable[[PipelineContext, Denoiser, Any], Rule]] = {
    TeaCacheConfig: _teacache,
    DBCacheConfig: _dbcache,
    FBCacheConfig: _dbcache,
    StepMaskConfig: _mask,
    IntervalConfig: _interval,
    TaylorSeerConfig: _interval,
    MagCacheConfig: _magcache,
    EasyCacheConfig: _easycache,
    SeaCacheConfig: _seacache,
    PolicyConfig: _registered,
}
