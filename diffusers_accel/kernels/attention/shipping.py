"""Query, key and value on their way to the ranks that have their heads, together or one by one, through a window.

What a rank has of them is read once, normed and rotated if that is still to be done, and written to where attention
will read it, on this GPU and on the others. Or, where there is something else to compute meanwhile, it is written to
memory of this GPU, head by head, from where copy engines bring it to the others on a stream of their own: they take
nothing of what computes but bandwidth.

Long sequences keep the link busy for as long as several other kernels, and attention is one head after another anyway:
their heads go in groups. While attention works on one group, those after it are on their way there, and what it has
found for those before it is on its way back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...core.comm import Group
from ...core.windows import Window, placed
from .record import Tables

QUERY, KEY, VALUE = range(3)
# Bytes that a rank sends of one operand, from which on its heads go in groups: some 40 us over NVLink (a guess between
# FLUX's 7 MB at 1024x1024 and Wan's 25 at 480p, on two GPUs).
_LONG = 12 << 20
# Queries that attention's kernels give to one multiprocessor at a time.
_TILE = 128
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
        halves: As in `Rotary`.
    """

    parts: tuple[torch.Tensor, ...]
    norms: Sequence[torch.Tensor] = ()
    eps: float = 0.0
    tables: Sequence[Tables] = ()
    halves: bool = False

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
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, tables: Tables | None, halves: bool
) -> torch.Tensor:
    """Norm and rotation of (batch, sequence, heads, head_dim) in plain torch and float32."""
    found = x.float()
    if weight is not None:
        dims = (-1,) if weight.numel() == x.shape[-1] else (-2, -1)
        found = found * (found.pow(2).mean(dims, keepdim=True) + eps).rsqrt()
        found = found * weight.float().view(-1, x.shape[-1])
    if tables is not None:
        found = turned(found, *tables, halves)
    return found.to(x.dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool) -> torch.Tensor:
    """A rotation, in plain torch."""
    if halves:
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
        groups: How many key heads of each rank are in each of the groups that go one after another.
    """

    batch: int
    heads: tuple[int, int]
    dim: int
    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype
    groups: tuple[int, ...]

    def divided(self, units: int) -> Size:
        """The same in groups of heads, if it is worth that.

        Args:
            units: Multiprocessors that attention has, the same number on all ranks.
        """
        ranks = len(self.lengths[0])
        sent = self.batch * sum(self.lengths[0]) * self.heads[0] * self.dim * self.dtype.itemsize
        if sent * (ranks - 1) // ranks**2 < _LONG:
            return self
        tiles = self.batch * -(-sum(self.lengths[0]) // _TILE) * (self.heads[0] // self.heads[1])
        return replace(self, groups=grouped(self.heads[1] // ranks, tiles, units))

    @property
    def own(self) -> list[tuple[int, int]]:
        """Heads of query and key that each rank has of each group."""
        return [(count * self.heads[0] // self.heads[1], count) for count in self.groups]

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """What a rank has of query, key and value when all have arrived, group by group."""
        return [
            (self.batch, sum(self.lengths[operand > 0]), heads[operand > 0], self.dim)
            for heads in self.own
            for operand in (QUERY, KEY, VALUE)
        ]


@functools.cache
def grouped(heads: int, tiles: int, units: int) -> tuple[int, ...]:
    """Groups of heads, such that as little as may be is on its way while nothing is computed: query, key and value of
    the first group, and what was found for the last. No division keeps the GPU's units waiting for longer than none.

    Args:
        heads: Key heads of a rank.
        tiles: Pieces of work in one of them.
        units: How many of the GPU's are at work at once.
    """

    def turns(count: int) -> int:
        return -(-count * tiles // units)

    found: tuple[int, ...] = (heads,)
    least = 4 * heads
    for first in range(1, heads):
        for last in range(1, heads - first + 1):
            middle = heads - first - last
            parts = (first, middle, last) if middle else (first, last)
            if 3 * first + last < least and sum(map(turns, parts)) <= turns(heads):
                found, least = parts, 3 * first + last
    return found


@dataclass
class _Underway:
    """An exchange that has begun.

    Attributes:
        size: Its size.
        window: What it goes through.
        join: What follows it comes after what copy engines bring, if they bring anything.
    """

    size: Size
    window: Window
    join: Callable[[], None] | None = None


class Shipping:
    """Exchanges of one group's heads, one at a time.

    Args:
        group: Ranks that exchange them; it has windows.
    """

    def __init__(self, group: Group):
        assert group.windows is not None
        self.group, self._windows = group, group.windows
        # Of the smallest GPU, so that all ranks find the same groups of heads.
        own = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 1
        self.units = min(group.objects(own))
        self._underway: _Underway | None = None
        # By what they depend on: where operands go, tables of it on the device, and memory that they leave from.
        self._places: dict[Any, list[torch.Tensor]] = {}
        self._tables: dict[Any, Any] = {}

    def ship(self, operands: Mapping[int, Operand], size: Size, aside: bool) -> None:
        """Sends operands off.

        Args:
            operands: This rank's tokens, all heads, of `VALUE`, which begins an exchange, `QUERY` and `KEY`, or of some
                of them; the others follow.
            size: Of the exchange; the same for its three operands.
            aside: Whether copy engines bring them, beside what is computed next. They bring what is not of the first
                group of heads in any case.
        """
        group, groups = self.group, len(size.groups)
        if VALUE in operands:
            window = self._windows.following(placed(size.shapes, [size.dtype] * 3 * groups)[1])
            self._underway = _Underway(size, window)
        now = self._underway
        assert now is not None and now.size == size
        # Places of one rank after another's, and of a rank's groups.
        brought = [
            rank * groups + which
            for which in range(0 if aside else 1, groups)
            for rank in ((group.rank + step) % group.size for step in range(1, group.size))
        ]
        there = {which: self._there(now.window, size, which) for which in operands}
        here = {which: self._here(size, which, places, brought) for which, places in there.items()}
        self._write([(item, here[which], (which, size, id(now.window), aside)) for which, item in operands.items()])
        if not brought:
            return
        with self._windows.beside(next(iter(operands.values())).parts[0].device) as now.join:
            for place in brought:
                for which in operands:
                    _copy(there[which][place], here[which][place])

    def arrived(self) -> tuple[list[int], Iterator[list[torch.Tensor]]]:
        """Attention may begin.

        Returns:
            How many query heads this rank has of each group, and query, key and value of all tokens, one group of heads
            after another; all to be read before the exchange after the next one begins.
        """
        now, self._underway = self._underway, None
        assert now is not None
        return [heads for heads, _ in now.size.own], self._arriving(now)

    def _arriving(self, now: _Underway) -> Iterator[list[torch.Tensor]]:
        size, groups = now.size, len(now.size.groups)
        offsets, _ = placed(size.shapes, [size.dtype] * 3 * groups)
        whole = [
            now.window.part(self.group.rank, offset, shape, size.dtype)
            for offset, shape in zip(offsets, size.shapes, strict=True)
        ]
        for which in range(groups):
            # Copy engines bring all but the first group, or the only one.
            if which == min(1, groups - 1) and now.join is not None:
                now.join()
            if which < 2:
                now.window.barrier()
            yield whole[3 * which : 3 * which + 3]

    def returned(
        self, outs: Iterable[torch.Tensor], heads: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> torch.Tensor:
        """All heads of this rank's tokens, from everybody's heads of all tokens.

        Args:
            outs: (batch, sequence, this rank's heads of a group, head_dim), one group after another. What is found for
                one is on its way while the next is computed, by copy engines.
            heads: Of each rank, of each group.
            lengths: Tokens of each rank.
        """
        group, outs = self.group, iter(outs)
        out = next(outs)
        batch, _, _, dim = out.shape
        counts = [count for each in heads for count in each]
        own = range(group.rank * len(heads[0]), (group.rank + 1) * len(heads[0]))
        # What comes from one rank lies in one piece, which is written faster than a part of every token's row.
        shapes = [[(batch, length, count, dim) for count in counts] for length in lengths]
        sizes = [placed(each, [out.dtype] * len(counts)) for each in shapes]
        window = self._windows.following(max(end for _, end in sizes))
        # What is read after the next exchange does not stay in a window.
        found = out.new_empty((batch, lengths[group.rank], sum(counts), dim))
        mine = found.split(counts, 2)
        key = ("returned", id(window), batch, tuple(lengths), tuple(counts), len(own), dim, out.dtype)
        for place in own:
            if (*key, place) not in self._places:
                self._places[(*key, place)] = [
                    window.part(rank, sizes[rank][0][place], shapes[rank][place], out.dtype)
                    for rank in range(group.size)
                ]
        joins, kept = [], []
        for place in own[:-1]:
            with self._windows.beside(out.device) as join:
                parts, there = out.split(list(lengths), 1), self._places[(*key, place)]
                for step in range(1, group.size):
                    rank = (group.rank + step) % group.size
                    _copy(there[rank], parts[rank])
                mine[place].copy_(parts[group.rank])
            joins.append(join)
            # Till then what is on its way keeps its memory.
            kept.append(out)
            out = next(outs)
        self._hand_back(out, mine[own[-1]], self._places[(*key, own[-1])], lengths, (*key, own[-1]))
        for join in joins:
            join()
        window.barrier()
        if key not in self._places:
            self._places[key] = [
                window.part(group.rank, offset, shape, found.dtype)
                for offset, shape in zip(sizes[group.rank][0], shapes[group.rank], strict=True)
            ]
        self._collect(found, self._places[key], own, key)
        return found

    def _hand_back(
        self, out: torch.Tensor, mine: torch.Tensor, there: Sequence[torch.Tensor], lengths: Sequence[int], key: Any
    ) -> None:
        """Writes some heads of all tokens to where they belong: this rank's to `mine`, the others' to `there`."""
        if out.is_cuda and out.dtype in _IN_ONE_PASS:
            from .scatter import Ways, hand_back

            if key not in self._tables:
                self._tables[key] = Ways.of(there, out.device)
            hand_back(out, mine, self._tables[key], self.group.rank)
            return
        for rank, part in enumerate(out.split(list(lengths), 1)):
            (mine if rank == self.group.rank else there[rank]).copy_(part)

    def _collect(self, out: torch.Tensor, come: Sequence[torch.Tensor], own: range, key: Any) -> None:
        """Writes what has come to where this rank's own heads are; `own` are the latter's places in `come`."""
        if out.is_cuda and out.dtype in _IN_ONE_PASS:
            from .scatter import Places, collect

            if key not in self._tables:
                self._tables[key] = Places.of(come, out.device)
            counts = [place.shape[2] for place in come]
            collect(out, self._tables[key], sum(counts[: own.start]), sum(counts[own.start : own.stop]))
            return
        for place, part in enumerate(out.split([each.shape[2] for each in come], 2)):
            if place not in own:
                part.copy_(come[place])

    # --- where they go ------------------------------------------------------------------------------------------------

    def _there(self, window: Window, size: Size, which: int) -> list[torch.Tensor]:
        """The places of this rank's tokens in each rank's window, of each group."""
        key = (which, size, id(window))
        if key not in self._places:
            lengths = size.lengths[min(which, 1)]
            start, own = sum(lengths[: self.group.rank]), lengths[self.group.rank]
            shapes, groups = size.shapes, len(size.groups)
            offsets, _ = placed(shapes, [size.dtype] * 3 * groups)
            self._places[key] = [
                window.part(rank, offsets[place], shapes[place], size.dtype)[:, start : start + own]
                for rank in range(self.group.size)
                for place in range(which, 3 * groups, 3)
            ]
        return self._places[key]

    def _here(self, size: Size, which: int, there: list[torch.Tensor], brought: Sequence[int]) -> list[torch.Tensor]:
        """The same with places on this GPU for what copy engines bring."""
        if not brought:
            return there
        key = (which, size, "here", brought[0])
        if key not in self._places:
            self._places[key] = [
                torch.empty_like(there[place], memory_format=torch.contiguous_format) for place in brought
            ]
        found = list(there)
        for place, memory in zip(brought, self._places[key], strict=True):
            found[place] = memory
        return found

    def _write(self, sent: Sequence[tuple[Operand, Sequence[torch.Tensor], Any]]) -> None:
        """Writes this rank's tokens to where their heads go: operands, their places, and what these depend on."""
        first = sent[0][0].parts[0]
        if first.is_cuda and first.dtype in _IN_ONE_PASS:
            from .scatter import Places, scatter

            for _, places, key in sent:
                if key not in self._tables:
                    self._tables[key] = Places.of(places, first.device)
            going = [(operand.lacking(), self._tables[key]) for operand, _, key in sent]
            eps, halves = max(operand.eps for operand, *_ in sent), any(operand.halves for operand, *_ in sent)
            scatter(going, eps, halves)
            return
        for operand, places, _ in sent:
            start = 0
            for part, norm, tables in operand.lacking():
                ready = plain(part, norm, operand.eps, tables, operand.halves)
                for place, heads in zip(places, ready.split([place.shape[2] for place in places], 2), strict=True):
                    place[:, start : start + part.shape[1]].copy_(heads)
                start += part.shape[1]


def _copy(to: torch.Tensor, x: torch.Tensor) -> None:
    """A copy by copy engines, which take what lies in one piece: one sample after another."""
    for place, part in zip(to, x, strict=True):
        place.copy_(part)
