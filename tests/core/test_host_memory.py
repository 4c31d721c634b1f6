"""Page-locked buffers: pages of their own, given back with the last tensor; and what the machine has."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from diffusers_accel.core import host_memory
from diffusers_accel.core.host_memory import LockedBuffer, available_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 100_000])
def test_a_buffer_has_pages_of_its_own(length):
    buffers = [LockedBuffer.allocate(length, CPU) for _ in range(3)]
    pages = [buffer.memory.data_ptr() // 4096 for buffer in buffers]
    taken = [page + number for page in pages for number in range(-(-max(1, length) // 4096))]
    assert len(set(taken)) == len(taken)
    for buffer in buffers:
        assert buffer.memory.data_ptr() % 4096 == 0 and buffer.memory.numel() == max(1, length)
        # torch asks whether a storage's first byte is locked.
        assert buffer.memory.untyped_storage().data_ptr() == buffer.memory.data_ptr()
        buffer.memory.fill_(7)
    assert all(bool((buffer.memory == 7).all()) for buffer in buffers)


def test_memory_outlives_its_buffer():
    buffer = LockedBuffer.allocate(10_000, CPU)
    view, gone = buffer.memory[5000:], weakref.ref(buffer)
    view.fill_(3)
    del buffer
    gc.collect()
    assert gone() is None and bool((view == 3).all())


class TestAvailable:
    @pytest.fixture
    def files(self, monkeypatch):
        """Files that a machine may have: path -> text."""
        found: dict[str, str] = {}

        def read(path: Path, *_):
            if str(path) not in found:
                raise FileNotFoundError(path)
            return found[str(path)]

        monkeypatch.setattr(host_memory.Path, "read_text", read)
        return found

    def test_the_kernels_estimate(self, files):
        files["/proc/meminfo"] = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   2000 kB\n"
        assert available_bytes() == 2000 * 1024

    def test_a_control_group(self, files):
        files["/proc/meminfo"] = "MemAvailable: 2000 kB\n"
        files |= {
            "/sys/fs/cgroup/memory.max": "1500000\n",
            "/sys/fs/cgroup/memory.current": "1000000\n",
            "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 200000\n",
        }
        assert available_bytes() == 700_000

    def test_a_control_group_without_limit(self, files):
        files["/proc/meminfo"] = "MemAvailable: 2000 kB\n"
        files["/sys/fs/cgroup/memory.max"] = "max\n"
        assert available_bytes() == 2000 * 1024

    def test_the_first_version_of_control_groups(self, files):
        files["/proc/meminfo"] = "MemAvailable: 2000 kB\n"
        files |= {
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "900000\n",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "800000\n",
            "/sys/fs/cgroup/memory/memory.stat": "total_inactive_file 50000\n",
        }
        assert available_bytes() == 150_000

    def test_another_system(self, files):
        assert available_bytes() is None
