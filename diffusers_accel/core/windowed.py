"""What a group's ranks exchange through its windows. `comm.py` says what each is for, and does the same by messages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .windows import Windows, placed

if TYPE_CHECKING:
    from .comm import Group

# Parts of a sum begin where copies are fast. Sums of no more bytes, of norms that is, are not divided: one barrier less
# (a guess, until `benchmarks/exchanges.py` has been run).
GRANULE, FEW_BYTES = 128, 1 << 16


def reshard(
    group: Group,
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
    group: Group,
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
    group: Group,
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
    with windows.beside(sent[0].device) as join:
        for item, offset in zip(sent, offsets, strict=True):
            window.part(following, offset, item.shape, item.dtype).copy_(item)

    def wait() -> None:
        join()
        # Till then what is on its way keeps its memory.
        sent.clear()
        window.barrier()

    where = zip(offsets, like, dtypes, strict=True)
    return [window.part(group.rank, *each) for each in where], wait


def total(group: Group, windows: Windows, x: torch.Tensor, granules: Sequence[int]) -> torch.Tensor:
    """`Group.total`: each rank sums a part and tells the others; of few values, each sums all.

    Args:
        group: The ranks.
        windows: Theirs.
        x: This rank's tensor.
        granules: How many times `GRANULE` values each rank sums, with the last ones as many as there are.
    """
    flat, size = x.contiguous().view(-1), x.element_size()
    few = flat.numel() * size <= FEW_BYTES
    cuts = [0]
    for count in granules:
        cuts.append(min(flat.numel(), cuts[-1] + count * GRANULE))
    parts = [flat] * group.size if few else [flat[first:last] for first, last in itertools.pairwise(cuts)]
    own, slot = parts[group.rank].numel(), -(-max(part.numel() for part in parts) // GRANULE) * GRANULE
    window = windows.following(slot * size * group.size)
    # This rank's own part stays where it is if there is one other.
    for step in range(1, group.size + (group.size > 2)):
        rank = (group.rank + step) % group.size
        window.part(rank, slot * size * group.rank, parts[rank].shape, x.dtype).copy_(parts[rank])
    window.barrier()
    come = window.part(group.rank, 0, (group.size, slot), x.dtype)[:, :own]
    out = torch.empty_like(flat)
    summed = out if few else out[cuts[group.rank] : cuts[group.rank + 1]]
    # Added up in float32, and rounded once.
    if group.size == 2:
        torch.add(parts[group.rank], come[1 - group.rank], out=summed)
    else:
        torch.sum(come, 0, dtype=x.dtype, out=summed)
    if few:
        windows.rest()
        return out.view(x.shape)
    window = windows.following(flat.numel() * size)
    for step in range(1, group.size):
        rank = (group.rank + step) % group.size
        window.part(rank, cuts[group.rank] * size, (own,), x.dtype).copy_(summed)
    window.barrier()
    told = window.part(group.rank, 0, flat.shape, x.dtype)
    for first, last in ((0, cuts[group.rank]), (cuts[group.rank + 1], flat.numel())):
        out[first:last].copy_(told[first:last])
    return out.view(x.shape)
