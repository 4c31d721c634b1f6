"""Attention: routes a denoiser's attention calls to kernels, and counts what really ran.

- `layers.py`: which modules call attention, and the roles they share.
- `kernels.py`: what a configuration's names, globs and shares stand for on a device.
- `seam.py`: how a stock processor comes to call a site of ours.
- Here: the feature itself, checked and put on. Which block is running is marked from outside the compiled block, and
  only if the configuration asks for it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...config import AttentionConfig
from ...core.edits import AddLayer, Edit, SetAttr, SetItem
from ...errors import Unsupported
from ...kernels.attention import SITES, AttentionSite, Choice, Fastest, margin
from ..context import Denoiser, PipelineContext
from ..feature import Plan
from . import kernels, layers
from .seam import SetProcessor, calls_by_name, dispatcher_backend, rebound_class


@dataclass
class _Place:
    """The block that is running, as its mark says."""

    block: int | None = None
    dense: bool = False


def check(context: PipelineContext, config: AttentionConfig) -> Plan:
    """The kernels each denoiser would use.

    Raises:
        Unsupported: A kernel or recipe is unknown or cannot run here, a glob matches nothing, or no attention layer can
            be given to a kernel.
    """
    layers.refuse_unmatched(context, config)
    layers.named(config)  # a recipe is judged where every layer has a kernel of its own too
    actions, notes, left, modules = [], [], [], 0
    for denoiser in context.denoisers:
        roles, closed = layers.roles(denoiser, config)
        touched = sum(len(role.layers) for role in roles)
        if closed:
            names = ", ".join(sorted({type(processor).__name__ for processor in closed}))
            if config.backend != "auto" and not touched:
                raise Unsupported(
                    f"attention={config.backend!r}",
                    f"its {len(closed)} attention layers call attention in a way that cannot be redirected ({names}).",
                    "leave attention=None for this model.",
                    str(denoiser),
                )
            left.append(f"{denoiser.name}: {len(closed)} attention layers stay stock ({names}).")
        for role in roles:
            for layer in role.layers:
                if getattr(layer.module.processor, "_parallel_config", None) is not None:
                    raise Unsupported(
                        f"attention={config.backend!r}",
                        "diffusers' own context parallelism is on, and it needs diffusers' own attention backends.",
                        "attention=None, or load the pipeline without enable_parallelism.",
                        str(denoiser),
                    )
        modules += touched
        used: dict[str, Choice] = {}
        for role in roles:
            for backend in dict.fromkeys(role.backends):
                used[backend] = kernels.choice(denoiser, role, backend, config)
        # A denoiser without a single attention layer still gets its kernel judged.
        used = used or {layers.named(config): kernels.choice(denoiser, None, layers.named(config), config)}
        actions.append(f"{denoiser.name}: {kernels.described(roles, used)}")
        dense = kernels.dense(denoiser, config)
        if dense is not None:
            notes.append(f"{denoiser.name}: {kernels.share(config)} run on {kernels.label(dense)}.")
        dims = {role.head_dim for role in roles} or {None}
        for choice in used.values():
            notes += _notes(denoiser, choice, dims)
    return Plan("; ".join(actions), modules, tuple(dict.fromkeys(notes)), tuple(left))


def _notes(denoiser: Denoiser, choice: Choice, head_dims: set[int | None]) -> list[str]:
    """What a user should know of a choice: how it is made and what is known already, or where a kernel stops."""
    if isinstance(choice, Fastest) and len(choice.kernels) > 1:
        names = ", ".join(kernel.name for kernel in choice.kernels)
        known = {shape: times for dim in head_dims for shape, times in choice.remembered(dim).items()}
        return [
            f"{denoiser.name}: each new shape is timed once on {names}; answers are kept in {choice.timings.path}.",
            *(f"{denoiser.name}: {shape}: {margin(times)}." for shape, times in sorted(known.items())),
        ]
    kernel = choice.kernels[0]
    if kernel.mask:
        return []
    kind = "a mask that is not over keys alone" if kernel.key_mask else "a mask"
    return [f"{denoiser.name}: calls with {kind} run on sdpa, since {kernel.name} takes none."]


def edits(context: PipelineContext, config: AttentionConfig) -> Iterator[Edit]:
    """A site per role, entered in diffusers' registry while it is in use, one edit per processor, and marks on the
    blocks if the block matters."""
    if config.dense_steps:
        context.outputs.graph_keys.append(lambda: _in_dense_steps(context, config.dense_steps))
    for denoiser in context.denoisers:
        roles, _ = layers.roles(denoiser, config)
        place, dense = _Place(), kernels.dense(denoiser, config)
        owners = Counter(id(layer.module.processor) for role in roles for layer in role.layers)
        for role in roles:
            choices = {
                name: kernels.choice(denoiser, role, name, config, context) for name in dict.fromkeys(role.backends)
            }
            by_block = {layer.block: choices[name] for layer, name in zip(role.layers, role.backends, strict=True)}
            # What `by_block` holds for a module outside the blocks is under None.
            select = _selector(context, config, place, by_block, dense)
            context_parallel = context.outputs.context_parallel.get((denoiser.name, role.name.rpartition(".")[2]))
            site = AttentionSite(select, context.stats.attention_calls, context_parallel)
            member, registrations = dispatcher_backend(site)
            if any(hasattr(layer.module.processor, "_attention_backend") for layer in role.layers):
                yield from registrations
            yield SetItem(SITES, site.number, site)
            # What travels between ranks is normed and rotated first.
            # Kernels that round query and key norm and rotate them in the same pass; for others the stock functions do
            # it then.
            folding = context_parallel is None and any(
                kernel.folds for choice in choices.values() for kernel in choice.kernels
            )
            # Compiled graphs have them prepared in one launch, by a rewrite.
            mark = context.rewrites(denoiser)
            for layer in role.layers:
                processor: Any = layer.module.processor
                fold = folding and type(processor).__name__ in denoiser.adapter.folding
                marked = mark and calls_by_name(processor) and not isinstance(processor, nn.Module)
                if hasattr(processor, "_attention_backend") and not (fold or marked):
                    # A copy: who sets another processor then, or another backend of this one, is noticed. One that
                    # is a module stays the model's own, unless several layers share it.
                    if owners[id(processor)] > 1 or not isinstance(processor, nn.Module):
                        processor = copy.copy(processor)
                        yield SetProcessor(layer.module, "processor", processor)
                    yield SetAttr(processor, "_attention_backend", member)
                else:
                    # One class per stock class, so that all blocks share one compiled graph.
                    kind: Any = type(processor)
                    clone: Any = object.__new__(rebound_class(kind, site.number, fold, mark))
                    vars(clone).update(vars(processor))
                    yield SetProcessor(layer.module, "processor", clone)
        if config.dense_layers or any(len(set(role.backends)) > 1 for role in roles):
            yield from _marks(denoiser, context, config, place)


def _selector(
    context: PipelineContext,
    config: AttentionConfig,
    place: _Place,
    by_block: dict[int | None, Choice],
    dense: Choice | None,
) -> Callable[[], Choice]:
    """What a site asks on every call: the choice for the step and block that are running."""
    first = next(iter(by_block.values()))
    uniform = all(choice is first for choice in by_block.values())

    def select() -> Choice:
        if dense is not None and (place.dense or _in_dense_steps(context, config.dense_steps)):
            return dense
        return first if uniform else by_block[place.block]

    return select


def _in_dense_steps(context: PipelineContext, share: float) -> bool:
    if not share:
        return False
    state = context.clock.current
    if state is None or state.step is None:
        return True  # a place that is unknown is computed with care
    return state.step - state.first < math.ceil(share * (state.total - state.first))


def _marks(denoiser: Denoiser, context: PipelineContext, config: AttentionConfig, place: _Place) -> Iterator[Edit]:
    """A layer around each block that says which one is running."""
    adapter = denoiser.adapter
    dense: dict[int, bool] = {}
    for stacks in (adapter.side_stacks, adapter.stacks):
        blocks = [block for stack in stacks for block in stack.blocks(denoiser.module)]
        count = math.ceil(config.dense_layers * len(blocks))
        dense |= {id(block): index < count for index, block in enumerate(blocks)}
    for number, block in enumerate(adapter.blocks(denoiser.module)):
        yield AddLayer(block, context.rank("attention layer"), _marked(place, number, dense[id(block)]))


def _marked(place: _Place, number: int, dense: bool) -> Callable[..., Any]:
    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = place.block, place.dense
        place.block, place.dense = number, dense
        try:
            return inner(*args, **kwargs)
        finally:
            place.block, place.dense = before

    return forward
