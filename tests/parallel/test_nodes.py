"""Two launchers of one machine, which stand for two machines: they share nothing but an address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from exact import relative
from tiny import TINY, build, tensors


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What two launchers of two ranks each have left and said, when one rank of the second had failed."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*launcher, "--node-rank", str(node), "-m", "ranks.node", str(folder)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        said = [node.communicate(timeout=200)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return SimpleNamespace(folder=folder, said=said, codes=[node.returncode for node in nodes], at=time.time())


def test_every_rank_has_the_picture_of_one_process(ended):
    entry, pipe = TINY["wan"], build("wan")
    expected = tensors(entry.run(pipe, steps=2))
    for rank in range(4):
        file = ended.folder / f"{rank}.pt"
        assert file.exists(), "\n".join(ended.said)
        found = tensors(torch.load(file))
        # float32.
        assert all(relative(one, other) < 1e-4 for one, other in zip(found, expected, strict=True))


def test_a_rank_that_raises_ends_both_machines(ended):
    assert all(ended.codes) and "ValueError: this rank has had enough" in ended.said[1]
    # The other machine's ranks were waiting for it, and would for ten minutes.
    assert ended.at - float((ended.folder / "failed").read_text()) < 30
    assert "Connection closed by peer" in ended.said[0]
