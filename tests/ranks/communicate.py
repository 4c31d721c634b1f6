"""What a rank does in tests of `core/comm.py` and `core/mesh.py`."""

from __future__ import annotations

import torch

from diffusers_accel.core import mesh, windowed
from diffusers_accel.core.comm import shares
from diffusers_accel.core.mesh import Mesh, begin
from diffusers_accel.core.windows import Windows

from .shared import SharedFiles


def broken_off(agree):
    """Whether exchanges are right after one that an error ended, on the last rank after it had taken a window."""
    begin("cpu")
    group = Mesh({"ulysses": torch.distributed.get_world_size()}, "cpu").group("ulysses")
    group.windows = Windows(group, SharedFiles)
    for _ in range(2):
        group.windows.following(8)
    group.gather(torch.zeros(1), 0, passing=True)
    if group.rank == group.size - 1:
        group.windows.following(8)
    if agree:
        group.windows.begin()
    right = True
    for number in range(1, 6):
        found = torch.cat(group.gather(torch.tensor([number + group.rank / 8]), 0, passing=True))
        right &= found.tolist() == [number + rank / 8 for rank in range(group.size)]
    return right


def collectives(length, windows):
    """Every collective on shards of a known tensor; returns what came. With windows, also sums of few values go through
    them."""
    summed, windowed.SUMMED = windowed.SUMMED, 64
    try:
        return _collectives(length, windows)
    finally:
        windowed.SUMMED = summed


def _collectives(length, windows):
    begin("cpu")
    group = Mesh({"ulysses": torch.distributed.get_world_size()}, "cpu").group("ulysses")
    if windows:
        group.windows = Windows(group, SharedFiles)
    whole = torch.arange(2.0 * length * 3).view(2, length, 3)
    counts = shares(length, group.size)
    mine = group.part(whole, 1)
    parts = group.gather(mine, 1, counts)
    passing = torch.cat(group.gather(mine.mT, -1, counts, passing=True), 2)
    # Windows have come round.
    group.rest()
    group.gather(mine, 1, counts)
    turns = [group.windows._turn] if windows else []
    gathered = torch.cat(parts, 1)
    # Two tensors in one message, one of them with other strides.
    sends = [[mine * (rank + 1), mine.mT] for rank in range(group.size)]
    most = [(2, max(counts), 3), (2, 3, max(counts))]
    found = group.exchange(sends, [[(2, count, 3), (2, 3, count)] for count in counts], most)
    exchanged, turned = torch.cat([pair[0] for pair in found], 1), torch.cat([pair[1] for pair in found], 2)
    previous = (group.rank - 1) % group.size
    (passed,), wait = group.pass_on([mine], [(2, counts[previous], 3)], most[:1])
    wait()
    passed = passed.clone()
    group.rest()
    turns += [group.windows._turn] if windows else []
    summed = group.sum(torch.full((3,), float(group.rank)))
    # Not in one piece, and through windows where there are two ranks.
    many = torch.arange(2.0 * 40_001).view(40_001, 2).mT
    total, kept = group.total(many * (group.rank + 1)), many.clone()
    turns += [group.windows._turn] if windows else []
    told = group.broadcast(torch.full((1,), float(group.rank)), group.size - 1)
    return {
        "mine": mine, "gathered": gathered, "passing": passing, "exchanged": exchanged, "turned": turned,
        "passed": passed, "summed": summed, "told": told,
        "turns": turns,
        "total": torch.equal(total, many * sum(range(1, group.size + 1))) and torch.equal(kept, many),
        "objects": group.objects({"rank": group.rank}),
    }  # fmt: skip


def groups_of(sizes):
    """How many process groups a mesh makes that nobody has made before."""
    begin("cpu")
    mesh._device_mesh.cache_clear()
    before = len(torch.distributed.distributed_c10d._world.pg_map)
    Mesh(sizes, "cpu")
    return len(torch.distributed.distributed_c10d._world.pg_map) - before


def places(sizes):
    """Where a rank is in a mesh, and with whom."""
    begin("cpu")
    made = Mesh(sizes, "cpu")
    groups = {axis: made.group(axis).ranks for axis in made.sizes}
    return made.place, groups, made.sequence().ranks, made.sequence().rank
