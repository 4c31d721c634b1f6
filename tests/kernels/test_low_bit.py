"""Our 8-bit attention: on the CPU through Triton's interpreter, on a GPU as it is compiled there.

Three references: float64 attention for fidelity, each recipe in plain torch for what is rounded, and hand-made inputs
where an error would show at once. The interpreter multiplies bf16 as if it were integers, so 16-bit inputs are fp16.
"""

from __future__ import annotations

import math

import exact
import pytest
import torch

from diffusers_accel.kernels.attention import KERNELS, RECIPES, Inputs
from diffusers_accel.kernels.attention.recipe import hadamard_matrix, reference

triton = pytest.importorskip("triton")

from diffusers_accel.kernels.attention import low_bit, quantize  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = [(backend, name) for backend, recipes in RECIPES.items() for name in recipes]
DEFAULTS = [(backend, next(iter(recipes))) for backend, recipes in RECIPES.items()]


def inputs(batch=1, length=70, keys=200, heads=2, kv_heads=2, dim=64, seed=0, dtype=torch.float16):
    """Gaussian inputs; K has outlying channels, the same for all tokens, as the K of trained models has."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, length, heads, dim, generator=generator)
    key = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    key += 8 * torch.randn(dim, generator=generator) * (torch.rand(dim, generator=generator) < 0.2)
    value = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    return [item.to(DEVICE, dtype) for item in (query, key, value)]


def check(found, lse, expected, expected_lse, plain, recipe):
    """Rounding to 8 bits leaves known errors; anything else would be far outside."""
    assert found.isfinite().all() and lse.isfinite().all()
    # e4m3 QK puts about 5% of noise on Gaussian inputs, int8 about 1% and e4m3 PV 3.7%.
    assert exact.cosine(found, expected) > (0.998 if recipe.qk == "fp8" else 0.999)
    assert (lse.double() - expected_lse).abs().max() < (0.1 if recipe.qk == "fp8" else 0.03)
    # P is rounded against the running maximum, not the final one; with one tile of keys the two agree.
    assert exact.relative(found, plain) < (0.03 if recipe.pv else 2e-3)


@pytest.mark.parametrize(("backend", "name"), EVERY)
def test_recipes(backend, name):
    recipe = RECIPES[backend][name]
    # With the tile of a CPU, two tiles of queries and of keys.
    query, key, value = inputs(batch=2, keys=140, heads=2, kv_heads=1)
    found, lse = low_bit.attention(Inputs(query, key, value, return_lse=True), recipe)
    check(found, lse, *exact.attention(query, key, value), reference(query, key, value, recipe), recipe)


@pytest.mark.parametrize(("backend", "name"), DEFAULTS)
@pytest.mark.parametrize(
    ("length", "keys", "dim"),
    [(1, 1, 64), (63, 64, 96), (64, 63, 128), (65, 257, 128), (257, 65, 64), (5, 129, 16), (130, 2, 80)],
)
def test_lengths_and_head_dims(backend, name, length, keys, dim):
    recipe = RECIPES[backend][name]
    query, key, value = inputs(length=length, keys=keys, dim=dim, seed=length)
    found, lse = low_bit.attention(Inputs(query, key, value, return_lse=True), recipe)
    check(found, lse, *exact.attention(query, key, value), reference(query, key, value, recipe), recipe)


@pytest.mark.parametrize(("backend", "name"), DEFAULTS)
@pytest.mark.parametrize("queries", [64, 128])
@pytest.mark.parametrize("prefetch_logits", [False, True])
def test_every_tile_is_the_same_attention(backend, name, queries, prefetch_logits):
    recipe = RECIPES[backend][name]
    query, key, value = inputs(length=130, keys=200)
    for keys in (64, 128):
        tile = low_bit.Tile(queries, keys, 4, 2, prefetch_logits=prefetch_logits)
        found, lse = low_bit.attention(Inputs(query, key, value, return_lse=True), recipe, tile=tile)
        check(found, lse, *exact.attention(query, key, value), reference(query, key, value, recipe), recipe)


@pytest.mark.parametrize(("backend", "name"), DEFAULTS)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks_over_keys(backend, name, kind):
    recipe = RECIPES[backend][name]
    query, key, value = inputs(batch=2, keys=150)
    mask = torch.ones(2, 1, 1, 150, dtype=torch.bool, device=DEVICE)
    mask[0, ..., 40:] = False
    mask[1, ..., ::3] = False
    if kind == "additive":
        bias = torch.linspace(-2, 2, 150, device=DEVICE).expand(2, 1, 1, 150)
        mask = bias.masked_fill(~mask, -math.inf)
    function = KERNELS.get(backend).load()
    found, lse = function(Inputs(query, key, value, mask, return_lse=True))
    expected, expected_lse = exact.attention(query, key, value, mask)
    check(found, lse, expected, expected_lse, reference(query, key, value, recipe, mask), recipe)


@pytest.mark.parametrize(("backend", "name"), DEFAULTS)
def test_a_row_without_keys_is_zero(backend, name):
    query, key, value = inputs(batch=2)
    bias = torch.zeros(2, 200, device=DEVICE)
    bias[1] = -math.inf
    found, lse = low_bit.attention(
        Inputs(query, key, value, bias[:, None, None], return_lse=True), RECIPES[backend][name]
    )
    assert found[1].eq(0).all() and lse[1].eq(-math.inf).all()
    assert found[0].isfinite().all() and lse[0].isfinite().all()


@pytest.mark.parametrize(("backend", "name"), DEFAULTS)
def test_hard_inputs(backend, name):
    """Zero blocks, one constant for all keys, very large and very small values: no NaN, and the right answer."""
    recipe = RECIPES[backend][name]
    query, key, value = inputs()
    zero = [item.clone() for item in (query, key, value)]
    for item in zero:
        item[:, :64] = 0
    constant = [query, torch.ones_like(key), value]
    large = [query * 10, key * 100, value * 10000]
    huge = [query * 1000, key * 1000, value * 10000]
    small = [query * 1e-3, key * 1e-3, value * 1e-3]
    nothing = [torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)]
    for case, tensors in {"zero": zero, "constant": constant, "large": large, "small": small}.items():
        found = low_bit.attention(Inputs(*tensors), recipe)
        expected, _ = exact.attention(*tensors)
        # Logits of 1e6 make a choice of one key; a rounding of 1e-2 may turn a near tie.
        assert found.isfinite().all() and exact.cosine(found, expected) > (0.95 if case == "large" else 0.999), case
    found = low_bit.attention(Inputs(*huge), recipe)
    assert found.isfinite().all() and found.abs().max() <= 1.1 * huge[2].abs().max()
    assert low_bit.attention(Inputs(*nothing), recipe).eq(0).all()


@pytest.mark.parametrize(("backend", "name"), DEFAULTS)
def test_any_strides_and_untouched_inputs(backend, name):
    """Heads-first tensors and slices of a fused projection are read where they lie; nothing is written to them."""
    recipe = RECIPES[backend][name]
    query, key, value = inputs(keys=70)
    expected = low_bit.attention(Inputs(query, key, value), recipe)
    heads_first = [item.transpose(1, 2).contiguous().transpose(1, 2) for item in (query, key, value)]
    fused = torch.cat([query, key, value], dim=2).chunk(3, dim=2)
    odd = [torch.nn.functional.pad(item, (1, 2))[..., 1:-2] for item in (query, key, value)]
    for tensors in (heads_first, fused, odd):
        before = [item.clone() for item in tensors]
        # Another layout of a program's threads adds up K's mean in another order, and few values round otherwise.
        assert exact.relative(low_bit.attention(Inputs(*tensors), recipe), expected) < 2e-3
        assert all(map(torch.equal, tensors, before))


def test_the_softmax_scale():
    query, key, value = inputs()
    for backend, name in DEFAULTS:
        found, lse = low_bit.attention(Inputs(query, key, value, scale=0.31, return_lse=True), RECIPES[backend][name])
        expected, expected_lse = exact.attention(query, key, value, scale=0.31)
        assert exact.cosine(found, expected) > 0.99
        assert (lse.double() - expected_lse).abs().max() < 0.1


def test_rounding_stays_within_half_a_step():
    query, key, value = inputs(batch=2, heads=4, kv_heads=2, dim=96)
    data = quantize.quantize(
        Inputs(query, key, value, scale=1 / quantize.LOG2E, return_lse=True), RECIPES["sage-fp8"]["int8-1-16-1"]
    )
    q = data.query.float() * data.query_scale[..., None]
    matrix = hadamard_matrix(96).to(DEVICE)
    mixed = query.transpose(1, 2).float() @ matrix
    assert ((q - mixed).abs() <= 0.501 * data.query_scale[..., None]).all()
    smooth = (key.float() - key.float().mean(1, keepdim=True)) @ matrix
    scales = data.key_scale.repeat_interleave(16, -1)[..., :200, None]
    assert ((data.key.float() * scales - smooth.transpose(1, 2)).abs() <= 0.502 * scales).all()
    # Position 16g + 4a + 2b + c holds key 16g + 8b + 2a + c; values behind the last key are zero.
    order = torch.arange(208).view(13, 2, 4, 2).transpose(1, 2).flatten()
    v = torch.zeros(2, 2, 96, data.value.shape[-1], device=DEVICE)
    v[..., :208] = torch.nn.functional.pad(value.permute(0, 2, 3, 1).float(), (0, 8))[..., order]
    error = (data.value.float() * data.value_scale[..., None] - v).abs()
    assert (error <= v.abs() / 16 + data.value_scale[..., None] * 2**-9).all()
    mean = key.float().mean(1).repeat_interleave(2, 1)
    correction = torch.einsum("bshd,bhd->bhs", query.float(), mean) / quantize.LOG2E
    torch.testing.assert_close(data.lse_correction, correction, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dim", "block"), [(64, 32), (96, 32), (128, 32), (80, 16)])
def test_scales_per_head(dim, block):
    """The transformed input, within half a step of e4m3."""
    query, key, value = inputs(keys=100, heads=4, kv_heads=2, dim=dim)
    data = quantize.quantize_per_head(Inputs(query, key, value, scale=0.1, return_lse=True))
    mean = key.float().mean(1, keepdim=True)
    smoothed = key.float() - mean
    matrix = hadamard_matrix(dim).to(DEVICE)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, device=DEVICE))
    assert (matrix != 0).sum(0).eq(block).all()
    grouped = query.float().unflatten(2, (2, 2)).abs().amax((1, 3, 4))
    bound = key.float().abs().amax((1, 3)) + mean.abs().amax((1, 3))
    # The values' mean is subtracted up to a power of two far below the largest value.
    subtracted = data.value_mean[:, None]
    amax = value.float().abs().amax((1, 3))
    assert ((subtracted - value.float().mean(1, keepdim=True)).abs().amax((1, 3)) <= amax / 256).all()
    for largest, scale in (
        (grouped * block**0.5, data.query_scale),
        (bound * block**0.5, data.key_scale),
        (amax + subtracted.abs().amax((1, 3)), data.value_scale),
    ):
        torch.testing.assert_close(largest / 448, scale, rtol=1e-4, atol=0)
    for rounded, scale, original in (
        (data.query, data.query_scale.repeat_interleave(2, 1), query.float() @ matrix),
        (data.key, data.key_scale, smoothed @ matrix),
        (data.value, data.value_scale, value.float() - subtracted),
    ):
        each = scale[:, None, :, None]
        assert ((rounded.float() * each - original).abs() <= original.abs() / 15.9 + each * 2**-9).all()
    correction = torch.einsum("bshd,bhd->bhs", query.float(), mean[:, 0].repeat_interleave(2, 1)) * 0.1
    torch.testing.assert_close(data.lse_correction, correction, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_mean_of_the_values_is_added_back(kv_heads):
    out = torch.randn(2, 37, 4, 96, device=DEVICE).half()
    mean = torch.randn(2, kv_heads, 96, device=DEVICE)
    expected = out.float() + mean.repeat_interleave(4 // kv_heads, 1)[:, None]
    found = quantize.add_mean(out, mean)
    assert found is out
    torch.testing.assert_close(found, expected.half(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["fp8-1-128-1", "int8-1-128-1"])
def test_the_transform_helps_where_few_channels_carry_the_logits(name):
    """The purpose of the Hadamard transform: K and Q with two strong channels that vary from token to token."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 200, 2, 64, generator=generator) for _ in range(3))
    query[..., :2] *= 6
    key[..., :2] *= 6
    expected, _ = exact.attention(query, key, value)
    recipe = RECIPES["sage-fp8"][name]
    tensors = [item.to(DEVICE, torch.float16) for item in (query, key, value)]
    found = low_bit.attention(Inputs(*tensors), recipe).cpu()
    matrix = torch.eye(64)
    error = exact.relative(found, expected)
    assert error < 0.15 and exact.relative(reference(*tensors, recipe).cpu(), expected) < 0.15
    import diffusers_accel.kernels.attention.recipe as module

    original, module.hadamard_matrix = module.hadamard_matrix, lambda dim: matrix
    try:
        assert exact.relative(reference(*tensors, recipe).cpu(), expected) > 1.2 * error
    finally:
        module.hadamard_matrix = original


def test_cuts_by_architecture():
    recipe = RECIPES["sage"]["int8-1-128-0"]
    # On Hopper, the tile whose last wave is fuller: long sequences fill either, FLUX's fills the smaller one better.
    assert low_bit.choose_tile(recipe, 128, (9, 0), 132, 32760, 12).queries == 128
    assert low_bit.choose_tile(recipe, 128, (9, 0), 132, 4608, 24).queries == 64
    for backend, name in EVERY:
        assert low_bit.choose_tile(RECIPES[backend][name], 128, (8, 0), 108, 4096, 24).stages == 2
