"""Attention: sends a denoiser's attention calls to kernels, and counts the calls of each kernel.

- `layers.py`: the modules that call attention, and the roles that they share.
- `kernels.py`: the kernels that a configuration's names, globs and shares stand for on a device.
- `sparse.py`, `token_order.py`: sparse attention, and the place and order of the tokens that it is about.
- `backends.py`, `processors.py`: the two ways from a stock processor to a dispatcher.
- Here: the feature's check and its edits. If the configuration depends on the block, layers around the blocks note the
  running block. The compiled code of a block then does not depend on its number.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...compat.diffusers_private import ATTENTION_BACKEND, parallel_config_of
from ...config import AttentionConfig
from ...core.edits import AddLayer, Edit, SetAttr, SetItem
from ...errors import Unsupported
from ...kernels.attention import DISPATCHERS, AttentionDispatcher, Choice, Fastest, margin
from ..context import Denoiser, PipelineContext
from ..feature import Plan
from . import kernels, layers, sparse
from .backends import registered_backend
from .processors import SetProcessor, rebindable, rebound_processor


@dataclass
class _RunningBlock:
    """The block that is running.

    Attributes:
        block: Its number among all blocks; `None` outside of them.
        dense: Whether the configuration computes it with the dense kernel.
    """

    block: int | None = None
    dense: bool = False


def check(context: PipelineContext, config: AttentionConfig) -> Plan:
    """The kernels each denoiser would use.

    Raises:
        Unsupported: A kernel or recipe is unknown or cannot run here, a glob matches nothing, or no attention layer can
            be given to a kernel.
    """
    layers.refuse_unmatched(context, config)
    layers.named(config)  # checks the recipe, also where every layer names a kernel of its own
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
                if parallel_config_of(layer.module.processor) is not None:
                    raise Unsupported(
                        f"attention={config.backend!r}",
                        "diffusers' own context parallelism is on, and it needs diffusers' own attention backends.",
                        "attention=None, or load the pipeline without enable_parallelism.",
                        str(denoiser),
                    )
        modules += touched
        sparse.refuse(context, denoiser, roles, config)
        used: dict[str, Choice] = {}
        for role in roles:
            for backend in dict.fromkeys(role.backends):
                used[backend] = kernels.choice(denoiser, role, backend, config)
        notes += sparse.notes(denoiser, roles, config)
        # The kernel is checked for a denoiser without attention layers too.
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
    """Notes on a choice: how it is made and what is measured already, or the calls that its kernel does not support."""
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
    """A dispatcher per role, registered as an attention backend of diffusers, and one edit per processor. If the choice
    of the kernel depends on the block, also layers around the blocks."""
    if config.dense_steps:
        context.outputs.graph_keys.append(lambda: _in_dense_steps(context, config.dense_steps))
    for denoiser in context.denoisers:
        roles, _ = layers.roles(denoiser, config)
        running, dense = _RunningBlock(), kernels.dense(denoiser, config)
        settings = sparse.settings(config)
        chosen = None
        if settings is not None:
            # In dense steps of this section no layer chooses blocks either.
            chosen = sparse.SparseAttention(
                denoiser, settings, context, lambda running=running: running.block,  # type: ignore[misc]
                lambda: bool(config.dense_steps) and _in_dense_steps(context, config.dense_steps),
            )  # fmt: skip
            yield from chosen.edits(context)
        owners = Counter(id(layer.module.processor) for role in roles for layer in role.layers)
        for role in roles:
            of_role = None if chosen is None else chosen.of(role)
            choices = {
                name: kernels.choice(denoiser, role, name, config, context, of_role)
                for name in dict.fromkeys(role.backends)
            }
            by_block = {layer.block: choices[name] for layer, name in zip(role.layers, role.backends, strict=True)}
            # The key of a module outside the blocks is None.
            select = _selector(context, config, running, by_block, dense)
            context_parallel = context.outputs.context_parallel.get((denoiser.name, role.name.rpartition(".")[2]))
            dispatcher = AttentionDispatcher(select, context.stats.attention_calls, context_parallel)
            backend_name, registrations = registered_backend(dispatcher)
            if any(hasattr(layer.module.processor, ATTENTION_BACKEND) for layer in role.layers):
                yield from registrations
            yield SetItem(DISPATCHERS, dispatcher.number, dispatcher)
            # Kernels that round query and key norm and rotate them in the same pass; other kernels get both from the
            # stock functions. Query and key that ranks exchange are normed and rotated before.
            fuses = context_parallel is None and any(
                kernel.fuses_qk_norm_rope for choice in choices.values() for kernel in choice.kernels
            )
            # In compiled graphs a rewrite joins norm, rotation and attention.
            use_operator = context.rewrites(denoiser)
            for layer in role.layers:
                processor: Any = layer.module.processor
                defer = fuses and type(processor).__name__ in denoiser.adapter.fusable_processors
                rebinds = use_operator and rebindable(processor) and not isinstance(processor, nn.Module)
                if hasattr(processor, ATTENTION_BACKEND) and not (defer or rebinds):
                    # A copy, so that undoing can tell a processor or a backend that the user has set since. A processor
                    # that is a module stays the model's own, unless several layers share it.
                    if owners[id(processor)] > 1 or not isinstance(processor, nn.Module):
                        processor = copy.copy(processor)
                        yield SetProcessor(layer.module, "processor", processor)
                    yield SetAttr(processor, ATTENTION_BACKEND, backend_name)
                else:
                    # One class per stock class: all blocks share one compiled graph.
                    kind: Any = type(processor)
                    clone: Any = object.__new__(rebound_processor(kind, dispatcher.number, defer, use_operator))
                    vars(clone).update(vars(processor))
                    yield SetProcessor(layer.module, "processor", clone)
        # Sparse attention counts by block.
        if chosen is not None or config.dense_layers or any(len(set(role.backends)) > 1 for role in roles):
            yield from _block_layers(denoiser, context, config, running)


def _selector(
    context: PipelineContext,
    config: AttentionConfig,
    running: _RunningBlock,
    by_block: dict[int | None, Choice],
    dense: Choice | None,
) -> Callable[[], Choice]:
    """A function that a dispatcher asks on every call: the choice for the running step and block."""
    first = next(iter(by_block.values()))
    uniform = all(choice is first for choice in by_block.values())

    def select() -> Choice:
        if dense is not None and (running.dense or _in_dense_steps(context, config.dense_steps)):
            return dense
        return first if uniform else by_block[running.block]

    return select


def _in_dense_steps(context: PipelineContext, share: float) -> bool:
    if not share:
        return False
    state = context.clock.current
    if state is None or state.step is None:
        return True  # an unknown step counts as a dense one
    return state.step - state.first < math.ceil(share * (state.total - state.first))


def _block_layers(
    denoiser: Denoiser, context: PipelineContext, config: AttentionConfig, running: _RunningBlock
) -> Iterator[Edit]:
    """A layer around each block that notes it as the running one."""
    adapter = denoiser.adapter
    dense: dict[int, bool] = {}
    for stacks in (adapter.side_stacks, adapter.stacks):
        blocks = [block for stack in stacks for block in stack.blocks(denoiser.module)]
        count = math.ceil(config.dense_layers * len(blocks))
        dense |= {id(block): index < count for index, block in enumerate(blocks)}
    for number, block in enumerate(adapter.blocks(denoiser.module)):
        yield AddLayer(block, context.rank("attention layer"), _noting_block(running, number, dense[id(block)]))


def _noting_block(running: _RunningBlock, number: int, dense: bool) -> Callable[..., Any]:
    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = running.block, running.dense
        running.block, running.dense = number, dense
        try:
            return inner(*args, **kwargs)
        finally:
            running.block, running.dense = before

    return forward
