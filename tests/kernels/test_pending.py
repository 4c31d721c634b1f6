"""QK-norm and rotary embedding on their way to a kernel: done in its quantizer, or found done by whoever looks."""

from __future__ import annotations

from collections import Counter

import exact
import pytest
import torch

from diffusers_accel.kernels.attention import KERNELS, RECIPES, AttentionKernel, AttentionSite, Fixed, Inputs, Pending
from diffusers_accel.kernels.attention.record import QKNorm, Rotary
from diffusers_accel.kernels.attention.torch_native import scaled_dot_product

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tables(length, dim, seed=0, heads=1, batch=1, halves=False):
    angles = torch.rand(batch, length, heads, dim // 2, generator=torch.Generator().manual_seed(seed)) * 6
    angles = angles if halves else angles.repeat_interleave(2, -1)
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def rotate(x, cos, sin, halves=False):
    """Complex multiplication, written as such: an independent reference of both forms."""
    parts = x.double().unflatten(-1, (2, -1) if halves else (-1, 2)).movedim(-2 if halves else -1, 0)
    turns = torch.complex(cos.double(), sin.double())
    numbers = torch.complex(parts[0], parts[1]) * (turns if halves else turns[..., ::2])
    return torch.stack([numbers.real, numbers.imag], -2 if halves else -1).flatten(-2)


# The forms stock models use: FLUX and Wan, Cosmos, LTX-2 in both of its (a table per batch entry and head).
FORMS = {
    "neighbours": {},
    "halves": {"halves": True},
    "neighbours per head": {"heads": 2, "batch": 2},
    "halves per head": {"heads": 2, "batch": 2, "halves": True},
}


def rotary_of(form, length, dim):
    """A rotation of some form, another one for the key, and both as functions of a tensor."""
    given = FORMS[form]
    halves = given.get("halves", False)
    one, two = tables(length, dim, **given), tables(length, dim, seed=1, **given)
    return Rotary(one, two, halves), lambda x: rotate(x, *one, halves), lambda x: rotate(x, *two, halves)


def inputs(length=70, dim=64, dtype=torch.float16, groups=2, batch=2):
    """Two heads of keys and values, and so many times as many of queries."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, length, 4, dim), *[(batch, length, 4 // groups, dim)] * 2]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    query, key, value = query[:, :, : 2 * groups], key[:, :, :2], value[:, :, :2]
    key += torch.randn(dim, generator=generator)  # turned by another angle at every token: no mean to take away
    return [item.to(DEVICE, dtype) for item in (query, key, value)]


@pytest.mark.parametrize(("backend", "name"), [(b, n) for b, r in RECIPES.items() for n in r if b != "qk16pv8"])
@pytest.mark.parametrize(("length", "dim", "form"), [(70, 64, "neighbours"), (33, 96, "halves per head")])
def test_a_recipe_rotates_in_passing(backend, name, length, dim, form):
    pytest.importorskip("triton")
    from diffusers_accel.kernels.attention import low_bit

    query, key, value = inputs(length, dim, groups=1, batch=FORMS[form].get("batch", 1))
    rotary, turn_query, turn_key = rotary_of(form, length, dim)
    found, lse = low_bit.attention(query, key, value, RECIPES[backend][name], rotary=rotary, return_lse=True)
    expected, expected_lse = exact.attention(turn_query(query), turn_key(key), value.double())
    assert exact.cosine(found, expected) > 0.998
    assert (lse.double() - expected_lse).abs().max() < (0.1 if "fp8-1" in name else 0.03)
    # Without the rotation the answer would be another one.
    assert exact.cosine(found, exact.attention(query, key, value)[0]) < 0.9


def norms(dim, heads=1):
    """Weights of a trained model's kind: around one, a few much larger or near zero; over `heads` at once."""
    generator = torch.Generator().manual_seed(5)
    weights = [1 + 0.3 * torch.randn(heads * dim, generator=generator) for _ in range(2)]
    for weight in weights:
        weight[3], weight[7] = 6.0, 0.01
    return QKNorm(*(weight.to(DEVICE, torch.float16) for weight in weights), eps=1e-5)


def normed(x, weight, eps):
    x = x.double()
    dims = -1 if weight.numel() == x.shape[-1] else (-2, -1)
    return x / (x.square().mean(dims, keepdim=True) + eps).sqrt() * weight.double().view(-1, x.shape[-1])


@pytest.mark.parametrize("backend", ["sage", "sage-fp8", "sage-fp8/fp8-1-128-1"])
@pytest.mark.parametrize(
    ("length", "dim", "form", "over_all"),
    [
        (70, 64, None, False),
        (33, 96, "neighbours", False),
        (5, 80, "halves", False),
        (33, 64, "neighbours per head", False),
        (5, 96, "halves per head", False),
        (33, 64, "neighbours", True),
        (70, 64, "halves per head", True),
    ],
)
def test_a_recipe_norms_in_passing(backend, length, dim, form, over_all):
    pytest.importorskip("triton")
    # Heads of another size, which a norm over each of them would not see.
    per_head = "per head" in str(form)
    query, key, value = inputs(length, dim, groups=1 if over_all or per_head else 2, batch=2 if per_head else 1)
    query[:, :, 1] *= 3
    norm = norms(dim, 2 if over_all else 1)
    rotary, turn_query, turn_key = rotary_of(form, length, dim) if form else (None, None, None)
    found = KERNELS.get(backend).load()(Inputs(10 * query, key / 10, value, rotary=rotary, norm=norm))
    query, key = normed(10 * query, norm.query, norm.eps), normed(key / 10, norm.key, norm.eps)
    if rotary is not None:
        query, key = turn_query(query), turn_key(key)
    assert exact.cosine(found, exact.attention(query, key, value.double())[0]) > 0.998


def close_to_e4m3(found, scale, expected):
    """Whether values are what e4m3 makes of others by a scale: half a unit in the last place, or of the smallest."""
    each = scale[:, None, :, None].double()
    return ((found.double() * each - expected).abs() <= expected.abs() / 15.9 + each * 2**-9).all()


@pytest.mark.parametrize(
    ("dim", "wide", "form"),
    [(64, 64, "halves per head"), (96, 96, "halves"), (80, 96, "neighbours"), (80, 96, "halves"),
     (64, 64, "neighbours, all")],
)  # fmt: skip
def test_scales_per_head_norm_and_rotate_in_passing(dim, wide, form):
    pytest.importorskip("triton")
    from diffusers_accel.kernels.attention.flash import padded
    from diffusers_accel.kernels.attention.quantize import quantize_per_head
    from diffusers_accel.kernels.attention.recipe import hadamard

    query, key, value = inputs(dim=dim, groups=1)
    form, _, over_all = form.partition(", ")
    query[:, :, 1] *= 3
    norm = norms(dim, 2 if over_all else 1)
    rotary, turn_query, turn_key = rotary_of(form, 70, dim)
    given = padded(Inputs(query, key, value, rotary=rotary, norm=norm), wide)
    data = quantize_per_head(given.query, given.key, given.value, 0.125, rotary=given.rotary, norm=given.norm)
    query = turn_query(normed(query, norm.query, norm.eps))
    key = turn_key(normed(key, norm.key, norm.eps))
    for found, scale, expected in (
        (data.query, data.query_scale, query),
        (data.key, data.key_scale, key - key.mean(1, keepdim=True)),
    ):
        parts = (2, -1) if rotary.halves else (1, -1)
        expected = torch.nn.functional.pad(expected.unflatten(-1, parts), (0, (wide - dim) // parts[0])).flatten(-2)
        assert close_to_e4m3(found, scale, expected @ hadamard(wide).to(DEVICE).double())
        assert found.float().abs().max() < 448  # nothing ran into the end of e4m3: the bound holds


@pytest.mark.parametrize("form", FORMS)
def test_scales_per_head_rotate_in_passing(form):
    pytest.importorskip("triton")
    from diffusers_accel.kernels.attention.quantize import quantize_per_head
    from diffusers_accel.kernels.attention.recipe import hadamard

    per_head = "per head" in form
    groups = 1 if per_head else 2
    query, key, value = inputs(groups=groups)
    rotary, turn_query, turn_key = rotary_of(form, 70, 64)
    data = quantize_per_head(query, key, value, 0.125, rotary=rotary, shift=True)
    query, key = turn_query(query), turn_key(key)
    matrix = hadamard(64).to(DEVICE).double()
    assert close_to_e4m3(data.query, data.query_scale.repeat_interleave(groups, 1), query @ matrix)
    assert close_to_e4m3(data.key, data.key_scale, (key - key.mean(1, keepdim=True)) @ matrix)
    assert close_to_e4m3(data.value, data.value_scale, value.double() - data.value_mean[:, None].double())
    assert (data.value_mean - value.float().mean(1)).abs().max() < value.abs().max() / 256
    shift = torch.einsum("bshd,bhd->bhs", query, key.mean(1).repeat_interleave(groups, 1)) * 0.125
    torch.testing.assert_close(data.shift.double(), shift, atol=1e-3, rtol=1e-3)


class TestPending:
    @pytest.fixture
    def put_off(self):
        x = torch.randn(1, 5, 2, 8)
        cos, sin = (item.cpu() for item in tables(5, 8))
        calls = []

        def apply(item):
            assert type(item) is torch.Tensor
            calls.append(1)
            return rotate(item, cos, sin).to(item.dtype)

        return Pending.rotated(x, cos, sin, apply), x, apply, calls

    def test_facts_cost_nothing(self, put_off):
        found, x, _, calls = put_off
        assert found.shape == x.shape and found.dtype == x.dtype and found.device == x.device
        assert found.size(1) == 5 and found.ndim == 4
        assert torch.ones(3, dtype=torch.float64).type_as(found).dtype == torch.float32
        assert not calls
        assert torch.equal(found.plain(), x) and type(found.plain()) is torch.Tensor

    @pytest.mark.parametrize(
        "operation",
        [
            lambda x: x + 1,
            lambda x: 2 * x,
            lambda x: x.transpose(1, 3),
            lambda x: x.transpose(1, 2) + 1,
            lambda x: x.repeat_interleave(2, dim=3),
            lambda x: x.repeat_interleave(1),
            lambda x: x[:, :2],
            lambda x: x.clone(),
            lambda x: torch.cat([x, x], dim=1),
            lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
            lambda x: x.flatten(2),
            lambda x: x.double(),
        ],
    )
    def test_whoever_looks_finds_it_rotated(self, put_off, operation):
        found, x, apply, _ = put_off
        result = operation(found)
        assert type(result) is torch.Tensor
        assert torch.equal(result, operation(apply(x)))

    def test_tables_of_another_kind_are_applied_at_once(self, put_off):
        _, x, apply, _ = put_off
        cos, sin = tables(5, 8)
        for other in ((cos[..., :4], sin[..., :4]), (cos.expand(3, 5, 1, 8), sin.expand(3, 5, 1, 8)), (cos[0], sin[0])):
            assert type(Pending.rotated(x, *other, apply)) is torch.Tensor
        assert type(Pending.rotated(x, cos, sin, apply, halves=True)) is torch.Tensor
        twice = Pending.rotated(Pending.rotated(x, cos, sin, apply), cos, sin, apply)
        assert type(twice) is torch.Tensor and torch.equal(twice, apply(apply(x)))

    def test_a_site_gives_it_to_kernels_that_rotate(self, put_off):
        found, x, apply, calls = put_off
        seen = []

        def folding(inputs):
            seen.append(inputs.rotary)
            query, key = inputs.query, inputs.key
            if inputs.rotary is not None:
                query = rotate(query, *inputs.rotary.query).to(query.dtype)
                key = rotate(key, *inputs.rotary.key).to(key.dtype)
            return scaled_dot_product(Inputs(query, key, inputs.value))

        expected = scaled_dot_product(Inputs(apply(x), apply(x), x))
        calls.clear()
        kernel = AttentionKernel(name="folding", load=lambda: folding, folds=True, head_dims=(8,))
        site = AttentionSite(lambda: Fixed(kernel), Counter())
        torch.testing.assert_close(site(found, found, x), expected)
        assert seen[0] is not None and not calls
        # A kernel that does not rotate, and one that cannot take the call, get it rotated by the stock function.
        torch.testing.assert_close(
            AttentionSite(lambda: Fixed(KERNELS.get("sdpa")), Counter())(found, found, x), expected
        )
        assert len(calls) == 2
        narrow = AttentionKernel(name="narrow", load=lambda: folding, folds=True, head_dims=(64,))
        with pytest.warns(UserWarning, match="such calls run on 'sdpa'"):
            torch.testing.assert_close(AttentionSite(lambda: Fixed(narrow), Counter())(found, found, x), expected)
        # Query and key have tables of their own.
        cos, sin = (item.cpu() for item in tables(5, 8, seed=3))
        other = Pending.rotated(x, cos, sin, lambda item: rotate(item, cos, sin).to(item.dtype))
        expected = scaled_dot_product(Inputs(apply(x), rotate(x, cos, sin).to(x.dtype), x))
        torch.testing.assert_close(site(found, other, x), expected)
        assert seen[-1] is not None
        # Only one of the two rotated: nothing a kernel could fold.
        torch.testing.assert_close(site(found, x, x), scaled_dot_product(Inputs(apply(x), x, x)))

    def test_norm_and_rotation_reach_a_folding_kernel_together(self, put_off):
        _, x, apply, _ = put_off
        cos, sin = (item.cpu() for item in tables(5, 8))
        weight = torch.linspace(0.5, 2, 8)

        def stock_norm(item):
            assert type(item) is torch.Tensor
            return normed(item, weight, 1e-5).to(item.dtype)

        both = Pending.rotated(Pending.normed(x, weight, 1e-5, stock_norm), cos, sin, apply)
        assert torch.equal(both + 0, apply(stock_norm(x)))
        only = Pending.normed(x, weight, 1e-5, stock_norm)
        assert torch.equal(only + 0, stock_norm(x)) and torch.equal(only.plain(), x)
        seen = []

        def folding(inputs):
            seen.append((inputs.norm, inputs.rotary))
            assert torch.equal(inputs.query, x)
            return inputs.value

        kernel = AttentionKernel(name="folding", load=lambda: folding, folds=True, head_dims=(8,))
        site = AttentionSite(lambda: Fixed(kernel), Counter())
        site(both, both, x)
        site(only, only, x)
        assert torch.equal(seen[0][0].key, weight) and seen[0][0].eps == 1e-5 and seen[0][1] is not None
        assert seen[1][0] is not None and seen[1][1] is None
        # Another epsilon, or a rotation on one side only: the stock functions do it.
        plain = AttentionKernel(name="plain", load=lambda: scaled_dot_product, folds=True, head_dims=(8,))
        site = AttentionSite(lambda: Fixed(plain), Counter())
        other = Pending.normed(x, weight, 1e-2, stock_norm)
        torch.testing.assert_close(site(only, other, x), scaled_dot_product(Inputs(stock_norm(x), stock_norm(x), x)))
        expected = scaled_dot_product(Inputs(apply(stock_norm(x)), stock_norm(x), x))
        torch.testing.assert_close(site(both, only, x), expected)

    def test_a_norm_of_another_kind_is_done_at_once(self, put_off):
        _, x, _, _ = put_off
        whole = torch.nn.RMSNorm(16, eps=1e-5)  # over all heads, before they are split
        flat = x.flatten(2)
        assert type(Pending.normed(flat, whole.weight, whole.eps, whole)) is not Pending
        assert type(Pending.normed(x, None, 1e-5, torch.abs)) is torch.Tensor
        assert type(Pending.normed(x, torch.ones(8), None, torch.abs)) is torch.Tensor

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("layout", ["heads first", "heads in the channels"])
    def test_heads_move_to_where_attention_wants_them(self, form, layout):
        given = {**FORMS[form], "heads": 2} if layout != "heads first" else FORMS[form]
        halves = given.get("halves", False)
        x = torch.randn(2, 5, given.get("heads", 2), 8)
        cos, sin = (item.cpu() for item in tables(5, 8, **given))
        expected = rotate(x, cos, sin, halves).to(x.dtype)
        if layout == "heads first":

            def apply(item):
                return rotate(item, cos.transpose(1, 2), sin.transpose(1, 2), halves).to(item.dtype)

            first = Pending.rotated(x.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2), apply, halves)
            found = first.repeat_interleave(1, dim=3).transpose(1, 2)
        else:

            def apply(item):
                return rotate(item.unflatten(2, (2, -1)), cos, sin, halves).to(item.dtype).flatten(2)

            first = Pending.rotated(x.flatten(2), cos.flatten(2), sin.flatten(2), apply, halves, heads=2)
            found = first.unflatten(2, (2, -1))
            assert type(first.unflatten(2, (4, -1))) is torch.Tensor  # not the heads of its tables
        assert type(found) is Pending and torch.equal(found.plain(), x)
        assert torch.equal(rotate(found.plain(), *found.tables, found.halves).to(x.dtype), expected)
        assert torch.equal(found + 0, expected)
