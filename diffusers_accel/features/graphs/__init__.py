"""CUDA graphs: runs of blocks are launched in one call each, so that the GPU never waits for Python.

A graph covers a run of blocks of one stack: a *segment*. Python still goes through the stock forward: what it does
before, between and after the segments stays as it is, and so do caches, whose gates stand around the blocks; a skipped
step plays no graph, and a computed one the same as ever. Within a segment the blocks before the last hand their streams
on, and the last one plays the graph of them all.

That is right only if nobody touches the streams on their way. The first call of a kind is therefore run as it is and
watched: a segment ends where a block is given anything that is neither what the block before it returned, nor what the
segment's first block was given, nor a constant (ControlNet's additions, say); where a cache looks at the streams; and
where a stack ends. The second call records, later ones play. A call's kind is the form of all its arguments (shapes,
types, strides, and values of what is no tensor), with what other features do by the step (`Target.phases`). Weights are
looked at when a request begins: if one has moved, or an adapter's scale has changed, everything is recorded anew.

- `segments.py`: what a segment is made of.
- `graphs.py`: a denoiser's graphs.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...config import CudaGraphConfig
from ...core.edits import AddLayer, Edit
from ...core.graphs import RECORDERS
from ...errors import Unsupported
from ..feature import Plan, Target, refuse_offloaded
from .graphs import Graphs

# inductor modes that record graphs of their own.
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")


def check(target: Target, config: CudaGraphConfig) -> Plan:
    """How many blocks would be recorded.

    Raises:
        Unsupported: Not on a CUDA device, no adapter says what blocks hand on, weights are offloaded, or inductor
            records graphs itself.
    """
    options = target.config.compile if target.config is not None else None
    if options is not None and options.mode in _OWN_GRAPHS:
        raise Unsupported(
            "cuda_graph",
            f"torch.compile records graphs of its own in mode {options.mode!r}.",
            f"compile='default' or {options.mode + '-no-cudagraphs'!r}, or cuda_graph=None.",
        )
    for denoiser in target.denoisers:
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
    return Plan(
        f"runs of blocks, for up to {config.limit} kinds of calls",
        target.blocks,
        ("The first two calls of a kind are run as they are; warmup(pipe) makes them beforehand.",),
    )


def edits(target: Target, config: CudaGraphConfig) -> Iterator[Edit]:
    """One layer around each denoiser, which tells kinds of calls apart, and one around each block."""
    for denoiser in target.denoisers:
        graphs = Graphs(target, denoiser, config)
        target.graphs.append(graphs)
        yield AddLayer(denoiser.module, target.rank("graph kind"), graphs.around_denoiser)
        adapter = denoiser.adapter
        for stack in (*adapter.side_stacks, *adapter.stacks):
            for index, block in enumerate(stack.blocks(denoiser.module)):
                yield AddLayer(block, target.rank("graph"), graphs.around_block(stack, block, index))
