"""Query, key and value on their way to the ranks that have their heads, together or one by one, through a window.

What a rank has of them is read once, normed and rotated if that is still to be done, and written to where attention
will read it, on this GPU and on the others. Or, where there is something else to compute meanwhile, it is written to
memory of this GPU, head by head, from where copy engines bring it to the others on a stream of their own: they take
nothing of what computes but bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.comm import Group, shares
from ...core.windows import Window, placed
from .record import Tables

QUERY, KEY, VALUE = range(3)
# Types that `scatter.py` writes; others go by torch's own operations.
_IN_ONE_PASS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Operand:
    """A query, key or value in parts along the sequence, and what it lacks.

    Attributes:
        parts: (batch, sequence of the part, heads, head_dim).
        norms: Weights of an RMS norm, of each part; empty without a norm.
        eps: The norm's.
        tables: Cosines and sines, of each part; empty without a rotation.
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

    def lacking(self) -> list[tuple[torch.Tensor, torch.Tensor | None, Tables | None]]:
        """Each part, with its norm and its tables."""
        norms: list[Any] = list(self.norms) or [None] * len(self.parts)
        tables: list[Any] = list(self.tables) or [None] * len(self.parts)
        return list(zip(self.parts, norms, tables, strict=True))


def plain(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, tables: Tables | None, rope_style: str
) -> torch.Tensor:
    """Norm and rotation of (batch, sequence, heads, head_dim) in plain torch and float32."""
    found = x.float()
    if weight is not None:
        dims = (-1,) if weight.numel() == x.shape[-1] else (-2, -1)
        found = found * (found.pow(2).mean(dims, keepdim=True) + eps).rsqrt()
        found = found * weight.float().view(-1, x.shape[-1])
    if tables is not None:
        found = rotate(found, *tables, rope_style)
    return found.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope_style: str) -> torch.Tensor:
    """A rotation, in plain torch."""
    if rope_style == "half":
        real, imaginary = x.chunk(2, -1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], -1).flatten(-2) * sin


@dataclass(frozen=True)
class Size:
    """What all ranks know of one exchange.

    Attributes:
        batch: Samples.
        heads: All heads of query and key.
        dim: Channels of a head, of query, key and value alike.
        lengths: Tokens of each rank, of query and key.
        dtype: Of all three.
    """

    batch: int
    heads: tuple[int, int]
    dim: int
    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype

    def shapes(self, rank: int, ranks: int) -> list[tuple[int, int, int, int]]:
        """What a rank has of query, key and value when all have arrived."""
        each = [
            (self.batch, sum(lengths), shares(heads, ranks)[rank], self.dim)
            for heads, lengths in zip(self.heads, self.lengths, strict=True)
        ]
        return [each[0], each[1], each[1]]


@dataclass
class _Underway:
    """An exchange that has begun."""

    size: Size
    window: Window
    aside: bool = False


class Shipping:
    """Exchanges of one group's heads, one at a time.

    Args:
        group: Ranks that exchange them; it has windows.
    """

    def __init__(self, group: Group):
        assert group.windows is not None
        self.group, self._windows = group, group.windows
        self._underway: _Underway | None = None
        # By what they depend on: where operands go, tables of it on the device, and memory that they leave from.
        self._places: dict[Any, list[torch.Tensor]] = {}
        self._tables: dict[Any, Any] = {}
        self._staging: dict[Any, list[torch.Tensor]] = {}

    def ship(self, operands: Mapping[int, Operand], size: Size, aside: bool) -> None:
        """Sends operands off.

        Args:
            operands: This rank's tokens, all heads, of `VALUE`, which begins an exchange, `QUERY` and `KEY`, or of some
                of them; the others follow.
            size: Of the exchange; the same for its three operands.
            aside: Whether copy engines bring them, beside what is computed next.
        """
        group = self.group
        if VALUE in operands:
            shapes = [size.shapes(rank, group.size) for rank in range(group.size)]
            window = self._windows.following(max(placed(each, [size.dtype] * 3)[1] for each in shapes))
            self._underway = _Underway(size, window)
        now = self._underway
        assert now is not None and now.size == size
        there = {which: self._there(now.window, size, which) for which in operands}
        if not aside:
            self._write([(item, there[which], (which, size, id(now.window))) for which, item in operands.items()])
            return
        here = {which: self._here(size, which, places) for which, places in there.items()}
        self._write([(item, here[which], (which, size, id(now.window), "aside")) for which, item in operands.items()])
        now.aside = True
        with self._windows.beside(next(iter(operands.values())).parts[0].device):
            for step in range(1, group.size):
                rank = (group.rank + step) % group.size
                for which in operands:
                    there[which][rank].copy_(here[which][rank])

    def arrived(self) -> list[torch.Tensor]:
        """Query, key and value of all tokens, this rank's heads; to be read before the exchange after the next one
        begins."""
        now, self._underway = self._underway, None
        assert now is not None
        if now.aside:
            self._windows.join()
        now.window.barrier()
        group = self.group
        shapes = now.size.shapes(group.rank, group.size)
        offsets, _ = placed(shapes, [now.size.dtype] * 3)
        return [
            now.window.part(group.rank, offset, shape, now.size.dtype)
            for offset, shape in zip(offsets, shapes, strict=True)
        ]

    def returned(self, out: torch.Tensor, heads: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """All heads of this rank's tokens, from everybody's heads of all tokens.

        Args:
            out: (batch, sequence, this rank's heads, head_dim).
            heads: Of each rank.
            lengths: Tokens of each rank.
        """
        group = self.group
        batch, _, own, dim = out.shape
        # What comes from one rank lies in one piece, which is written faster than a part of every token's row.
        shapes = [[(batch, length, count, dim) for count in heads] for length in lengths]
        dtypes = [out.dtype] * len(heads)
        window = self._windows.following(max(placed(each, dtypes)[1] for each in shapes))
        key = ("returned", id(window), batch, tuple(lengths), tuple(heads), dim, out.dtype)
        if key not in self._places:
            self._places[key] = [
                window.part(rank, placed(each, dtypes)[0][group.rank], each[group.rank], out.dtype)
                for rank, each in enumerate(shapes)
            ]
            self._places[(*key, "come")] = [
                window.part(group.rank, offset, shape, out.dtype)
                for offset, shape in zip(placed(shapes[group.rank], dtypes)[0], shapes[group.rank], strict=True)
            ]
        there, come = self._places[key], self._places[(*key, "come")]
        # What is read after the next exchange does not stay in a window.
        found = out.new_empty((batch, lengths[group.rank], sum(heads), dim))
        first = sum(heads[: group.rank])
        mine = found[:, :, first : first + own]
        if out.is_cuda and out.dtype in _IN_ONE_PASS:
            from .scatter import Places, Ways, collect, hand_back

            if key not in self._tables:
                self._tables[key] = Ways.of(there, out.device), Places.of(come, out.device)
            ways, places = self._tables[key]
            hand_back(out, mine, ways, group.rank)
            window.barrier()
            collect(found, places, first, own)
            return found
        for rank, part in enumerate(out.split(list(lengths), 1)):
            (mine if rank == group.rank else there[rank]).copy_(part)
        window.barrier()
        for rank, part in enumerate(found.split(list(heads), 2)):
            if rank != group.rank:
                part.copy_(come[rank])
        return found

    # --- where they go ------------------------------------------------------------------------------------------------

    def _there(self, window: Window, size: Size, which: int) -> list[torch.Tensor]:
        """The places of this rank's tokens in each rank's window."""
        key = (which, size, id(window))
        if key not in self._places:
            lengths = size.lengths[min(which, 1)]
            start, own = sum(lengths[: self.group.rank]), lengths[self.group.rank]
            found = []
            for rank in range(self.group.size):
                shapes = size.shapes(rank, self.group.size)
                offsets, _ = placed(shapes, [size.dtype] * 3)
                found.append(window.part(rank, offsets[which], shapes[which], size.dtype)[:, start : start + own])
            self._places[key] = found
        return self._places[key]

    def _here(self, size: Size, which: int, there: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Places on this GPU of what is for others; what is for this rank goes where it belongs at once."""
        key = (which, size, "aside")
        if key not in self._places:
            self._places[key] = [self._staged((which, rank), place) for rank, place in enumerate(there)]
        found = list(self._places[key])
        found[self.group.rank] = there[self.group.rank]
        return found

    def _staged(self, key: Any, like: torch.Tensor) -> torch.Tensor:
        """Memory of a tensor's form that sizes share, since there is one exchange at a time."""
        nbytes = like.numel() * like.element_size()
        kept = self._staging.setdefault(key, [])
        if not kept or kept[-1].numel() < nbytes:
            # Recorded graphs know outgrown memory by its address. Doubled, all of it is twice the largest at most.
            kept.append(torch.empty(1 << max(nbytes - 1, 1).bit_length(), dtype=torch.uint8, device=like.device))
        return kept[-1][:nbytes].view(like.dtype).view(like.shape)

    def _write(self, sent: Sequence[tuple[Operand, Sequence[torch.Tensor], Any]]) -> None:
        """Writes this rank's tokens to where their heads go: operands, their places, and what these depend on."""
        first = sent[0][0].parts[0]
        if first.is_cuda and first.dtype in _IN_ONE_PASS:
            from .scatter import Places, scatter

            for _, places, key in sent:
                if key not in self._tables:
                    self._tables[key] = Places.of(places, first.device)
            going = [(operand.lacking(), self._tables[key]) for operand, _, key in sent]
            eps = max(operand.eps for operand, *_ in sent)
            rope_style = next((operand.rope_style for operand, *_ in sent if operand.tables), "interleaved")
            scatter(going, eps, rope_style)
            return
        for operand, places, _ in sent:
            start = 0
            for part, norm, tables in operand.lacking():
                ready = plain(part, norm, operand.eps, tables, operand.rope_style)
                for place, heads in zip(places, ready.split([place.shape[2] for place in places], 2), strict=True):
                    place[:, start : start + part.shape[1]].copy_(heads)
                start += part.shape[1]
