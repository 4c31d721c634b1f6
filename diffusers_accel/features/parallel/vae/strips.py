"""Strips of a picture, one per rank, and what ranks tell each other of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ....core.comm import Group
from ....core.windows import Windows, placed
from .kinds import Halo


class Strips:
    """Which part of the picture this rank has, at whatever size the picture has by then.

    Args:
        group: The ranks, in the order of their strips.
        axis: The dimension that is divided, counted from the last: -2 for rows, -1 for columns.
    """

    def __init__(self, group: Group, axis: int):
        self.group, self.axis = group, axis
        self.first, self.last = group.rank == 0, group.rank == group.size - 1
        self._counts: Sequence[int] = ()
        self._weights: torch.Tensor | None = None

    @property
    def divided(self) -> bool:
        """Whether tensors are strips now. They are not if someone calls a part of the VAE by itself."""
        return bool(self._counts)

    @property
    def weights(self) -> torch.Tensor:
        """Each strip's share of the picture, the same at every size, (ranks, 1, 1), in float32 or more."""
        assert self._weights is not None
        return self._weights

    @contextmanager
    def dividing(self, x: torch.Tensor, counts: Sequence[int]) -> Iterator[torch.Tensor]:
        """Gives this rank's part of `x`, of `counts` rows for each rank. Until the end, tensors are strips."""
        rank = self.group.rank
        if self.group.windows is not None:
            # A picture that was broken off may have left them to different turns.
            self.group.windows.begin()
        self._counts = counts
        dtype = torch.promote_types(x.dtype, torch.float32)
        self._weights = torch.tensor(counts, dtype=dtype, device=x.device)[:, None, None] / sum(counts)
        try:
            yield x.narrow(self.axis, sum(counts[:rank]), counts[rank]).contiguous()
        finally:
            self._counts, self._weights = (), None

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Everybody's, joined along `dim`, in which lengths are in proportion to the strips."""
        mine = self._counts[self.group.rank]
        lengths = [x.shape[dim] * count // mine for count in self._counts]
        return torch.cat(self.group.gather(x, dim, lengths, passing=True), dim)

    def neighbours(self, x: torch.Tensor, halo: Halo, zeros: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The neighbours' nearest rows, in one exchange.

        Args:
            x: This rank's strip, without room for them.
            halo: How many are needed, on every rank.
            zeros: What comes beyond the picture's borders: rows of zeros, or no rows.

        Returns:
            The rows before the strip and those after it, to be read before the exchange after the next one.
        """
        if self.group.windows is not None:
            return self._through_windows(self.group.windows, x, halo, zeros)
        rank, axis, length = self.group.rank, self.axis, x.shape[self.axis]
        sends = [[x.new_empty(0)] for _ in self.group.ranks]
        like: list[list[Sequence[int]]] = [[(0,)] for _ in self.group.ranks]
        rows = [x.narrow(axis, 0, count).shape for count in (halo.before, halo.after)]
        if not self.first:
            sends[rank - 1], like[rank - 1] = [x.narrow(axis, 0, halo.after)], [rows[0]]
        if not self.last:
            sends[rank + 1], like[rank + 1] = [x.narrow(axis, length - halo.before, halo.before)], [rows[1]]
        found = self.group.exchange(sends, like)
        beyond = [x.new_zeros(shape) if zeros else x.narrow(axis, 0, 0) for shape in rows]
        return beyond[0] if self.first else found[rank - 1][0], beyond[1] if self.last else found[rank + 1][0]

    def _through_windows(
        self, windows: Windows, x: torch.Tensor, halo: Halo, zeros: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, written to the neighbours' memory: a decoder exchanges rows a thousand times, and messages cost the
        host more than the rows do the link."""
        rank, axis, length = self.group.rank, self.axis, x.shape[self.axis]
        rows = [x.narrow(axis, 0, count).shape for count in (halo.before, halo.after)]
        offsets, size = placed(rows, [x.dtype] * 2)
        window = windows.following(max(size, 1))
        if not self.first:
            # The first rows are what the strip before this one needs after it.
            window.part(rank - 1, offsets[1], rows[1], x.dtype).copy_(x.narrow(axis, 0, halo.after))
        if not self.last:
            after = x.narrow(axis, length - halo.before, halo.before)
            window.part(rank + 1, offsets[0], rows[0], x.dtype).copy_(after)
        window.barrier()
        beyond = [x.new_zeros(shape) if zeros else x.narrow(axis, 0, 0) for shape in rows]
        found = [window.part(rank, offset, shape, x.dtype) for offset, shape in zip(offsets, rows, strict=True)]
        return beyond[0] if self.first else found[0], beyond[1] if self.last else found[1]
