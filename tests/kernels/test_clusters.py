"""Clusters of queries and keys: singular vectors against torch's decomposition of the logits, the tree against plain
loops, and attention over clustered blocks against float64. On the CPU through Triton's interpreter, which multiplies
bf16 as if it were integers: inputs are fp16."""

from __future__ import annotations

import math

import exact
import pytest
import torch

from diffusers_accel.kernels.attention import SELECTORS, Inputs, Span, Sparse
from diffusers_accel.kernels.attention.recipe import RECIPES, Recipe

pytest.importorskip("triton")

from diffusers_accel.kernels.attention import clusters, low_bit, token_grid

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = Recipe(qk=None, k_block=0, pv=None)


def topics(length, heads=2, kv_heads=2, dim=48, count=12, seed=0):
    """Queries and keys of a few topics, one drawn for each token: fp16 (1, length, heads, dim)."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for number in (heads, kv_heads):
        centers = 2 * torch.randn(number, count, dim, generator=generator)
        which = torch.randint(count, (number, length), generator=generator)
        x = torch.stack([center[own] for center, own in zip(centers, which, strict=True)], 1)
        sides.append((x + 0.4 * torch.randn(x.shape, generator=generator))[None].to(DEVICE, torch.float16))
    value = torch.randn(1, length, kv_heads, dim, generator=generator).to(DEVICE, torch.float16)
    return sides[0], sides[1] + 3.0, value


def covariance(x):
    x = x[0].transpose(0, 1).float()
    x = x - x.mean(1, keepdim=True)
    return x.transpose(1, 2) @ x / x.shape[1]


@pytest.mark.parametrize("dim", [48, 128])
def test_singular_vectors_of_the_logits(dim):
    """Coordinates are singular vectors of the centred logits, in proportion to their singular values."""
    generator = torch.Generator().manual_seed(1)
    shape = torch.linspace(0, -12, dim).exp()
    query, key = ((torch.randn(1, 400, 2, dim, generator=generator) * shape + turn).to(DEVICE) for turn in (0, 3))
    query[..., :3] *= torch.tensor([4.0, 2.0, 1.0], device=DEVICE)
    vectors = clusters.singular_vectors(covariance(query), covariance(key))
    for head in range(2):
        q, k = (x[0, :, head].double() - x[0, :, head].double().mean(0) for x in (query, key))
        left, values, right = torch.linalg.svd(q @ k.T)
        for x, vector, expected in ((q, vectors[0][head], left.T), (k, vectors[1][head], right)):
            found = x @ vector.double()
            spread = found.std(0, correction=0)
            torch.testing.assert_close(spread[:4], (values / values[0])[:4], rtol=0.05, atol=1e-3)
            assert spread[8:].eq(0).all()
            cosines = (found[:, :3] / found[:, :3].norm(dim=0) * expected[:3].T).sum(0).abs()
            assert cosines.min() > 0.99


def test_fewer_directions_than_coordinates():
    """Logits of rank two: the other coordinates are zero, none is invalid."""
    generator = torch.Generator().manual_seed(2)
    basis = torch.randn(2, 48, generator=generator)
    query, key = ((torch.randn(1, 300, 1, 2, generator=generator) @ basis).to(DEVICE) for _ in range(2))
    for x, vector in zip(
        (query, key), clusters.singular_vectors(covariance(query), covariance(key)), strict=True
    ):  # fmt: skip
        found = (x[0, :, 0] - x[0, :, 0].mean(0)) @ vector[0]
        assert found.isfinite().all()
        assert found.std(0)[0] > 0.5 and found.std(0)[2:].max() < 0.05
    same = clusters.singular_vectors(torch.zeros(1, 48, 48, device=DEVICE), torch.zeros(1, 48, 48, device=DEVICE))
    assert all(each.isfinite().all() for each in same)


def leaves(y, block):
    """The tokens of one chunk, float32 (tokens, axes), halved along the axis of the widest spread: places beyond the
    last token fill the chunk up."""
    tokens = list(range(token_grid.CHUNK_BLOCKS * block))
    segments = [tokens]
    while len(segments[0]) > block:
        halves = []
        for segment in segments:
            own = [token for token in segment if token < len(y)]
            axis = int(y[own].var(0, correction=0).argmax()) if len(own) > 1 else 0
            segment = sorted(segment, key=lambda token: (float(y[token, axis]) if token < len(y) else math.inf, token))
            half = len(segment) // 2
            halves += [segment[:half], segment[half:]]
        segments = halves
    return [token for segment in segments for token in segment if token < len(y)]


@pytest.mark.parametrize("count", [512, 700, 33])
def test_the_leaves_of_a_tree(count):
    block, first = 16, 5
    generator = torch.Generator().manual_seed(count)
    y = (torch.randn(1, 2, count, 8, generator=generator) * torch.linspace(1, 0.3, 8)).to(torch.float16)
    order = torch.arange(count + 9, dtype=torch.int32).repeat(1, 2, 1).to(DEVICE)
    clusters.tree_order(y.to(DEVICE), order, first, block)
    chunk = token_grid.CHUNK_BLOCKS * block
    for head in range(2):
        expected = []
        for start, part in zip(range(0, count, chunk), y[0, head].float().split(chunk), strict=True):
            # The last level sorts within a leaf no more: leaves are compared as sets.
            expected += [first + start + token for token in leaves(part, block)]
        found = order[0, head].tolist()
        assert found[:first] == list(range(first)) and found[first + count :] == list(range(first + count, count + 9))
        for start in range(0, count, block):
            part = slice(start, min(start + block, count))
            assert set(found[first:][part]) == set(expected[part])


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_clusters_of_topics(kv_heads):
    """Tokens outside of the span and chunks keep their places, and blocks hold fewer topics than before."""
    query, key, _ = topics(600, kv_heads=kv_heads)
    block = 16
    found = clusters.cluster(query, key, block, ((16, 590), (32, 600)))
    for x, order, (begin, end) in zip((query, key), found, ((16, 590), (32, 600)), strict=True):
        assert order.shape == (1, x.shape[2], 600)
        moving = torch.arange(begin, end)
        for row in order[0].long().cpu():
            assert row[:begin].equal(torch.arange(begin)) and row[end:].equal(torch.arange(end, 600))
            for part in moving.split(token_grid.CHUNK_BLOCKS * block):
                assert row[part].sort().values.equal(part)
        moved = clusters.ordered(x, order)
        spreads = [
            each[0, begin : begin + 560].float().unflatten(0, (-1, block)).var(1).mean() for each in (x, moved)
        ]  # fmt: skip
        assert spreads[1] < 0.5 * spreads[0]


def test_an_order_and_back():
    x = torch.randn(2, 70, 3, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    order = torch.stack([torch.randperm(70, generator=torch.Generator().manual_seed(seed)) for seed in range(6)])
    order = order.view(2, 3, 70).to(DEVICE, torch.int32)
    moved = clusters.ordered(x, order)
    expected = x.gather(1, order.long().transpose(1, 2)[..., None].expand(-1, -1, -1, 40))
    assert torch.equal(moved, expected)
    assert torch.equal(clusters.ordered(moved, order, back=True), x)
    # A view, as processors make them of a joint projection.
    joint = torch.randn(2, 70, 9, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    part = joint[:, :, 3:6]
    assert torch.equal(clusters.ordered(part, order), clusters.ordered(part.contiguous(), order))


@pytest.mark.parametrize("recipe", [next(iter(RECIPES["sage-fp8"].values())), EXACT], ids=["sage-fp8", "16-bit"])
@pytest.mark.parametrize("kv_heads", [pytest.param(2, marks=pytest.mark.thorough), 1])
def test_attention_over_clusters(recipe, kv_heads):
    """With all blocks it is dense attention; with a quarter of them it is the masked attention of the lists, and holds
    more of the softmax than blocks of neighbours."""
    query, key, value = topics(620, kv_heads=kv_heads)
    seen = []

    def run(order, keep):
        span = Span((1, 1, 608), 12, 12, order, 32)
        sparse = Sparse(
            selector=SELECTORS.get("sub-blocks"),
            amount=keep,
            block=32,
            min_tokens=1,
            centroids=False,
            span=lambda *_: span,
        )
        x = Inputs(query, key, value, return_lse=True)
        moved, back = sparse.clustered(x) if order == "clusters" else (x, lambda result: result)

        def choose(x, data):
            seen.append(sparse.choose(x, data))
            return seen[-1]

        return back(low_bit.attention(moved, recipe, choose=choose)), moved

    (found, lse), _ = run("clusters", 1.0)
    expected, expected_lse = exact.attention(query, key, value)
    least = 0.99999 if recipe is EXACT else 0.998
    assert exact.cosine(found, expected) > least
    assert (lse.double() - expected_lse).abs().max() < (5e-3 if recipe is EXACT else 0.1)
    errors = {}
    for order in ("model", "clusters"):
        (found, _), moved = run(order, 0.25)
        errors[order] = 1 - exact.cosine(found, expected)
        if order == "clusters":
            lists = seen[-1]
            mask = torch.zeros(*lists.indices.shape[:3], 20, dtype=torch.bool, device=DEVICE)
            place = torch.arange(20, device=DEVICE)
            listed = lists.indices.long().where(place < lists.counts[..., None], lists.indices[..., :1].long())
            mask.scatter_(3, listed, True)
            mask = mask.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, :620, :620]
            masked, _ = exact.attention(moved.query, moved.key, moved.value, mask)
            direct = low_bit.attention(moved, recipe, choose=lambda *_, lists=lists: lists)[0]
            assert exact.cosine(direct, masked) > least
    assert errors["clusters"] < 0.5 * errors["model"]
