"""Windows for ranks on CPUs: files that all of them have mapped into their memory."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch


class SharedFiles:
    """A window of a group: a file of each rank's, which the others map too. Fresh ones hold nothing that was meant."""

    def __init__(self, group, nbytes):
        self.nbytes, self._group = nbytes, group
        folder = group.objects(tempfile.mkdtemp() if group.rank == 0 else None)[0]
        paths = [str(Path(folder) / str(rank)) for rank in range(group.size)]
        Path(paths[group.rank]).write_bytes(os.urandom(64) * (nbytes // 64 + 1))
        torch.distributed.barrier(group.handle)
        self._memory = [torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8) for path in paths]
        torch.distributed.barrier(group.handle)
        # Mapped memory needs no name.
        Path(paths[group.rank]).unlink()

    def part(self, rank, offset, shape, dtype):
        end = offset + math.prod(shape) * dtype.itemsize
        return self._memory[rank][offset:end].view(dtype).view(*shape)

    def barrier(self):
        torch.distributed.barrier(self._group.handle)
