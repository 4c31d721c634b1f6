"""Tensor parallelism: every rank has a shard of the blocks' weights, and computes some heads and features.

This feature comes before all others that change weights, so these quantize or fuse a rank's shard, an ordinary linear
layer (`kernels/linear/sharded.py`). The adapter has the plan of the sharded layers (`models/tensor_parallel.py`).
Processors are stock: they read the number of heads from attributes of their module, which are set to a rank's number.

The stock weights go to host memory. So `restore` needs no other rank, and `state_dict` and `save_pretrained` return the
stock weights. Until `restore`, methods that would write a whole model's tensors into shards (e.g. loading a LoRA) are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...compat.diffusers_private import parallel_config_of
from ...compat.torch_private import children_of
from ...config import ParallelConfig
from ...core.edits import AddLayer, Edit, OffloadWeight, SetAttr, SetItem, SwapModule
from ...core.mesh import Mesh
from ...errors import Unsupported
from ...kernels.linear import sharded, stock_of
from ...models.tensor_parallel import (
    GLOBAL_COUNTS,
    HEADS,
    Heads,
    Range,
    ShardedLayer,
    TooFewUnits,
    global_count,
    local_count,
    ranges,
    sharded_layers,
)
from ..context import Denoiser, PipelineContext
from ..feature import Plan, refuse_offloaded
from .symm_mem_setup import set_up_symm_mem

_FEATURE = "parallel.tp"
_INSTEAD = "parallel without tp (ulysses, ring and cfg share the work, and leave the weights whole)."
# Methods that would put a whole model's tensors, or layers made for them, beside shards.
_REFUSED_OF_PIPE = ("load_lora_weights", "load_ip_adapter")
_REFUSED = ("load_lora_adapter", "add_adapter", "fuse_qkv_projections", "load_state_dict", "enable_parallelism")


def check(context: PipelineContext, config: ParallelConfig) -> Plan:
    """The number of sharded layers, and the bytes that they leave on a rank.

    Raises:
        Unsupported: No adapter has a plan, there are fewer heads than ranks, or weights are not whole stock ones.
    """
    actions, notes, modules = [], [], 0
    shards: dict[int, tuple[int, int]] = {}
    for denoiser in context.denoisers:
        refuse_offloaded(_FEATURE, denoiser, context)
        if denoiser.adapter.tensor is None:
            raise Unsupported(_FEATURE, "no adapter says how its weights are sharded.", _INSTEAD, str(denoiser))
        _refuse_adapters(denoiser)
        found = _layers(denoiser, config.tp)
        modules += len(found)
        shards |= {id(layer.stock): layer.shape(0) for layer in found if not layer.norm}
        actions.append(f"{denoiser.name}: {len(found)} layers on {config.tp} ranks")
        whole = sum(_bytes(layer.stock.weight) for layer in found)
        # The first rank has the most.
        own = sum(_bytes(layer.stock.weight) * layer.share(0) for layer in found)
        stock = {id(layer.stock.weight) for layer in found}
        rest = sum(_bytes(item) for item in denoiser.module.parameters() if id(item) not in stock)
        notes.append(
            f"{denoiser.name}: their weights take {own / 2**20:.1f} MiB on a rank instead of {whole / 2**20:.1f}; the "
            f"other {rest / 2**20:.1f} stay whole."
        )
    linear = context.config.linear if context.config is not None else None
    if linear is not None and linear.keep_original == "drop":
        notes.append("Whole weights stay in every rank's host memory, although linear drops its originals.")
    left = []
    if config.comm == "symm_mem" and config.tp > 2:
        left.append("parallel.comm='symm_mem': sums of more than two ranks of tp use collectives, which are faster.")
    return Plan("; ".join(actions), modules, tuple(notes), tuple(left), shards=shards)


def edits(context: PipelineContext, config: ParallelConfig) -> Iterator[Edit]:
    """For each layer a swap and the move of its stock weight to the host, then the counts that processors read."""
    device = context.device.type
    group = Mesh(config.sizes, device).group("tp")
    if group.size == 2:  # NCCL sums more ranks: core/symm_collectives.py
        set_up_symm_mem(context, group, device, config)
    number = sharded.free_group_number()
    yield SetItem(sharded.GROUPS, number, group)
    for name in _REFUSED_OF_PIPE:
        yield from _refuse_method(context, context.pipe, name, type(context.pipe).__name__)
    for denoiser in context.denoisers:
        for name in _REFUSED:
            yield from _refuse_method(context, denoiser.module, name, str(denoiser))
        layers = _layers(denoiser, config.tp)
        yield _StockStateDict(denoiser.module, layers)
        yield from _shard_tables(context, denoiser, config.tp, group.rank)
        for layer in layers:
            yield from _shard_layer(layer, group.rank, number)
        for attention in _attention(layers):
            yield from _set_counts(attention, denoiser, config.tp, group.rank)


# --- which layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A sharded layer or norm.

    Attributes:
        place: The layer's place in the denoiser.
        stock: The stock layer, which another module may have replaced.
        parts: Ranges of each rank's outputs, inputs or channels.
    """

    place: ShardedLayer
    stock: Any
    parts: list[list[Range]]

    @property
    def norm(self) -> bool:
        return isinstance(self.stock, nn.RMSNorm)

    def share(self, rank: int) -> float:
        """The fraction of the layer that a rank has."""
        counts = [sum(last - first for first, last in parts) for parts in self.parts]
        return counts[rank] / sum(counts)

    def shape(self, rank: int) -> tuple[int, int]:
        """(outputs, inputs) of a rank's shard of a layer."""
        own = sum(last - first for first, last in self.parts[rank])
        return (self.stock.out_features, own) if self.place.rows else (own, self.stock.in_features)


def _layers(denoiser: Denoiser, ranks: int) -> list[_Layer]:
    """The layers and norms of a denoiser that its plan shards. Raises `Unsupported` if one cannot be."""
    found = []
    assert denoiser.adapter.tensor is not None
    for place in sharded_layers(denoiser.adapter.named_blocks(denoiser.module), denoiser.adapter.tensor):
        stock = stock_of(children_of(place.parent)[place.name])
        reason = _refusal(stock)
        if reason is not None:
            raise Unsupported(_FEATURE, f"{place.path}: {reason}.", _INSTEAD, str(denoiser))
        size = stock.in_features if place.rows else stock.out_features
        found.append(_Layer(place, stock, _parts(denoiser, place, size, ranks)))
    plan, paths = denoiser.adapter.tensor, {id(module): path for path, module in denoiser.module.named_modules()}
    assert plan is not None
    for attention in _attention(found):
        for name in plan.norms:
            if children_of(attention).get(name) is None:
                continue
            place = ShardedLayer(f"{paths[id(attention)]}.{name}", attention, name, (HEADS,), False, attention)
            stock = stock_of(children_of(attention)[name])
            if not isinstance(stock, nn.RMSNorm):
                raise Unsupported(
                    _FEATURE, f"{place.path} is a {type(stock).__name__} across heads.", _INSTEAD, str(denoiser)
                )
            found.append(_Layer(place, stock, _parts(denoiser, place, stock.normalized_shape[-1], ranks)))
    return found


def _parts(denoiser: Denoiser, place: ShardedLayer, size: int, ranks: int) -> list[list[Range]]:
    heads = Heads.of(place.attention) if place.attention is not None else None
    try:
        return ranges(place.segments, size, heads, ranks)
    except TooFewUnits as error:
        most = min(item for item in (heads and heads.key, size) if item)
        raise Unsupported(
            _FEATURE, f"{place.path} has {error}.", f"tp={most} or less, with ulysses, ring or cfg for the rest.",
            str(denoiser),
        ) from None  # fmt: skip


def _attention(layers: list[_Layer]) -> list[nn.Module]:
    """The attention modules whose heads are sharded."""
    found = {id(layer.place.attention): layer.place.attention for layer in layers}
    return [module for module in found.values() if module is not None]


def _bytes(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.numel() * x.element_size()


def _refusal(module: Any) -> str | None:
    """The reason why a layer cannot be sharded; `None` if it can."""
    if module is None:
        return "it is quantized already, and its original weight is gone"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not a stock linear layer"
    weight = module.weight
    if type(weight) not in (nn.Parameter, torch.Tensor) or type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return None


def _refuse_adapters(denoiser: Denoiser) -> None:
    """Refuses diffusers' parallelism, LoRAs, IP-Adapters and fused projections, which are made for whole layers."""
    module: Any = denoiser.module
    if parallel_config_of(module) is not None:
        raise Unsupported(
            _FEATURE, "diffusers' own parallelism is on.", "load the pipeline without enable_parallelism.",
            str(denoiser),
        )  # fmt: skip
    for path, part in module.named_modules():
        if isinstance(getattr(part, "base_layer", None), nn.Module) and not isinstance(part, sharded.RowParallelLinear):
            raise Unsupported(
                _FEATURE,
                f"{path} has a LoRA, made for a whole layer.",
                "pipe.fuse_lora() and pipe.unload_lora_weights() first.",
                str(denoiser),
            )
        if "IPAdapter" in type(getattr(part, "processor", None)).__name__:
            raise Unsupported(
                _FEATURE, f"{path} attends to an IP-Adapter's pictures too.", "pipe.unload_ip_adapter().", str(denoiser)
            )
        if getattr(part, "fused_projections", False):
            raise Unsupported(
                _FEATURE,
                f"{path} has diffusers' fused projections.",
                f"pipe.{denoiser.name}.unfuse_qkv_projections(); fuse=True fuses a rank's shard.",
                str(denoiser),
            )


# --- the edits -------------------------------------------------------------------------------------------------------


def _shard_layer(layer: _Layer, rank: int, number: int) -> Iterator[Edit]:
    """Puts this rank's shard in a layer's place.

    Args:
        layer: The layer.
        rank: This rank along the axis `tp`.
        number: The number of the ranks' group in `sharded.GROUPS`.
    """
    place, stock, parts = layer.place, layer.stock, layer.parts[rank]
    made: nn.Module
    holder: nn.Module
    if layer.norm:
        made = holder = sharded.rms_norm_across_heads(stock, parts, number)
    elif place.rows:
        made = sharded.row_parallel(stock, parts, number)
        holder = made.base_layer
    else:
        made = holder = sharded.column_parallel(stock, parts)
    yield SwapModule(place.parent, place.name, made)
    if stock.weight is not None:
        yield OffloadWeight(stock, holder, keep=True)
    if not place.rows and getattr(stock, "bias", None) is not None:
        yield OffloadWeight(stock, holder, keep=True, tensor="bias")


def _set_counts(attention: nn.Module, denoiser: Denoiser, ranks: int, rank: int) -> Iterator[Edit]:
    """Sets an attention module's counts to this rank's heads."""
    assert denoiser.adapter.tensor is not None
    counts = {
        name: unit
        for name, unit in denoiser.adapter.tensor.counts.items()
        if isinstance(global_count(attention, name), int)
    }
    own = {name: local_count(attention, name, unit, ranks, rank) for name, unit in counts.items()}
    yield SetAttr(attention, GLOBAL_COUNTS, {name: global_count(attention, name) for name in counts})
    for name, value in own.items():
        yield SetAttr(attention, name, value)


def _shard_tables(context: PipelineContext, denoiser: Denoiser, ranks: int, rank: int) -> Iterator[Edit]:
    """Layers around the modules that make rotary tables of heads: tables are sharded once in a call, where they are
    made."""
    assert denoiser.adapter.tensor is not None
    for path, name in denoiser.adapter.tensor.tables.items():
        block = denoiser.adapter.blocks(denoiser.module)[0]
        heads = Heads.of(block.get_submodule(name))
        assert heads is not None
        counts = [queries for queries, _ in heads.shard_sizes(ranks)]
        own = _slice_heads(heads.query, sum(counts[:rank]), counts[rank])
        yield AddLayer(denoiser.module.get_submodule(path), context.rank("sequence sharding"), own)


def _slice_heads(heads: int, first: int, count: int) -> Callable[..., Any]:
    """The layer that keeps some heads of rotary tables.

    Args:
        heads: Heads of the tables.
        first: The first head that is kept.
        count: The number of heads that are kept.
    """

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = []
        for table in inner(*args, **kwargs):
            dim = 1 if table.ndim == 4 else 2
            width, more = divmod(table.shape[dim], heads)
            if more:
                raise Unsupported(
                    _FEATURE, f"a rotary table has {table.shape[dim]} values for {heads} heads.", _INSTEAD
                )
            found.append(table.narrow(dim, first * width, count * width).contiguous())
        return tuple(found)

    return forward


def _refuse_method(context: PipelineContext, owner: Any, name: str, who: str) -> Iterator[Edit]:
    """Refuses a method while weights are sharded."""
    if not callable(getattr(owner, name, None)):
        return

    def refuse(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise Unsupported(
            name, "tensor parallelism has sharded its weights, and the method needs whole ones.",
            "restore(pipe) first, and accelerate it again afterwards.", who,
        )  # fmt: skip

    yield AddLayer(owner, context.rank("request"), refuse, name)


@dataclass(eq=False)
class _StockStateDict:
    """Makes a model's `state_dict`, and so `save_pretrained`, return the stock weights."""

    module: nn.Module
    layers: list[_Layer]
    _handle: Any = field(default=None, init=False)

    def apply(self) -> None:
        layers = {layer.place.path: layer.stock for layer in self.layers}

        def show(module: nn.Module, found: dict[str, Any], prefix: str, metadata: Any) -> None:
            held = list(found.items())
            found.clear()
            # In the order of the stock model, which shards may not have.
            for key, item in held:
                path = key.rpartition(".")[0].removesuffix(".base_layer")
                stock = layers.get(path.removeprefix(prefix))
                own = {key: item} if stock is None else dict(stock.named_parameters(path, recurse=False))
                found.update({name: each.detach() for name, each in own.items()})

        self._handle = self.module.register_state_dict_post_hook(show)

    def undo(self) -> None:
        self._handle.remove()
