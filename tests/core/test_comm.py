"""Collectives and the mesh, on real processes."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from ranks import collectives

from diffusers_accel.core.comm import shard_sizes
from diffusers_accel.core.symm_mem import SymmetricMemory, buffer_offsets


def test_shard_sizes_are_tensor_splits():
    for length in range(9):
        for ranks in (1, 2, 3, 4):
            assert shard_sizes(length, ranks) == [len(part) for part in torch.arange(length).tensor_split(ranks)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("length", [8, 7, 3])
@pytest.mark.parametrize("symm_mem", [False, True], ids=["collectives", "symm_mem"])
def test_collectives(pools, size, length, symm_mem):
    whole = torch.arange(2.0 * length * 3).view(2, length, 3)
    shards = whole.tensor_split(size, 1)
    for rank, found in enumerate(pools[size].run(collectives.collectives, length, symm_mem)):
        assert torch.equal(found["mine"], shards[rank])
        assert torch.equal(found["gathered"], whole) and torch.equal(found["passing"], whole.mT)
        assert torch.equal(found["exchanged"], whole * (rank + 1))
        assert torch.equal(found["turned"], whole.mT)
        assert torch.equal(found["passed"], shards[rank - 1])
        # A recorded graph uses the symm_mem it has used, whatever comes before and after it.
        assert found["total"] and not any(found["turns"])
        assert found["summed"].tolist() == [sum(range(size))] * 3
        assert found["told"].item() == size - 1
        assert found["objects"] == [{"rank": other} for other in range(size)]


def test_places(pools):
    found = pools[4].run(collectives.places, {"cfg": 2, "ulysses": 2})
    for rank, (place, groups, sequence, number) in enumerate(found):
        assert (place["cfg"], place["ulysses"]) == divmod(rank, 2)
        assert groups["ulysses"] == sequence == (rank - rank % 2, rank - rank % 2 + 1)
        assert groups["cfg"] == (rank % 2, rank % 2 + 2)
        assert groups["dp"] == (rank,)
        assert number == rank % 2
    found = pools[4].run(collectives.places, {"tp": 2, "ulysses": 2})
    for rank, (place, groups, sequence, number) in enumerate(found):
        assert (place["tp"], place["ulysses"], number) == (*divmod(rank, 2), rank % 2)
        # A sequence's ranks are neighbours, of one place along tp.
        assert groups["ulysses"] == sequence == (rank - rank % 2, rank - rank % 2 + 1)
        assert groups["tp"] == (rank % 2, rank % 2 + 2)
    found = pools[4].run(collectives.places, {"row": 2, "column": 2})
    for rank, (place, groups, sequence, number) in enumerate(found):
        assert (place["row"], place["column"]) == divmod(rank, 2)
        # A group along an axis holds those that differ in it.
        assert groups["column"] == (rank - rank % 2, rank - rank % 2 + 1)
        assert groups["row"] == (rank % 2, rank % 2 + 2)
        assert sequence == (0, 1, 2, 3)
        assert number == rank


def test_an_axis_of_one_rank_has_no_group(pools):
    """Nor has one of all ranks another than the process's own."""
    assert pools[4].run(collectives.groups_of, {"cfg": 2, "ulysses": 2}) == [2] * 4
    assert pools[4].run(collectives.groups_of, {"ulysses": 4}) == [0] * 4


class Memory:
    """A buffer without memory."""

    def __init__(self, group, nbytes):
        self.nbytes = nbytes


def test_buffers_are_used_in_turn_and_grow():
    symm_mem = SymmetricMemory(None, Memory)
    first, second = symm_mem.next_buffer(100), symm_mem.next_buffer(100)
    assert first is not second and symm_mem.next_buffer(first.nbytes) is first and symm_mem.next_buffer(1) is second
    larger = symm_mem.next_buffer(first.nbytes + 1)
    assert larger is not first and larger.nbytes >= first.nbytes + 1
    # Recorded graphs write to the smaller one.
    assert symm_mem._outgrown == [first] and symm_mem.next_buffer(1) is second and symm_mem.next_buffer(1) is larger


class Others:
    """A group of two, with given answers of the other rank."""

    def __init__(self):
        self.said = None

    def all_gather_object(self, value):
        return [value, self.said]


class Passed(Memory):
    """Sizes of the buffers whose barriers were passed, in order."""

    order: ClassVar = []

    def barrier(self):
        Passed.order.append(self.nbytes)


def test_ranks_agree_again_after_an_error():
    """Those behind pass the barriers that others wait in; then all begin with the first buffer."""
    small, large = 1 << 20, 1 << 21
    for other, expected in (
        ((0, [(small, 1), (large, 1)]), [large, large]),  # this rank is one barrier behind
        ((1, [(small, 1), (large, 0)]), []),  # no difference: an odd number of exchanges ends with a barrier
        ((0, [(small, 0), (large, 0)]), [large]),  # the other one is behind, and has taken the second too
    ):
        Passed.order.clear()
        group = Others()
        symm_mem = SymmetricMemory(group, Passed)
        symm_mem.next_buffer(1).barrier()
        symm_mem._buffers[1] = symm_mem._buffers[1] or type(symm_mem._buffers[0])(Passed(group, large))
        group.said = other
        symm_mem.resynchronize()
        assert Passed.order[1:] == (expected or [large]), other
        assert symm_mem.next_buffer(1).nbytes == small


def test_a_window_that_has_grown_on_one_rank_is_replaced():
    group = Others()
    symm_mem = SymmetricMemory(group, Passed)
    before = [symm_mem.next_buffer(1), symm_mem.next_buffer(1)]
    group.said = (0, [(1 << 22, 0), (1 << 20, 0)])
    symm_mem.resynchronize()
    assert symm_mem._outgrown == before and symm_mem.next_buffer(1) not in before


@pytest.mark.parametrize("size", [2, 4])
def test_exchanges_after_one_that_was_broken_off(pools, size):
    """Without resynchronization ranks write to different buffers, and read wrong values."""
    assert all(pools[size].run(collectives.broken_off, True))
    assert not all(pools[size].run(collectives.broken_off, False))


def test_places_in_a_window_do_not_overlap():
    offsets, end = buffer_offsets([(3, 5), (0,), (7,)], [torch.bfloat16, torch.float32, torch.float64])
    assert all(offset % 16 == 0 for offset in offsets)
    assert offsets[1] >= 3 * 5 * 2 and offsets[2] >= offsets[1] and end >= offsets[2] + 7 * 8
