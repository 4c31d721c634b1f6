"""CUDA graphs: runs of blocks are launched in one call each, so that the GPU does not wait for Python.

A graph covers a run of consecutive blocks of one stack: a *segment*. Python still runs the stock forward, so work
before, between and after segments is unchanged. Caches' layers are around the blocks: a skipped step replays no graph,
and a computed step replays all. Within a segment, blocks before the last return their streams without computing. The
last block replays the graph of the whole segment.

This needs streams that nothing else reads or changes within a segment. The first call of a *graph variant* is therefore
traced. A segment ends where a block's argument is neither the previous block's output, nor an argument of the segment's
first block, nor a constant (after ControlNet's addition, for example). A segment also ends where a cache reads the
streams, and at the end of a stack. The second call is captured, and later calls are replayed.

A variant is the signature of all arguments (shapes, dtypes, strides, values of constants) together with other features'
keys for the step (`graph_keys`). At the start of a request, a moved weight or a changed adapter drops all graphs.

- `segments.py`: segments, and the sources of blocks' arguments.
- `denoiser_graphs.py`: trace, capture and replay of a denoiser's segments.
- `module_graphs.py`: graphs of whole forwards, for the VAE's decoder and the text encoders.
- `dependencies.py`: a graph's dependencies besides its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...compat.accelerate_private import has_accelerate_hook
from ...compat.torch_private import INDUCTOR_CUDA_GRAPHS
from ...config import CudaGraphConfig
from ...core.edits import AddLayer, Edit
from ...core.graphs import GRAPH_BACKENDS
from ...errors import Unsupported
from ...models.adapter import parameter_names
from ..context import PipelineContext
from ..feature import Plan, refuse_offloaded
from .denoiser_graphs import DenoiserGraphs
from .module_graphs import ModuleGraphs

# inductor's modes that capture CUDA graphs.
_INDUCTOR_MODES = ("reduce-overhead", "max-autotune")


def check(context: PipelineContext, config: CudaGraphConfig) -> Plan:
    """The number of blocks and other modules to capture.

    Raises:
        Unsupported: A denoiser is not on a CUDA device, has no adapter or has offloaded weights; ranks share weights;
            or inductor captures graphs itself.
    """
    if context.fsdp:
        raise Unsupported(
            "cuda_graph",
            "a graph covers many blocks, and ranks that share weights hold those of two blocks at a time.",
            "cuda_graph=None, or parallel without fsdp.",
        )
    options = context.config.compile if context.config is not None else None
    if options is not None and options.mode in _INDUCTOR_MODES:
        without = "'default' or 'max-autotune-no-cudagraphs'" if options.mode == "max-autotune" else "'default'"
        raise Unsupported(
            "cuda_graph",
            f"torch.compile captures graphs itself in mode {options.mode!r}.",
            f"compile={without}, or cuda_graph=None.",
        )
    if options is not None and (options.options or {}).get(INDUCTOR_CUDA_GRAPHS):
        raise Unsupported(
            "cuda_graph",
            f"torch.compile captures graphs itself with the option {INDUCTOR_CUDA_GRAPHS!r}.",
            "compile without it, or cuda_graph=None.",
        )
    for denoiser in context.denoisers:
        if denoiser.device.type not in GRAPH_BACKENDS:
            raise Unsupported("cuda_graph", f"it runs on {denoiser.device}.", "cuda_graph=None.", str(denoiser))
        if denoiser.adapter.default or not denoiser.adapter.stacks:
            raise Unsupported("cuda_graph", "no adapter names its blocks' outputs.", "cuda_graph=None.", str(denoiser))
        refuse_offloaded("cuda_graph", denoiser, context)
        if not context.takes_over_offloading and any(map(has_accelerate_hook, denoiser.module.modules())):
            raise Unsupported(
                "cuda_graph", "its weights move between devices.", "cuda_graph=None, or no offloading.", str(denoiser)
            )
    others = [name for name, _ in _whole_modules(context, config)]
    return Plan(
        f"{', '.join(['runs of blocks', *others])}, for up to {config.limit} graph variants",
        context.blocks + len(others),
        ("The first two calls of a variant run without graphs; warmup(pipe) makes them in advance.",),
    )


def _whole_modules(context: PipelineContext, config: CudaGraphConfig) -> list[tuple[str, nn.Module]]:
    """(name, module) of the modules whose whole forward is captured.

    Raises:
        Unsupported: The pipeline lacks a configured module, or its forward cannot be captured.
    """
    found: list[tuple[str, nn.Module]] = []
    if config.vae:
        vae = getattr(context.pipe, "vae", None)
        decoder = getattr(vae, "decoder", None)
        if not isinstance(decoder, nn.Module):
            raise Unsupported("cuda_graph.vae", "there is no VAE with a decoder.", "cuda_graph.vae=False.")
        if "feat_cache" in parameter_names(decoder):
            raise Unsupported(
                "cuda_graph.vae", "its decoder keeps features of earlier chunks of a video.", "cuda_graph.vae=False.",
                type(vae).__name__,
            )  # fmt: skip
        found.append(("vae.decoder", decoder))
    if config.text_encoders:
        encoders = [
            (name, module)
            for name, module in context.pipe.components.items()
            if name.startswith("text_encoder") and isinstance(module, nn.Module)
        ]
        if not encoders:
            raise Unsupported("cuda_graph.text_encoders", "none is loaded.", "cuda_graph.text_encoders=False.")
        found += encoders
    for name, module in found:
        if not context.takes_over_offloading and any(map(has_accelerate_hook, module.modules())):
            raise Unsupported("cuda_graph", "its weights move between devices.", "leave it out.", name)
    return found


def components(context: PipelineContext, config: CudaGraphConfig) -> tuple[str, ...]:
    """Names of the changed components besides the denoisers."""
    return tuple(name.partition(".")[0] for name, _ in _whole_modules(context, config))


def edits(context: PipelineContext, config: CudaGraphConfig) -> Iterator[Edit]:
    """One layer around each denoiser, one around each of its blocks, and one around each other module."""
    for name, module in _whole_modules(context, config):
        if name.partition(".")[0] in context.shared:
            continue
        module_graphs = ModuleGraphs(context, name, module, config.limit)
        context.outputs.graphs.append(module_graphs)
        yield AddLayer(module, context.rank("graph module"), module_graphs.around_module)
    for denoiser in context.denoisers:
        graphs = DenoiserGraphs(context, denoiser, config)
        context.outputs.graphs.append(graphs)
        yield AddLayer(denoiser.module, context.rank("graph denoiser"), graphs.around_denoiser)
        adapter = denoiser.adapter
        for stack in (*adapter.side_stacks, *adapter.stacks):
            for index, block in enumerate(stack.blocks(denoiser.module)):
                yield AddLayer(block, context.rank("graph block"), graphs.around_block(stack, block, index))
