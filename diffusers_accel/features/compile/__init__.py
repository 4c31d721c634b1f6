"""Regional compilation: each repeated block's forward runs compiled; blocks of one class share one compiled function.

The compiled function is the innermost layer around a block, so caches, gates and hooks stay outside the graph, and
`restore` takes it away without a trace on the module (`nn.Module.compile` would leave one).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ...config import CompileConfig
from ...core.chain import Chain
from ...core.edits import AddLayer, Edit
from ...core.hooks import wrapped
from ...core.parts import parts
from ...errors import Unsupported
from ..context import Denoiser, PipelineContext
from ..feature import Plan
from .known import options_of
from .modulation import Modulations

_RECOMPILE_LIMIT = 64
# Inductor's options where blocks exchange something with other ranks: it leaves operators in the order in which it
# finds them, which is that of all ranks, and in which exchanges overlap with what was put beside them.
EXCHANGING = {"reorder_for_locality": False, "reorder_for_peak_memory": False}


def check(context: PipelineContext, config: CompileConfig) -> Plan:
    """How many blocks would be compiled.

    Raises:
        Unsupported: The denoiser has no repeated blocks that are known.
    """
    if _off(context, config):
        return Plan("nothing: compiled only on CUDA when the mode is 'auto'", 0)
    for denoiser in context.denoisers:
        if not denoiser.adapter.stacks:
            raise Unsupported(
                "compile", "no repeated blocks were found in it.", "compile=None, or torch.compile it.", str(denoiser)
            )
    kinds = {type(block) for denoiser in context.denoisers for block in denoiser.adapter.blocks(denoiser.module)}
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    wrapped = sum(
        not _plain(block) for denoiser in context.denoisers for block in denoiser.adapter.blocks(denoiser.module)
    )
    left = (f"{wrapped} blocks carry another hook: it is compiled with them, each alone, graph breaks allowed.",)
    action = f"{names} with {config.backend}, mode {_mode(config) or 'default'}"
    ahead = [str(each) for each in context.denoisers if _ahead(context, each)]
    notes = tuple(f"{name}: modulations of all steps are made before a request's first." for name in ahead)
    return Plan(action, context.blocks, notes, left=left if wrapped else ())


def edits(context: PipelineContext, config: CompileConfig) -> Iterator[Edit]:
    """One layer per block, and one around each denoiser."""
    if _off(context, config):
        return
    if config.backend == "inductor" and (context.config is None or context.config.linear is None):
        # What the first compilation would import otherwise, while somebody waits for a picture. Where weights are
        # quantized and moved, `accelerate` takes its time already. The names are torch's own: whatever is wrong with
        # one is said when it is needed, if it ever is.
        for name in ("torch._inductor.compile_fx", "torch._inductor.select_algorithm"):
            with suppress(Exception):
                importlib.import_module(name)
    shared: dict[type, Callable[..., Any]] = {}
    for denoiser in context.denoisers:
        yield AddLayer(denoiser.module, context.rank("compile"), _with_room)
        modulation = denoiser.adapter.modulation
        if modulation is not None and _ahead(context, denoiser):
            made = Modulations(context, denoiser, modulation)
            context.outputs.modulations.append(made)
            context.outputs.graph_keys.append(made.buffers)
            yield AddLayer(
                denoiser.module.get_submodule(modulation.embedding), context.rank("compile"), made.around_embedding
            )
        blocks = denoiser.adapter.blocks(denoiser.module)
        hooked = _Hooked(denoiser, blocks)
        context.outputs.request_hooks.append(hooked.look)
        for block in blocks:
            rewrites = context.rewrites(denoiser)
            yield AddLayer(
                block,
                context.rank("compile"),
                _compiled(block, config, shared, rewrites, bool(context.outputs.context_parallel), hooked.blocks),
            )
            if denoiser.adapter.static_arguments:
                # Of equal rank and added later, so it runs outside the compiled forward.
                yield AddLayer(block, context.rank("compile"), _read(denoiser.adapter.static_arguments))


def _ahead(context: PipelineContext, denoiser: Denoiser) -> bool:
    """Whether modulations are made before a request's first step. They read many blocks' weights, and are found again
    by their addresses: neither can be where blocks share memory for weights that ranks share."""
    return denoiser.adapter.modulation is not None and context.rewrites(denoiser) and not context.fsdp


def _with_room(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer within which a block may be compiled for many sizes and configurations. Dynamo stops at eight by itself,
    for all pipelines of a process together, and then refuses."""
    with torch._dynamo.config.patch(recompile_limit=max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)):
        return inner(*args, **kwargs)


def _read(names: tuple[str, ...]) -> Callable[..., Any]:
    """A layer that turns one-element tensors among the named arguments into Python values, as the stock code would."""

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for name in names:
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].item()
        return inner(*args, **kwargs)

    return forward


class _Hooked:
    """The blocks that have hooks on modules within, which a compiled block would call wrongly or not at all.

    Args:
        denoiser: The denoiser.
        blocks: Its blocks.

    Attributes:
        blocks: The identities of those that have hooks, as the last request found them.
    """

    def __init__(self, denoiser: Denoiser, blocks: list[nn.Module]):
        self.denoiser, self._all = denoiser, blocks
        self.blocks: set[int] = set()
        self._warned = False

    def look(self, pipe: Any) -> None:
        """Looks for hooks as a request begins: its user may have hung some there since the last."""
        if pipe is not None:  # the denoiser is not about to run yet
            return
        self.blocks.clear()
        self.blocks.update(id(block) for block in self._all if any(map(wrapped, parts(block)[1:])))
        if self.blocks and not self._warned:
            self._warned = True
            warnings.warn(
                f"compile: {len(self.blocks)} blocks of {self.denoiser} run as they are: modules within have hooks, "
                "which a compiled block would not call.",
                stacklevel=2,
            )


def _compiled(
    module: nn.Module,
    config: CompileConfig,
    shared: dict[type, Callable[..., Any]],
    rewrites: bool,
    exchanging: bool,
    hooked: set[int],
) -> Callable[..., Any]:
    """A layer that runs `module`'s forward compiled.

    Args:
        module: The block.
        config: The configuration.
        shared: Compiled forwards by class.
        rewrites: Whether graphs are rewritten.
        exchanging: Whether attention exchanges heads with other ranks.
        hooked: Identities of blocks that are to run as they are.
    """
    options: dict[str, Any] = {
        "backend": config.backend,
        "fullgraph": config.fullgraph,
        "dynamic": config.dynamic,
        "mode": _mode(config),
        "options": options_of(config) or None,
    }
    if exchanging and config.backend == "inductor" and options["mode"] is None:
        # Exchanges that do not depend on each other must come in one order on all ranks.
        options["options"] = {**EXCHANGING, **(options["options"] or {})}
    if rewrites and config.backend != "inductor":
        from .rewrites import rewritten

        options["backend"] = rewritten(config.backend)
    elif rewrites:
        from .rewrites import REWRITES

        # A mode stands for options, and torch takes one or the other.
        own = torch._inductor.list_mode_options(options["mode"]) if options["mode"] else options["options"] or {}
        own = {**(EXCHANGING if exchanging else {}), **own}
        options |= {"mode": None, "options": {**own, "pre_grad_custom_pass": REWRITES}}
    if _plain(module):
        kind = type(module)
        if kind not in shared:
            shared[kind] = torch.compile(kind.forward, **options)

        def compiled(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if id(module) in hooked:
                return inner(*args, **kwargs)
            try:
                return shared[kind](module, *args, **kwargs)
            except torch._dynamo.exc.Unsupported as error:
                # Raised while it is traced, before anything was run.
                if not options["fullgraph"]:
                    raise
                options["fullgraph"] = False
                warnings.warn(
                    f"compile: {kind.__name__} is no single graph ({str(error).splitlines()[0]}): graph breaks are "
                    "allowed in it.",
                    stacklevel=2,
                )
                shared[kind] = torch.compile(kind.forward, **options)
                return shared[kind](module, *args, **kwargs)

        return compiled
    # Somebody else's wrapper (an offload hook, say) is part of the forward here: compile around it.
    around: list[Callable[..., Any]] = []

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not around:
            around.append(torch.compile(inner, **{**options, "fullgraph": False}))
        return around[0](*args, **kwargs)

    return forward


def _plain(module: nn.Module) -> bool:
    """Whether nobody else has wrapped the module's forward."""
    chain = Chain.find(module)
    return chain.stock if chain is not None else "forward" not in vars(module)


def _mode(config: CompileConfig) -> str | None:
    return None if config.mode in ("auto", "default") or config.backend != "inductor" else config.mode


def _off(context: PipelineContext, config: CompileConfig) -> bool:
    return config.mode == "auto" and any(denoiser.device.type != "cuda" for denoiser in context.denoisers)
