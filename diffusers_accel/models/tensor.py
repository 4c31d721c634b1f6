"""How a denoiser's weights may be divided among ranks (tensor parallelism): data beside each model, in its adapter, and
the arithmetic.

Of two layers that follow each other, the first is divided by its outputs and the second by its inputs, so that what
lies between them, heads of attention or features of a feed-forward, is one rank's alone. The second one's products are
partial: their sum over ranks is the stock product (Megatron-LM, https://arxiv.org/abs/1909.08053, whose `columns` and
`rows` are those of the transposed weight). Tokens, norms over channels, modulations and whatever lies outside the
blocks stay whole on every rank.

Heads and features need not divide: the first ranks have one more. Heads go whole, under grouped queries with all
queries of a key head; features in granules, so that kernels that work in tiles take every rank's share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core.comm import shares

# What a segment of a layer's outputs or inputs consists of, and what an attribute of an attention module counts.
HEADS, KEY_HEADS, FEATURES = "heads", "key heads", "features"
# Of features: the first that divides them, into no fewer granules than ranks. 64 suits every low-bit format.
GRANULES = (64, 32, 16, 8, 4, 2, 1)
# Where an attention module that counts a rank's heads remembers all.
WHOLE_COUNTS = "_diffusers_accel_whole_counts"

Segments = tuple[str, ...]
# First and last (exclusive) of a run of outputs or inputs.
Range = tuple[int, int]


class TooFew(ValueError):
    """There are fewer heads or features than ranks: how many, in words."""


@dataclass(frozen=True)
class TensorPlan:
    """What of a denoiser's blocks is divided, and how. Layers that a block does not have are passed over.

    Attributes:
        columns: Layers whose outputs are divided, by their paths in a block -> the segments that the outputs consist
            of, in their order. A layer's heads are those of the attention module it belongs to, or of the block's only
            one.
        rows: Likewise, layers whose inputs are divided and whose products are summed over ranks.
        norms: Names, in an attention module, of norms that run across all heads.
        counts: Attributes of attention modules that processors read -> what they count, alone or times the channels of
            each.
        tables: Modules of the denoiser that make rotary tables with something for every head (dimension 1 of four, or
            the channels, dimension 2 of three) -> path in a block of the attention module whose heads those are.
    """

    columns: Mapping[str, Segments]
    rows: Mapping[str, Segments]
    norms: tuple[str, ...] = ()
    counts: Mapping[str, str] = field(default_factory=lambda: {"heads": HEADS, "inner_dim": HEADS})
    tables: Mapping[str, str] = field(default_factory=dict)


# --- what most models have alike --------------------------------------------------------------------------------------


def attention_columns(*names: str, keys: str = HEADS) -> dict[str, Segments]:
    """The projections of attention modules, of their own stream and of another.

    Args:
        names: Of the modules, in a block.
        keys: What keys and values consist of.
    """
    units = {"q": HEADS, "k": keys, "v": keys}
    return {
        f"{name}.{layer.format(which)}": (unit,)
        for name in names
        for layer in ("to_{}", "add_{}_proj")
        for which, unit in units.items()
    }


def attention_rows(*names: str, own: str = "to_out.0") -> dict[str, Segments]:
    """The projections behind attention, of its own stream (named `own` there) and of another."""
    return {f"{name}.{layer}": (HEADS,) for name in names for layer in (own, "to_add_out")}


def feed_forward_columns(*names: str) -> dict[str, Segments]:
    """The first layers of diffusers' feed-forwards without a gate."""
    return {f"{name}.net.0.proj": (FEATURES,) for name in names}


def feed_forward_rows(*names: str) -> dict[str, Segments]:
    """The second layers of diffusers' feed-forwards."""
    return {f"{name}.net.2": (FEATURES,) for name in names}


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """An attention module's heads, all ranks' together.

    Attributes:
        query: How many there are.
        key: How many of keys and values; a divisor.
        dim: Channels of each, where the module says so.
    """

    query: int
    key: int
    dim: int | None = None

    @classmethod
    def of(cls, attention: nn.Module) -> Heads | None:
        """Those of a module, divided already or not; `None` if it does not say."""
        query = next((whole_count(attention, name) for name in ("heads", "num_attention_heads")
                      if isinstance(whole_count(attention, name), int)), None)  # fmt: skip
        if query is None:
            return None
        key = whole_count(attention, "num_key_value_heads")
        dim = getattr(attention, "head_dim", None)
        return cls(query, key if isinstance(key, int) else query, dim if isinstance(dim, int) else None)

    def shares(self, ranks: int) -> list[tuple[int, int]]:
        """Heads and key heads of each rank.

        Raises:
            TooFew: There are fewer than ranks.
        """
        if self.key < ranks:
            kind = ("head" if self.key == self.query else "key head") + ("s" if self.key > 1 else "")
            raise TooFew(f"{self.key} {kind}, and tp={ranks} ranks")
        return [(keys * (self.query // self.key), keys) for keys in shares(self.key, ranks)]


def feature_shares(features: int, ranks: int) -> list[int]:
    """Features of each rank, in granules.

    Raises:
        TooFew: There are fewer than ranks.
    """
    if features < ranks:
        raise TooFew(f"{features} features, and tp={ranks} ranks")
    granule = next(size for size in GRANULES if features % size == 0 and features // size >= ranks)
    return [granule * count for count in shares(features // granule, ranks)]


def ranges(segments: Segments, size: int, heads: Heads | None, ranks: int) -> list[list[Range]]:
    """Each rank's outputs or inputs of a layer, a run of each segment.

    Args:
        segments: What they consist of.
        size: How many there are.
        heads: Those that the segments are of, where any is of heads.
        ranks: Among how many they are divided.

    Raises:
        TooFew: There are fewer heads or features than ranks.
        ValueError: They do not consist of that.
    """
    counts = {HEADS: heads.query, KEY_HEADS: heads.key} if heads is not None else {}
    total = sum(counts[unit] for unit in segments if unit != FEATURES)
    features = segments.count(FEATURES)
    if features and total:
        assert heads is not None
        # Nothing else says where heads end.
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
            widths = feature_shares(of_features, ranks)
        else:
            assert heads is not None
            widths = [width * (queries if unit == HEADS else keys) for queries, keys in heads.shares(ranks)]
        for rank, count in enumerate(widths):
            found[rank].append((start, start + count))
            start += count
    return found


# --- where it is in a denoiser ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A layer that is divided.

    Attributes:
        path: In the denoiser.
        parent: The module it hangs in.
        name: Its name there.
        segments: What its outputs, or inputs, consist of.
        rows: Whether its inputs are divided.
        attention: The module whose heads those segments are of; `None` without any of heads.
    """

    path: str
    parent: nn.Module
    name: str
    segments: Segments
    rows: bool
    attention: nn.Module | None


def places(blocks: Iterable[tuple[str, nn.Module]], plan: TensorPlan) -> Iterator[Place]:
    """The layers that a plan divides, in blocks with their paths."""
    for path, block in blocks:
        for rows, layers in ((False, plan.columns), (True, plan.rows)):
            for name, segments in layers.items():
                parent = _submodule(block, name.rpartition(".")[0])
                last = name.rpartition(".")[2]
                layer = parent._modules.get(last) if parent is not None else None
                # The same name may be a list's in another kind of block.
                if parent is None or layer is None or isinstance(layer, nn.ModuleList):
                    continue
                attention = None if set(segments) == {FEATURES} else attention_of(block, name)
                yield Place(f"{path}.{name}", parent, last, segments, rows, attention)


def attention_of(block: nn.Module, path: str) -> nn.Module:
    """The attention module that a layer belongs to, or the block's only one.

    Raises:
        ValueError: There are several.
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


def whole_count(module: nn.Module, name: str) -> Any:
    """An attribute that counts heads or channels, of all ranks; `None` if there is none."""
    return vars(module).get(WHOLE_COUNTS, {}).get(name, getattr(module, name, None))


def own_count(module: nn.Module, name: str, unit: str, ranks: int, rank: int) -> int:
    """The same of one rank.

    Args:
        module: The attention module.
        name: The attribute.
        unit: What it counts.
        ranks: Among how many the module's heads are divided.
        rank: Which of them.
    """
    whole = whole_count(module, name)
    if unit == FEATURES:
        return feature_shares(whole, ranks)[rank]
    heads = Heads.of(module)
    assert heads is not None
    queries, keys = heads.shares(ranks)[rank]
    return int(whole // heads.query * queries if unit == HEADS else whole // heads.key * keys)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        found = module._modules.get(name)
        if found is None:
            return None
        module = found
    return module
