"""The mesh: which rank does what.

Ranks are the points of a box whose axes are the ways to divide work. From the outside, where ranks talk least, to the
inside, where they talk most: data, guidance, tensor parallelism, ring or the rows and columns of Attention2D, Ulysses.
So neighbouring ranks, which share a machine and its fast links, are Ulysses' and rings cross machines before it does.
Tensor parallelism stands outside a sequence's ranks for their sake: they are neighbours, and hold one shard of the
weights.

The process group is the process's own: if a launcher has said who this process is and nobody has begun one, it is begun
here, and it stays.
"""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from .comm import Group

# From the outside to the inside.
AXES = ("dp", "cfg", "tp", "ring", "row", "column", "ulysses")
# The axes along which a sequence is divided.
SEQUENCE = ("ring", "row", "column", "ulysses")
# A collective that has not ended by then is given up, with an error on every rank.
TIMEOUT = datetime.timedelta(minutes=10)
# What a launcher tells a process.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> int | None:
    """How many processes work together; `None` if nobody has said."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else None


def begin(device: str) -> None:
    """Begins the process group that the launcher has described, if nobody has.

    Args:
        device: Type of the device that tensors are on.
    """
    if dist.is_initialized():
        return
    if device == "cuda":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)


def own_gpu() -> torch.device:
    """This rank's GPU: the one that the script has chosen, or else the one that the launcher counts."""
    chosen, place = torch.cuda.current_device(), int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", place if chosen == 0 and place < torch.cuda.device_count() else chosen)


def everyone() -> Group:
    """All ranks."""
    return Group(dist.group.WORLD, range(dist.get_world_size()), dist.get_rank())


class Mesh:
    """The groups of one division of all ranks.

    Args:
        sizes: Axis -> number of ranks along it; axes left out have one. Their product is the number of ranks.
        device: Type of the device that tensors are on.
    """

    def __init__(self, sizes: Mapping[str, int], device: str):
        self.sizes = {axis: sizes.get(axis, 1) for axis in AXES}
        self.device = device
        self.device_mesh = _device_mesh(dist.group.WORLD, device, tuple(self.sizes.items()))
        coordinates = self.device_mesh.get_coordinate()
        assert coordinates is not None and self.device_mesh.mesh_dim_names is not None
        self.place = dict.fromkeys(AXES, 0) | dict(zip(self.device_mesh.mesh_dim_names, coordinates, strict=True))
        self._groups: dict[str, Group] = {}

    def group(self, axis: str) -> Group:
        """The ranks along one axis that this one is among; one object for all who ask."""
        if axis not in self._groups:
            alone = self.sizes[axis] == 1
            handle = None if alone else self.device_mesh.get_group(axis)
            ranks = (dist.get_rank(),) if alone else dist.get_process_group_ranks(handle)
            self._groups[axis] = Group(handle, ranks, self.place[axis])
        return self._groups[axis]

    def sequence(self) -> Group:
        """The ranks that have one sequence among them, in the order of their shards."""
        size = 1
        for axis in SEQUENCE:
            size *= self.sizes[axis]
        # They are innermost, so neighbours.
        return self.neighbours(size)

    def neighbours(self, size: int) -> Group:
        """Every `size` ranks in a row; the group that this one is in."""
        if size == 1:
            return Group(None, (dist.get_rank(),), 0)
        handle = _neighbours(dist.group.WORLD, self.device, size).get_group("inner")
        return Group(handle, dist.get_process_group_ranks(handle), dist.get_rank() % size)

    def beside(self) -> Group:
        """All ranks that have the same part of each weight (all, without tensor parallelism), over connections of their
        own: what others send waits for nothing that is sent there."""
        rank, inside = dist.get_rank(), 1
        for axis in AXES[AXES.index("tp") + 1 :]:
            inside *= self.sizes[axis]
        parts = tuple(other // inside % self.sizes["tp"] for other in range(dist.get_world_size()))
        ranks = [other for other, part in enumerate(parts) if part == parts[rank]]
        return Group(_beside(dist.group.WORLD, parts)[parts[rank]], ranks, ranks.index(rank))


# Groups are the process's, and each costs a connection: made once.
@functools.cache
def _device_mesh(world: Any, device: str, sizes: tuple[tuple[str, int], ...]) -> Any:
    """Of the axes that have several ranks. A group of one rank would have threads too, and Gloo's look for messages a
    hundred times a second."""
    from torch.distributed.device_mesh import init_device_mesh

    divided = {axis: size for axis, size in sizes if size > 1} or {AXES[-1]: 1}
    return init_device_mesh(device, tuple(divided.values()), mesh_dim_names=tuple(divided))


@functools.cache
def _beside(world: Any, parts: tuple[int, ...]) -> list[Any]:
    """A group for each number in `parts`, of the ranks that have it. All ranks make all of them."""
    members = ([rank for rank, other in enumerate(parts) if other == part] for part in sorted(set(parts)))
    return [dist.new_group(ranks, timeout=TIMEOUT) for ranks in members]


@functools.cache
def _neighbours(world: Any, device: str, size: int) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh(device, torch.arange(dist.get_world_size()).view(-1, size), mesh_dim_names=("outer", "inner"))
