"""Tensor parallelism: every rank has a part of the blocks' weights, and works with some heads and features.

It comes before everything else that touches weights, so that what is quantized, or joined, is a rank's part, an
ordinary linear layer (`kernels/linear/sharded.py`). What is divided is the adapter's data (`models/tensor.py`).
Processors are stock: they count heads by attributes of their module, which are set to a rank's.

The stock weights go to the host's memory, so that `restore` needs no other rank, and `state_dict` and `save_pretrained`
speak of them. What would write a whole model's numbers into parts (a LoRA, say) is refused meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...config import ParallelConfig
from ...core.edits import AddLayer, Edit, OffloadWeight, SetAttr, SetItem, SwapModule
from ...core.mesh import Mesh, begin
from ...errors import Unsupported
from ...kernels.linear import sharded, stock_of
from ...models.tensor import (
    HEADS,
    WHOLE_COUNTS,
    Heads,
    Place,
    Range,
    TooFew,
    own_count,
    places,
    ranges,
    whole_count,
)
from ..context import Denoiser, PipelineContext
from ..feature import Plan, refuse_offloaded
from .opening import open_for

_FEATURE = "parallel.tp"
_INSTEAD = "parallel without tp (ulysses, ring and cfg divide the work, and leave the weights whole)."
# Methods that would put a whole model's numbers, or layers made for them, beside parts.
_CLOSED_OF_PIPE = ("load_lora_weights", "load_ip_adapter")
_CLOSED = ("load_lora_adapter", "add_adapter", "fuse_qkv_projections", "load_state_dict", "enable_parallelism")


def check(context: PipelineContext, config: ParallelConfig) -> Plan:
    """How many layers would be divided, and what that leaves on a rank.

    Raises:
        Unsupported: No adapter says how, there are fewer heads than ranks, or the weights are not stock ones that are
            there as a whole.
    """
    actions, notes, modules = [], [], 0
    for denoiser in context.denoisers:
        refuse_offloaded(_FEATURE, denoiser)
        if denoiser.adapter.tensor is None:
            raise Unsupported(_FEATURE, "no adapter says how its weights may be divided.", _INSTEAD, str(denoiser))
        _refuse_neighbours(denoiser)
        found = _layers(denoiser, config.tp)
        modules += len(found)
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
        notes.append("Whole weights stay in every rank's host memory, whatever linear drops.")
    left = []
    if config.exchange == "windows" and config.tp > 2:
        left.append("parallel.exchange='windows': sums of more than two ranks of tp go by messages, which is faster.")
    return Plan("; ".join(actions), modules, tuple(notes), tuple(left))


def edits(context: PipelineContext, config: ParallelConfig) -> Iterator[Edit]:
    """The process group and mesh; then, layer by layer, a swap and the stock weight put aside; and what processors
    count."""
    device = context.device.type
    begin(device)
    group = Mesh(config.sizes, device).group("tp")
    if group.size == 2:  # sums of more are NCCL's: core/windowed.py
        open_for(context, group, device, config)
    number = sharded.free_number()
    yield SetItem(sharded.GROUPS, number, group)
    for name in _CLOSED_OF_PIPE:
        yield from _closed(context, context.pipe, name, type(context.pipe).__name__)
    for denoiser in context.denoisers:
        for name in _CLOSED:
            yield from _closed(context, denoiser.module, name, str(denoiser))
        layers = _layers(denoiser, config.tp)
        yield _ShowWhole(denoiser.module, layers)
        yield from _tables(context, denoiser, config.tp, group.rank)
        for layer in layers:
            yield from _divided(layer, group.rank, number)
        for attention in _attention(layers):
            yield from _counted(attention, denoiser, config.tp, group.rank)


# --- which layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A layer or norm that is divided.

    Attributes:
        place: Where it is.
        stock: The stock layer, wherever it is now.
        parts: Each rank's outputs, inputs or channels.
    """

    place: Place
    stock: Any
    parts: list[list[Range]]

    @property
    def norm(self) -> bool:
        return isinstance(self.stock, nn.RMSNorm)

    def share(self, rank: int) -> float:
        """How much of it a rank has."""
        counts = [sum(last - first for first, last in parts) for parts in self.parts]
        return counts[rank] / sum(counts)


def _layers(denoiser: Denoiser, ranks: int) -> list[_Layer]:
    """The layers and norms of a denoiser that its plan divides; raises `Unsupported`."""
    found = []
    assert denoiser.adapter.tensor is not None
    for place in places(denoiser.adapter.named_blocks(denoiser.module), denoiser.adapter.tensor):
        stock = stock_of(place.parent._modules[place.name])
        reason = _refusal(stock)
        if reason is not None:
            raise Unsupported(_FEATURE, f"{place.path}: {reason}.", _INSTEAD, str(denoiser))
        size = stock.in_features if place.rows else stock.out_features
        found.append(_Layer(place, stock, _parts(denoiser, place, size, ranks)))
    plan, paths = denoiser.adapter.tensor, {id(module): path for path, module in denoiser.module.named_modules()}
    assert plan is not None
    for attention in _attention(found):
        for name in plan.norms:
            if attention._modules.get(name) is None:
                continue
            place = Place(f"{paths[id(attention)]}.{name}", attention, name, (HEADS,), False, attention)
            stock = stock_of(attention._modules[name])
            if not isinstance(stock, nn.RMSNorm):
                raise Unsupported(
                    _FEATURE, f"{place.path} is a {type(stock).__name__} across heads.", _INSTEAD, str(denoiser)
                )
            found.append(_Layer(place, stock, _parts(denoiser, place, stock.normalized_shape[-1], ranks)))
    return found


def _parts(denoiser: Denoiser, place: Place, size: int, ranks: int) -> list[list[Range]]:
    heads = Heads.of(place.attention) if place.attention is not None else None
    try:
        return ranges(place.segments, size, heads, ranks)
    except TooFew as error:
        most = min(item for item in (heads and heads.key, size) if item)
        raise Unsupported(
            _FEATURE, f"{place.path} has {error}.", f"tp={most} or less, with ulysses, ring or cfg for the rest.",
            str(denoiser),
        ) from None  # fmt: skip


def _attention(layers: list[_Layer]) -> list[nn.Module]:
    """The attention modules whose heads are divided."""
    found = {id(layer.place.attention): layer.place.attention for layer in layers}
    return [module for module in found.values() if module is not None]


def _bytes(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.numel() * x.element_size()


def _refusal(module: Any) -> str | None:
    """Why a layer cannot be divided, or `None` if it can."""
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


def _refuse_neighbours(denoiser: Denoiser) -> None:
    """Refuses what others have put around layers or processors."""
    module: Any = denoiser.module
    if getattr(module, "_parallel_config", None) is not None:
        raise Unsupported(
            _FEATURE, "diffusers' own parallelism is on.", "load the pipeline without enable_parallelism.",
            str(denoiser),
        )  # fmt: skip
    for path, part in module.named_modules():
        if isinstance(getattr(part, "base_layer", None), nn.Module) and not isinstance(part, sharded.SummedLinear):
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
                f"pipe.{denoiser.name}.unfuse_qkv_projections(); fuse=True joins a rank's part.",
                str(denoiser),
            )


# --- the edits -------------------------------------------------------------------------------------------------------


def _divided(layer: _Layer, rank: int, number: int) -> Iterator[Edit]:
    """This rank's part in a layer's place."""
    place, stock, parts = layer.place, layer.stock, layer.parts[rank]
    made: nn.Module
    holder: nn.Module
    if layer.norm:
        made = holder = sharded.norm_across_heads(stock, parts, number)
    elif place.rows:
        made = sharded.rows(stock, parts, number)
        holder = made.base_layer
    else:
        made = holder = sharded.columns(stock, parts)
    yield SwapModule(place.parent, place.name, made)
    if stock.weight is not None:
        yield OffloadWeight(stock, holder, keep=True)
    if not place.rows and getattr(stock, "bias", None) is not None:
        yield OffloadWeight(stock, holder, keep=True, tensor="bias")


def _counted(attention: nn.Module, denoiser: Denoiser, ranks: int, rank: int) -> Iterator[Edit]:
    """What an attention module counts, as this rank has it."""
    assert denoiser.adapter.tensor is not None
    counts = {
        name: unit
        for name, unit in denoiser.adapter.tensor.counts.items()
        if isinstance(whole_count(attention, name), int)
    }
    own = {name: own_count(attention, name, unit, ranks, rank) for name, unit in counts.items()}
    yield SetAttr(attention, WHOLE_COUNTS, {name: whole_count(attention, name) for name in counts})
    for name, value in own.items():
        yield SetAttr(attention, name, value)


def _tables(context: PipelineContext, denoiser: Denoiser, ranks: int, rank: int) -> Iterator[Edit]:
    """Layers around what makes rotary tables of heads: divided once in a call, where they are made."""
    assert denoiser.adapter.tensor is not None
    for path, name in denoiser.adapter.tensor.tables.items():
        block = denoiser.adapter.blocks(denoiser.module)[0]
        heads = Heads.of(block.get_submodule(name))
        assert heads is not None
        counts = [queries for queries, _ in heads.shares(ranks)]
        own = _of_heads(heads.query, sum(counts[:rank]), counts[rank])
        yield AddLayer(denoiser.module.get_submodule(path), context.rank("division"), own)


def _of_heads(heads: int, first: int, count: int) -> Callable[..., Any]:
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


def _closed(context: PipelineContext, owner: Any, name: str, who: str) -> Iterator[Edit]:
    """Refuses a method while weights are divided."""
    if not callable(getattr(owner, name, None)):
        return

    def refuse(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise Unsupported(
            name, "tensor parallelism has divided its weights, and this is made for whole ones.",
            "restore(pipe) first, and accelerate it again afterwards.", who,
        )  # fmt: skip

    yield AddLayer(owner, context.rank("request"), refuse, name)


@dataclass(eq=False)
class _ShowWhole:
    """Has a model's `state_dict`, and so `save_pretrained`, speak of the stock weights."""

    module: nn.Module
    layers: list[_Layer]
    _handle: Any = field(default=None, init=False)

    def apply(self) -> None:
        layers = {layer.place.path: layer.stock for layer in self.layers}

        def show(module: nn.Module, found: dict[str, Any], prefix: str, metadata: Any) -> None:
            held = list(found.items())
            found.clear()
            # In the stock order, whatever order parts have theirs in.
            for key, item in held:
                path = key.rpartition(".")[0].removesuffix(".base_layer")
                stock = layers.get(path.removeprefix(prefix))
                own = {key: item} if stock is None else dict(stock.named_parameters(path, recurse=False))
                found.update({name: each.detach() for name, each in own.items()})

        self._handle = self.module.register_state_dict_post_hook(show)

    def undo(self) -> None:
        self._handle.remove()
