"""Ulysses, Ring and Attention2D on real processes, against attention of the whole sequence in float64."""

from __future__ import annotations

from types import SimpleNamespace

import exact
import pytest
import torch
from ranks import context_parallel

from diffusers_accel import Unsupported
from diffusers_accel.kernels.attention import Inputs
from diffusers_accel.kernels.attention.context_parallel import ContextParallelAttention, Layout
from diffusers_accel.kernels.attention.ulysses import KEY, QUERY, VALUE, UlyssesAllToAll

WAYS = {
    "ulysses": (2, {"ulysses": 2}),
    "ring": (2, {"ring": 2}),
    "rows": (2, {"row": 2}),
    "columns": (2, {"column": 2}),
    "ulysses of 4": (4, {"ulysses": 4}),
    "ring of 4": (4, {"ring": 4}),
    "grid": (4, {"row": 2, "column": 2}),
    "ulysses in a ring": (4, {"ring": 2, "ulysses": 2}),
    "ulysses in a column": (4, {"row": 2, "ulysses": 2}),
}


def stub(size):
    return SimpleNamespace(size=size, rank=0, ranks=tuple(range(size)))


@pytest.mark.parametrize(
    ("ring", "layout", "inputs", "words"),
    [
        (2, Layout((8,), (8,)), {"is_causal": True}, "a causal mask is known for one stream"),
        (1, Layout((4, 4), (4, 4)), {"is_causal": True}, "a causal mask is known for one stream"),
        (1, Layout((8,), (8,), 2), {"is_causal": True}, "a causal mask is known for one stream"),
        (1, Layout((8,), (8,)), {"attn_mask": torch.zeros(1, 1, 5, 8)}, "is not over all 8 queries"),
        (1, Layout((8,), (8,)), {"attn_mask": torch.zeros(1, 1, 8, 3)}, "neither over all 8 keys nor"),
    ],
)
def test_masks_that_cannot_be_sharded_are_refused(ring, layout, inputs, words):
    one, x = stub(1), torch.zeros(1, 8 // ring, 2, 16)
    ways = ContextParallelAttention(stub(ring), one, stub(ring), one, one)
    with pytest.raises(Unsupported, match=words):
        ways.attend(Inputs(x, x, x, **inputs), layout, lambda inputs: inputs.query)


def check(pools, way, queries, keys, mask=None, heads=6, kv_heads=6, shared=0, local_mask=False, symm_mem=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(queries), heads), (shared + sum(keys), kv_heads), (shared + sum(keys), kv_heads)]
    query, key, value = (torch.randn(2, length, count, 16, generator=generator) for length, count in shapes)
    expected, _ = exact.attention(query, key, value, mask)
    size, sizes = WAYS[way]
    found = torch.full_like(query, float("nan"))
    for rows, out in pools[size].run(
        context_parallel.attend, sizes, query, key, value, mask, (queries, keys), shared, local_mask, symm_mem
    ):
        found[:, rows] = out
    # float32 against float64: sums of some sixty terms.
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_one_stream(pools, way):
    check(pools, way, [37], [37])


@pytest.mark.parametrize("way", WAYS)
def test_two_streams_and_other_keys(pools, way):
    check(pools, way, [13, 30], [7, 22])


@pytest.mark.parametrize("way", WAYS)
def test_heads_that_do_not_divide(pools, way):
    check(pools, way, [20], [20], heads=5, kv_heads=5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grouped_heads_and_shared_keys(pools, way, kv_heads):
    check(pools, way, [21], [21], heads=8, kv_heads=kv_heads, shared=9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["keys", "own keys", "pairs", "heads"])
def test_masks(pools, way, kind):
    shape = {"keys": (2, 1, 1, 29), "own keys": (2, 1, 1, 29), "pairs": (2, 1, 43, 29), "heads": (1, 6, 43, 29)}[kind]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 3] = True  # no row without a key
    check(pools, way, [13, 30], [7, 22], mask, local_mask=kind == "own keys")


@pytest.mark.parametrize("way", ["ring of 4", "grid", "ulysses of 4"])
def test_fewer_keys_than_ranks(pools, way):
    check(pools, way, [17], [3])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kv_heads", [5, 1])
def test_over_symmetric_memory(pools, way, kv_heads):
    """Of which some ranks have more keys, or more queries, than others."""
    check(pools, way, [13, 30], [7, 22], heads=5, kv_heads=kv_heads, shared=3 if kv_heads == 1 else 0, symm_mem=True)


@pytest.mark.parametrize("symm_mem", [False, True])
@pytest.mark.parametrize("way", ["ulysses of 4", "ulysses in a ring"])
def test_rounded_on_their_way(pools, way, symm_mem):
    """As attention of rounded tensors, itself rounded, where it makes sense to say so; the few that a last place moves
    are rounded to another number."""
    generator = torch.Generator().manual_seed(0)
    size, sizes = WAYS[way]
    given = [torch.randn(2, 29, 5, 16, generator=generator) for _ in range(3)]

    def rounded(x):
        scale = x.float().abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()

    expected = rounded(exact.attention(*map(rounded, given))[0])
    found = torch.full_like(given[0], float("nan"))
    for rows, out in pools[size].run(
        context_parallel.attend, sizes, *given, None, ([29], [29]), 0, False, symm_mem, True
    ):
        found[:, rows] = out
    assert exact.relative(found, expected) < 2e-3
    assert 5e-3 < exact.relative(found, exact.attention(*given)[0]) < 0.06


@pytest.mark.parametrize(
    ("async_op", "together"),
    [(False, [[VALUE, QUERY, KEY]]), (True, [[VALUE], [QUERY], [KEY]]), (True, [[VALUE, KEY], [QUERY]])],
    ids=["together", "one by one", "two at once"],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize("way", ["ulysses of 4", "ulysses in a ring"])
def test_before_norm_and_rotation(pools, way, kv_heads, masked, async_op, together):
    """Query, key and value that are normed and rotated as they are sent."""
    generator = torch.Generator().manual_seed(0)
    streams, (size, sizes) = [13, 30], WAYS[way]
    query, key, value = (torch.randn(2, 43, count, 16, generator=generator) for count in (8, kv_heads, kv_heads))
    weights = [torch.randn(count, generator=generator) for count in (16, 16 * kv_heads)]
    angles = torch.rand(1, 43, 1, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 43, generator=generator) > 0.4 if masked else None
    ready = [exact.normed_rotated(x, weight, 1e-6, angles) for x, weight in zip((query, key), weights, strict=True)]
    expected, _ = exact.attention(*ready, value, mask)
    tables = [item.repeat_interleave(2, -1).float() for item in (angles.cos(), angles.sin())]
    found = torch.full_like(query, float("nan"))
    for rows, out in pools[size].run(
        context_parallel.sent, sizes, query, key, value, mask, streams, weights, tables, async_op, together
    ):
        found[:, rows] = out
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["ring of 4", "grid"])
def test_ranks_that_see_no_key(pools, way):
    """A mask that leaves the keys of one rank alone."""
    mask = torch.zeros(1, 1, 1, 20, dtype=torch.bool)
    mask[..., 6:9] = True
    check(pools, way, [20], [20], mask)


def test_sizes_share_what_they_leave_from():
    """A server sees many sizes: memory that copies leave from is that of the largest, twice at most."""
    group = SimpleNamespace(symm_mem=SimpleNamespace(), rank=0, size=2)
    all_to_all, largest = UlyssesAllToAll(group), 0
    for tokens in (7, 50, 13, 400, 399, 401, 7, 1600):
        place = torch.empty(1, tokens, 2, 8)
        largest = max(largest, place.numel() * 4)
        there = all_to_all._staging_views(("size", tokens), 0, [place, place])
        assert there[1].shape == place.shape and there[1].is_contiguous()
        there[1].fill_(tokens)
    held = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for key in all_to_all._views
            for item in all_to_all._views[key]}  # fmt: skip
    # Of both places, powers of two.
    assert sum(held.values()) <= 2 * 4 * largest
