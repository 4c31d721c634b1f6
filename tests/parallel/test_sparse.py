"""Sparse attention of a request that ranks share: blocks are chosen for whole sequences, per head or per branch."""

from __future__ import annotations

import pytest
from ranks import sparse

pytest.importorskip("triton")


@pytest.mark.parametrize("parallel", [{"ulysses": 2}, {"cfg": 2}], ids=["ulysses", "cfg"])
def test_two_ranks(pools, parallel):
    for error, counts in pools[2].run(sparse.divided, "wan", parallel):
        # Float32 sums in another order; another choice of blocks differs by far more.
        assert error < 2e-3
        assert counts["exact, 33% of blocks"] and "exact" not in counts
