"""CUDA graphs: runs of blocks are launched in one call each, so that the GPU never waits for Python.

A graph covers a run of blocks of one stack: a *segment*. Python still goes through the stock forward: what it does
before, between and after the segments stays as it is, and so do caches, whose gates stand around the blocks; a skipped
step plays no graph, and a computed one the same as ever. Within a segment the blocks before the last hand their streams
on, and the last one plays the graph of them all.

That is right only if nobody touches the streams on their way. The first call of a kind is therefore run as it is and
watched: a segment ends where a block is given anything that is neither what the block before it returned, nor what the
segment's first block was given, nor a constant (ControlNet's additions, say); where a cache looks at the streams; and
where a stack ends. The second call records, later ones play. A call's kind is the form of all its arguments (shapes,
types, strides, and values of what is no tensor), with what other features do by the step (`graph_keys`). Weights are
looked at when a request begins: if one has moved, or an adapter's scale has changed, everything is recorded anew.

- `segments.py`: what a segment is made of.
- `graphs.py`: a denoiser's graphs.
- `whole.py`: the VAE's decoder and text encoders, if asked for: a graph for a whole forward.
- `state.py`: what a graph depends on besides its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...config import CudaGraphConfig
from ...core.edits import AddLayer, Edit
from ...core.graphs import RECORDERS
from ...errors import Unsupported
from ...models.adapter import parameter_names
from ..context import PipelineContext
from ..feature import Plan, refuse_offloaded
from .graphs import Graphs
from .whole import Whole

# inductor's modes that record graphs of their own, and its option.
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")
_OWN_OPTION = "triton.cudagraphs"


def check(context: PipelineContext, config: CudaGraphConfig) -> Plan:
    """How many blocks would be recorded.

    Raises:
        Unsupported: Not on a CUDA device, no adapter says what blocks hand on, weights are offloaded, or inductor
            records graphs itself.
    """
    if context.fsdp:
        raise Unsupported(
            "cuda_graph",
            "a graph covers many blocks, and ranks that share weights have those of two at a time.",
            "cuda_graph=None, or parallel without fsdp.",
        )
    options = context.config.compile if context.config is not None else None
    if options is not None and options.mode in _OWN_GRAPHS:
        without = "'default' or 'max-autotune-no-cudagraphs'" if options.mode == "max-autotune" else "'default'"
        raise Unsupported(
            "cuda_graph",
            f"torch.compile records graphs of its own in mode {options.mode!r}.",
            f"compile={without}, or cuda_graph=None.",
        )
    if options is not None and (options.options or {}).get(_OWN_OPTION):
        raise Unsupported(
            "cuda_graph",
            f"torch.compile records graphs of its own with the option {_OWN_OPTION!r}.",
            "compile without it, or cuda_graph=None.",
        )
    for denoiser in context.denoisers:
        if denoiser.device.type not in RECORDERS:
            raise Unsupported("cuda_graph", f"it runs on {denoiser.device}.", "cuda_graph=None.", str(denoiser))
        if denoiser.adapter.default or not denoiser.adapter.stacks:
            raise Unsupported(
                "cuda_graph", "no adapter says what its blocks hand on.", "cuda_graph=None.", str(denoiser)
            )
        refuse_offloaded("cuda_graph", denoiser)
        if any("_hf_hook" in vars(module) for module in denoiser.module.modules()):
            raise Unsupported(
                "cuda_graph", "its weights move between devices.", "cuda_graph=None, or no offloading.", str(denoiser)
            )
    others = [name for name, _ in _wholes(context, config)]
    return Plan(
        f"{', '.join(['runs of blocks', *others])}, for up to {config.limit} kinds of calls",
        context.blocks + len(others),
        ("The first two calls of a kind are run as they are; warmup(pipe) makes them beforehand.",),
    )


def _wholes(context: PipelineContext, config: CudaGraphConfig) -> list[tuple[str, nn.Module]]:
    """The other modules whose forward is recorded as a whole, and their names.

    Raises:
        Unsupported: There are none of those asked for, or one cannot be recorded.
    """
    found: list[tuple[str, nn.Module]] = []
    if config.vae:
        vae = getattr(context.pipe, "vae", None)
        decoder = getattr(vae, "decoder", None)
        if not isinstance(decoder, nn.Module):
            raise Unsupported("cuda_graph.vae", "there is no VAE with a decoder.", "cuda_graph.vae=False.")
        if "feat_cache" in parameter_names(decoder):
            raise Unsupported(
                "cuda_graph.vae", "its decoder keeps what earlier chunks of a video left.", "cuda_graph.vae=False.",
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
        if any("_hf_hook" in vars(part) for part in module.modules()):
            raise Unsupported("cuda_graph", "its weights move between devices.", "leave it out.", name)
    return found


def components(context: PipelineContext, config: CudaGraphConfig) -> tuple[str, ...]:
    """The components besides the denoisers that it changes."""
    return tuple(name.partition(".")[0] for name, _ in _wholes(context, config))


def edits(context: PipelineContext, config: CudaGraphConfig) -> Iterator[Edit]:
    """One layer around each denoiser, which tells kinds of calls apart, and one around each block; one around each
    other module."""
    for name, module in _wholes(context, config):
        if name.partition(".")[0] in context.shared:
            continue
        whole = Whole(context, name, module, config.limit)
        context.outputs.graphs.append(whole)
        yield AddLayer(module, context.rank("whole graph"), whole.around)
    for denoiser in context.denoisers:
        graphs = Graphs(context, denoiser, config)
        context.outputs.graphs.append(graphs)
        yield AddLayer(denoiser.module, context.rank("graph kind"), graphs.around_denoiser)
        adapter = denoiser.adapter
        for stack in (*adapter.side_stacks, *adapter.stacks):
            for index, block in enumerate(stack.blocks(denoiser.module)):
                yield AddLayer(block, context.rank("graph"), graphs.around_block(stack, block, index))
