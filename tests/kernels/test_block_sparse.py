"""Sparse attention over lists of key blocks: lists against torch's own sorts, attention against masked float64
attention. On the CPU through Triton's interpreter, which multiplies bf16 as if it were integers: inputs are fp16."""

from __future__ import annotations

import math

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


def test_lists_of_a_mask():
    mask = torch.rand(2, 3, 4, 37, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[0, 0, 0], mask[0, 0, 1] = False, True
    assert torch.equal(kept(block_lists.lists_of(mask.to(DEVICE), 64, 64), 37), mask)


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
        torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=0.05 if recipe.qk else 2e-3)


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


def test_tiles_that_do_not_divide_blocks():
    query, key, value = inputs()
    every = torch.ones(1, 2, 2, 4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="do not divide"):
        low_bit.attention(
            Inputs(query, key, value), EXACT, tile=low_bit.Tile(64, 32, 4, 2),
            choose=lambda *_: block_lists.lists_of(every, 64, 64),
        )  # fmt: skip
