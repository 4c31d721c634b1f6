"""Attention over a sequence that several ranks have among them: Ulysses, Ring and Attention2D, around any kernel.

Every rank holds a shard of the tokens with all heads. Ulysses exchanges shards for heads, so that a rank has all tokens
of some heads, and back (https://arxiv.org/abs/2309.14509). What is left to do for these heads is plain attention, or is
divided further. Ring passes keys and values on from rank to rank, the next ones on their way while attention works on
the last (https://arxiv.org/abs/2310.01889). Attention2D puts ranks on a grid: queries are gathered along a rank's row,
keys and values along its column, and the row's partial results are exchanged (TensorRT-LLM VisualGen). Both merge
partial results in float32 by their logsumexp.

Nothing is padded: shards, and heads, are divided as they come. After an exchange tokens lie in the order of ranks; if a
shard holds tokens of two streams, that is not the order of a whole sequence, which matters to masks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...core.comm import Group, shares
from ...errors import Unsupported
from .record import Inputs
from .shipping import Operand, Shipping, Size

_INSTEAD = "parallel without ulysses, ring and attn2d."
# A kernel: the output, or output and logsumexp if that is asked for.
Attend = Callable[[Inputs], Any]
_Partial = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Which tokens each rank has, in one attention call.

    Attributes:
        queries: Streams that a rank's queries are of, in their order: the length of each whole.
        keys: Likewise.
        shared: How many keys, in front of those, every rank has: they are not divided.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    shared: int = 0

    def lengths(self, streams: Sequence[int], ranks: int) -> list[int]:
        """Tokens of each rank."""
        return [sum(parts) for parts in zip(*(shares(length, ranks) for length in streams), strict=True)]


@dataclass(frozen=True)
class Transport:
    """How a sequence is divided.

    Attributes:
        everyone: All ranks that have a part of it.
        ulysses: Those that exchange shards for heads.
        ring: Those that pass keys and values on.
        row: Those of this rank's row of the grid, among which queries are gathered.
        column: Those of its column, among which keys and values are.
        shipping: What heads go through, where `ulysses` has windows.
        overlaps: Whether they may be on their way while something else is computed.
        rounded: Whether what Ulysses exchanges travels in 8 bits.
    """

    everyone: Group
    ulysses: Group
    ring: Group
    row: Group
    column: Group
    shipping: Shipping | None = None
    overlaps: bool = True
    rounded: bool = False

    @property
    def partial(self) -> bool:
        """Whether partial results are merged, for which a kernel must return its logsumexp."""
        return self.ring.size * self.row.size * self.column.size > 1

    def attend(self, inputs: Inputs, layout: Layout, attend: Attend) -> torch.Tensor:
        """This rank's rows of the attention of all.

        Args:
            inputs: This rank's shards; query and key with nothing left to be done. A mask is over this rank's keys, or
                over all queries and keys, or all keys.
            layout: Whose they are.
            attend: The kernel.

        Returns:
            (batch, this rank's queries, heads, value_dim), in the query's type.

        Raises:
            Unsupported: The mask is over neither, so nobody knows which keys it is about.
        """
        inputs = _divisible(inputs, self.ulysses.size)
        heads = inputs.query.shape[2], inputs.key.shape[2]
        mask = inputs.attn_mask
        inputs, together = self._to_heads(inputs, layout, heads)
        return self._attended(inputs, together, layout, heads[0], mask, attend)

    def _attended(
        self,
        inputs: Inputs,
        together: _Partial | None,
        layout: Layout,
        heads: int,
        attn_mask: torch.Tensor | None,
        attend: Attend,
    ) -> torch.Tensor:
        """The rest of `attend`, of tokens of all peers and this rank's heads."""
        query_lengths, key_lengths = self._lengths(layout)
        mask = _Mask.over(attn_mask, layout, self.everyone, query_lengths, key_lengths)
        counts = shares(heads, self.ulysses.size)
        mask = mask.of_heads(counts, self.ulysses.rank)
        out = self._among_blocks(inputs, together, query_lengths, key_lengths, mask, attend)
        return self._to_tokens(out, counts, [query_lengths[rank] for rank in self._peers])

    # --- one operand after another ------------------------------------------------------------------------------------

    def ships(self, heads: tuple[int, int]) -> bool:
        """Whether query, key and value of so many heads may be sent off by `ship`."""
        return self.shipping is not None and not self.rounded and not heads[1] % self.ulysses.size

    def ship(self, operands: Mapping[int, Operand], heads: tuple[int, int], layout: Layout, aside: bool) -> None:
        """Sends them off, or some of them; `arrived` is to follow the three.

        Args:
            operands: This rank's, by `shipping.VALUE`, `QUERY` and `KEY`.
            heads: Of query and key, all of them.
            layout: Whose tokens they are.
            aside: Whether something else is computed meanwhile.
        """
        assert self.shipping is not None
        first = next(iter(operands.values())).parts[0]
        lengths = [tuple(each[rank] for rank in self._peers) for each in self._lengths(layout)]
        size = Size(first.shape[0], heads, first.shape[3], (lengths[0], lengths[1]), first.dtype)
        self.shipping.ship(operands, size, aside)

    def arrived(
        self, heads: int, layout: Layout, attn_mask: torch.Tensor | None, scale: float | None, attend: Attend
    ) -> torch.Tensor:
        """This rank's rows of the attention of what was sent off.

        Args:
            heads: Of the query.
            layout: As in `attend`, as are the mask and the kernel.
            attn_mask: See there.
            scale: Of the logits.
            attend: See there.
        """
        assert self.shipping is not None
        query, key, value = self.shipping.arrived()
        inputs = Inputs(query, key, value, attn_mask, False, scale)
        return self._attended(inputs, None, layout, heads, attn_mask, attend)

    # --- Ulysses ------------------------------------------------------------------------------------------------------

    def _lengths(self, layout: Layout) -> tuple[list[int], list[int]]:
        """Queries and keys of each rank."""
        ranks = self.everyone.size
        return layout.lengths(layout.queries, ranks), layout.lengths(layout.keys, ranks)

    @property
    def _peers(self) -> range:
        """Those that exchange heads with this rank, in the order of shards."""
        return range(self._block * self.ulysses.size, (self._block + 1) * self.ulysses.size)

    @property
    def _block(self) -> int:
        """Which of the groups that exchange heads this rank is in, in the order of shards."""
        return self.everyone.rank // self.ulysses.size

    def _to_heads(self, x: Inputs, layout: Layout, count: tuple[int, int]) -> tuple[Inputs, _Partial | None]:
        """All tokens of this rank's heads; keys and values that everybody has apart."""
        group, shared = self.ulysses, layout.shared
        heads = shares(count[0], group.size), shares(count[1], group.size)
        together = None
        key, value = x.key, x.value
        if shared:
            start = sum(heads[1][: group.rank])
            own = slice(start, start + heads[1][group.rank])
            together = (key[:, :shared, own], value[:, :shared, own])
            key, value = key[:, shared:], value[:, shared:]
        if group.size == 1:
            return replace(x, key=key, value=value), together
        queries, keys = ([each[rank] for rank in self._peers] for each in self._lengths(layout))
        query, key, value = self._exchanged(
            [x.query, key, value], 2, [heads[0], heads[1], heads[1]], 1, [queries, keys, keys], passing=True
        )
        return replace(x, query=query, key=key, value=value), together

    def _to_tokens(self, out: torch.Tensor, heads: list[int], lengths: list[int]) -> torch.Tensor:
        """This rank's tokens with all heads."""
        group = self.ulysses
        if group.size == 1:
            return out
        if self.shipping is not None and not self.rounded:
            return self.shipping.returned(out, heads, lengths)
        (found,) = self._exchanged([out], 1, [lengths], 2, [heads])
        return found

    def _exchanged(
        self,
        tensors: list[torch.Tensor],
        away: int,
        counts: list[list[int]],
        toward: int,
        lengths: list[list[int]],
        passing: bool = False,
    ) -> list[torch.Tensor]:
        """`Group.reshard`, of bytes if they are rounded to travel."""
        if not self.rounded:
            return self.ulysses.reshard(tensors, away, counts, toward, lengths, passing)
        found = self.ulysses.reshard([to_bytes(x) for x in tensors], away, counts, toward, lengths, passing)
        return [from_bytes(each, x.dtype) for each, x in zip(found, tensors, strict=True)]

    # --- between groups of heads --------------------------------------------------------------------------------------

    def _among_blocks(
        self,
        x: Inputs,
        together: _Partial | None,
        query_lengths: list[int],
        key_lengths: list[int],
        mask: _Mask,
        attend: Attend,
    ) -> torch.Tensor:
        size = self.ulysses.size
        blocks = [list(range(start, start + size)) for start in range(0, self.everyone.size, size)]
        if not self.partial:
            x = replace(x, attn_mask=mask.of(blocks[0], blocks[0]))
            out: torch.Tensor = attend(_with_shared(x, together))
            return out
        if self.ring.size > 1:
            return self._ring(x, together, blocks, key_lengths, mask, attend)
        return self._grid(x, together, blocks, query_lengths, key_lengths, mask, attend)

    def _ring(
        self,
        x: Inputs,
        together: _Partial | None,
        blocks: list[list[int]],
        key_lengths: list[int],
        mask: _Mask,
        attend: Attend,
    ) -> torch.Tensor:
        """Keys and values come by, the previous rank's first."""
        group, own = self.ring, blocks[self.ring.rank]
        most = max(sum(key_lengths[rank] for rank in block) for block in blocks)
        merged = _Merged(x.query.dtype)
        key, value = x.key, x.value
        for turn in range(group.size):
            source = (group.rank - turn) % group.size
            coming, wait = None, None
            if turn < group.size - 1:
                length = sum(key_lengths[rank] for rank in blocks[(source - 1) % group.size])
                like = [(item.shape[0], length, *item.shape[2:]) for item in (key, value)]
                largest = [(item.shape[0], most, *item.shape[2:]) for item in (key, value)]
                coming, wait = group.pass_on([key, value], like, largest)
            part = replace(x, key=key, value=value, attn_mask=mask.of(own, blocks[source]), return_lse=True)
            merged.add(_partial(_with_shared(part, together if turn == 0 else None), attend))
            if coming is not None and wait is not None:
                wait()
                key, value = coming
        group.rest()
        return merged.out

    def _grid(
        self,
        x: Inputs,
        together: _Partial | None,
        blocks: list[list[int]],
        query_lengths: list[int],
        key_lengths: list[int],
        mask: _Mask,
        attend: Attend,
    ) -> torch.Tensor:
        """All queries of the row with all keys of the column; then the row's parts of each one's queries."""
        width = self.row.size
        row = blocks[self.column.rank * width : (self.column.rank + 1) * width]
        column = blocks[self.row.rank :: width]
        queries = [sum(query_lengths[rank] for rank in block) for block in row]
        keys = [sum(key_lengths[rank] for rank in block) for block in column]
        query = torch.cat(self.row.gather(x.query, 1, queries, passing=True), 1)
        both = torch.cat([x.key, x.value], -1)
        whole = torch.cat(self.column.gather(both, 1, keys, passing=True), 1)
        self.column.rest()
        key, value = whole.split([x.key.shape[3], x.value.shape[3]], -1)
        part = replace(
            x, query=query, key=key, value=value, return_lse=True,
            attn_mask=mask.of([rank for block in row for rank in block], [rank for block in column for rank in block]),
        )  # fmt: skip
        # Every column but one leaves out what all have.
        out, lse = _partial(_with_shared(part, together if self.row.rank == 0 else None), attend)
        batch, _, heads, dim = out.shape
        # It travels as values of the output's type: two of them of 16 bits, one of 32, itself widened to 64.
        lse = lse.to(torch.promote_types(lse.dtype, out.dtype))
        sends = [
            [piece, sums.contiguous().view(out.dtype)]
            for piece, sums in zip(out.split(queries, 1), lse.split(queries, 2), strict=True)
        ]
        mine, wide = queries[self.row.rank], lse.element_size() // out.element_size()
        like = [[(batch, mine, heads, dim), (batch, heads, mine * wide)] for _ in row]
        most = max(queries)
        largest = [(batch, most, heads, dim), (batch, heads, most * wide)]
        merged = _Merged(x.query.dtype)
        for piece, sums in self.row.exchange(sends, like, largest):
            # A part of a buffer begins where it may: float32 wants its own alignment.
            merged.add((piece, sums.clone().view(lse.dtype)))
        self.row.rest()
        return merged.out


def _divisible(x: Inputs, ranks: int) -> Inputs:
    """Key and value heads that can be divided with the query's: as they come, or one for each query head."""
    return x.ungrouped() if x.grouped and x.key.shape[2] % ranks else x


def _with_shared(x: Inputs, together: _Partial | None) -> Inputs:
    if together is None:
        return x
    return replace(x, key=torch.cat([together[0], x.key], 1), value=torch.cat([together[1], x.value], 1))


def _partial(x: Inputs, attend: Attend) -> _Partial:
    """Output and logsumexp, also of no keys at all."""
    batch, length, heads, _ = x.query.shape
    if 0 in (length, x.key.shape[1]):
        out = x.query.new_zeros((batch, length, heads, x.value.shape[3]))
        return out, torch.full((batch, heads, length), float("-inf"), device=out.device)
    out, lse = attend(x)
    if x.attn_mask is not None:
        # Kernels differ in what they return for a row that sees none of these keys.
        hidden = ~x.attn_mask if x.attn_mask.dtype == torch.bool else x.attn_mask == float("-inf")
        lse = lse.masked_fill(hidden.all(-1), float("-inf"))
    return out, lse


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    """Rows in 8 bits to travel: (..., channels) as e4m3 with a float32 scale each, (..., channels + 4) bytes."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448.0
    rows = (wide / scale).to(torch.float8_e4m3fn)
    return torch.cat([rows.view(torch.uint8), scale.view(torch.uint8)], -1)


def from_bytes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `to_bytes` was given, rounded."""
    rows, scale = x[..., :-4].view(torch.float8_e4m3fn), x[..., -4:].contiguous().view(torch.float32)
    return (rows.float() * scale).to(dtype)


class _Merged:
    """Partial results of the same queries, merged in float32, or in float64 if they are that, as they come."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._sum: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, part: _Partial) -> None:
        """Takes an output (batch, sequence, heads, head_dim) and its logsumexp (batch, heads, sequence)."""
        wide = torch.promote_types(part[0].dtype, torch.float32)
        out, lse = part[0].to(wide), part[1].to(wide).transpose(1, 2).unsqueeze(-1)
        # What is there has no weight, and may be no number.
        out = out.masked_fill(lse == float("-inf"), 0.0)
        if self._sum is None or self._lse is None:
            self._sum, self._lse = out, lse
            return
        both = torch.logaddexp(self._lse, lse)
        before, now = ((item - both).exp().nan_to_num(0.0) for item in (self._lse, lse))
        self._sum, self._lse = self._sum * before + out * now, both

    @property
    def out(self) -> torch.Tensor:
        """What they are together."""
        assert self._sum is not None
        return self._sum.to(self._dtype)


@dataclass(frozen=True)
class _Mask:
    """A mask over all queries and keys in the order of ranks, of which a kernel is given a part."""

    whole: torch.Tensor | None
    queries: list[int]
    keys: list[int]

    @classmethod
    def over(
        cls,
        mask: torch.Tensor | None,
        layout: Layout,
        everyone: Group,
        query_lengths: list[int],
        key_lengths: list[int],
    ) -> _Mask:
        if mask is None:
            return cls(None, query_lengths, key_lengths)
        if layout.shared or mask.ndim != 4:
            raise Unsupported(
                "parallel", f"a mask of shape {tuple(mask.shape)} cannot be divided with its sequence.", _INSTEAD
            )
        columns, rows = mask.shape[3], mask.shape[2]
        if columns == sum(key_lengths):
            mask = _by_rank(mask, 3, layout.keys, everyone.size)
        elif columns == key_lengths[everyone.rank] and rows == 1:
            mask = torch.cat(everyone.gather(mask, 3, key_lengths), 3)
        else:
            raise Unsupported(
                "parallel",
                f"a mask of shape {tuple(mask.shape)} is neither over all {sum(key_lengths)} keys nor over this rank's "
                f"{key_lengths[everyone.rank]} alone.",
                _INSTEAD,
            )
        if rows != 1:
            mask = _by_rank(mask, 2, layout.queries, everyone.size)
        return cls(mask, query_lengths, key_lengths)

    def of_heads(self, heads: list[int], rank: int) -> _Mask:
        """For a rank's heads."""
        if self.whole is None or self.whole.shape[1] == 1:
            return self
        return replace(self, whole=self.whole.split(heads, 1)[rank])

    def of(self, query_ranks: list[int], key_ranks: list[int]) -> torch.Tensor | None:
        """For the queries of some ranks and the keys of some, in their order."""
        found = self.whole
        if found is None:
            return None
        for dim, lengths, ranks in ((2, self.queries, query_ranks), (3, self.keys, key_ranks)):
            if found.shape[dim] > 1 and ranks != list(range(len(lengths))):
                parts = found.split(lengths, dim)
                found = torch.cat([parts[rank] for rank in ranks], dim)
        return found


def _by_rank(mask: torch.Tensor, dim: int, streams: Sequence[int], ranks: int) -> torch.Tensor:
    """A mask whose `dim` goes through whole streams, in the order in which ranks have their tokens."""
    if len(streams) == 1:
        return mask
    parts = [whole.tensor_split(ranks, dim) for whole in mask.split(list(streams), dim)]
    return torch.cat([part for each in zip(*parts, strict=True) for part in each], dim)
