"""Collectives of a group over its symmetric memory; `comm.Group` documents each and has it over the process group too.

Every function takes the group, whose `symm_mem` must be allocated. Results that lie in a buffer must be read before the
next collective's barrier (`symm_mem.SymmetricMemory`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .symm_mem import buffer_offsets

# Bytes from which two ranks all-reduce here: 27 us where NCCL takes 32. Smaller sums take 12 to 18 us with NCCL, and 19
# to 24 here. More ranks always use NCCL: among four, 28 MB took 196 us over symmetric memory, and 152 with NCCL
# (`benchmarks/exchanges.py`).
ALL_REDUCE_MIN_BYTES = 2 << 20


def reshard(
    group: Any,
    tensors: Sequence[torch.Tensor],
    shapes: Sequence[Sequence[Sequence[int]]],
    parts: Sequence[Sequence[torch.Tensor]],
    gather_dim: int,
    gather_sizes: Sequence[Sequence[int]],
    transient: bool,
) -> list[torch.Tensor]:
    """`Group.reshard`.

    Args:
        group: The ranks (`comm.Group`).
        tensors: This rank's tensors, all of one dtype.
        shapes: Shapes of each rank's results, one for each tensor.
        parts: For each tensor, the views of it that go to each rank.
        gather_dim: The dimension that is sharded now and whole afterwards.
        gather_sizes: For each tensor, the size of `gather_dim` on each rank.
        transient: Whether results stay in the buffer.
    """
    dtypes = [x.dtype for x in tensors]
    buffer = group.symm_mem.next_buffer(max(buffer_offsets(each, dtypes)[1] for each in shapes))
    starts = [sum(sizes[: group.rank]) for sizes in gather_sizes]
    # Each rank begins with another peer, so that no peer is written to by all at once.
    for rank in (*range(group.rank + 1, group.size), *range(group.rank)):
        offsets, _ = buffer_offsets(shapes[rank], dtypes)
        for offset, shape, dtype, start, part in zip(offsets, shapes[rank], dtypes, starts, parts, strict=True):
            view = buffer.peer_view(rank, offset, shape, dtype)
            view.narrow(gather_dim, start, part[rank].shape[gather_dim]).copy_(part[rank])
    offsets, _ = buffer_offsets(shapes[group.rank], dtypes)
    received = [buffer.peer_view(group.rank, *where) for where in zip(offsets, shapes[group.rank], dtypes, strict=True)]
    results = received if transient else [torch.empty_like(each) for each in received]
    for each, start, part in zip(results, starts, parts, strict=True):
        each.narrow(gather_dim, start, part[group.rank].shape[gather_dim]).copy_(part[group.rank])
    buffer.barrier()
    if not transient:
        for each, view, start, sizes in zip(results, received, starts, gather_sizes, strict=True):
            for first, last in ((0, start), (start + sizes[group.rank], sum(sizes))):
                if last > first:
                    each.narrow(gather_dim, first, last - first).copy_(view.narrow(gather_dim, first, last - first))
    return results


def all_to_all(
    group: Any,
    sends: Sequence[Sequence[torch.Tensor]],
    recv_shapes: Sequence[Sequence[Sequence[int]]],
    max_shapes: Sequence[Sequence[int]],
) -> list[list[torch.Tensor]]:
    """`Group.all_to_all`; each rank has a region of every peer's buffer, as large as `max_shapes` need."""
    dtype = sends[0][0].dtype
    _, region = buffer_offsets(max_shapes, [dtype] * len(max_shapes))
    buffer = group.symm_mem.next_buffer(region * group.size)
    for step in range(1, group.size):
        rank = (group.rank + step) % group.size
        offsets, _ = buffer_offsets([item.shape for item in sends[rank]], [dtype] * len(sends[rank]))
        for item, offset in zip(sends[rank], offsets, strict=True):
            buffer.peer_view(rank, region * group.rank + offset, item.shape, dtype).copy_(item)
    buffer.barrier()
    found = []
    for rank, shapes in enumerate(recv_shapes):
        offsets, _ = buffer_offsets(shapes, [dtype] * len(shapes))
        found.append(
            list(sends[rank]) if rank == group.rank else
            [buffer.peer_view(group.rank, region * rank + offset, shape, dtype)
             for offset, shape in zip(offsets, shapes, strict=True)]
        )  # fmt: skip
    return found


def ring_rotate(
    group: Any,
    tensors: Sequence[torch.Tensor],
    recv_shapes: Sequence[Sequence[int]],
    max_shapes: Sequence[Sequence[int]],
) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """`Group.ring_rotate`; copy engines write to the next rank."""
    memory = group.symm_mem
    dtypes = [item.dtype for item in tensors]
    offsets, size = buffer_offsets(max_shapes, dtypes)
    buffer, following = memory.next_buffer(size), (group.rank + 1) % group.size
    # Copy engines take contiguous tensors only.
    sent = [item.contiguous() for item in tensors]
    with memory.copy_stream(sent[0].device):
        for item, offset in zip(sent, offsets, strict=True):
            buffer.peer_view(following, offset, item.shape, item.dtype).copy_(item)

    def wait() -> None:
        memory.wait_copies()
        # Until here the sources keep their memory.
        sent.clear()
        buffer.barrier()

    where = zip(offsets, recv_shapes, dtypes, strict=True)
    return [buffer.peer_view(group.rank, *each) for each in where], wait


def all_reduce_copy(group: Any, x: torch.Tensor) -> torch.Tensor:
    """`Group.all_reduce_copy` of two ranks, which write all they have to each other: added in float32, rounded once.

    Args:
        group: A group of two ranks (`comm.Group`).
        x: This rank's tensor, any shape, the same on both ranks.
    """
    x = x.contiguous()
    buffer = group.symm_mem.next_buffer(x.nbytes)
    buffer.peer_view(1 - group.rank, 0, x.shape, x.dtype).copy_(x)
    buffer.barrier()
    out = x + buffer.peer_view(group.rank, 0, x.shape, x.dtype)
    group.symm_mem.rewind()
    return out
