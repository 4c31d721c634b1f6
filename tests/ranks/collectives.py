"""Functions that ranks run in tests of `core/comm.py` and `core/mesh.py`."""

from __future__ import annotations

import torch

from diffusers_accel.core import mesh, symm_collectives
from diffusers_accel.core.comm import shard_sizes
from diffusers_accel.core.mesh import Mesh, init_process_group
from diffusers_accel.core.symm_mem import SymmetricMemory

from .shared_memory import SharedFiles


def broken_off(agree):
    """Whether exchanges are right after one that an error ended, on the last rank after it had taken a window."""
    init_process_group("cpu")
    group = Mesh({"ulysses": torch.distributed.get_world_size()}, "cpu").group("ulysses")
    group.symm_mem = SymmetricMemory(group, SharedFiles)
    for _ in range(2):
        group.symm_mem.next_buffer(8)
    group.all_gather(torch.zeros(1), 0, transient=True)
    if group.rank == group.size - 1:
        group.symm_mem.next_buffer(8)
    if agree:
        group.symm_mem.resynchronize()
    right = True
    for number in range(1, 6):
        found = torch.cat(group.all_gather(torch.tensor([number + group.rank / 8]), 0, transient=True))
        right &= found.tolist() == [number + rank / 8 for rank in range(group.size)]
    return right


def collectives(length, symm_mem):
    """Every collective on shards of a known tensor; returns what came. Over symmetric memory, also sums of few values
    go through them."""
    summed, symm_collectives.ALL_REDUCE_MIN_BYTES = symm_collectives.ALL_REDUCE_MIN_BYTES, 64
    try:
        return _collectives(length, symm_mem)
    finally:
        symm_collectives.ALL_REDUCE_MIN_BYTES = summed


def _collectives(length, symm_mem):
    init_process_group("cpu")
    group = Mesh({"ulysses": torch.distributed.get_world_size()}, "cpu").group("ulysses")
    if symm_mem:
        group.symm_mem = SymmetricMemory(group, SharedFiles)
    whole = torch.arange(2.0 * length * 3).view(2, length, 3)
    counts = shard_sizes(length, group.size)
    mine = group.shard(whole, 1)
    parts = group.all_gather(mine, 1, counts)
    transient = torch.cat(group.all_gather(mine.mT, -1, counts, transient=True), 2)
    # SymmetricMemory have come round.
    group.rewind()
    group.all_gather(mine, 1, counts)
    turns = [group.symm_mem._next] if symm_mem else []
    gathered = torch.cat(parts, 1)
    # Two tensors in one message, one of them with other strides.
    sends = [[mine * (rank + 1), mine.mT] for rank in range(group.size)]
    most = [(2, max(counts), 3), (2, 3, max(counts))]
    found = group.all_to_all(sends, [[(2, count, 3), (2, 3, count)] for count in counts], most)
    exchanged, turned = torch.cat([pair[0] for pair in found], 1), torch.cat([pair[1] for pair in found], 2)
    previous = (group.rank - 1) % group.size
    (passed,), wait = group.ring_rotate([mine], [(2, counts[previous], 3)], most[:1])
    wait()
    passed = passed.clone()
    group.rewind()
    turns += [group.symm_mem._next] if symm_mem else []
    summed = group.all_reduce(torch.full((3,), float(group.rank)))
    # Not in one piece, and through symm_mem where there are two ranks.
    many = torch.arange(2.0 * 40_001).view(40_001, 2).mT
    total, kept = group.all_reduce_copy(many * (group.rank + 1)), many.clone()
    turns += [group.symm_mem._next] if symm_mem else []
    told = group.broadcast(torch.full((1,), float(group.rank)), group.size - 1)
    return {
        "mine": mine, "gathered": gathered, "passing": transient, "exchanged": exchanged, "turned": turned,
        "passed": passed, "summed": summed, "told": told,
        "turns": turns,
        "total": torch.equal(total, many * sum(range(1, group.size + 1))) and torch.equal(kept, many),
        "objects": group.all_gather_object({"rank": group.rank}),
    }  # fmt: skip


def groups_of(sizes):
    """How many process groups a mesh makes that nobody has made before."""
    init_process_group("cpu")
    mesh._device_mesh.cache_clear()
    before = len(torch.distributed.distributed_c10d._world.pg_map)
    Mesh(sizes, "cpu")
    return len(torch.distributed.distributed_c10d._world.pg_map) - before


def places(sizes):
    """Where a rank is in a mesh, and with whom."""
    init_process_group("cpu")
    made = Mesh(sizes, "cpu")
    groups = {axis: made.group(axis).ranks for axis in made.sizes}
    return made.coordinates, groups, made.sequence().ranks, made.sequence().rank
