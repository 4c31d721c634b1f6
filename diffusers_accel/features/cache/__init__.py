"""Step caching: a step whose blocks' residual can be predicted from earlier steps skips these blocks.

- `rules.py` turns a configuration into a `Rule` (`rule.py`): skippable blocks, change signal (`signals.py`), policy
  (`diffusers_accel/policies`) and order of the prediction.
- `block_layers.py` carries a rule out on any model, over the state of `state.py`.
- `broadcast.py` broadcasts attention outputs over several steps (PAB).
- `trace.py` records changes for calibration.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...config import CacheConfig, PABConfig
from ...core.edits import AddLayer, Edit
from ...errors import Unsupported
from ..context import PipelineContext
from ..feature import Plan
from . import broadcast
from .block_layers import StepCache
from .rule import Rule
from .rules import rule_of, signal_of
from .trace import StepRecord

__all__ = ["StepRecord", "check", "edits", "trace_edits"]


def check(context: PipelineContext, config: CacheConfig | PABConfig) -> Plan:
    """Each denoiser's rule.

    Raises:
        Unsupported: The denoiser has no adapter or too few blocks; diffusers' own cache is on; or the rule needs
            constants and none are published for the model or given.
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
            pab = "cache='pab', which needs attention alone, or " if broadcast.is_possible(context) else ""
            raise Unsupported(
                "cache", "no adapter names its blocks' outputs.", f"{pab}cache=None for this model.", str(denoiser)
            )
        rule = rule_of(context, denoiser, config)
        actions.append(f"{denoiser.name}: {rule.label}")
        modules += sum(len(stack.blocks(denoiser.module)) for stack in adapter.stacks) - rule.first - rule.last
    notes: tuple[str, ...] = ()
    if config.guard:
        notes = (f"The guard computes {config.guard:.0%} of the skippable steps for comparison.",)
    return Plan("; ".join(actions), modules, notes)


def edits(context: PipelineContext, config: CacheConfig | PABConfig) -> Iterator[Edit]:
    """One layer around the denoiser, and one around each block (for PAB around each attention module)."""
    if isinstance(config, PABConfig):
        yield from broadcast.edits(context, config)
        return
    caches = [StepCache(context, denoiser, rule_of(context, denoiser, config)) for denoiser in context.denoisers]
    for cache in caches:
        context.clock.on_request_end.append(cache.forget)
        cache.others = [other for other in caches if other is not cache]
        yield from _edits(context, cache)


def trace_edits(context: PipelineContext, use_ret_steps: bool = False) -> Iterator[Edit]:
    """Layers that compute every step, and record changes of signal and residual in `context.outputs.cache_records`.

    Args:
        context: The pipeline.
        use_ret_steps: Whether the signal is that of TeaCache's second variant for Wan.
    """
    from ...policies import StepMask

    for denoiser in context.denoisers:
        signal = signal_of(denoiser, use_ret_steps)
        rule = Rule(lambda branch: StepMask((True,)), "calibration", signal, tracing=True)
        yield from _edits(context, StepCache(context, denoiser, rule))


def _edits(context: PipelineContext, cache: StepCache) -> Iterator[Edit]:
    denoiser = cache.denoiser
    yield AddLayer(denoiser.module, context.rank("cache denoiser"), cache.around_denoiser)
    if cache.rule.whole_denoiser:
        return
    # The signal is measured behind the first blocks, and the prediction enters the last blocks. The streams are read at
    # both places, so no CUDA graph may cover them.
    stacks, first, last = denoiser.stacks, cache.rule.first, cache.rule.last
    observed = [stacks[0].blocks(denoiser.module)[first]] if first else []
    observed += [stacks[-1].blocks(denoiser.module)[-last]] if last else []
    context.outputs.observed_blocks.update((denoiser.name, id(block)) for block in observed)
    for stack in stacks:
        for index, block in enumerate(stack.blocks(denoiser.module)):
            yield AddLayer(block, context.rank("cache block"), cache.around_block(stack, block, index))
