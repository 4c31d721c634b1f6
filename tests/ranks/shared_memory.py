"""Symmetric memory for ranks on CPUs: files that all of them have mapped into their memory."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch


class SharedFiles:
    """A symmetric buffer: a file of each rank, which its peers map too. It begins with random bytes."""

    def __init__(self, group, nbytes):
        self.nbytes, self._group = nbytes, group
        folder = group.all_gather_object(tempfile.mkdtemp() if group.rank == 0 else None)[0]
        paths = [str(Path(folder) / str(rank)) for rank in range(group.size)]
        Path(paths[group.rank]).write_bytes(os.urandom(64) * (nbytes // 64 + 1))
        torch.distributed.barrier(group.handle)
        self._memory = [torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8) for path in paths]
        torch.distributed.barrier(group.handle)
        # Mapped memory needs no name.
        Path(paths[group.rank]).unlink()

    def peer_view(self, rank, offset, shape, dtype):
        end = offset + math.prod(shape) * dtype.itemsize
        return self._memory[rank][offset:end].view(dtype).view(*shape)

    def barrier(self):
        torch.distributed.barrier(self._group.handle)
