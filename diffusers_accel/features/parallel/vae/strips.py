"""Strips of a picture, one for each rank, and the exchange of their halos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ....core.comm import Group
from ....core.symm_mem import SymmetricMemory, buffer_offsets
from .kinds import Halo


class Strips:
    """This rank's strip of the picture, at every size that the picture has on its way through the VAE.

    Args:
        group: The ranks, in the order of their strips.
        axis: The sharded dimension, counted from the last: -2 for rows, -1 for columns.
    """

    def __init__(self, group: Group, axis: int):
        self.group, self.axis = group, axis
        self.first, self.last = group.rank == 0, group.rank == group.size - 1
        self._counts: Sequence[int] = ()
        self._weights: torch.Tensor | None = None

    @property
    def sharded(self) -> bool:
        """Whether tensors are strips now. They are whole when a part of the VAE is called by itself."""
        return bool(self._counts)

    @property
    def weights(self) -> torch.Tensor:
        """Each strip's fraction of the picture, the same at every size: (ranks, 1, 1), float32 or float64."""
        assert self._weights is not None
        return self._weights

    @contextmanager
    def sharding(self, x: torch.Tensor, counts: Sequence[int]) -> Iterator[torch.Tensor]:
        """A context within which tensors are strips; it yields this rank's strip of `x`.

        Args:
            x: The whole latents or picture.
            counts: Number of rows of each rank.
        """
        rank = self.group.rank
        if self.group.symm_mem is not None:
            # An interrupted decoding may have left ranks with different buffers next.
            self.group.symm_mem.resynchronize()
        self._counts = counts
        dtype = torch.promote_types(x.dtype, torch.float32)
        self._weights = torch.tensor(counts, dtype=dtype, device=x.device)[:, None, None] / sum(counts)
        try:
            yield x.narrow(self.axis, sum(counts[:rank]), counts[rank]).contiguous()
        finally:
            self._counts, self._weights = (), None

    def whole(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' tensors, joined along `dim`, in which their sizes are in proportion to the strips."""
        mine = self._counts[self.group.rank]
        lengths = [x.shape[dim] * count // mine for count in self._counts]
        return torch.cat(self.group.all_gather(x, dim, lengths, transient=True), dim)

    def exchange_halos(self, x: torch.Tensor, halo: Halo, zeros: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The neighbours' nearest rows, in one exchange with both.

        Args:
            x: This rank's strip, without padding.
            halo: The halo of every rank.
            zeros: Whether rows of zeros are returned beyond the picture's borders, instead of no rows.

        Returns:
            The rows before the strip and the rows after it. They may be in symmetric memory, and must be read before
            the next exchange.
        """
        if self.group.symm_mem is not None:
            return self._exchange_halos_in_symm_mem(self.group.symm_mem, x, halo, zeros)
        rank, axis, length = self.group.rank, self.axis, x.shape[self.axis]
        sends = [[x.new_empty(0)] for _ in self.group.ranks]
        like: list[list[Sequence[int]]] = [[(0,)] for _ in self.group.ranks]
        rows = [x.narrow(axis, 0, count).shape for count in (halo.before, halo.after)]
        if not self.first:
            sends[rank - 1], like[rank - 1] = [x.narrow(axis, 0, halo.after)], [rows[0]]
        if not self.last:
            sends[rank + 1], like[rank + 1] = [x.narrow(axis, length - halo.before, halo.before)], [rows[1]]
        found = self.group.all_to_all(sends, like)
        beyond = [x.new_zeros(shape) if zeros else x.narrow(axis, 0, 0) for shape in rows]
        return beyond[0] if self.first else found[rank - 1][0], beyond[1] if self.last else found[rank + 1][0]

    def _exchange_halos_in_symm_mem(
        self, memory: SymmetricMemory, x: torch.Tensor, halo: Halo, zeros: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`exchange_halos` over symmetric memory.

        A decoder exchanges halos a thousand times, and a collective costs the host more than the rows cost the link.
        """
        rank, axis, length = self.group.rank, self.axis, x.shape[self.axis]
        rows = [x.narrow(axis, 0, count).shape for count in (halo.before, halo.after)]
        offsets, size = buffer_offsets(rows, [x.dtype] * 2)
        buffer = memory.next_buffer(max(size, 1))
        if not self.first:
            # The first rows are the halo after the previous rank's strip.
            buffer.peer_view(rank - 1, offsets[1], rows[1], x.dtype).copy_(x.narrow(axis, 0, halo.after))
        if not self.last:
            after = x.narrow(axis, length - halo.before, halo.before)
            buffer.peer_view(rank + 1, offsets[0], rows[0], x.dtype).copy_(after)
        buffer.barrier()
        beyond = [x.new_zeros(shape) if zeros else x.narrow(axis, 0, 0) for shape in rows]
        found = [buffer.peer_view(rank, offset, shape, x.dtype) for offset, shape in zip(offsets, rows, strict=True)]
        return beyond[0] if self.first else found[0], beyond[1] if self.last else found[1]
