"""What a group's ranks exchange through its windows. `comm.py` says what each is for, and does the same by messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .windows import Windows, placed

# Bytes from which two ranks' sums are made here: 27 us where NCCL takes 32. It makes smaller ones in 12 to 18 us, which
# take 19 to 24 here. All sums of more ranks are NCCL's: divided among four, 28 MB took 196 us through windows, and 152
# by NCCL (`benchmarks/exchanges.py`).
SUMMED = 2 << 20


def reshard(
    group: Any,
    windows: Windows,
    tensors: Sequence[torch.Tensor],
    shapes: Sequence[Sequence[Sequence[int]]],
    parts: Sequence[Sequence[torch.Tensor]],
    toward: int,
    lengths: Sequence[Sequence[int]],
    passing: bool,
) -> list[torch.Tensor]:
    """`Group.reshard`.

    Args:
        group: The ranks.
        windows: Theirs.
        tensors: See there.
        shapes: Of what each rank gets.
        parts: Of each tensor, what goes to each rank.
        toward: See there.
        lengths: See there.
        passing: See there.
    """
    dtypes = [x.dtype for x in tensors]
    window = windows.following(max(placed(each, dtypes)[1] for each in shapes))
    starts = [sum(length[: group.rank]) for length in lengths]
    # Everybody begins with another one, so that nobody is written to by all at once.
    for rank in (*range(group.rank + 1, group.size), *range(group.rank)):
        offsets, _ = placed(shapes[rank], dtypes)
        for offset, shape, dtype, start, part in zip(offsets, shapes[rank], dtypes, starts, parts, strict=True):
            place = window.part(rank, offset, shape, dtype)
            place.narrow(toward, start, part[rank].shape[toward]).copy_(part[rank])
    offsets, _ = placed(shapes[group.rank], dtypes)
    own = [window.part(group.rank, *where) for where in zip(offsets, shapes[group.rank], dtypes, strict=True)]
    kept = own if passing else [torch.empty_like(each) for each in own]
    for each, start, part in zip(kept, starts, parts, strict=True):
        each.narrow(toward, start, part[group.rank].shape[toward]).copy_(part[group.rank])
    window.barrier()
    if not passing:
        for each, come, start, length in zip(kept, own, starts, lengths, strict=True):
            for first, last in ((0, start), (start + length[group.rank], sum(length))):
                if last > first:
                    each.narrow(toward, first, last - first).copy_(come.narrow(toward, first, last - first))
    return kept


def exchange(
    group: Any,
    windows: Windows,
    sends: Sequence[Sequence[torch.Tensor]],
    like: Sequence[Sequence[Sequence[int]]],
    largest: Sequence[Sequence[int]],
) -> list[list[torch.Tensor]]:
    """`Group.exchange`."""
    dtype = sends[0][0].dtype
    # Each rank has a part of everybody's window, as long as the largest.
    _, part = placed(largest, [dtype] * len(largest))
    window = windows.following(part * group.size)
    for step in range(1, group.size):
        rank = (group.rank + step) % group.size
        offsets, _ = placed([item.shape for item in sends[rank]], [dtype] * len(sends[rank]))
        for item, offset in zip(sends[rank], offsets, strict=True):
            window.part(rank, part * group.rank + offset, item.shape, dtype).copy_(item)
    window.barrier()
    found = []
    for rank, shapes in enumerate(like):
        offsets, _ = placed(shapes, [dtype] * len(shapes))
        found.append(
            list(sends[rank]) if rank == group.rank else
            [window.part(group.rank, part * rank + offset, shape, dtype)
             for offset, shape in zip(offsets, shapes, strict=True)]
        )  # fmt: skip
    return found


def pass_on(
    group: Any,
    windows: Windows,
    tensors: Sequence[torch.Tensor],
    like: Sequence[Sequence[int]],
    largest: Sequence[Sequence[int]],
) -> tuple[list[torch.Tensor], Any]:
    """`Group.pass_on`."""
    dtypes = [item.dtype for item in tensors]
    offsets, size = placed(largest, dtypes)
    window, following = windows.following(size), (group.rank + 1) % group.size
    # In one piece, so that copy engines can take them.
    sent = [item.contiguous() for item in tensors]
    with windows.beside(sent[0].device):
        for item, offset in zip(sent, offsets, strict=True):
            window.part(following, offset, item.shape, item.dtype).copy_(item)

    def wait() -> None:
        windows.join()
        # Till then what is on its way keeps its memory.
        sent.clear()
        window.barrier()

    where = zip(offsets, like, dtypes, strict=True)
    return [window.part(group.rank, *each) for each in where], wait


def total(group: Any, windows: Windows, x: torch.Tensor) -> torch.Tensor:
    """`Group.total` of two ranks, which send each other all they have: added up in float32, and rounded once.

    Args:
        group: The ranks.
        windows: Theirs.
        x: This rank's tensor.
    """
    x = x.contiguous()
    window = windows.following(x.nbytes)
    window.part(1 - group.rank, 0, x.shape, x.dtype).copy_(x)
    window.barrier()
    out = x + window.part(group.rank, 0, x.shape, x.dtype)
    windows.rest()
    return out
