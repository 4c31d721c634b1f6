"""Step caching: skipping the blocks of a step whose result can be told from earlier steps.

- `rules.py`: from a configuration to a `Rule` (`rule.py`): which part may be skipped, what is watched (`signals.py`),
  which policy decides (`diffusers_accel/policies`), how a skipped result is predicted.
- `gates.py` carries any rule out; `lanes.py` is what it remembers.
- `broadcast.py`: attention that is computed every few steps (PAB).
- `recorder.py`: what calibration looks at.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...config import CacheConfig, PABConfig
from ...core.edits import AddLayer, Edit
from ...errors import Unsupported
from ..context import PipelineContext
from ..feature import Plan
from . import broadcast
from .gates import StepCache
from .recorder import Record
from .rule import Rule
from .rules import rule_of, signal_of

__all__ = ["Record", "check", "edits", "recording"]


def check(context: PipelineContext, config: CacheConfig | PABConfig) -> Plan:
    """What each denoiser's rule is.

    Raises:
        Unsupported: The denoiser has no adapter, fewer blocks than asked for, or native caching is on; or nothing was
            published for it and no constants were given.
    """
    for denoiser in context.denoisers:
        if getattr(denoiser.module, "is_cache_enabled", False):
            raise Unsupported(
                "cache", "one of diffusers' own caches is on.", f"{denoiser.name}.disable_cache() first.", str(denoiser)
            )
    if isinstance(config, PABConfig):
        return broadcast.check(context, config)
    actions, modules = [], 0
    for denoiser in context.denoisers:
        adapter = denoiser.adapter
        if adapter.default or not denoiser.stacks:
            pab = "cache='pab', which looks at attention alone, or " if broadcast.able(context) else ""
            raise Unsupported(
                "cache", "no adapter says what its blocks hand on.", f"{pab}cache=None for this model.", str(denoiser)
            )
        rule = rule_of(context, denoiser, config)
        actions.append(f"{denoiser.name}: {rule.label}")
        modules += sum(len(stack.blocks(denoiser.module)) for stack in adapter.stacks) - rule.first - rule.last
    notes: tuple[str, ...] = ()
    if config.guard:
        notes = (f"The guard computes {config.guard:.0%} of the steps that could be skipped, to compare.",)
    return Plan("; ".join(actions), modules, notes)


def edits(context: PipelineContext, config: CacheConfig | PABConfig) -> Iterator[Edit]:
    """One layer around the denoiser and one around each block; around each attention module for PAB."""
    if isinstance(config, PABConfig):
        yield from broadcast.edits(context, config)
        return
    caches = [StepCache(context, denoiser, rule_of(context, denoiser, config)) for denoiser in context.denoisers]
    for cache in caches:
        context.clock.ended.append(cache.forget)
        cache.others = [other for other in caches if other is not cache]
        yield from _edits(context, cache)


def recording(context: PipelineContext, use_ret_steps: bool = False) -> Iterator[Edit]:
    """Layers that compute every step and record, in `context.outputs.cache_records`, how signal and residual change."""
    from ...policies import StepMask

    for denoiser in context.denoisers:
        watch = signal_of(denoiser, use_ret_steps)
        rule = Rule(lambda branch: StepMask((True,)), "recording", watch, recording=True)
        yield from _edits(context, StepCache(context, denoiser, rule))


def _edits(context: PipelineContext, cache: StepCache) -> Iterator[Edit]:
    denoiser = cache.denoiser
    yield AddLayer(denoiser.module, context.rank("cache decision"), cache.around_denoiser)
    if cache.rule.whole:
        return
    # What the first blocks return is measured, and what the last ones are given is predicted.
    stacks, first, last = denoiser.stacks, cache.rule.first, cache.rule.last
    looked_at = [stacks[0].blocks(denoiser.module)[first]] if first else []
    looked_at += [stacks[-1].blocks(denoiser.module)[-last]] if last else []
    context.outputs.observed_blocks.update((denoiser.name, id(block)) for block in looked_at)
    for stack in stacks:
        for index, block in enumerate(stack.blocks(denoiser.module)):
            yield AddLayer(block, context.rank("cache gate"), cache.gate(stack, block, index))
