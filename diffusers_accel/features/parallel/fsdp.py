"""FSDP: the weights of blocks are sharded among ranks, and a block is gathered while it runs (ZeRO stage 3:
https://arxiv.org/abs/1910.02054, section 5.3).

Owns the choice of the sharded weights: the blocks of the denoisers and of the text encoders. `fsdp_shards.py` shards
and gathers them. FSDP has the section `parallel`, and is a feature of its own, because all features that change or read
weights come before it. Ranks must run the same blocks in the same order, or they wait until the process group's
timeout. So caches decide by sums over all ranks, and under CFG parallelism ranks without a branch compute another
rank's (`cfg_parallel.py`). Methods that read or write whole weights are refused until `restore`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...compat.accelerate_private import has_accelerate_hook
from ...config import ParallelConfig
from ...core.edits import AddLayer, Edit
from ...core.mesh import Mesh, world_group, world_size
from ...core.weights import Weight, find_weights, is_plain, kind_of_tensor
from ...errors import Unsupported
from ...kernels.linear import LinearProxy
from ...models.adapter import default_adapter
from ..context import Denoiser, PipelineContext
from ..feature import Plan, refuse_offloaded, refuse_own_graphs
from .fsdp_shards import AllocateBuffers, GatherBuffers, MoveToDevice, ShardBlock

_FEATURE = "parallel.fsdp"
# Methods of a block, a model and a pipeline that read, write, move or extend weights.
_BLOCK = ("state_dict",)
_MODEL = (
    "save_pretrained", "load_state_dict", "load_lora_adapter", "load_adapter", "add_adapter", "fuse_lora",
    "unfuse_lora", "load_attn_procs", "enable_group_offload", "enable_layerwise_casting",
)  # fmt: skip
_PIPELINE = (
    "save_pretrained", "load_lora_weights", "fuse_lora", "unfuse_lora", "load_ip_adapter", "enable_model_cpu_offload",
    "enable_sequential_cpu_offload", "enable_group_offload",
)  # fmt: skip


@dataclass(eq=False)
class _Block:
    """A sharded block.

    Attributes:
        name: The block's path, for messages.
        component: The pipeline's name for its model.
        module: The block.
        weights: The tensors that are sharded.
    """

    name: str
    component: str
    module: nn.Module
    weights: list[Weight]

    @property
    def bytes(self) -> int:
        return sum(weight.bytes for weight in self.weights)


@dataclass
class _Weights:
    """A pipeline's tensors.

    Attributes:
        blocks: Blocks with the tensors that are sharded.
        rest: Tensors that stay whole on every rank.
    """

    blocks: list[_Block]
    rest: list[Weight]


def check(context: PipelineContext, config: ParallelConfig) -> Plan:
    """The bytes of each model that a rank would hold.

    Raises:
        Unsupported: A denoiser has no known blocks, weights are offloaded or of a package that hides their bytes, or
            another feature records addresses of weights or would make ranks diverge.
    """
    _refuse_graphs_and_guard(context)
    for component in _components(context):
        _refuse(context, component, component in context.denoisers)
    found, world = _weights(context), world_size() or 1
    bytes_of: dict[str, int] = defaultdict(int)
    for block in found.blocks:
        bytes_of[block.component] += block.bytes
    notes = [
        f"{name}: each of {world} ranks holds {size / world / 2**20:.1f} MiB of its blocks' {size / 2**20:.1f}"
        + (", before they are quantized." if context.config is not None and context.config.linear is not None else ".")
        for name, size in bytes_of.items()
    ]
    most = max((block.bytes for block in found.blocks), default=0)
    notes.append(f"Blocks are gathered in twice {most / 2**20:.1f} MiB; the rest is on every rank.")
    notes.append("Until restore(pipe), weights cannot be saved, and no LoRA can be loaded.")
    return Plan(f"the weights of blocks on {world}", len(found.blocks), tuple(notes))


def edits(context: PipelineContext, config: ParallelConfig) -> Iterator[Edit]:
    """Shards every block, adds the layer that gathers it, and moves all other weights to the rank's device."""
    device = context.device.type
    mesh = Mesh(config.axes(world_size() or 1), device)
    found, memory = _weights(context), GatherBuffers(mesh.fsdp_group(), context.home)
    if memory.group.size == 1:
        found = _Weights([], [*found.rest, *(weight for block in found.blocks for weight in block.weights)])
    rank, shards = context.rank("fsdp"), {}
    for block in found.blocks:
        shard = shards[id(block.module)] = memory.shard(block.name, block.weights)
        yield ShardBlock(shard)
        yield AddLayer(block.module, rank, memory.layer(shard))
        yield from _refused(block.module, _BLOCK, block.name, rank)
        context.outputs.sharded_bytes[block.component] = (
            context.outputs.sharded_bytes.get(block.component, 0) + shard.length
        )
    for weight in found.rest:
        if weight.tensor.device != context.home and weight.tensor.device.type == "cpu":
            yield MoveToDevice(weight, memory.device)
    if not shards:
        return
    for component in _components(context):
        if component.name in context.outputs.sharded_bytes:
            yield from _refused(component.module, _MODEL, str(component), rank)
    yield from _refused(context.pipe, _PIPELINE, type(context.pipe).__name__, rank)
    yield AllocateBuffers(memory)
    # Ranks that skipped different steps would wait for each other for ever.
    context.outputs.all_reduce = world_group().all_reduce
    context.outputs.unsharded = lambda block: (
        memory.unsharded(shards[id(block)]) if id(block) in shards else nullcontext()
    )


def _refused(owner: Any, methods: tuple[str, ...], name: str, rank: int) -> Iterator[Edit]:
    """Layers that refuse methods.

    Args:
        owner: The block, model or pipeline.
        methods: Names of methods; missing ones are passed over.
        name: The owner's name in messages.
        rank: Place of the layers among others around the same method.
    """
    for method in methods:
        if hasattr(owner, method):
            yield AddLayer(owner, rank, _refusing(method, name), method)


def _refusing(method: str, name: str) -> Callable[..., Any]:
    """A layer that raises `Unsupported` instead of calling its method."""

    def refused(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise Unsupported(
            _FEATURE, f"{method} needs whole weights, which are sharded among ranks.", "restore(pipe) first.", name
        )

    return refused


# --- what is sharded --------------------------------------------------------------------------------------------------


def _components(context: PipelineContext) -> list[Denoiser]:
    """The pipeline's models but its VAEs, each with the adapter that names its blocks."""
    known = {denoiser.name: denoiser for denoiser in context.denoisers}
    found = []
    for name, module in context.pipe.components.items():
        if not isinstance(module, nn.Module) or (hasattr(module, "encode") and hasattr(module, "decode")):
            continue
        device = context.device
        found.append(known.get(name) or Denoiser(name, module, default_adapter(module), device))
    return found


def _weights(context: PipelineContext) -> _Weights:
    """Sorts the pipeline's tensors: tensors of a single block are sharded, all others stay whole."""
    blocks: list[_Block] = []
    owner: dict[int, _Block] = {}
    for component in _components(context):
        paths = {id(module): path for path, module in component.module.named_modules()}
        for module in component.adapter.blocks(component.module):
            # A block within a block belongs to the outer one.
            if id(module) not in owner:
                blocks.append(_Block(f"{component.name}.{paths[id(module)]}", component.name, module, []))
                owner |= {id(part): blocks[-1] for part in module.modules()}
    rest: list[Weight] = []
    models = [item for item in context.pipe.components.values() if isinstance(item, nn.Module)]
    for entry in find_weights(models, owner, lambda module: isinstance(module, LinearProxy), is_plain):
        (entry.block.weights if entry.block is not None else rest).append(entry.weight)
    return _Weights([block for block in blocks if block.weights], rest)


# --- what is refused -------------------------------------------------------------------------------------------------


def _refuse_graphs_and_guard(context: PipelineContext) -> None:
    """Refuses modes of torch.compile that record addresses of weights, and a cache whose guard differs among ranks."""
    others = context.config
    refuse_own_graphs(_FEATURE, context)
    if others is not None and getattr(others.cache, "guard", False):
        raise Unsupported(
            _FEATURE, "a cache's guard looks at one rank's result, so ranks would diverge.", "cache.guard=0."
        )


def _refuse(context: PipelineContext, component: Denoiser, denoises: bool) -> None:
    """Refuses a model whose weights cannot be sharded.

    Args:
        context: The pipeline.
        component: The model.
        denoises: Whether it is a denoiser, which must have blocks.
    """
    refuse_offloaded(_FEATURE, component, context)
    blocks = component.adapter.blocks(component.module)
    if denoises and not blocks:
        raise Unsupported(_FEATURE, "no blocks were found in it.", "parallel without fsdp.", str(component))
    for module in component.module.modules():
        if has_accelerate_hook(module):
            raise Unsupported(
                _FEATURE, "its weights move between devices.", "no offloading: each rank holds a part of the weights.",
                str(component),
            )  # fmt: skip
    for block in blocks:
        for path, tensor in (*block.named_parameters(), *block.named_buffers()):
            if not is_plain(tensor):
                raise Unsupported(
                    _FEATURE,
                    f"{path} of a block is a {kind_of_tensor(tensor)}, whose bytes only its package knows.",
                    "weights of plain tensors, quantized with linear= if you like.",
                    str(component),
                )
        if any(not tensor.numel() for tensor in block.parameters()):
            raise Unsupported(
                _FEATURE, "weights of a block are not there: another pipeline that shares it may have sharded them.",
                "restore(...) that pipeline first.", str(component),
            )  # fmt: skip
