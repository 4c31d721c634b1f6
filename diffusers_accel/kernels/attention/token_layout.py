"""The tokens of an attention call over all ranks, and masks over them.

A rank holds a shard of each stream of tokens. After an exchange, tokens are in the order of ranks: the shards of the
first rank, then those of the next. With one stream this is the order of the whole sequence. A mask is given in the
order of streams, and is brought into the order of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...core.comm import Group, shard_sizes
from ...errors import Unsupported

INSTEAD = "parallel without ulysses, ring and attn2d."


@dataclass(frozen=True)
class Layout:
    """The tokens of one attention call, over all ranks.

    Attributes:
        queries: Lengths, over all ranks, of the streams of the queries, in their order in a shard.
        keys: Lengths, over all ranks, of the streams of the sharded keys, in their order in a shard.
        replicated_keys: Number of keys that every rank has, in front of the sharded ones.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    replicated_keys: int = 0

    def lengths(self, streams: Sequence[int], ranks: int) -> list[int]:
        """Each rank's number of tokens, from the streams' lengths over all ranks."""
        return [sum(parts) for parts in zip(*(shard_sizes(length, ranks) for length in streams), strict=True)]


@dataclass(frozen=True)
class ShardedMask:
    """A mask over all queries and keys in the order of ranks.

    Attributes:
        whole: (batch or 1, heads or 1, all queries or 1, all keys); `None` without a mask.
        queries: Each rank's number of queries.
        keys: Each rank's number of keys.
    """

    whole: torch.Tensor | None
    queries: list[int]
    keys: list[int]

    @classmethod
    def over(
        cls,
        mask: torch.Tensor | None,
        layout: Layout,
        sequence: Group,
        query_lengths: list[int],
        key_lengths: list[int],
    ) -> ShardedMask:
        """The mask of `attend`, whole and in the order of ranks. A collective if it covers this rank's keys alone."""
        if mask is None:
            return cls(None, query_lengths, key_lengths)
        if layout.replicated_keys or mask.ndim != 4:
            raise Unsupported(
                "parallel", f"a mask of shape {tuple(mask.shape)} cannot be sharded with its sequence.", INSTEAD
            )
        columns, rows = mask.shape[3], mask.shape[2]
        if columns == sum(key_lengths):
            mask = _by_rank(mask, 3, layout.keys, sequence.size)
        elif columns == key_lengths[sequence.rank] and rows == 1:
            mask = torch.cat(sequence.all_gather(mask, 3, key_lengths), 3)
        else:
            raise Unsupported(
                "parallel",
                f"a mask of shape {tuple(mask.shape)} is neither over all {sum(key_lengths)} keys nor over this rank's "
                f"{key_lengths[sequence.rank]} alone.",
                INSTEAD,
            )
        if rows not in (1, sum(query_lengths)):
            raise Unsupported(
                "parallel",
                f"a mask of shape {tuple(mask.shape)} is not over all {sum(query_lengths)} queries.",
                INSTEAD,
            )
        if rows != 1:
            mask = _by_rank(mask, 2, layout.queries, sequence.size)
        return cls(mask, query_lengths, key_lengths)

    def of_heads(self, heads: list[int], rank: int) -> ShardedMask:
        """The mask of one rank's heads.

        Args:
            heads: Each rank's number of heads.
            rank: The rank in the Ulysses group.
        """
        if self.whole is None or self.whole.shape[1] == 1:
            return self
        return replace(self, whole=self.whole.split(heads, 1)[rank])

    def of(self, query_ranks: list[int], key_ranks: list[int]) -> torch.Tensor | None:
        """The mask of some ranks' queries and some ranks' keys, in the order given; `None` without a mask."""
        found = self.whole
        if found is None:
            return None
        for dim, lengths, ranks in ((2, self.queries, query_ranks), (3, self.keys, key_ranks)):
            if found.shape[dim] > 1 and ranks != list(range(len(lengths))):
                parts = found.split(lengths, dim)
                found = torch.cat([parts[rank] for rank in ranks], dim)
        return found


def _by_rank(mask: torch.Tensor, dim: int, streams: Sequence[int], ranks: int) -> torch.Tensor:
    """Reorders `dim` of a mask from stream by stream to rank by rank.

    Args:
        mask: The mask, four dimensions.
        dim: The dimension, whole.
        streams: Whole lengths of the streams along it.
        ranks: Number of ranks.
    """
    if len(streams) == 1:
        return mask
    parts = [whole.tensor_split(ranks, dim) for whole in mask.split(list(streams), dim)]
    return torch.cat([part for each in zip(*parts, strict=True) for part in each], dim)
