"""The models of a pipeline as offloading sees them: their blocks, the weights of each block, and all other weights.

Sizes are those that weights will have once they are sharded and quantized, so that a plan can be made beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...compat.torch_private import buffers_of, parameters_of
from ...core.memory_plan import ModelSizes, Role
from ...core.streaming import can_stream, parts_of
from ...core.weights import ALIGNED, Weight, bytes_of, find_weights, is_plain, round_up
from ...kernels.linear import LinearProxy, unsharded_layer
from ...kernels.linear.precomputed import PRECOMPUTED_FORMATS, can_precompute
from ...models import Adapter
from ...models.adapter import default_adapter
from ..context import Denoiser, PipelineContext


@dataclass(frozen=True)
class Changes:
    """The changes to layers that other features have planned, while these are not applied yet.

    Attributes:
        formats: `id` of a stock layer -> the record of the format that it will have.
        shards: `id` of a stock layer -> (outputs, inputs) of its shard on a rank.
    """

    formats: Mapping[int, Any] = field(default_factory=dict)
    shards: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def shape(self, layer: Any) -> tuple[int, int]:
        """(outputs, inputs) that a linear layer will have."""
        stock = unsharded_layer(layer)
        return self.shards.get(id(stock), (stock.out_features, stock.in_features))


def layer_shape(layer: Any, changes: Changes | None) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer after planned changes; `None` for none."""
    return (layer.out_features, layer.in_features) if changes is None else changes.shape(layer)


@dataclass(eq=False)
class Block:
    """A block of a model.

    Attributes:
        name: Its path, for messages.
        module: The block.
        copied: Weights that streaming copies.
        in_place: Weights that are read from host memory, if at all: those of precomputed modulations.
    """

    name: str
    module: nn.Module
    copied: list[Weight] = field(default_factory=list)
    in_place: list[Weight] = field(default_factory=list)


@dataclass(eq=False)
class Model:
    """A model of a pipeline.

    Attributes:
        name: The pipeline's name for it.
        role: Its part in the pipeline.
        module: The model.
        blocks: Its blocks, in the order in which they are listed.
        rest: Weights outside of blocks.
        buffers: Tensors outside of blocks, and in them, that cannot be streamed: a forward may write to them.
        denoiser: The denoiser, for a model that is one.
    """

    name: str
    role: Role
    module: nn.Module
    blocks: list[Block]
    rest: list[Weight]
    buffers: list[Weight]
    denoiser: Denoiser | None = None

    def sizes(self, changes: Changes | None, seconds: tuple[float, ...] = ()) -> ModelSizes:
        """Its bytes, as the planner reads them.

        Args:
            changes: Planned changes to layers; `None` once they are applied.
            seconds: Predicted seconds of each block.
        """
        planned = {} if changes is None else _planned_bytes(self.module, changes)

        def total(weights: list[Weight]) -> int:
            return sum(round_up(planned.get(id(weight.tensor), _stored_bytes(weight)), ALIGNED) for weight in weights)

        return ModelSizes(
            self.name,
            self.role,
            tuple(total(block.copied) for block in self.blocks),
            tuple(total(block.in_place) for block in self.blocks),
            total([*self.rest, *self.buffers]),
            seconds,
            mappable=self.role == "text encoder",
        )


def models_of(context: PipelineContext, changes: Changes | None, mapped: bool) -> list[Model]:
    """The pipeline's models.

    Args:
        context: The pipeline.
        changes: Planned changes to layers; `None` once they are applied.
        mapped: Whether weights can be read from host memory in place.
    """
    denoisers = {denoiser.name: denoiser for denoiser in context.denoisers}
    found = []
    for name, module in context.pipe.components.items():
        if isinstance(module, nn.Module):
            denoiser = denoisers.get(name)
            adapter = denoiser.adapter if denoiser is not None else default_adapter(module)
            in_place = _precomputed(context, denoiser, changes) if denoiser is not None and mapped else set()
            found.append(_model(name, _role(name, module, denoiser), module, adapter, in_place, denoiser))
    return found


def _role(name: str, module: nn.Module, denoiser: Denoiser | None) -> Role:
    if denoiser is not None:
        return "denoiser"
    if hasattr(module, "encode") and hasattr(module, "decode"):
        return "vae"
    return "text encoder" if name.startswith("text_encoder") else "other"


def _model(
    name: str, role: Role, module: nn.Module, adapter: Adapter, in_place: set[int], denoiser: Denoiser | None
) -> Model:
    blocks: list[Block] = []
    owner: dict[int, Block] = {}
    paths = {id(part): path for path, part in module.named_modules()}
    for part in adapter.blocks(module) if role in ("denoiser", "text encoder") else ():
        # A block within a block belongs to the outer one.
        if id(part) not in owner:
            blocks.append(Block(f"{name}.{paths[id(part)]}", part))
            owner |= {id(each): blocks[-1] for each in part.modules()}
    rest: list[Weight] = []
    buffers: list[Weight] = []
    entries = find_weights([module], owner, lambda each: isinstance(each, LinearProxy), lambda tensor: True)
    for entry in entries:
        block: Block | None = entry.block if can_stream(entry.weight.tensor) or entry.weight.tensor.is_meta else None
        if block is None:
            # Shared with another block, written to by a forward, or of a class that hides its bytes.
            movable = entry.stored and not entry.aliased and can_stream(entry.weight.tensor)
            (rest if movable and set(entry.owners) == {None} else buffers).append(entry.weight)
        elif id(entry.weight.tensor) in in_place:
            block.in_place.append(entry.weight)
        else:
            block.copied.append(entry.weight)
    return Model(name, role, module, [block for block in blocks if block.copied], rest, buffers, denoiser)


def _precomputed(context: PipelineContext, denoiser: Denoiser, changes: Changes | None) -> set[int]:
    """`id` of each tensor of layers whose outputs are precomputed."""
    modulation = denoiser.adapter.modulation
    if modulation is None or not context.precomputes_modulations(denoiser):
        return set()
    found: set[int] = set()
    for block in denoiser.adapter.blocks(denoiser.module):
        for path in modulation.layers:
            try:
                layer: Any = block.get_submodule(path)
            except AttributeError:
                continue
            layer = getattr(layer, "base_layer", layer)
            record = None if changes is None else changes.formats.get(id(layer))
            if can_precompute(layer, denoiser.dtype) if record is None else record.name in PRECOMPUTED_FORMATS:
                tensors = (*parameters_of(layer).values(), *buffers_of(layer).values())
                found |= {id(tensor) for tensor in tensors if tensor is not None}
    return found


def _planned_bytes(module: nn.Module, changes: Changes) -> dict[int, int]:
    """`id` of each weight that changes will shard or quantize, or that is so now and will not be -> its bytes then."""
    found = {}
    for part in module.modules():
        layer = part.stock if isinstance(part, LinearProxy) else part if isinstance(part, nn.Linear) else None
        if not isinstance(layer, nn.Linear) or isinstance(layer, LinearProxy):
            continue
        stock = unsharded_layer(layer)
        if part is stock and id(stock) not in changes.formats and id(stock) not in changes.shards:
            continue
        outputs, inputs = changes.shape(stock)
        record, width = changes.formats.get(id(stock)), layer.weight.element_size()
        bits = 8 * width if record is None or record.bits is None else record.bits
        size = int(outputs * inputs * bits / 8)
        if part is layer:
            found[id(layer.weight)] = size
        else:
            # The tensors of an earlier `accelerate`, which ends before this one begins.
            own = [item for item in buffers_of(part).values() if item is not None and item.numel()]
            found |= {id(item): 0 for item in own}
            if own:
                found[id(max(own, key=torch.Tensor.numel))] = size
        if layer.bias is not None:
            found[id(layer.bias)] = outputs * width
    return found


def _stored_bytes(weight: Weight) -> int:
    tensor = weight.tensor
    if is_plain(tensor) or tensor.is_meta or not can_stream(tensor):
        return bytes_of(tensor)
    return sum(bytes_of(part) for part in parts_of(tensor)[0])
