"""Several machines, of which each has a launcher (`ranks.machines`)."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from exact import relative
from ranks import node
from ranks.machines import NUMBERED, two
from tiny import TINY, build, tensors


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What two launchers of two ranks each have left and said, when one rank of the second had failed."""
    folder = tmp_path_factory.mktemp("ranks")
    nodes = two(NUMBERED, 2, folder, node.main, folder)
    return SimpleNamespace(folder=folder, nodes=nodes)


def test_every_rank_has_the_picture_of_one_process(ended):
    entry, pipe = TINY["wan"], build("wan")
    expected = tensors(entry.run(pipe, steps=2))
    for rank in range(4):
        file = ended.folder / f"{rank}.pt"
        assert file.exists(), "\n".join(each.stderr for each in ended.nodes)
        found = tensors(torch.load(file))
        # float32.
        assert all(relative(one, other) < 1e-4 for one, other in zip(found, expected, strict=True))


def test_a_rank_that_raises_ends_both_machines(ended):
    first, second = ended.nodes
    assert first.returncode and second.returncode and "ValueError: this rank has had enough" in second.stderr
    # The other machine's ranks were waiting for it, and would for ten minutes, which is longer than `two` waits.
    assert re.search("Connection (closed|reset) by peer", first.stderr)
