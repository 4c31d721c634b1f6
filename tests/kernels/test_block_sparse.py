"""Sparse attention over lists of key blocks: lists against torch's own sorts, attention against masked float64
attention. On the CPU through Triton's interpreter, which multiplies bf16 as if it were integers: inputs are fp16."""

from __future__ import annotations

import math
from dataclasses import replace

import exact
import pytest
import torch

from diffusers_accel.kernels.attention import RECIPES, Inputs
from diffusers_accel.kernels.attention.recipe import Recipe, hadamard_matrix

triton = pytest.importorskip("triton")

from diffusers_accel.kernels.attention import block_lists, low_bit  # noqa: E402
from diffusers_accel.kernels.attention.quantize import quantize  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = Recipe(qk=None, k_block=0, pv=None)
DEFAULTS = [*(next(iter(recipes.values())) for recipes in RECIPES.values()), EXACT]
NAMES = [*RECIPES, "16-bit"]


def inputs(batch=1, length=70, keys=200, heads=2, kv_heads=2, dim=64, seed=0):
    """Gaussian inputs; K has outlying channels, the same for all tokens."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, length, heads, dim, generator=generator)
    key = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    key += 8 * torch.randn(dim, generator=generator) * (torch.rand(dim, generator=generator) < 0.2)
    value = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    return [item.to(DEVICE, torch.float16) for item in (query, key, value)]


def kept(lists, columns):
    """The lists as a mask: (batch, heads, query blocks, key blocks). Indices are in ascending order."""
    mask = torch.zeros(*lists.counts.shape, columns, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, lists.counts.shape)).tolist():
        row = lists.indices[tuple(place)][: lists.counts[tuple(place)]].long().cpu()
        assert row.tolist() == sorted(set(row.tolist()))
        mask[tuple(place)][row] = True
    return mask


# --- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 7, 64, 150, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_highest_scores(columns, dtype):
    scores = torch.randn(2, 3, 5, columns, generator=torch.Generator().manual_seed(columns)).to(DEVICE, dtype)
    budget = torch.tensor([1, columns // 2, columns, 2 * columns, 3, 0], dtype=torch.float32, device=DEVICE)
    lists = block_lists.select(scores, budget, 64, 64)
    counts = budget.clamp(max=columns).long().view(2, 3, 1).expand(2, 3, 5)
    assert torch.equal(lists.counts.long(), counts)
    order = scores.float().sort(dim=-1, descending=True, stable=True).indices  # of equal scores, the first ones
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected.scatter_(-1, order, torch.arange(columns, device=DEVICE) < counts[..., None])
    assert torch.equal(kept(lists, columns), expected.cpu())


def test_equal_scores():
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, -0.0, 0.0], device=DEVICE).expand(1, 1, 2, 6)
    for budget, expected in ((1, [1]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 4, 5])):
        lists = block_lists.select(scores, torch.full((1,), float(budget), device=DEVICE), 64, 64)
        assert lists.indices[0, 0, 1, :budget].tolist() == expected


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_a_share_of_the_softmax(share):
    scores = 3 * torch.randn(1, 2, 6, 90, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = kept(block_lists.select(scores, torch.full((2,), share, device=DEVICE), 64, 64, rule="mass"), 90)
    weights = scores.double().softmax(-1).cpu()
    reached = (weights * mask).sum(-1)
    least = weights.masked_fill(~mask, math.inf).amin(-1)
    assert (reached >= share - 1e-6).all()
    # No block could be left out, and none that is left out is larger.
    assert (reached - least < share).all() and (weights.masked_fill(mask, 0).amax(-1) <= least).all()


@pytest.mark.parametrize("rule", ["count", "mass"])
def test_blocks_that_are_always_kept(rule):
    scores = torch.randn(1, 2, 4, 20, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    forced = torch.zeros(4, 20, dtype=torch.bool, device=DEVICE)
    forced[0] = True
    forced[:, 19] = True
    budget = torch.full((2,), 5.0 if rule == "count" else 0.3, device=DEVICE)
    lists = block_lists.select(scores, budget, 64, 64, rule=rule, forced=forced)
    mask = kept(lists, 20)
    assert mask[:, :, 0].all() and mask[..., 19].all()
    if rule == "count":
        assert lists.counts[:, :, 0].eq(20).all() and lists.counts[:, :, 1:].eq(5).all()


@pytest.mark.parametrize("tau", [-0.5, 0.0, 1.0, 9.0])
def test_scores_above_the_spread(tau):
    scores = 3 * torch.randn(2, 2, 6, 90, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    scores[0, 0, 0] = 1.0  # no spread at all
    mask = kept(block_lists.select(scores, torch.full((4,), tau, device=DEVICE), 64, 64, rule="spread"), 90)
    row = scores.double().cpu()
    expected = row > row.mean(-1, keepdim=True) + tau * row.std(-1, keepdim=True, correction=0)
    # The highest score is kept at least.
    expected |= row == row.amax(-1, keepdim=True)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(("rule", "amount"), [("count", 4.0), ("mass", 0.3), ("spread", 1.5)])
def test_a_score_of_infinity_is_always_kept(rule, amount):
    """It has no part in the mean, the spread or the softmax of the others."""
    scores = torch.randn(1, 1, 3, 20, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    budget = torch.full((1,), amount, device=DEVICE)
    others = kept(block_lists.select(scores[..., 2:].contiguous(), budget, 64, 64, rule=rule), 18)
    scores[..., :2] = float("inf")
    lists = block_lists.select(scores, budget, 64, 64, rule=rule, mark=True)
    mask = kept(lists, 20)
    assert mask[..., :2].all() and torch.equal(lists.kept.bool().cpu(), mask)
    if rule == "count":
        assert lists.counts.eq(4).all()
    else:
        assert torch.equal(mask[..., 2:], others)


def test_lists_of_a_mask():
    mask = torch.rand(2, 3, 4, 37, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[0, 0, 0], mask[0, 0, 1] = False, True
    assert torch.equal(kept(block_lists.lists_of(mask.to(DEVICE), 64, 64), 37), mask)


@pytest.mark.parametrize("columns", [5, 32, 70, 200])
def test_lists_of_bits(columns):
    """A choice is the same after its bits were written and read."""
    scores = torch.randn(2, 2, 3, columns, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    bits = torch.full((2, 2, 3, -(-columns // 32)), -1, dtype=torch.int32, device=DEVICE)
    tau = torch.zeros(4, device=DEVICE)
    lists = block_lists.select(scores, tau, 64, 64, rule="spread", bits=bits)
    found = block_lists.lists_of_bits(bits, columns, 64, 64, mark=True)
    assert torch.equal(kept(found, columns), kept(lists, columns))
    assert torch.equal(found.kept.bool().cpu(), kept(lists, columns)) and not found.even
    # No bit beyond the last block.
    ones = sum(((bits.long() & 0xFFFFFFFF) >> place) & 1 for place in range(32)).sum(-1)
    assert torch.equal(ones.cpu(), lists.counts.long().cpu())


def test_long_rows_first():
    counts = torch.tensor([[[3, 100, 4, 101, 0, 50]]], dtype=torch.int32, device=DEVICE)
    assert block_lists.long_first(counts).tolist() == [1, 3, 5, 2, 0, 4]


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("query_parts", "key_parts"), [(1, 1), (4, 4), (2, 1), (8, 2)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_scores_of_blocks(query_parts, key_parts, heads):
    generator = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(2, heads[0], 41, 48, generator=generator)
    key = 3 * torch.randn(2, heads[1], 75, 48, generator=generator)
    found = block_lists.block_scores(query.to(DEVICE), key.to(DEVICE), query_parts, key_parts, 0.2).cpu()
    logits = query.double() @ key.double().repeat_interleave(heads[0] // heads[1], 1).transpose(2, 3) * 0.2
    expected = torch.stack(
        [
            torch.stack([part.flatten(-2).logsumexp(-1) for part in row.split(key_parts, 3)], -1)
            for row in logits.split(query_parts, 2)
        ],
        2,
    )
    # A GPU multiplies float32 as TF32, with 10 bits of mantissa: products here are up to 60.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05 if DEVICE == "cuda" else 1e-4)


# --- means -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", DEFAULTS, ids=NAMES)
@pytest.mark.parametrize("pool", [(128, 128), (64, 32), (16, 16)])
def test_means_of_neighbours(recipe, pool):
    query, key, value = inputs(batch=2, length=150, keys=200, kv_heads=1, dim=96)
    x = Inputs(query, key, value, scale=0.3)
    found_query, found_key = block_lists.operand_means(x, quantize(x, recipe), *pool)
    matrix = hadamard_matrix(96).double() if recipe.qk is not None else torch.eye(96).double()
    for item, found, size, centred in ((query, found_query, pool[0], False), (key, found_key, pool[1], True)):
        x = item.double().cpu().transpose(1, 2)
        x = x - x.mean(2, keepdim=True) if centred and recipe.qk is not None else x
        expected = torch.stack([part.mean(2) for part in (x @ matrix).split(size, 2)], 2)
        # Means of rounded values: each is off by half a step at most, which few neighbours average out.
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-3, atol=0.05 if recipe.qk else 2e-3)


@pytest.mark.parametrize("length", [128, 150])
def test_similarity_of_a_blocks_tokens(length):
    """The mean of all cosines of a block, each token's own included, whatever the tokens' lengths."""
    x = torch.randn(2, 3, length, 48, generator=torch.Generator().manual_seed(0)) + 0.5
    x *= torch.rand(2, 3, length, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    expected = torch.stack(
        [
            torch.nn.functional.cosine_similarity(part[..., :, None, :], part[..., None, :, :], dim=-1).mean((-1, -2))
            for part in x.double().split(64, 2)
        ],
        -1,
    )
    found = block_lists.self_similarity(x.to(DEVICE), 64).double().cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", DEFAULTS, ids=NAMES)
@pytest.mark.parametrize(
    ("query_block", "key_block", "prefetch_logits"), [(64, 64, False), (128, 64, True), (128, 128, False)]
)
@pytest.mark.parametrize("keys", [300, 384])
def test_imposed_lists(recipe, query_block, key_block, prefetch_logits, keys):
    query, key, value = inputs(length=270, keys=keys, kv_heads=1)
    rows, columns = -(-270 // query_block), -(-keys // key_block)
    mask = torch.rand(1, 2, rows, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 0, 0] = True
    mask[0, 0, 1] = False  # nothing at all
    mask[0, 1, 0] = torch.arange(columns) == columns - 1  # the last tile alone, which may be partial
    tile = low_bit.Tile(64, key_block, 4, 2, prefetch_logits=prefetch_logits)
    found, lse = low_bit.attention(
        Inputs(query, key, value, return_lse=True), recipe, tile=tile,
        choose=lambda *_: block_lists.lists_of(mask.to(DEVICE), query_block, key_block),
    )  # fmt: skip
    spread = mask.repeat_interleave(query_block, 2).repeat_interleave(key_block, 3)[:, :, :270, :keys].to(DEVICE)
    expected, expected_lse = exact.attention(query, key, value, spread)
    empty = ~spread.any(-1)
    assert found.transpose(1, 2)[empty].eq(0).all() and lse[empty].eq(-math.inf).all()
    expected = expected.transpose(1, 2).masked_fill(empty[..., None], 0).transpose(1, 2)
    assert exact.cosine(found, expected) > (0.999999 if recipe is EXACT else 0.999)
    assert (lse.double() - expected_lse)[~empty].abs().max() < (2e-3 if recipe is EXACT else 0.03)


@pytest.mark.parametrize("recipe", DEFAULTS, ids=NAMES)
def test_all_blocks_are_dense_attention(recipe):
    """Beside a mask over keys, and with more than one sample."""
    query, key, value = inputs(batch=2, length=140, keys=200)
    mask = torch.ones(2, 1, 1, 200, dtype=torch.bool, device=DEVICE)
    mask[0, ..., 90:] = False
    every = torch.ones(2, 2, 2, 2, dtype=torch.bool, device=DEVICE)
    for given in (None, mask):
        x = Inputs(query, key, value, given, return_lse=True)
        found, lse = low_bit.attention(x, recipe, choose=lambda *_: block_lists.lists_of(every, 128, 128))
        expected, expected_lse = exact.attention(query, key, value, given)
        assert exact.cosine(found, expected) > (0.999999 if recipe is EXACT else 0.999)
        assert (lse.double() - expected_lse).abs().max() < (2e-3 if recipe is EXACT else 0.03)


def with_centroids(query, key, value, mask, block, scale=None):
    """Attention in float64 in which the mean of each block that is left out stands for its keys."""
    q, k, v = (item.double().transpose(1, 2) for item in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    spread = mask.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, : q.shape[2], : k.shape[2]]
    logits = (q @ k.transpose(2, 3) * scale).masked_fill(~spread.to(q.device), -math.inf)
    means = [torch.stack([part.mean(2) for part in item.split(block[1], 2)], 2) for item in (k, v)]
    number = torch.tensor([part.shape[2] for part in k.split(block[1], 2)], device=q.device).double()
    rows = mask.repeat_interleave(block[0], 2)[:, :, : q.shape[2]].to(q.device)
    coarse = (q @ means[0].transpose(2, 3) * scale + number.log()).masked_fill(rows, -math.inf)
    logits = torch.cat([logits, coarse], -1)
    return (logits.softmax(-1) @ torch.cat([v, means[1]], 2)).transpose(1, 2), logits.logsumexp(-1)


@pytest.mark.parametrize("recipe", DEFAULTS, ids=NAMES)
@pytest.mark.parametrize(("block", "length"), [((64, 64), 200), ((128, 128), 384), ((32, 32), 150)])
def test_centroids(recipe, block, length):
    query, key, value = inputs(length=length, keys=length, kv_heads=1, dim=48)
    value += 1.0
    x = Inputs(query, key, value, return_lse=True)
    rows, columns = -(-length // block[0]), -(-length // block[1])
    mask = torch.rand(1, 2, rows, columns, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0, 0, 0], mask[0, 1, 0] = True, False  # all of them, and none

    def choose(x, data):
        lists = block_lists.lists_of(mask.to(DEVICE), *block, mark=True)
        return replace(lists, centroids=block_lists.centroids(x, data, block[1]))

    found, lse = low_bit.attention(x, recipe, choose=choose)
    expected, expected_lse = with_centroids(query, key, value, mask, block)
    without, _ = low_bit.attention(x, recipe, choose=lambda *_: block_lists.lists_of(mask.to(DEVICE), *block))
    assert exact.cosine(found, expected) > (0.99999 if recipe is EXACT else 0.999)
    assert exact.cosine(without, expected) < 0.95
    assert (lse.double() - expected_lse).abs().max() < (4e-3 if recipe is EXACT else 0.05)


@pytest.mark.parametrize("recipe", [EXACT, DEFAULTS[0]], ids=["16-bit", NAMES[0]])
def test_centroids_of_constant_keys_are_exact(recipe):
    """A block of equal keys has the same part by its mean, and so dense attention is found whatever is kept."""
    query, key, value = inputs(length=128, keys=256)
    key = key[:, ::64].repeat_interleave(64, 1)
    mask = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    mask[..., 1] = True

    def choose(x, data):
        lists = block_lists.lists_of(mask.to(DEVICE), 64, 64, mark=True)
        return replace(lists, centroids=block_lists.centroids(x, data, 64))

    found = low_bit.attention(Inputs(query, key, value), recipe, choose=choose)
    expected, _ = exact.attention(query, key, value, None)
    assert exact.cosine(found, expected) > (0.99999 if recipe is EXACT else 0.999)


def with_skips(query, key, value, tile, share):
    """Attention in float64, tile by tile: a tile of keys whose weights are all below a share of the running maximum, in
    every row of a tile of queries, is left out. Also the number of tiles that are not."""
    q, k, v = (item.double().transpose(1, 2) for item in (query, key, value))
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * q.shape[-1] ** -0.5
    computed = 0
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            for row in range(0, q.shape[2], tile.queries):
                top = torch.full((min(tile.queries, q.shape[2] - row),), -math.inf, device=q.device).double()
                for column in range(0, k.shape[2], tile.keys):
                    part = logits[batch, head, row : row + tile.queries, column : column + tile.keys]
                    highest = part.amax(-1)
                    if (highest - top).max() > math.log(share):
                        top, computed = torch.maximum(top, highest), computed + 1
                    else:
                        part.fill_(-math.inf)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1), computed


@pytest.mark.parametrize("recipe", DEFAULTS, ids=NAMES)
@pytest.mark.parametrize("share", [1e-30, 0.05, 1.0])
def test_tiles_far_below_the_maximum(recipe, share):
    query, key, value = inputs(length=150, keys=400, kv_heads=1)
    query[..., 0] += 8
    key[:, 64:192, :, 0] += 8  # two tiles that all queries look at
    x = Inputs(query, key, value, return_lse=True)
    tile = low_bit.Tile(32, 64, 4, 2, prefetch_logits=recipe.qk is None)
    computed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    found, lse = low_bit.attention(x, recipe, skip=share, computed=computed, tile=tile)
    expected, expected_lse, number = with_skips(query, key, value, tile, share)
    every = 2 * 5 * 7
    assert (number == every) == (share < 1e-20)
    # Rounded logits may be on the other side of the threshold.
    assert abs(int(computed) - number) <= (0 if recipe is EXACT or share < 1e-20 else 4)
    if recipe is EXACT or share < 1e-20:
        assert exact.cosine(found, expected) > (0.99999 if recipe is EXACT else 0.998)
        assert (lse.double() - expected_lse).abs().max() < (4e-3 if recipe is EXACT else 0.2)


def test_tiles_that_do_not_divide_blocks():
    query, key, value = inputs()
    every = torch.ones(1, 2, 2, 4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="do not divide"):
        low_bit.attention(
            Inputs(query, key, value), EXACT, tile=low_bit.Tile(64, 32, 4, 2),
            choose=lambda *_: block_lists.lists_of(every, 64, 64),
        )  # fmt: skip
