"""Collectives among the ranks of one group. Shards may differ in length; results have no padding.

Owns `Group`, a process group with this process's rank in it, which all features that communicate take. If a group has
symmetric memory, its data goes through that (`symm_collectives.py`). Otherwise the data goes through torch's
collectives, by NCCL on GPUs and by Gloo on CPUs. If a rank does not call a collective, the others wait in it until the
process group's timeout.

Lengths are sharded as by `torch.tensor_split`: if a length does not divide evenly, the first shards are one longer. So
every rank knows the sizes of all shards without communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import symm_collectives
from .symm_mem import SymmetricMemory

# Newer torch has renamed this function, and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def shard_sizes(length: int, ranks: int) -> list[int]:
    """The sizes of all ranks' shards of `length`, in the order of ranks."""
    whole, more = divmod(length, ranks)
    return [whole + (rank < more) for rank in range(ranks)]


class Group:
    """A process group, and this process's rank in it.

    Args:
        handle: torch's process group; `None` for a group of one rank.
        ranks: The members' global ranks, in order.
        rank: This process's rank in the group, from 0.

    Attributes:
        symm_mem: The group's symmetric memory; `None` where there is none. Shards and sums go through it.
    """

    def __init__(self, handle: Any, ranks: Sequence[int], rank: int):
        self.handle, self.ranks, self.rank = handle, tuple(ranks), rank
        self.symm_mem: SymmetricMemory | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's shard, along `dim`, of a tensor that is replicated on all ranks; a view."""
        sizes = shard_sizes(x.shape[dim], self.size)
        return x.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank])

    def all_to_all(
        self,
        sends: Sequence[Sequence[torch.Tensor]],
        recv_shapes: Sequence[Sequence[Sequence[int]]],
        max_shapes: Sequence[Sequence[int]] | None = None,
    ) -> list[list[torch.Tensor]]:
        """Sends the n-th item of `sends` to the n-th rank, in one message from each rank to each.

        Args:
            sends: The tensors for each rank, all of one dtype, with any strides.
            recv_shapes: The shapes of the tensors from each rank.
            max_shapes: Upper bounds of the shapes in a message between any two ranks, the same on all ranks. With these
                bounds the message may go through symmetric memory.

        Returns:
            The tensors from each rank; this rank's own may be the ones in `sends`. With `max_shapes` the others may lie
            in symmetric memory. They must be read before this group's next collective ends, and before `rewind`.
        """
        if self.size == 1:
            return [list(sends[0])]
        if self.symm_mem is not None and max_shapes is not None:
            return symm_collectives.all_to_all(self, sends, recv_shapes, max_shapes)
        counts = [[item.numel() for item in items] for items in sends]
        flat = sends[0][0].new_empty(sum(map(sum, counts)))
        # One copy of each tensor, from any strides, straight into the buffer.
        for place, item in zip(
            flat.split([count for each in counts for count in each]), (item for items in sends for item in items),
            strict=True,
        ):  # fmt: skip
            place.view(item.shape).copy_(item)
        sizes = [[math.prod(shape) for shape in shapes] for shapes in recv_shapes]
        found = flat.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(found, flat, list(map(sum, sizes)), list(map(sum, counts)), group=self.handle)
        parts = iter(found.split([size for each in sizes for size in each]))
        return [[next(parts).view(*shape) for shape in shapes] for shapes in recv_shapes]

    def reshard(
        self,
        tensors: Sequence[torch.Tensor],
        scatter_dim: int,
        scatter_sizes: Sequence[Sequence[int]],
        gather_dim: int,
        gather_sizes: Sequence[Sequence[int]],
        transient: bool = False,
    ) -> list[torch.Tensor]:
        """Turns tensors that are sharded along `gather_dim` into tensors that are sharded along `scatter_dim`.

        Args:
            tensors: This rank's shards, all of one dtype; `scatter_dim` is whole in them.
            scatter_dim: The dimension that is sharded afterwards.
            scatter_sizes: For each tensor, the size of `scatter_dim` on each rank afterwards.
            gather_dim: The dimension that is sharded now and whole afterwards.
            gather_sizes: For each tensor, the size of `gather_dim` on each rank now.
            transient: Whether the results are read before this group's next collective begins. Then they may lie in
                symmetric memory, which later collectives overwrite.
        """
        if self.size == 1:
            return list(tensors)
        shapes = [
            [_with(x.shape, {scatter_dim: sizes[rank], gather_dim: sum(lengths)}) for x, sizes, lengths in
             zip(tensors, scatter_sizes, gather_sizes, strict=True)]
            for rank in range(self.size)
        ]  # fmt: skip
        parts = [x.split(list(sizes), scatter_dim) for x, sizes in zip(tensors, scatter_sizes, strict=True)]
        if self.symm_mem is None:
            sends = [[part[rank] for part in parts] for rank in range(self.size)]
            recv_shapes = [
                [_with(shape, {gather_dim: sizes[rank]}) for shape, sizes in
                 zip(shapes[self.rank], gather_sizes, strict=True)]
                for rank in range(self.size)
            ]  # fmt: skip
            found = self.all_to_all(sends, recv_shapes)
            return [torch.cat([items[index] for items in found], gather_dim) for index in range(len(tensors))]
        return symm_collectives.reshard(self, tensors, shapes, parts, gather_dim, gather_sizes, transient)

    def all_gather(
        self, x: torch.Tensor, dim: int, sizes: Sequence[int] | None = None, transient: bool = False
    ) -> list[torch.Tensor]:
        """The shards of all ranks, in the order of ranks. This rank's own may be `x` itself.

        Args:
            x: This rank's shard, with any strides.
            dim: The dimension in which shards may differ.
            sizes: The size of each rank's shard in `dim`; `None` if all shards are equal in it.
            transient: Whether the results are read before this group's next collective begins. Then they may lie in
                symmetric memory, and the caller calls `rewind` after reading them.
        """
        if self.size == 1:
            return [x]
        dim %= x.ndim
        sizes = [x.shape[dim]] * self.size if sizes is None else sizes
        longest = max(sizes)
        if self.symm_mem is not None:
            shapes = [[_with(x.shape, {dim: size})] for size in sizes]
            max_shapes = [_with(x.shape, {dim: longest})]
            received = symm_collectives.all_to_all(self, [[x]] * self.size, shapes, max_shapes)
            if transient:
                return [each for (each,) in received]
            kept = [each if rank == self.rank else each.clone() for rank, (each,) in enumerate(received)]
            self.rewind()
            return kept
        # Gathered along the first dimension, so that each rank's shard is contiguous. Shorter shards are padded.
        moved = x.movedim(dim, 0)
        sent = moved.contiguous()
        if len(moved) < longest:
            sent = torch.cat([sent, sent.new_zeros((longest - len(moved), *sent.shape[1:]))])
        found = sent.new_empty((self.size * longest, *sent.shape[1:]))
        _all_gather(found, sent, group=self.handle)
        return [found[rank * longest : rank * longest + size].movedim(0, dim) for rank, size in enumerate(sizes)]

    def all_gather_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Concatenates equally long shards of all ranks into `out`. The group has two ranks or more.

        Args:
            out: (ranks * length,), contiguous; overwritten.
            x: This rank's shard, (length,), contiguous.
        """
        _all_gather(out, x, group=self.handle)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, which have one shape. `x` may be overwritten, and may be the result."""
        if self.symm_mem is not None and self._reduces_in_symm_mem(x):
            return symm_collectives.all_reduce_copy(self, x)
        if self.size > 1:
            dist.all_reduce(x, group=self.handle)
        return x

    def _reduces_in_symm_mem(self, x: torch.Tensor) -> bool:
        """Whether a tensor is summed over symmetric memory, if the group has it."""
        return self.size == 2 and x.nbytes >= symm_collectives.ALL_REDUCE_MIN_BYTES

    def all_reduce_copy(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors as a new contiguous tensor; `x` is not changed."""
        if self.symm_mem is None or not self._reduces_in_symm_mem(x):
            x = x.clone(memory_format=torch.contiguous_format)
        return self.all_reduce(x)

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Overwrites `x` with the tensor of the group's rank `source`, and returns it."""
        if self.size > 1:
            dist.broadcast(x, self.ranks[source], group=self.handle)
        return x

    def ring_rotate(
        self,
        tensors: Sequence[torch.Tensor],
        recv_shapes: Sequence[Sequence[int]],
        max_shapes: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Begins to send tensors to the next rank and to receive the previous rank's. The group has two ranks or more.

        Args:
            tensors: This rank's tensors.
            recv_shapes: The shapes of the previous rank's tensors.
            max_shapes: Upper bounds of the shapes of any rank's tensors, the same on all ranks. With these bounds
                results may lie in symmetric memory, and must be read before the next rotation is waited for.

        Returns:
            The previous rank's tensors, and a function that waits for the transfer. The caller calls the function
            before reading these tensors, and before overwriting `tensors`.
        """
        if self.symm_mem is not None and max_shapes is not None:
            return symm_collectives.ring_rotate(self, tensors, recv_shapes, max_shapes)
        following = self.ranks[(self.rank + 1) % self.size]
        previous = self.ranks[(self.rank - 1) % self.size]
        found = [item.new_empty(tuple(shape)) for item, shape in zip(tensors, recv_shapes, strict=True)]
        work = []
        for tag, (item, place) in enumerate(zip(tensors, found, strict=True)):
            work.append(dist.P2POp(dist.isend, item.contiguous(), following, self.handle, tag))
            work.append(dist.P2POp(dist.irecv, place, previous, self.handle, tag))
        requests = dist.batch_isend_irecv(work)

        def wait() -> None:
            for request in requests:
                request.wait()
            # The sent tensors keep their memory until here.
            work.clear()

        return found, wait

    def rewind(self) -> None:
        """Makes the next collective use the first symmetric buffer. All results in both buffers must have been read.

        Every operation that a CUDA graph may record leaves the first buffer next (`SymmetricMemory.rewind`).
        """
        if self.symm_mem is not None:
            self.symm_mem.rewind()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Small picklable objects of all ranks, in the order of ranks.

        A process group with NCCL alone sends them over the GPU, and this call waits for the GPU.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.handle)
        return found


def _with(shape: Sequence[int], sizes: Mapping[int, int]) -> tuple[int, ...]:
    """A shape with other sizes of some dimensions (dimension -> size)."""
    return tuple(sizes.get(dim, size) for dim, size in enumerate(shape))
