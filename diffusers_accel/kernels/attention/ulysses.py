"""Ulysses' all-to-all over symmetric memory: query, key and value go to the ranks that have their heads, and back.

Owns the exchange of heads for tokens (https://arxiv.org/abs/2309.14509) of one group, in the steps `send`, `wait` and
`gather`. One pass reads each operand, applies a pending norm and rotation, and writes attention's input on this GPU and
its peers (`peer_writes.py`). With `async_op` the pass writes the peers' heads to staging buffers on this GPU. Copy
engines bring them to the peers on a stream of their own, so computation that runs meanwhile loses only bandwidth.

Results of `wait` lie in symmetric memory, and must be read before `gather`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.comm import Group, shard_sizes
from ...core.symm_mem import SymmetricBuffer, buffer_offsets
from .record import Tables

QUERY, KEY, VALUE = range(3)
# Dtypes that `peer_writes.py` supports; torch copies other dtypes.
_PEER_WRITTEN = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Operand:
    """A query, key or value in parts along the sequence, with a pending norm and rotation.

    Attributes:
        parts: Tensors (batch, sequence of the part, heads, head_dim).
        norms: Each part's RMS-norm weight, (head_dim,) or (heads * head_dim,); empty without a norm.
        eps: The norm's epsilon, the same for query and key.
        tables: Each part's cosines and sines, as `Rotary` describes them; empty without a rotation.
        rope_style: `"interleaved"` or `"half"`, as `Rotary` describes it.
    """

    parts: tuple[torch.Tensor, ...]
    norms: Sequence[torch.Tensor] = ()
    eps: float = 0.0
    tables: Sequence[Tables] = ()
    rope_style: str = "interleaved"

    @property
    def length(self) -> int:
        """Tokens of all parts."""
        return sum(part.shape[1] for part in self.parts)

    def deferred_parts(self) -> list[tuple[torch.Tensor, torch.Tensor | None, Tables | None]]:
        """Each part with its norm's weight and its tables, each `None` if it has none."""
        norms: list[Any] = list(self.norms) or [None] * len(self.parts)
        tables: list[Any] = list(self.tables) or [None] * len(self.parts)
        return list(zip(self.parts, norms, tables, strict=True))


def norm_and_rotate(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, tables: Tables | None, rope_style: str
) -> torch.Tensor:
    """RMS norm and rotation in plain torch and float32.

    Args:
        x: (batch, sequence, heads, head_dim).
        weight: The norm's weight: (head_dim,) for a norm over each head, (heads * head_dim,) over all heads. `None`
            without a norm.
        eps: The norm's epsilon.
        tables: Cosines and sines; `None` without a rotation.
        rope_style: `"interleaved"` or `"half"`, as `Rotary` describes it.

    Returns:
        (batch, sequence, heads, head_dim), in the dtype of `x`.
    """
    found = x.float()
    if weight is not None:
        dims = (-1,) if weight.numel() == x.shape[-1] else (-2, -1)
        found = found * (found.pow(2).mean(dims, keepdim=True) + eps).rsqrt()
        found = found * weight.float().view(-1, x.shape[-1])
    if tables is not None:
        found = apply_rotary(found, *tables, rope_style)
    return found.to(x.dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope_style: str) -> torch.Tensor:
    """A rotary embedding in plain torch; tables and `rope_style` as in `Rotary`."""
    if rope_style == "half":
        real, imaginary = x.chunk(2, -1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], -1).flatten(-2) * sin


@dataclass(frozen=True)
class AllToAllShape:
    """The shape of one exchange, which all ranks know.

    Attributes:
        batch: Samples.
        heads: Numbers of query heads and of key heads, over all ranks.
        dim: head_dim, the same for query, key and value.
        lengths: Each rank's number of queries, and each rank's number of keys.
        dtype: The dtype of query, key and value.
    """

    batch: int
    heads: tuple[int, int]
    dim: int
    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype

    def shapes(self, rank: int, ranks: int) -> list[tuple[int, int, int, int]]:
        """Shapes of the query, key and value that a rank has after the exchange: all tokens, its heads."""
        each = [
            (self.batch, sum(lengths), shard_sizes(heads, ranks)[rank], self.dim)
            for heads, lengths in zip(self.heads, self.lengths, strict=True)
        ]
        return [each[0], each[1], each[1]]


@dataclass
class _Pending:
    """An exchange that has begun."""

    shape: AllToAllShape
    buffer: SymmetricBuffer
    async_op: bool = False


class UlyssesAllToAll:
    """The exchanges of one group, one at a time.

    Args:
        group: The Ulysses ranks; the group has symmetric memory.
    """

    def __init__(self, group: Group):
        assert group.symm_mem is not None
        self.group, self._memory = group, group.symm_mem
        self._pending: _Pending | None = None
        # Kept as long as this object: views to write to and tables of their addresses, by shape and buffer; staging
        # memory, by operand and rank.
        self._views: dict[Any, list[torch.Tensor]] = {}
        self._tables: dict[Any, Any] = {}
        self._staging: dict[Any, list[torch.Tensor]] = {}

    def send(self, operands: Mapping[int, Operand], shape: AllToAllShape, async_op: bool) -> None:
        """Writes operands to the ranks that have their heads.

        Args:
            operands: This rank's tokens with all heads, by `QUERY`, `KEY` and `VALUE`. The call with the value begins
                an exchange; the other operands come with it or in later calls.
            shape: The exchange's shape, the same in all its calls.
            async_op: Whether copy engines bring the operands to the peers while the current stream works on.
        """
        group = self.group
        if VALUE in operands:
            shapes = [shape.shapes(rank, group.size) for rank in range(group.size)]
            buffer = self._memory.next_buffer(max(buffer_offsets(each, [shape.dtype] * 3)[1] for each in shapes))
            self._pending = _Pending(shape, buffer)
        pending = self._pending
        assert pending is not None and pending.shape == shape
        buffer = pending.buffer
        views = {which: self._destinations(buffer, shape, which) for which in operands}
        if not async_op:
            self._write([(item, views[which], (which, shape, id(buffer))) for which, item in operands.items()])
            return
        staged = {which: self._staging_views(shape, which, destinations) for which, destinations in views.items()}
        self._write([(item, staged[which], (which, shape, id(buffer), "async")) for which, item in operands.items()])
        pending.async_op = True
        with self._memory.copy_stream(next(iter(operands.values())).parts[0].device):
            for step in range(1, group.size):
                rank = (group.rank + step) % group.size
                for which in operands:
                    views[which][rank].copy_(staged[which][rank])

    def wait(self) -> list[torch.Tensor]:
        """Ends the exchange: query, key and value of all tokens, with this rank's heads.

        The results lie in symmetric memory, and must be read before `gather`.
        """
        pending, self._pending = self._pending, None
        assert pending is not None
        if pending.async_op:
            self._memory.wait_copies()
        pending.buffer.barrier()
        group = self.group
        shapes = pending.shape.shapes(group.rank, group.size)
        offsets, _ = buffer_offsets(shapes, [pending.shape.dtype] * 3)
        return [
            pending.buffer.peer_view(group.rank, offset, shape, pending.shape.dtype)
            for offset, shape in zip(offsets, shapes, strict=True)
        ]

    def gather(self, out: torch.Tensor, heads: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Turns the attention output back: this rank's tokens with all heads.

        Args:
            out: (batch, sequence, this rank's heads, head_dim).
            heads: Each rank's number of heads.
            lengths: Each rank's number of tokens.

        Returns:
            (batch, this rank's tokens, all heads, head_dim), in memory of its own.
        """
        group = self.group
        batch, _, own, dim = out.shape
        # Each rank's data is contiguous in the buffer: this is written faster than a part of every token's row.
        shapes = [[(batch, length, count, dim) for count in heads] for length in lengths]
        dtypes = [out.dtype] * len(heads)
        buffer = self._memory.next_buffer(max(buffer_offsets(each, dtypes)[1] for each in shapes))
        key = ("gather", id(buffer), batch, tuple(lengths), tuple(heads), dim, out.dtype)
        if key not in self._views:
            self._views[key] = [
                buffer.peer_view(rank, buffer_offsets(each, dtypes)[0][group.rank], each[group.rank], out.dtype)
                for rank, each in enumerate(shapes)
            ]
            self._views[(*key, "received")] = [
                buffer.peer_view(group.rank, offset, shape, out.dtype)
                for offset, shape in zip(buffer_offsets(shapes[group.rank], dtypes)[0], shapes[group.rank], strict=True)
            ]
        views, received = self._views[key], self._views[(*key, "received")]
        # The result outlives the next exchange, so it is copied out of symmetric memory.
        found = out.new_empty((batch, lengths[group.rank], sum(heads), dim))
        first = sum(heads[: group.rank])
        mine = found[:, :, first : first + own]
        if out.is_cuda and out.dtype in _PEER_WRITTEN:
            from .peer_writes import HeadAddresses, TokenAddresses, gather_heads, scatter_tokens

            if key not in self._tables:
                self._tables[key] = TokenAddresses.of(views, out.device), HeadAddresses.of(received, out.device)
            tokens, addresses = self._tables[key]
            scatter_tokens(out, mine, tokens, group.rank)
            buffer.barrier()
            gather_heads(found, addresses, first, own)
            return found
        for rank, part in enumerate(out.split(list(lengths), 1)):
            (mine if rank == group.rank else views[rank]).copy_(part)
        buffer.barrier()
        for rank, part in enumerate(found.split(list(heads), 2)):
            if rank != group.rank:
                part.copy_(received[rank])
        return found

    # --- destinations -------------------------------------------------------------------------------------------------

    def _destinations(self, buffer: SymmetricBuffer, shape: AllToAllShape, which: int) -> list[torch.Tensor]:
        """Views of this rank's tokens in each rank's buffer."""
        key = (which, shape, id(buffer))
        if key not in self._views:
            lengths = shape.lengths[min(which, 1)]
            start, own = sum(lengths[: self.group.rank]), lengths[self.group.rank]
            found = []
            for rank in range(self.group.size):
                shapes = shape.shapes(rank, self.group.size)
                offsets, _ = buffer_offsets(shapes, [shape.dtype] * 3)
                view = buffer.peer_view(rank, offsets[which], shapes[which], shape.dtype)
                found.append(view[:, start : start + own])
            self._views[key] = found
        return self._views[key]

    def _staging_views(
        self, shape: AllToAllShape, which: int, destinations: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Staging buffers on this GPU for the peers' heads; this rank's own heads go to their destination at once."""
        key = (which, shape, "async")
        if key not in self._views:
            self._views[key] = [self._staging_buffer((which, rank), view) for rank, view in enumerate(destinations)]
        found = list(self._views[key])
        found[self.group.rank] = destinations[self.group.rank]
        return found

    def _staging_buffer(self, key: Any, like: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor like another one. All shapes share its memory, since exchanges do not overlap."""
        nbytes = like.numel() * like.element_size()
        kept = self._staging.setdefault(key, [])
        if not kept or kept[-1].numel() < nbytes:
            # CUDA graphs hold the addresses of outgrown memory, so it is kept. Sizes are powers of two: all memory of
            # a key is at most twice the largest.
            kept.append(torch.empty(1 << max(nbytes - 1, 1).bit_length(), dtype=torch.uint8, device=like.device))
        return kept[-1][:nbytes].view(like.dtype).view(like.shape)

    def _write(self, sent: Sequence[tuple[Operand, Sequence[torch.Tensor], Any]]) -> None:
        """Writes this rank's tokens, from (operand, a view for each rank's heads, key of the views' address table)."""
        first = sent[0][0].parts[0]
        if first.is_cuda and first.dtype in _PEER_WRITTEN:
            from .peer_writes import HeadAddresses, scatter_heads

            for _, views, key in sent:
                if key not in self._tables:
                    self._tables[key] = HeadAddresses.of(views, first.device)
            operands = [(operand.deferred_parts(), self._tables[key]) for operand, _, key in sent]
            # Query and key have one epsilon and one style, those of their operator; the value has neither.
            eps = max(operand.eps for operand, *_ in sent)
            rope_style = next((operand.rope_style for operand, *_ in sent if operand.tables), "interleaved")
            scatter_heads(operands, eps, rope_style)
            return
        for operand, views, _ in sent:
            start = 0
            for part, norm, tables in operand.deferred_parts():
                prepared = norm_and_rotate(part, norm, operand.eps, tables, operand.rope_style)
                for view, heads in zip(views, prepared.split([view.shape[2] for view in views], 2), strict=True):
                    view[:, start : start + part.shape[1]].copy_(heads)
                start += part.shape[1]
