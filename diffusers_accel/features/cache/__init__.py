"""Step caching: skipping the blocks of a step whose result can be told from earlier steps.

A rule says which blocks may be skipped, what is measured before they are, which policy decides on it
(`diffusers_accel/policies`), and how a skipped result is predicted. `gates.py` carries it out, whatever the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...config import DBCacheConfig, StepMaskConfig, TaylorSeerConfig, TeaCacheConfig
from ...core.edits import AddLayer, Edit
from ...errors import Unsupported, nearest
from ...models import TEACACHE_ROWS, Checkpoint
from ...policies import DBCache, StepMask, TeaCache, steps_of
from ..feature import Denoiser, Plan, Target
from .gates import Rule, StepCache


def check(target: Target, config: Any) -> Plan:
    """What each denoiser's rule is.

    Raises:
        Unsupported: The denoiser has no adapter, fewer blocks than asked for, or native caching is on; or nothing was
            published for it and no coefficients were given.
    """
    actions, modules = [], 0
    for denoiser in target.denoisers:
        if getattr(denoiser.module, "is_cache_enabled", False):
            raise Unsupported(
                "cache", "one of diffusers' own caches is on.", f"{denoiser.name}.disable_cache() first.", str(denoiser)
            )
        adapter = denoiser.adapter
        if adapter.default or not adapter.stacks:
            raise Unsupported(
                "cache", "no adapter says what its blocks hand on.", "cache=None for this model.", str(denoiser)
            )
        rule = _rule(target, denoiser, config)
        actions.append(f"{denoiser.name}: {rule.label}")
        modules += sum(len(stack.blocks(denoiser.module)) for stack in adapter.stacks) - rule.first - rule.last
    return Plan("; ".join(actions), modules)


def edits(target: Target, config: Any) -> Iterator[Edit]:
    """One layer around the denoiser and one around each block."""
    for denoiser in target.denoisers:
        cache = StepCache(target, denoiser, _rule(target, denoiser, config))
        yield AddLayer(denoiser.module, target.rank("cache decision"), cache.around_denoiser)
        for stack in denoiser.adapter.stacks:
            for index, block in enumerate(stack.blocks(denoiser.module)):
                yield AddLayer(block, target.rank("cache gate"), cache.gate(stack, block, index))


def _rule(target: Target, denoiser: Denoiser, config: Any) -> Rule:
    """A configuration's rule for a denoiser, or `Unsupported`."""
    if isinstance(config, TeaCacheConfig):
        return _teacache(target, denoiser, config)
    if isinstance(config, DBCacheConfig):
        return _dbcache(target, denoiser, config)
    if isinstance(config, TaylorSeerConfig):
        order, interval, warmup = config.order, config.interval, config.warmup
        label = f"taylorseer, order {order}, one step of {interval} computed after {warmup}"
        return Rule(lambda: StepMask(interval=interval, warmup=warmup), label, order=order)
    assert isinstance(config, StepMaskConfig)
    mask = _mask(config.mask)
    label = f"step mask {config.mask!r}" if isinstance(config.mask, str) else f"a step mask of {len(mask)} steps"
    return Rule(lambda: StepMask(mask), label, order=config.taylorseer_order)


def _mask(mask: str | tuple[float, ...]) -> tuple[bool, ...]:
    return steps_of(mask) if isinstance(mask, str) else tuple(bool(item) for item in mask)


def _dbcache(target: Target, denoiser: Denoiser, config: DBCacheConfig) -> Rule:
    first, last = config.Fn_compute_blocks, config.Bn_compute_blocks
    counts = [len(stack.blocks(denoiser.module)) for stack in denoiser.adapter.stacks]
    room = counts[0] - (last if len(counts) == 1 else 0)
    if first >= room or last >= counts[-1]:
        raise Unsupported(
            f"cache={config.kind!r}",
            f"Fn_compute_blocks={first} and Bn_compute_blocks={last} leave no block to skip: its stacks have "
            f"{', '.join(map(str, counts))}.",
            "fewer of them, or FBCacheConfig(), which computes one.",
            str(denoiser),
        )
    if config.enable_separate_cfg is False and denoiser.adapter.guidance == "separate":
        raise Unsupported(
            f"cache={config.kind!r}",
            "its pipeline calls the denoiser once per guidance branch: one state for both would mix them.",
            "enable_separate_cfg=None.",
            str(denoiser),
        )
    mask = None if config.steps_computation_mask is None else _mask(config.steps_computation_mask)
    if mask is not None and config.steps_computation_policy == "static":
        label = "step mask" if not isinstance(config.steps_computation_mask, str) else config.steps_computation_mask
        label = f"{config.kind}, {label}, static"
        return Rule(lambda: StepMask(mask), label, None, first, last, config.taylorseer_order)

    def policy() -> DBCache:
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
    return Rule(policy, label, "residual", first, last, config.taylorseer_order)


def _teacache(target: Target, denoiser: Denoiser, config: TeaCacheConfig) -> Rule:
    adapter = denoiser.adapter
    if adapter.block_signal is None and adapter.timestep_signal is None:
        raise Unsupported("cache", "no adapter says what signal to watch.", "cache=None for this model.", str(denoiser))
    threshold, coefficients, source = _constants(target, denoiser, config)
    return Rule(
        lambda: TeaCache(threshold, coefficients, config.use_ret_steps),
        f"teacache, threshold {threshold:g}, {source}",
        "signal",
        order=config.taylorseer_order,
        projected=config.use_ret_steps,
    )


def _constants(target: Target, denoiser: Denoiser, config: TeaCacheConfig) -> tuple[float, tuple[float, ...], str]:
    """The threshold, the coefficients and where they come from, or `Unsupported`."""
    given = config.coefficients
    if denoiser.name == "transformer_2" and config.coefficients_2 is not None:
        given = config.coefficients_2
    if isinstance(given, tuple):
        if config.threshold is None:
            raise Unsupported(
                "cache='teacache'", "own coefficients have no published threshold.", "threshold=...", str(denoiser)
            )
        return config.threshold, given, "given coefficients"
    checkpoint = Checkpoint(
        config=denoiser.config,
        pipeline=type(target.pipe).__name__,
        pipeline_config=dict(getattr(target.pipe, "config", {})),
        use_ret_steps=config.use_ret_steps,
    )
    name = given if given is not None else denoiser.adapter.row(checkpoint)
    if name is None:
        rows = ", ".join(denoiser.adapter.rows) or "none for this class"
        raise Unsupported(
            "cache='teacache'",
            "no coefficients are published for this configuration.",
            f"TeaCacheConfig(threshold=..., coefficients=(...)) fitted for it, or the name of a row ({rows}).",
            str(denoiser),
        )
    if name not in TEACACHE_ROWS:
        raise Unsupported("cache='teacache'", f"there is no row {name!r}.", nearest(name, TEACACHE_ROWS))
    row = TEACACHE_ROWS[name]
    if row.use_ret_steps != config.use_ret_steps:
        raise Unsupported(
            "cache='teacache'",
            f"row {name!r} was fitted with use_ret_steps={row.use_ret_steps}.",
            f"use_ret_steps={row.use_ret_steps}, or another row.",
            str(denoiser),
        )
    return row.threshold if config.threshold is None else config.threshold, row.coefficients, f"row {name!r}"
