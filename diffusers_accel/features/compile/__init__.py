"""Regional compilation: every repeated block's forward is compiled, and blocks of one class share a compiled function.

The compiled function is the innermost layer around a block, so layers of caches and hooks stay outside the graph.
`restore` removes the layer and leaves nothing on the module. `nn.Module.compile` would leave an attribute.

- `modulation.py` precomputes modulations of all steps for rewritten graphs (`rewrites/`).
- `options.py` knows the backends, modes and options of the installed torch.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ...compat.torch_private import (
    COMPILER_MODULES,
    PRE_GRAD_PASS,
    REORDERINGS,
    graph_break_error,
    inductor_mode_options,
    recompile_limit_at_least,
)
from ...config import CompileConfig
from ...core.chain import Chain
from ...core.edits import AddLayer, Edit
from ...core.hooks import is_wrapped
from ...core.submodules import submodules
from ...errors import Unsupported
from ..context import Denoiser, PipelineContext
from ..feature import Plan, offloaded
from .modulation import PrecomputedModulations
from .options import options_of

# Inductor's options for blocks with collectives: operators keep the order of the traced graph. This order is the same
# on all ranks, and overlaps collectives with computation.
_FIXED_ORDER = dict.fromkeys(REORDERINGS, False)


def check(context: PipelineContext, config: CompileConfig) -> Plan:
    """The number and classes of blocks to compile.

    Raises:
        Unsupported: The denoiser has no known repeated blocks.
    """
    if _is_off(context, config):
        return Plan("nothing: compiled only on CUDA when the mode is 'auto'", 0)
    for denoiser in context.denoisers:
        if not denoiser.adapter.stacks:
            raise Unsupported(
                "compile", "no repeated blocks were found in it.", "compile=None, or torch.compile it.", str(denoiser)
            )
    blocks = [block for denoiser in context.denoisers for block in denoiser.adapter.blocks(denoiser.module)]
    names = ", ".join(sorted({type(block).__name__ for block in blocks}))
    ends = context.takes_over_offloading
    wrapped = sum(not Chain.is_stock(block) and not (ends and offloaded(block)) for block in blocks)
    left = (
        f"{wrapped} blocks have a foreign forward wrapper: each is compiled with it, and graph breaks are allowed.",
    )
    action = f"{names} with {config.backend}, mode {_mode(config) or 'default'}"
    precomputed = [str(each) for each in context.denoisers if context.precomputes_modulations(each)]
    notes = tuple(
        f"{name}: modulations of all steps are computed before a request's first step." for name in precomputed
    )
    return Plan(action, context.blocks, notes, left=left if wrapped else ())


def edits(context: PipelineContext, config: CompileConfig) -> Iterator[Edit]:
    """A layer around each denoiser, each block, and the embedding of precomputed modulations."""
    if _is_off(context, config):
        return
    if config.backend == "inductor" and (context.config is None or context.config.linear is None):
        # The compiler's imports take seconds, and a first request should not wait for them. With quantization
        # `accelerate` takes long already, so the first request imports them. The modules are private to torch: an
        # import error is ignored here, and compilation raises it again if it needs the module.
        for name in COMPILER_MODULES:
            with suppress(Exception):
                importlib.import_module(name)
    shared: dict[tuple[type, bool], Callable[..., Any]] = {}
    for denoiser in context.denoisers:
        yield AddLayer(denoiser.module, context.rank("compile"), _raise_recompile_limit)
        modulation = denoiser.adapter.modulation
        if modulation is not None and context.precomputes_modulations(denoiser):
            precomputed = PrecomputedModulations(context, denoiser, modulation)
            context.outputs.modulations.append(precomputed)
            context.outputs.graph_keys.append(precomputed.generation)
            yield AddLayer(
                denoiser.module.get_submodule(modulation.embedding),
                context.rank("compile"),
                precomputed.around_embedding,
            )
        blocks = denoiser.adapter.blocks(denoiser.module)
        hooked = _HookedBlocks(denoiser, blocks)
        context.outputs.request_hooks.append(hooked.update)
        for block in blocks:
            rewrites = context.rewrites(denoiser)
            yield AddLayer(
                block,
                context.rank("compile"),
                _compiled(block, config, shared, rewrites, bool(context.outputs.context_parallel), hooked.blocks),
            )
            if denoiser.adapter.static_arguments:
                # A layer of equal rank that is added later runs outside the compiled forward.
                yield AddLayer(block, context.rank("compile"), _item_layer(denoiser.adapter.static_arguments))


def _raise_recompile_limit(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer that raises dynamo's recompile limit. All pipelines of a process share the limit, by default eight, and
    each of their sizes and configurations needs a compilation."""
    with recompile_limit_at_least():
        return inner(*args, **kwargs)


def _item_layer(names: tuple[str, ...]) -> Callable[..., Any]:
    """A layer that passes one-element tensors among the named arguments as Python numbers, as stock code reads them."""

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for name in names:
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].item()
        return inner(*args, **kwargs)

    return forward


class _HookedBlocks:
    """The blocks with hooks on inner modules. A compiled block would skip the hooks, so such blocks are not compiled.

    Args:
        denoiser: The denoiser.
        blocks: The denoiser's blocks.

    Attributes:
        blocks: `id` of each block that had such hooks as the last request began. The set is updated in place.
    """

    def __init__(self, denoiser: Denoiser, blocks: list[nn.Module]):
        self.denoiser, self._all = denoiser, blocks
        self.blocks: set[int] = set()
        self._warned = False

    def update(self, pipe: Any) -> None:
        """A request hook: looks for hooks just before a request's first denoiser call.

        Args:
            pipe: `None` just before that call. At the request's earlier call it is the pipeline, and nothing is done.
        """
        if pipe is not None:
            return
        self.blocks.clear()
        self.blocks.update(id(block) for block in self._all if any(map(is_wrapped, submodules(block)[1:])))
        if self.blocks and not self._warned:
            self._warned = True
            warnings.warn(
                f"compile: {len(self.blocks)} blocks of {self.denoiser} run without compilation: inner modules have "
                "hooks, which a compiled block would not call.",
                stacklevel=2,
            )


def _compiled(
    module: nn.Module,
    config: CompileConfig,
    shared: dict[tuple[type, bool], Callable[..., Any]],
    rewrites: bool,
    collectives: bool,
    hooked: set[int],
) -> Callable[..., Any]:
    """A layer that runs a block's forward compiled.

    Args:
        module: The block.
        config: The configuration.
        shared: Class of blocks -> compiled forward; this function adds to it.
        rewrites: Whether graphs are rewritten before the backend compiles them.
        collectives: Whether attention communicates with other ranks.
        hooked: `id` of each block to run without compilation, read at every call.
    """
    options: dict[str, Any] = {
        "backend": config.backend,
        "fullgraph": config.fullgraph,
        "dynamic": config.dynamic,
        "mode": _mode(config),
        "options": options_of(config) or None,
    }
    if collectives and config.backend == "inductor" and options["mode"] is None:
        # Independent collectives must run in the same order on all ranks.
        options["options"] = {**_FIXED_ORDER, **(options["options"] or {})}
    if rewrites and config.backend != "inductor":
        from .rewrites import rewritten

        options["backend"] = rewritten(config.backend)
    elif rewrites:
        from .rewrites import REWRITES

        # torch takes a mode or options, so a mode is replaced by its options.
        own = inductor_mode_options(options["mode"]) if options["mode"] else options["options"] or {}
        own = {**(_FIXED_ORDER if collectives else {}), **own}
        options |= {"mode": None, "options": {**own, PRE_GRAD_PASS: REWRITES}}
    if Chain.is_stock(module):
        kind = type(module)
        # Two denoisers of one class may differ in whether they are rewritten.
        key = kind, rewrites
        if key not in shared:
            shared[key] = torch.compile(kind.forward, **options)

        def compiled(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if id(module) in hooked:
                return inner(*args, **kwargs)
            try:
                return shared[key](module, *args, **kwargs)
            except graph_break_error() as error:
                # Tracing raises before any kernel has run, so the call can be repeated.
                if not options["fullgraph"]:
                    raise
                options["fullgraph"] = False
                warnings.warn(
                    f"compile: {kind.__name__} is not a single graph ({str(error).splitlines()[0]}): graph breaks are "
                    "allowed in it.",
                    stacklevel=2,
                )
                shared[key] = torch.compile(kind.forward, **options)
                return shared[key](module, *args, **kwargs)

        return compiled
    # A foreign wrapper (e.g. an offload hook) is compiled together with the forward.
    around: list[Callable[..., Any]] = []

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if id(module) in hooked:
            return inner(*args, **kwargs)
        if not around:
            around.append(torch.compile(inner, **{**options, "fullgraph": False}))
        return around[0](*args, **kwargs)

    return forward


def _mode(config: CompileConfig) -> str | None:
    return None if config.mode in ("auto", "default") or config.backend != "inductor" else config.mode


def _is_off(context: PipelineContext, config: CompileConfig) -> bool:
    return config.mode == "auto" and any(denoiser.device.type != "cuda" for denoiser in context.denoisers)
