"""The process group, and the mesh of its ranks.

Owns the start of the process group, the device of this rank, and `Mesh`, which hands on one `comm.Group` for each axis.
Communication grows from the outer axes to the inner ones: data parallelism, CFG parallelism, tensor parallelism, ring
or the rows and columns of Attention2D, Ulysses. So Ulysses runs among neighbouring ranks, which share a machine and its
fast links, and a ring crosses machines before Ulysses does. Tensor parallelism is outside the axes of a sequence: the
ranks that share a sequence are neighbours, and hold one shard of the weights.

If a launcher has set its variables and the script has started no process group, it is started here. It stays until the
process ends. All ranks must make the same meshes in the same order, or they wait for each other.
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
# The axes along which a sequence is sharded.
SEQUENCE = ("ring", "row", "column", "ulysses")
# A collective that has not ended by then raises on every rank.
TIMEOUT = datetime.timedelta(minutes=10)
# The variables of a launcher, as `torchrun` sets them.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int | None:
    """The number of ranks, by the process group or by the launcher's variables; `None` without both."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHER_VARIABLES) else None


def init_process_group(device: str) -> None:
    """Starts the process group that the launcher's variables describe, unless there is one.

    Args:
        device: Device type of the tensors: `"cuda"` gets NCCL with Gloo beside it, anything else Gloo.
    """
    if dist.is_initialized():
        return
    if device == "cuda":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)


def rank_device() -> torch.device:
    """This rank's GPU: the current one if the script has chosen it, otherwise the one numbered LOCAL_RANK."""
    current, local_rank = torch.cuda.current_device(), int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank if current == 0 and local_rank < torch.cuda.device_count() else current)


def world_group() -> Group:
    """The group of all ranks."""
    return Group(dist.group.WORLD, range(dist.get_world_size()), dist.get_rank())


class Mesh:
    """A mesh of all ranks, with a group for each axis.

    Args:
        sizes: Axis -> number of ranks along it; missing axes have one. The product is the number of ranks.
        device: Device type of the tensors.

    Attributes:
        coordinates: Axis -> this rank's coordinate along it.
    """

    def __init__(self, sizes: Mapping[str, int], device: str):
        self.sizes = {axis: sizes.get(axis, 1) for axis in AXES}
        self.device = device
        self.device_mesh = _device_mesh(dist.group.WORLD, device, tuple(self.sizes.items()))
        coordinates = self.device_mesh.get_coordinate()
        assert coordinates is not None and self.device_mesh.mesh_dim_names is not None
        names = self.device_mesh.mesh_dim_names
        self.coordinates = dict.fromkeys(AXES, 0) | dict(zip(names, coordinates, strict=True))
        self._groups: dict[str, Group] = {}

    def group(self, axis: str) -> Group:
        """The ranks with this rank's coordinates on all other axes; every call returns the same object.

        A group along `"column"` is therefore one row of Attention2D's grid.
        """
        if axis not in self._groups:
            alone = self.sizes[axis] == 1
            handle = None if alone else self.device_mesh.get_group(axis)
            ranks = (dist.get_rank(),) if alone else dist.get_process_group_ranks(handle)
            self._groups[axis] = Group(handle, ranks, self.coordinates[axis])
        return self._groups[axis]

    def sequence(self) -> Group:
        """The group of the ranks that share this rank's sequence, in the order of their shards."""
        size = 1
        for axis in SEQUENCE:
            size *= self.sizes[axis]
        # These axes are innermost, so the ranks are consecutive.
        return self.consecutive(size)

    def consecutive(self, size: int) -> Group:
        """The group of `size` consecutive ranks that this rank is in; `size` divides the number of ranks."""
        if size == 1:
            return Group(None, (dist.get_rank(),), 0)
        handle = _consecutive(dist.group.WORLD, self.device, size).get_group("inner")
        return Group(handle, dist.get_process_group_ranks(handle), dist.get_rank() % size)

    def fsdp_group(self) -> Group:
        """The group of the ranks that have the same tensor-parallel shard of each weight, for FSDP.

        The group has connections of its own, so that weights in transfer do not wait for activations.
        """
        rank, inside = dist.get_rank(), 1
        for axis in AXES[AXES.index("tp") + 1 :]:
            inside *= self.sizes[axis]
        shards = tuple(other // inside % self.sizes["tp"] for other in range(dist.get_world_size()))
        ranks = [other for other, shard in enumerate(shards) if shard == shards[rank]]
        return Group(_fsdp_groups(dist.group.WORLD, shards)[shards[rank]], ranks, ranks.index(rank))


# Process groups live as long as the process, and each costs connections: they are made once.
@functools.cache
def _device_mesh(world: Any, device: str, sizes: tuple[tuple[str, int], ...]) -> Any:
    """The device mesh of the axes that have several ranks.

    A group of one rank would have threads too, and Gloo's poll for messages a hundred times a second.
    """
    from torch.distributed.device_mesh import init_device_mesh

    sharded = {axis: size for axis, size in sizes if size > 1} or {AXES[-1]: 1}
    return init_device_mesh(device, tuple(sharded.values()), mesh_dim_names=tuple(sharded))


@functools.cache
def _fsdp_groups(world: Any, shards: tuple[int, ...]) -> list[Any]:
    """A process group for each tensor-parallel shard; all ranks make all of them.

    Args:
        world: The process group of all ranks, part of the cache's key.
        shards: Each rank's tensor-parallel shard.
    """
    members = ([rank for rank, other in enumerate(shards) if other == shard] for shard in sorted(set(shards)))
    return [dist.new_group(ranks, timeout=TIMEOUT) for ranks in members]


@functools.cache
def _consecutive(world: Any, device: str, size: int) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh(device, torch.arange(dist.get_world_size()).view(-1, size), mesh_dim_names=("outer", "inner"))
