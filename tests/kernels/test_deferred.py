"""Deferred QK-norm and rotary embedding: a kernel applies both in its quantizer; any other operation sees the
result."""

from __future__ import annotations

from collections import Counter

import exact
import pytest
import torch

from diffusers_accel.kernels.attention import (
    KERNELS,
    RECIPES,
    AttentionDispatcher,
    AttentionKernel,
    DeferredQK,
    Fixed,
    Inputs,
)
from diffusers_accel.kernels.attention.deferred import common_qk_norm_rope
from diffusers_accel.kernels.attention.record import QKNorm, Rotary
from diffusers_accel.kernels.attention.torch_native import scaled_dot_product

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tables(length, dim, seed=0, heads=1, batch=1, rope_style="interleaved"):
    angles = torch.rand(batch, length, heads, dim // 2, generator=torch.Generator().manual_seed(seed)) * 6
    angles = angles if rope_style == "half" else angles.repeat_interleave(2, -1)
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def rotate(x, cos, sin, rope_style="interleaved"):
    """Complex multiplication, written as such: an independent reference of both styles."""
    half = rope_style == "half"
    parts = x.double().unflatten(-1, (2, -1) if half else (-1, 2)).movedim(-2 if half else -1, 0)
    turns = torch.complex(cos.double(), sin.double())
    numbers = torch.complex(parts[0], parts[1]) * (turns if half else turns[..., ::2])
    return torch.stack([numbers.real, numbers.imag], -2 if half else -1).flatten(-2)


# The forms of stock models: FLUX and Wan; Cosmos; LTX-2 in both of its own (a table per batch entry and head).
FORMS = {
    "interleaved": {},
    "half": {"rope_style": "half"},
    "interleaved per head": {"heads": 2, "batch": 2},
    "half per head": {"heads": 2, "batch": 2, "rope_style": "half"},
}


def rotary_of(form, length, dim):
    """A rotation of some form, another one for the key, and both as functions of a tensor."""
    given = FORMS[form]
    rope_style = given.get("rope_style", "interleaved")
    one, two = tables(length, dim, **given), tables(length, dim, seed=1, **given)
    return Rotary(one, two, rope_style), lambda x: rotate(x, *one, rope_style), lambda x: rotate(x, *two, rope_style)


def inputs(length=70, dim=64, dtype=torch.float16, groups=2, batch=2):
    """Two heads of keys and values, and `groups` times as many of queries."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, length, 4, dim), *[(batch, length, 4 // groups, dim)] * 2]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    query, key, value = query[:, :, : 2 * groups], key[:, :, :2], value[:, :, :2]
    key += torch.randn(dim, generator=generator)  # rotated by another angle at every token: no mean to subtract
    return [item.to(DEVICE, dtype) for item in (query, key, value)]


@pytest.mark.parametrize(("backend", "name"), [(b, n) for b, r in RECIPES.items() for n in r if b != "qk16pv8"])
@pytest.mark.parametrize(("length", "dim", "form"), [(70, 64, "interleaved"), (33, 96, "half per head")])
def test_a_recipe_rotates_while_it_rounds(backend, name, length, dim, form):
    pytest.importorskip("triton")
    from diffusers_accel.kernels.attention import low_bit

    query, key, value = inputs(length, dim, groups=1, batch=FORMS[form].get("batch", 1))
    rotary, turn_query, turn_key = rotary_of(form, length, dim)
    found, lse = low_bit.attention(Inputs(query, key, value, rotary=rotary, return_lse=True), RECIPES[backend][name])
    expected, expected_lse = exact.attention(turn_query(query), turn_key(key), value.double())
    assert exact.cosine(found, expected) > 0.998
    assert (lse.double() - expected_lse).abs().max() < (0.1 if "fp8-1" in name else 0.03)
    # The rotation matters: without it the result is another one.
    assert exact.cosine(found, exact.attention(query, key, value)[0]) < 0.9


def norms(dim, heads=1):
    """Weights like those of a trained model: around one, a few much larger or near zero; over `heads` heads."""
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
        (33, 96, "interleaved", False),
        (5, 80, "half", False),
        (33, 64, "interleaved per head", False),
        (5, 96, "half per head", False),
        (33, 64, "interleaved", True),
        (70, 64, "half per head", True),
    ],
)
def test_a_recipe_norms_while_it_rounds(backend, length, dim, form, over_all):
    pytest.importorskip("triton")
    # A head of another size, which a norm over each head would hide.
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
    """Whether values round to e4m3 with a scale: within half a unit in the last place, or of the smallest step."""
    each = scale[:, None, :, None].double()
    return ((found.double() * each - expected).abs() <= expected.abs() / 15.9 + each * 2**-9).all()


@pytest.mark.parametrize(
    ("dim", "wide", "form"),
    [(64, 64, "half per head"), (96, 96, "half"), (80, 96, "interleaved"), (80, 96, "half"),
     (64, 64, "interleaved, all")],
)  # fmt: skip
def test_scales_per_head_norm_and_rotate_while_it_rounds(dim, wide, form):
    pytest.importorskip("triton")
    from diffusers_accel.kernels.attention.flash import padded
    from diffusers_accel.kernels.attention.quantize import quantize_per_head
    from diffusers_accel.kernels.attention.recipe import hadamard_matrix

    query, key, value = inputs(dim=dim, groups=1)
    form, _, over_all = form.partition(", ")
    query[:, :, 1] *= 3
    norm = norms(dim, 2 if over_all else 1)
    rotary, turn_query, turn_key = rotary_of(form, 70, dim)
    given = padded(Inputs(query, key, value, rotary=rotary, norm=norm), wide)
    data = quantize_per_head(given)
    query = turn_query(normed(query, norm.query, norm.eps))
    key = turn_key(normed(key, norm.key, norm.eps))
    for found, scale, expected in (
        (data.query, data.query_scale, query),
        (data.key, data.key_scale, key - key.mean(1, keepdim=True)),
    ):
        parts = (2, -1) if rotary.rope_style == "half" else (1, -1)
        expected = torch.nn.functional.pad(expected.unflatten(-1, parts), (0, (wide - dim) // parts[0])).flatten(-2)
        assert close_to_e4m3(found, scale, expected @ hadamard_matrix(wide).to(DEVICE).double())
        assert found.float().abs().max() < 448  # no value reaches the end of e4m3: the bound holds


@pytest.mark.parametrize("form", FORMS)
def test_scales_per_head_rotate_while_it_rounds(form):
    pytest.importorskip("triton")
    from diffusers_accel.kernels.attention.quantize import quantize_per_head
    from diffusers_accel.kernels.attention.recipe import hadamard_matrix

    per_head = "per head" in form
    groups = 1 if per_head else 2
    query, key, value = inputs(groups=groups)
    rotary, turn_query, turn_key = rotary_of(form, 70, 64)
    data = quantize_per_head(Inputs(query, key, value, scale=0.125, rotary=rotary, return_lse=True))
    query, key = turn_query(query), turn_key(key)
    matrix = hadamard_matrix(64).to(DEVICE).double()
    assert close_to_e4m3(data.query, data.query_scale.repeat_interleave(groups, 1), query @ matrix)
    assert close_to_e4m3(data.key, data.key_scale, (key - key.mean(1, keepdim=True)) @ matrix)
    assert close_to_e4m3(data.value, data.value_scale, value.double() - data.value_mean[:, None].double())
    assert (data.value_mean - value.float().mean(1)).abs().max() < value.abs().max() / 256
    correction = torch.einsum("bshd,bhd->bhs", query, key.mean(1).repeat_interleave(groups, 1)) * 0.125
    torch.testing.assert_close(data.lse_correction.double(), correction, atol=1e-3, rtol=1e-3)


class TestDeferredQK:
    @pytest.fixture
    def deferred(self):
        x = torch.randn(1, 5, 2, 8)
        cos, sin = (item.cpu() for item in tables(5, 8))
        calls = []

        def apply(item):
            assert type(item) is torch.Tensor
            calls.append(1)
            return rotate(item, cos, sin).to(item.dtype)

        return DeferredQK.rope(x, cos, sin, apply), x, apply, calls

    def test_raw_and_dtype_apply_nothing(self, deferred):
        found, x, _, calls = deferred
        assert torch.ones(3, dtype=torch.float64).type_as(found).dtype == torch.float32
        assert torch.equal(found.raw, x) and type(found.raw) is torch.Tensor
        assert not calls

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
    def test_any_other_operation_sees_the_rotation(self, deferred, operation):
        found, x, apply, _ = deferred
        result = operation(found)
        assert type(result) is torch.Tensor
        assert torch.equal(result, operation(apply(x)))

    @pytest.mark.parametrize("write_to", [0, 1])
    def test_a_write_ends_the_deferral_of_a_tensor_and_of_its_views(self, write_to):
        x, weight = torch.randn(1, 5, 2, 8), torch.linspace(0.5, 2, 8)
        untouched = x.clone()
        expected, stock_norm = normed(x, weight, 1e-5).float(), lambda item: normed(item, weight, 1e-5).float()
        own = DeferredQK.rms_norm(x, weight, 1e-5, stock_norm)
        copy = own.repeat_interleave(1, dim=2)
        both = own, own.transpose(1, 2)
        assert all(type(item) is DeferredQK for item in (*both, copy))
        assert common_qk_norm_rope(own, both[1]) is not None
        both[write_to][:, 1].mul_(3)
        (expected, expected.transpose(1, 2))[write_to][:, 1].mul_(3)
        assert torch.equal(own + 0, expected) and torch.equal(both[1] + 0, expected.transpose(1, 2))
        assert torch.equal(x, untouched) and torch.equal(copy + 0, stock_norm(x))
        assert torch.equal(own.repeat_interleave(1, dim=2) + 0, expected)
        assert torch.equal(own.transpose(1, 2) + 0, expected.transpose(1, 2))
        assert common_qk_norm_rope(own, both[1]) is None and common_qk_norm_rope(copy, copy) is not None
        # Kernels and a rotation see the written values.
        plain = AttentionKernel(name="plain", load=lambda: scaled_dot_product, fuses_qk_norm_rope=True, head_dims=(8,))
        found = AttentionDispatcher(lambda: Fixed(plain), Counter())(own, own, x)
        torch.testing.assert_close(found, scaled_dot_product(Inputs(expected, expected, x)))
        cos, sin = (item.cpu() for item in tables(5, 8))
        assert torch.equal(
            DeferredQK.rope(own, cos, sin, lambda item: rotate(item, cos, sin)) + 0, rotate(expected, cos, sin)
        )

    def test_tables_of_another_kind_are_applied_at_once(self, deferred):
        _, x, apply, _ = deferred
        cos, sin = tables(5, 8)
        for other in ((cos[..., :4], sin[..., :4]), (cos.expand(3, 5, 1, 8), sin.expand(3, 5, 1, 8)), (cos[0], sin[0])):
            assert type(DeferredQK.rope(x, *other, apply)) is torch.Tensor
        assert type(DeferredQK.rope(x, cos, sin, apply, rope_style="half")) is torch.Tensor
        twice = DeferredQK.rope(DeferredQK.rope(x, cos, sin, apply), cos, sin, apply)
        assert type(twice) is torch.Tensor and torch.equal(twice, apply(apply(x)))

    def test_a_dispatcher_passes_it_to_kernels_that_rotate(self, deferred):
        found, x, apply, calls = deferred
        seen = []

        def fusing(inputs):
            seen.append(inputs.rotary)
            query, key = inputs.query, inputs.key
            if inputs.rotary is not None:
                query = rotate(query, *inputs.rotary.query).to(query.dtype)
                key = rotate(key, *inputs.rotary.key).to(key.dtype)
            return scaled_dot_product(Inputs(query, key, inputs.value))

        expected = scaled_dot_product(Inputs(apply(x), apply(x), x))
        calls.clear()
        kernel = AttentionKernel(name="fusing", load=lambda: fusing, fuses_qk_norm_rope=True, head_dims=(8,))
        dispatcher = AttentionDispatcher(lambda: Fixed(kernel), Counter())
        torch.testing.assert_close(dispatcher(found, found, x), expected)
        assert seen[0] is not None and not calls
        # For a kernel that does not rotate, or does not support the call, the stock function rotates.
        torch.testing.assert_close(
            AttentionDispatcher(lambda: Fixed(KERNELS.get("sdpa")), Counter())(found, found, x), expected
        )
        assert len(calls) == 2
        narrow = AttentionKernel(name="narrow", load=lambda: fusing, fuses_qk_norm_rope=True, head_dims=(64,))
        with pytest.warns(UserWarning, match="such calls run on 'sdpa'"):
            torch.testing.assert_close(AttentionDispatcher(lambda: Fixed(narrow), Counter())(found, found, x), expected)
        # Query and key have different tables.
        cos, sin = (item.cpu() for item in tables(5, 8, seed=3))
        other = DeferredQK.rope(x, cos, sin, lambda item: rotate(item, cos, sin).to(item.dtype))
        expected = scaled_dot_product(Inputs(apply(x), rotate(x, cos, sin).to(x.dtype), x))
        torch.testing.assert_close(dispatcher(found, other, x), expected)
        assert seen[-1] is not None
        # With the rotation of one of the two deferred, no kernel can fuse it.
        torch.testing.assert_close(dispatcher(found, x, x), scaled_dot_product(Inputs(apply(x), x, x)))

    def test_norm_and_rotation_reach_a_fusing_kernel_together(self, deferred):
        _, x, apply, _ = deferred
        cos, sin = (item.cpu() for item in tables(5, 8))
        weight = torch.linspace(0.5, 2, 8)

        def stock_norm(item):
            assert type(item) is torch.Tensor
            return normed(item, weight, 1e-5).to(item.dtype)

        both = DeferredQK.rope(DeferredQK.rms_norm(x, weight, 1e-5, stock_norm), cos, sin, apply)
        assert torch.equal(both + 0, apply(stock_norm(x)))
        only = DeferredQK.rms_norm(x, weight, 1e-5, stock_norm)
        assert torch.equal(only + 0, stock_norm(x)) and torch.equal(only.raw, x)
        seen = []

        def fusing(inputs):
            seen.append((inputs.norm, inputs.rotary))
            assert torch.equal(inputs.query, x)
            return inputs.value

        kernel = AttentionKernel(name="fusing", load=lambda: fusing, fuses_qk_norm_rope=True, head_dims=(8,))
        dispatcher = AttentionDispatcher(lambda: Fixed(kernel), Counter())
        dispatcher(both, both, x)
        dispatcher(only, only, x)
        assert torch.equal(seen[0][0].key, weight) and seen[0][0].eps == 1e-5 and seen[0][1] is not None
        assert seen[1][0] is not None and seen[1][1] is None
        # With another epsilon, or one rotation alone, the stock functions apply both.
        plain = AttentionKernel(name="plain", load=lambda: scaled_dot_product, fuses_qk_norm_rope=True, head_dims=(8,))
        dispatcher = AttentionDispatcher(lambda: Fixed(plain), Counter())
        other = DeferredQK.rms_norm(x, weight, 1e-2, stock_norm)
        torch.testing.assert_close(
            dispatcher(only, other, x), scaled_dot_product(Inputs(stock_norm(x), stock_norm(x), x))
        )
        expected = scaled_dot_product(Inputs(apply(stock_norm(x)), stock_norm(x), x))
        torch.testing.assert_close(dispatcher(both, only, x), expected)

    def test_a_norm_of_another_kind_is_done_at_once(self, deferred):
        _, x, _, _ = deferred
        whole = torch.nn.RMSNorm(16, eps=1e-5)  # over all heads, before they are split
        flat = x.flatten(2)
        assert type(DeferredQK.rms_norm(flat, whole.weight, whole.eps, whole)) is not DeferredQK
        assert type(DeferredQK.rms_norm(x, None, 1e-5, torch.abs)) is torch.Tensor
        assert type(DeferredQK.rms_norm(x, torch.ones(8), None, torch.abs)) is torch.Tensor

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("layout", ["heads first", "heads in the channels"])
    def test_heads_move_to_where_attention_wants_them(self, form, layout):
        given = {**FORMS[form], "heads": 2} if layout != "heads first" else FORMS[form]
        rope_style = given.get("rope_style", "interleaved")
        x = torch.randn(2, 5, given.get("heads", 2), 8)
        cos, sin = (item.cpu() for item in tables(5, 8, **given))
        expected = rotate(x, cos, sin, rope_style).to(x.dtype)
        if layout == "heads first":

            def apply(item):
                return rotate(item, cos.transpose(1, 2), sin.transpose(1, 2), rope_style).to(item.dtype)

            first = DeferredQK.rope(x.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2), apply, rope_style)
            found = first.repeat_interleave(1, dim=3).transpose(1, 2)
        else:

            def apply(item):
                return rotate(item.unflatten(2, (2, -1)), cos, sin, rope_style).to(item.dtype).flatten(2)

            first = DeferredQK.rope(x.flatten(2), cos.flatten(2), sin.flatten(2), apply, rope_style, heads=2)
            found = first.unflatten(2, (2, -1))
            assert type(first.unflatten(2, (4, -1))) is torch.Tensor  # not the heads of its tables
        assert type(found) is DeferredQK and torch.equal(found.raw, x)
        assert torch.equal(rotate(found.raw, *found.tables, found.rope_style).to(x.dtype), expected)
        assert torch.equal(found + 0, expected)
