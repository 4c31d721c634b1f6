"""Collectives among the ranks of one group, as this package uses them: shards may differ in length, and none is padded.

A length is divided among ranks as `torch.tensor_split` does it: the first ranks have one more where it does not divide.
Every rank knows everybody's share without asking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import windowed
from .windows import Windows

# Newer torch has another name for it, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def shares(length: int, ranks: int) -> list[int]:
    """How many of `length` each rank has."""
    whole, more = divmod(length, ranks)
    return [whole + (rank < more) for rank in range(ranks)]


class Group:
    """Some of the ranks, in order.

    Args:
        handle: The process group; `None` for a rank alone.
        ranks: Their global ranks.
        rank: Which of them this process is, from 0.

    Attributes:
        windows: Memory that they share, if there is any: shards and sums go through it then.
    """

    def __init__(self, handle: Any, ranks: Sequence[int], rank: int):
        self.handle, self.ranks, self.rank = handle, tuple(ranks), rank
        self.windows: Windows | None = None

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)

    def part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's share of a tensor that all ranks have whole; a view."""
        counts = shares(x.shape[dim], self.size)
        return x.narrow(dim, sum(counts[: self.rank]), counts[self.rank])

    def exchange(
        self,
        sends: Sequence[Sequence[torch.Tensor]],
        like: Sequence[Sequence[Sequence[int]]],
        largest: Sequence[Sequence[int]] | None = None,
    ) -> list[list[torch.Tensor]]:
        """All to all, in one message from each rank to each: the n-th of `sends` goes to the n-th rank.

        Args:
            sends: Tensors for each rank, all of one type.
            like: The shapes of what each rank sends here.
            largest: Shapes that are as large as what any rank sends to any other, or larger. With them it may go
                through windows.

        Returns:
            What each rank sent, parts of one buffer; in a window, if `largest` is given, and to be read before the
            exchange after the next one of this group begins, and before `rest`.
        """
        if self.size == 1:
            return [list(sends[0])]
        if self.windows is not None and largest is not None:
            return windowed.exchange(self, self.windows, sends, like, largest)
        counts = [[item.numel() for item in items] for items in sends]
        flat = sends[0][0].new_empty(sum(map(sum, counts)))
        # Straight into the buffer, whatever the strides: one pass.
        for place, item in zip(
            flat.split([count for each in counts for count in each]), (item for items in sends for item in items),
            strict=True,
        ):  # fmt: skip
            place.view(item.shape).copy_(item)
        sizes = [[math.prod(shape) for shape in shapes] for shapes in like]
        found = flat.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(found, flat, list(map(sum, sizes)), list(map(sum, counts)), group=self.handle)
        parts = iter(found.split([size for each in sizes for size in each]))
        return [[next(parts).view(*shape) for shape in shapes] for shapes in like]

    def reshard(
        self,
        tensors: Sequence[torch.Tensor],
        away: int,
        counts: Sequence[Sequence[int]],
        toward: int,
        lengths: Sequence[Sequence[int]],
        passing: bool = False,
    ) -> list[torch.Tensor]:
        """Tensors divided along one dimension, divided along another instead: each rank has its share of `toward` and
        all of `away`, and then all of `toward` and its share of `away`.

        Args:
            tensors: This rank's, all of one type.
            away: The dimension that is divided afterwards.
            counts: Of each tensor, how much of it each rank gets.
            toward: The dimension that is divided now.
            lengths: Of each tensor, how much of it each rank has.
            passing: Whether the results are read before the next exchange of this group begins. They may lie in a
                window then, which the one after it writes to.
        """
        if self.size == 1:
            return list(tensors)
        shapes = [
            [_with(x.shape, {away: count[rank], toward: sum(length)}) for x, count, length in
             zip(tensors, counts, lengths, strict=True)]
            for rank in range(self.size)
        ]  # fmt: skip
        parts = [x.split(list(count), away) for x, count in zip(tensors, counts, strict=True)]
        if self.windows is None:
            sends = [[part[rank] for part in parts] for rank in range(self.size)]
            like = [
                [_with(shape, {toward: length[rank]}) for shape, length in
                 zip(shapes[self.rank], lengths, strict=True)]
                for rank in range(self.size)
            ]  # fmt: skip
            found = self.exchange(sends, like)
            return [torch.cat([items[which] for items in found], toward) for which in range(len(tensors))]
        return windowed.reshard(self, self.windows, tensors, shapes, parts, toward, lengths, passing)

    def gather(
        self, x: torch.Tensor, dim: int, lengths: Sequence[int] | None = None, passing: bool = False
    ) -> list[torch.Tensor]:
        """Everybody's shard.

        Args:
            x: This rank's.
            dim: The dimension in which they may differ.
            lengths: Of each rank's shard in that dimension; as long as this rank's if `None`.
            passing: As in `reshard`; `rest` is to follow.
        """
        if self.size == 1:
            return [x]
        dim %= x.ndim
        lengths = [x.shape[dim]] * self.size if lengths is None else lengths
        most = max(lengths)
        if self.windows is not None:
            shapes = [[_with(x.shape, {dim: length})] for length in lengths]
            largest = [_with(x.shape, {dim: most})]
            come = windowed.exchange(self, self.windows, [[x]] * self.size, shapes, largest)
            if passing:
                return [each for (each,) in come]
            kept = [each if rank == self.rank else each.clone() for rank, (each,) in enumerate(come)]
            self.rest()
            return kept
        # Along the first dimension, so that what comes from each rank lies in one piece; the longest decides.
        moved = x.movedim(dim, 0)
        sent = moved.contiguous()
        if len(moved) < most:
            sent = torch.cat([sent, sent.new_zeros((most - len(moved), *sent.shape[1:]))])
        found = sent.new_empty((self.size * most, *sent.shape[1:]))
        _all_gather(found, sent, group=self.handle)
        return [found[rank * most : rank * most + length].movedim(0, dim) for rank, length in enumerate(lengths)]

    def gather_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Everybody's shard, all of one length, one behind the other in memory that is there.

        Args:
            out: (ranks x length,), written to.
            x: This rank's shard, (length,).
        """
        _all_gather(out, x, group=self.handle)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of everybody's tensor; `x` may be written to."""
        if self.windows is not None and self._swaps(x):
            return windowed.total(self, self.windows, x)
        if self.size > 1:
            dist.all_reduce(x, group=self.handle)
        return x

    def _swaps(self, x: torch.Tensor) -> bool:
        """Whether a tensor's sum goes through windows, if there are any."""
        return self.size == 2 and x.nbytes >= windowed.SUMMED

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The same as a new tensor, whose values lie in order."""
        if self.windows is None or not self._swaps(x):
            x = x.clone(memory_format=torch.contiguous_format)
        return self.sum(x)

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """`x` with the values that the `source`-th rank has; it is written to."""
        if self.size > 1:
            dist.broadcast(x, self.ranks[source], group=self.handle)
        return x

    def pass_on(
        self,
        tensors: Sequence[torch.Tensor],
        like: Sequence[Sequence[int]],
        largest: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[torch.Tensor], Any]:
        """Begins to send tensors to the next rank and to receive the previous one's.

        Args:
            tensors: What the next rank is to have.
            like: The shapes of what the previous rank sends.
            largest: As in `exchange`, and so is what comes.

        Returns:
            What comes, and a function to be called before it is read or `tensors` are written to.
        """
        if self.windows is not None and largest is not None:
            return windowed.pass_on(self, self.windows, tensors, like, largest)
        following = self.ranks[(self.rank + 1) % self.size]
        previous = self.ranks[(self.rank - 1) % self.size]
        found = [item.new_empty(tuple(shape)) for item, shape in zip(tensors, like, strict=True)]
        work = []
        for tag, (item, place) in enumerate(zip(tensors, found, strict=True)):
            work.append(dist.P2POp(dist.isend, item.contiguous(), following, self.handle, tag))
            work.append(dist.P2POp(dist.irecv, place, previous, self.handle, tag))
        requests = dist.batch_isend_irecv(work)

        def wait() -> None:
            for request in requests:
                request.wait()
            # Till then what is on its way keeps its memory.
            work.clear()

        return found, wait

    def rest(self) -> None:
        """Ends what a graph may record: a number of exchanges, when what has come in windows is read."""
        if self.windows is not None:
            self.windows.rest()

    def objects(self, value: Any) -> list[Any]:
        """Everybody's value, for small things that Python must know. Waits for the device where the group has no
        other way than through it."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.handle)
        return found


def _with(shape: Sequence[int], sizes: Mapping[int, int]) -> tuple[int, ...]:
    """A shape with other sizes of some dimensions."""
    return tuple(sizes.get(dim, size) for dim, size in enumerate(shape))
