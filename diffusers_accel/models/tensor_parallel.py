"""Tensor-parallel plans: the layers of a denoiser that are sharded among ranks, as data in its adapter, and the
arithmetic of their shards.

Of two consecutive layers the first is column-parallel, sharded by its outputs, and the second is row-parallel, sharded
by its inputs. The heads or features between them stay on one rank, and the products of the second layer are summed over
ranks. (Megatron-LM, https://arxiv.org/abs/1909.08053; its columns and rows refer to the transposed weight.) Tokens,
norms over channels, modulations and all modules outside the blocks stay whole on every rank.

Heads and features need not divide evenly: the first ranks have one more. A head stays whole, and under grouped-query
attention a key head stays with its queries. Features are sharded in granules, so that kernels that work in tiles take
every rank's shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..compat.torch_private import children_of
from ..core.comm import shard_sizes

# Units of a segment of a layer's outputs or inputs, and of an attention module's counting attribute.
HEADS, KEY_HEADS, FEATURES = "heads", "key heads", "features"
# Sizes of a granule of features: the first that divides them into at least as many granules as ranks. 64 suits every
# low-bit format.
GRANULES = (64, 32, 16, 8, 4, 2, 1)
# The attribute in which an attention module keeps its counts over all ranks.
GLOBAL_COUNTS = "_diffusers_accel_global_counts"

Segments = tuple[str, ...]
# First and last (exclusive) index of a range of outputs or inputs.
Range = tuple[int, int]


class TooFewUnits(ValueError):
    """There are fewer heads or features than ranks; the message names both numbers."""


@dataclass(frozen=True)
class TensorParallelPlan:
    """The sharded layers of a denoiser's blocks. Layers that a block does not have are passed over.

    Attributes:
        columns: Column-parallel layers: path in a block -> segments of the outputs, in order. The layer's attention
            module, or the block's only one, gives the number of heads.
        rows: Row-parallel layers: path in a block -> segments of the inputs, in order.
        norms: Names, in an attention module, of norms across all heads.
        counts: Attributes of attention modules that processors read -> the unit that they count, alone or times the
            channels of each.
        tables: Modules of the denoiser that make rotary tables with a head dimension -> path in a block of the
            attention module with these heads. Heads are dimension 1 of four, or part of dimension 2 of three.
    """

    columns: Mapping[str, Segments]
    rows: Mapping[str, Segments]
    norms: tuple[str, ...] = ()
    counts: Mapping[str, str] = field(default_factory=lambda: {"heads": HEADS, "inner_dim": HEADS})
    tables: Mapping[str, str] = field(default_factory=dict)


# --- layers of most models --------------------------------------------------------------------------------------


def attention_columns(*names: str, keys: str = HEADS) -> dict[str, Segments]:
    """Column-parallel projections of attention modules, of their own stream and of another.

    Args:
        names: Paths of the attention modules in a block.
        keys: The unit of keys and values, `HEADS` or `KEY_HEADS`.
    """
    units = {"q": HEADS, "k": keys, "v": keys}
    return {
        f"{name}.{layer.format(which)}": (unit,)
        for name in names
        for layer in ("to_{}", "add_{}_proj")
        for which, unit in units.items()
    }


def attention_rows(*names: str, own: str = "to_out.0") -> dict[str, Segments]:
    """Row-parallel output projections of attention modules, of their own stream and of another.

    Args:
        names: Paths of the attention modules in a block.
        own: Path of the own stream's projection in the module.
    """
    return {f"{name}.{layer}": (HEADS,) for name in names for layer in (own, "to_add_out")}


def feed_forward_columns(*names: str) -> dict[str, Segments]:
    """Column-parallel first layers of diffusers' feed-forwards without a gate; `names` are their paths in a block."""
    return {f"{name}.net.0.proj": (FEATURES,) for name in names}


def feed_forward_rows(*names: str) -> dict[str, Segments]:
    """Row-parallel second layers of diffusers' feed-forwards; `names` are their paths in a block."""
    return {f"{name}.net.2": (FEATURES,) for name in names}


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """An attention module's heads, over all ranks.

    Attributes:
        query: Number of query heads.
        key: Number of key and value heads, a divisor of `query`.
        dim: head_dim; `None` where the module has no such attribute.
    """

    query: int
    key: int
    dim: int | None = None

    @classmethod
    def of(cls, attention: nn.Module) -> Heads | None:
        """The heads of a module, sharded or not; `None` if it has no attribute that counts them."""
        query = next((global_count(attention, name) for name in ("heads", "num_attention_heads")
                      if isinstance(global_count(attention, name), int)), None)  # fmt: skip
        if query is None:
            return None
        key = global_count(attention, "num_key_value_heads")
        dim = getattr(attention, "head_dim", None)
        return cls(query, key if isinstance(key, int) else query, dim if isinstance(dim, int) else None)

    def shard_sizes(self, ranks: int) -> list[tuple[int, int]]:
        """(query heads, key heads) of each rank.

        Raises:
            TooFewUnits: There are fewer key heads than ranks.
        """
        if self.key < ranks:
            kind = ("head" if self.key == self.query else "key head") + ("s" if self.key > 1 else "")
            raise TooFewUnits(f"{self.key} {kind}, and tp={ranks} ranks")
        return [(keys * (self.query // self.key), keys) for keys in shard_sizes(self.key, ranks)]


def feature_shard_sizes(features: int, ranks: int) -> list[int]:
    """Number of features of each rank, in whole granules.

    Raises:
        TooFewUnits: There are fewer features than ranks.
    """
    if features < ranks:
        raise TooFewUnits(f"{features} features, and tp={ranks} ranks")
    granule = next(size for size in GRANULES if features % size == 0 and features // size >= ranks)
    return [granule * count for count in shard_sizes(features // granule, ranks)]


def ranges(segments: Segments, size: int, heads: Heads | None, ranks: int) -> list[list[Range]]:
    """Each rank's outputs or inputs of a layer, as a range of each segment.

    Args:
        segments: The units of the layer's segments, in order.
        size: Number of the layer's outputs or inputs.
        heads: The heads of the segments; `None` if all are of features.
        ranks: Number of ranks.

    Raises:
        TooFewUnits: There are fewer heads or features than ranks.
        ValueError: `size` does not consist of these segments.
    """
    counts = {HEADS: heads.query, KEY_HEADS: heads.key} if heads is not None else {}
    total = sum(counts[unit] for unit in segments if unit != FEATURES)
    features = segments.count(FEATURES)
    if features and total:
        assert heads is not None
        # head_dim alone tells where the heads' segments end.
        width = heads.dim or 0
    else:
        width = size // total if total else 0
    of_features = (size - width * total) // features if features else 0
    if width * total + of_features * features != size or (total and not width):
        raise ValueError(f"{size} values do not consist of {', '.join(segments)}")
    found: list[list[Range]] = [[] for _ in range(ranks)]
    start = 0
    for unit in segments:
        if unit == FEATURES:
            widths = feature_shard_sizes(of_features, ranks)
        else:
            assert heads is not None
            widths = [width * (queries if unit == HEADS else keys) for queries, keys in heads.shard_sizes(ranks)]
        for rank, count in enumerate(widths):
            found[rank].append((start, start + count))
            start += count
    return found


# --- layers of a denoiser ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardedLayer:
    """A sharded layer of a denoiser.

    Attributes:
        path: The layer's path in the denoiser.
        parent: The module that holds it.
        name: The layer's name in `parent`.
        segments: Units of its outputs, or of its inputs if it is row-parallel.
        rows: Whether it is row-parallel.
        attention: The attention module that has the segments' heads; `None` if all segments are of features.
    """

    path: str
    parent: nn.Module
    name: str
    segments: Segments
    rows: bool
    attention: nn.Module | None


def sharded_layers(blocks: Iterable[tuple[str, nn.Module]], plan: TensorParallelPlan) -> Iterator[ShardedLayer]:
    """The layers that a plan shards.

    Args:
        blocks: (path in the denoiser, block) of every block.
        plan: The plan.
    """
    for path, block in blocks:
        for rows, layers in ((False, plan.columns), (True, plan.rows)):
            for name, segments in layers.items():
                parent = _submodule(block, name.rpartition(".")[0])
                last = name.rpartition(".")[2]
                layer = children_of(parent).get(last) if parent is not None else None
                # Another kind of block may have a list of that name.
                if parent is None or layer is None or isinstance(layer, nn.ModuleList):
                    continue
                attention = None if set(segments) == {FEATURES} else attention_of(block, name)
                yield ShardedLayer(f"{path}.{name}", parent, last, segments, rows, attention)


def attention_of(block: nn.Module, path: str) -> nn.Module:
    """The attention module that a layer belongs to, or the block's only one.

    Args:
        block: The block.
        path: The layer's path in the block.

    Raises:
        ValueError: The layer is outside the block's attention modules, and there is not exactly one.
    """
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = _submodule(block, ".".join(parts[:end]))
        if module is not None and hasattr(module, "processor"):
            return module
    found = [module for module in block.modules() if hasattr(module, "processor")]
    if len(found) != 1:
        raise ValueError(f"{path}: {len(found)} attention modules in {type(block).__name__}")
    return found[0]


def global_count(module: nn.Module, name: str) -> Any:
    """An attribute that counts heads or channels, over all ranks; `None` if the module has none."""
    return vars(module).get(GLOBAL_COUNTS, {}).get(name, getattr(module, name, None))


def local_count(module: nn.Module, name: str, unit: str, ranks: int, rank: int) -> int:
    """The share of one rank in an attribute that counts heads or channels.

    Args:
        module: The attention module.
        name: The attribute.
        unit: The unit that it counts: `HEADS`, `KEY_HEADS` or `FEATURES`.
        ranks: Number of ranks.
        rank: The rank, from 0.
    """
    whole = global_count(module, name)
    if unit == FEATURES:
        return feature_shard_sizes(whole, ranks)[rank]
    heads = Heads.of(module)
    assert heads is not None
    queries, keys = heads.shard_sizes(ranks)[rank]
    return int(whole // heads.query * queries if unit == HEADS else whole // heads.key * keys)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        found = children_of(module).get(name)
        if found is None:
            return None
        module = found
    return module
