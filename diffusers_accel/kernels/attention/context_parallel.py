"""Context parallelism: attention over a sequence that is sharded among ranks, around any kernel.

Owns Ulysses, Ring and Attention2D. Every rank holds a shard of the tokens with all heads. Ulysses exchanges tokens for
heads, so that a rank has all tokens of some heads, and back (https://arxiv.org/abs/2309.14509). The attention of these
heads is local, or is sharded further. Ring passes keys and values from rank to rank while the kernel works on the last
ones (https://arxiv.org/abs/2310.01889). Attention2D puts ranks on a grid (TensorRT-LLM VisualGen). Queries are gathered
along a rank's row, keys and values along its column; the row then exchanges partial outputs. Ring and Attention2D merge
partial outputs in float32 by their logsumexp (LSE).

Nothing is padded: tokens and heads may be sharded unevenly. After an exchange, tokens are in the order of ranks. If a
shard holds tokens of two streams, this is not the order of the whole sequence. Only masks depend on the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...core.comm import Group, shard_sizes
from ...errors import Unsupported
from .record import Inputs
from .ulysses import AllToAllShape, Operand, UlyssesAllToAll

_INSTEAD = "parallel without ulysses, ring and attn2d."
# A kernel: it returns the output, or the output and its logsumexp with `Inputs.return_lse`.
Kernel = Callable[[Inputs], Any]
_OutputLSE = tuple[torch.Tensor, torch.Tensor]
_KeyValue = tuple[torch.Tensor, torch.Tensor]


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
class ContextParallelAttention:
    """Attention over a sharded sequence.

    Attributes:
        sequence: All ranks that share the sequence, in the order of shards.
        ulysses: The ranks that exchange tokens for heads.
        ring: The ranks that pass keys and values to each other.
        row: The ranks of this rank's row of the grid, which gather queries.
        column: The ranks of this rank's column, which gather keys and values.
        all_to_all: The exchange over symmetric memory; `None` where `ulysses` has none.
        overlaps: Whether other computation may run during an exchange.
        fp8: Whether Ulysses communicates in e4m3.
    """

    sequence: Group
    ulysses: Group
    ring: Group
    row: Group
    column: Group
    all_to_all: UlyssesAllToAll | None = None
    overlaps: bool = True
    fp8: bool = False

    @property
    def partial(self) -> bool:
        """Whether partial outputs are merged, for which a kernel must return its LSE."""
        return self.ring.size * self.row.size * self.column.size > 1

    def attend(self, inputs: Inputs, layout: Layout, kernel: Kernel) -> torch.Tensor:
        """This rank's rows of the attention over all tokens.

        Args:
            inputs: This rank's shards, normed and rotated. A mask covers this rank's keys, all keys, or all queries and
                all keys. `is_causal` is right for one stream without Ring and Attention2D.
            layout: The tokens of all ranks.
            kernel: The attention kernel.

        Returns:
            (batch, this rank's queries, heads, value_dim), in the query's dtype.

        Raises:
            Unsupported: A mask has another number of keys or dimensions, or some keys are replicated.
        """
        inputs = _divisible(inputs, self.ulysses.size)
        heads = inputs.query.shape[2], inputs.key.shape[2]
        mask = inputs.attn_mask
        inputs, replicated = self._to_heads(inputs, layout, heads)
        return self._attend_heads(inputs, replicated, layout, heads[0], mask, kernel)

    def _attend_heads(
        self,
        inputs: Inputs,
        replicated: _KeyValue | None,
        layout: Layout,
        heads: int,
        attn_mask: torch.Tensor | None,
        kernel: Kernel,
    ) -> torch.Tensor:
        """`attend` after the first exchange.

        Args:
            inputs: The tokens of all Ulysses ranks, with this rank's heads.
            replicated: The replicated keys and values, with this rank's heads; `None` without any.
            layout: The tokens of all ranks.
            heads: Number of query heads over all ranks.
            attn_mask: The mask as `attend` was given it.
            kernel: The attention kernel.
        """
        query_lengths, key_lengths = self._lengths(layout)
        mask = _Mask.over(attn_mask, layout, self.sequence, query_lengths, key_lengths)
        counts = shard_sizes(heads, self.ulysses.size)
        mask = mask.of_heads(counts, self.ulysses.rank)
        out = self._attend_tokens(inputs, replicated, mask, kernel)
        return self._to_tokens(out, counts, [query_lengths[rank] for rank in self._ulysses_ranks])

    # --- one operand after another ------------------------------------------------------------------------------------

    def can_send(self, heads: tuple[int, int]) -> bool:
        """Whether `send` takes operands with these numbers of query heads and key heads."""
        return self.all_to_all is not None and not self.fp8 and not heads[1] % self.ulysses.size

    def send(self, operands: Mapping[int, Operand], heads: tuple[int, int], layout: Layout, async_op: bool) -> None:
        """Sends query, key and value to the ranks that have their heads, in one call or several.

        Args:
            operands: This rank's tokens by `ulysses.VALUE`, `QUERY` and `KEY`; the value is in the first call.
            heads: Numbers of query heads and key heads over all ranks.
            layout: The tokens of all ranks.
            async_op: Whether other computation runs during the exchange.
        """
        assert self.all_to_all is not None
        first = next(iter(operands.values())).parts[0]
        lengths = [tuple(each[rank] for rank in self._ulysses_ranks) for each in self._lengths(layout)]
        shape = AllToAllShape(first.shape[0], heads, first.shape[3], (lengths[0], lengths[1]), first.dtype)
        self.all_to_all.send(operands, shape, async_op)

    def wait_and_attend(
        self, heads: int, layout: Layout, attn_mask: torch.Tensor | None, scale: float | None, kernel: Kernel
    ) -> torch.Tensor:
        """This rank's rows of the attention over the tokens that `send` was given.

        Args:
            heads: Number of query heads over all ranks.
            layout: The tokens of all ranks, as `send` was given them.
            attn_mask: A mask as in `attend`, or `None`.
            scale: Factor of the logits; `None` for 1 / sqrt(head_dim).
            kernel: The attention kernel.
        """
        assert self.all_to_all is not None
        query, key, value = self.all_to_all.wait()
        inputs = Inputs(query, key, value, attn_mask, False, scale)
        return self._attend_heads(inputs, None, layout, heads, attn_mask, kernel)

    # --- Ulysses ------------------------------------------------------------------------------------------------------

    def _lengths(self, layout: Layout) -> tuple[list[int], list[int]]:
        """Each rank's number of queries, and each rank's number of keys."""
        ranks = self.sequence.size
        return layout.lengths(layout.queries, ranks), layout.lengths(layout.keys, ranks)

    @property
    def _ulysses_ranks(self) -> range:
        """The ranks of this rank's Ulysses group, by their numbers in `sequence`."""
        return range(self._ulysses_index * self.ulysses.size, (self._ulysses_index + 1) * self.ulysses.size)

    @property
    def _ulysses_index(self) -> int:
        """The index of this rank's Ulysses group in `sequence`."""
        return self.sequence.rank // self.ulysses.size

    def _to_heads(self, x: Inputs, layout: Layout, count: tuple[int, int]) -> tuple[Inputs, _KeyValue | None]:
        """(tokens of all Ulysses ranks, replicated keys and values), both with this rank's heads.

        `count` has the numbers of query heads and key heads over all ranks.
        """
        group, replicated_keys = self.ulysses, layout.replicated_keys
        heads = shard_sizes(count[0], group.size), shard_sizes(count[1], group.size)
        replicated = None
        key, value = x.key, x.value
        if replicated_keys:
            start = sum(heads[1][: group.rank])
            own = slice(start, start + heads[1][group.rank])
            replicated = (key[:, :replicated_keys, own], value[:, :replicated_keys, own])
            key, value = key[:, replicated_keys:], value[:, replicated_keys:]
        if group.size == 1:
            return replace(x, key=key, value=value), replicated
        queries, keys = ([each[rank] for rank in self._ulysses_ranks] for each in self._lengths(layout))
        query, key, value = self._reshard(
            [x.query, key, value], 2, [heads[0], heads[1], heads[1]], 1, [queries, keys, keys], transient=True
        )
        return replace(x, query=query, key=key, value=value), replicated

    def _to_tokens(self, out: torch.Tensor, heads: list[int], lengths: list[int]) -> torch.Tensor:
        """This rank's tokens with all heads, from each rank's number of heads and of tokens."""
        group = self.ulysses
        if group.size == 1:
            return out
        if self.all_to_all is not None and not self.fp8:
            return self.all_to_all.gather(out, heads, lengths)
        (found,) = self._reshard([out], 1, [lengths], 2, [heads])
        return found

    def _reshard(
        self,
        tensors: list[torch.Tensor],
        scatter_dim: int,
        scatter_sizes: list[list[int]],
        gather_dim: int,
        gather_sizes: list[list[int]],
        transient: bool = False,
    ) -> list[torch.Tensor]:
        """`Group.reshard`, in e4m3 if Ulysses communicates in it."""
        sizes = (scatter_dim, scatter_sizes, gather_dim, gather_sizes)
        if not self.fp8:
            return self.ulysses.reshard(tensors, *sizes, transient)
        found = self.ulysses.reshard([to_fp8(x) for x in tensors], *sizes, transient)
        return [from_fp8(each, x.dtype) for each, x in zip(found, tensors, strict=True)]

    # --- Ring and Attention2D -----------------------------------------------------------------------------------------

    def _attend_tokens(
        self,
        x: Inputs,
        replicated: _KeyValue | None,
        mask: _Mask,
        kernel: Kernel,
    ) -> torch.Tensor:
        """The attention of this rank's heads: local, or sharded further by Ring or Attention2D."""
        size = self.ulysses.size
        # The ranks of every Ulysses group, by their numbers in `sequence`.
        groups = [list(range(start, start + size)) for start in range(0, self.sequence.size, size)]
        if not self.partial:
            x = replace(x, attn_mask=mask.of(groups[0], groups[0]))
            out: torch.Tensor = kernel(_with_replicated(x, replicated))
            return out
        if self.ring.size > 1:
            return self._ring(x, replicated, groups, mask, kernel)
        return self._attention2d(x, replicated, groups, mask, kernel)

    def _ring(
        self,
        x: Inputs,
        replicated: _KeyValue | None,
        groups: list[list[int]],
        mask: _Mask,
        kernel: Kernel,
    ) -> torch.Tensor:
        """Ring attention: this rank's keys and values first, then each previous rank's."""
        group, own = self.ring, groups[self.ring.rank]
        longest = max(sum(mask.keys[rank] for rank in ranks) for ranks in groups)
        merger = _Merger(x.query.dtype)
        key, value = x.key, x.value
        for turn in range(group.size):
            source = (group.rank - turn) % group.size
            received, wait = None, None
            if turn < group.size - 1:
                length = sum(mask.keys[rank] for rank in groups[(source - 1) % group.size])
                shapes = [(item.shape[0], length, *item.shape[2:]) for item in (key, value)]
                max_shapes = [(item.shape[0], longest, *item.shape[2:]) for item in (key, value)]
                received, wait = group.ring_rotate([key, value], shapes, max_shapes)
            part = replace(x, key=key, value=value, attn_mask=mask.of(own, groups[source]), return_lse=True)
            merger.add(_partial(_with_replicated(part, replicated if turn == 0 else None), kernel))
            if received is not None and wait is not None:
                wait()
                key, value = received
        group.rewind()
        return merger.out

    def _attention2d(
        self,
        x: Inputs,
        replicated: _KeyValue | None,
        groups: list[list[int]],
        mask: _Mask,
        kernel: Kernel,
    ) -> torch.Tensor:
        """Attention2D: the row's queries with the column's keys, then an exchange of partial outputs in the row."""
        width = self.row.size
        row = groups[self.column.rank * width : (self.column.rank + 1) * width]
        column = groups[self.row.rank :: width]
        queries = [sum(mask.queries[rank] for rank in ranks) for ranks in row]
        keys = [sum(mask.keys[rank] for rank in ranks) for ranks in column]
        query = torch.cat(self.row.all_gather(x.query, 1, queries, transient=True), 1)
        both = torch.cat([x.key, x.value], -1)
        whole = torch.cat(self.column.all_gather(both, 1, keys, transient=True), 1)
        self.column.rewind()
        key, value = whole.split([x.key.shape[3], x.value.shape[3]], -1)
        part = replace(
            x, query=query, key=key, value=value, return_lse=True,
            attn_mask=mask.of([rank for ranks in row for rank in ranks], [rank for ranks in column for rank in ranks]),
        )  # fmt: skip
        # The first column alone attends to replicated keys, so that they count once.
        out, lse = _partial(_with_replicated(part, replicated if self.row.rank == 0 else None), kernel)
        batch, _, heads, dim = out.shape
        # The LSE is sent in the output's dtype: as two 16-bit values, as one of 32 bits, or widened to 64 bits.
        lse = lse.to(torch.promote_types(lse.dtype, out.dtype))
        sends = [
            [piece, sums.contiguous().view(out.dtype)]
            for piece, sums in zip(out.split(queries, 1), lse.split(queries, 2), strict=True)
        ]
        mine, wide = queries[self.row.rank], lse.element_size() // out.element_size()
        recv_shapes = [[(batch, mine, heads, dim), (batch, heads, mine * wide)] for _ in row]
        longest = max(queries)
        max_shapes = [(batch, longest, heads, dim), (batch, heads, longest * wide)]
        merger = _Merger(x.query.dtype)
        for piece, sums in self.row.all_to_all(sends, recv_shapes, max_shapes):
            # The view may not have the alignment that float32 needs.
            merger.add((piece, sums.clone().view(lse.dtype)))
        self.row.rewind()
        return merger.out


def _divisible(x: Inputs, ranks: int) -> Inputs:
    """Inputs whose grouped key heads divide evenly among ranks; if not, key heads are repeated for each query head."""
    return x.ungrouped() if x.grouped and x.key.shape[2] % ranks else x


def _with_replicated(x: Inputs, replicated: _KeyValue | None) -> Inputs:
    if replicated is None:
        return x
    return replace(x, key=torch.cat([replicated[0], x.key], 1), value=torch.cat([replicated[1], x.value], 1))


def _partial(x: Inputs, kernel: Kernel) -> _OutputLSE:
    """The kernel's output and LSE. Without queries or keys: zeros and -inf."""
    batch, length, heads, _ = x.query.shape
    if 0 in (length, x.key.shape[1]):
        out = x.query.new_zeros((batch, length, heads, x.value.shape[3]))
        return out, torch.full((batch, heads, length), float("-inf"), device=out.device)
    out, lse = kernel(x)
    if x.attn_mask is not None:
        # Kernels differ in the LSE of a row whose keys are all masked.
        hidden = ~x.attn_mask if x.attn_mask.dtype == torch.bool else x.attn_mask == float("-inf")
        lse = lse.masked_fill(hidden.all(-1), float("-inf"))
    return out, lse


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Quantizes rows (..., channels) to e4m3 with a float32 scale each: uint8 (..., channels + 4)."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448.0
    rows = (wide / scale).to(torch.float8_e4m3fn)
    return torch.cat([rows.view(torch.uint8), scale.view(torch.uint8)], -1)


def from_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantizes the result of `to_fp8` to a dtype."""
    rows, scale = x[..., :-4].view(torch.float8_e4m3fn), x[..., -4:].contiguous().view(torch.float32)
    return (rows.float() * scale).to(dtype)


class _Merger:
    """Merges partial outputs of the same queries by their LSE, in float32, or in float64 for float64 outputs."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._sum: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, part: _OutputLSE) -> None:
        """Adds an output (batch, sequence, heads, head_dim) with its LSE (batch, heads, sequence)."""
        wide = torch.promote_types(part[0].dtype, torch.float32)
        out, lse = part[0].to(wide), part[1].to(wide).transpose(1, 2).unsqueeze(-1)
        # Rows without keys have no weight, and their output may be NaN.
        out = out.masked_fill(lse == float("-inf"), 0.0)
        if self._sum is None or self._lse is None:
            self._sum, self._lse = out, lse
            return
        both = torch.logaddexp(self._lse, lse)
        before, now = ((item - both).exp().nan_to_num(0.0) for item in (self._lse, lse))
        self._sum, self._lse = self._sum * before + out * now, both

    @property
    def out(self) -> torch.Tensor:
        """The merged output, in the dtype of the queries."""
        assert self._sum is not None
        return self._sum.to(self._dtype)


@dataclass(frozen=True)
class _Mask:
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
    ) -> _Mask:
        """The mask of `attend`, whole and in the order of ranks. A collective if it covers this rank's keys alone."""
        if mask is None:
            return cls(None, query_lengths, key_lengths)
        if layout.replicated_keys or mask.ndim != 4:
            raise Unsupported(
                "parallel", f"a mask of shape {tuple(mask.shape)} cannot be sharded with its sequence.", _INSTEAD
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
                _INSTEAD,
            )
        if rows != 1:
            mask = _by_rank(mask, 2, layout.queries, sequence.size)
        return cls(mask, query_lengths, key_lengths)

    def of_heads(self, heads: list[int], rank: int) -> _Mask:
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
