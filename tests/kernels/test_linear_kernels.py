"""The Triton kernels of linear layers against the definitions of the formats: interpreted on the CPU,
compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel.kernels.linear import formats

pytest.importorskip("triton")

from diffusers_accel.kernels.linear import gemm, quantize_activations, quantize_weights
from diffusers_accel.kernels.linear.precomputed import (
    PrecomputedInputs,
    PrecomputedOutputs,
    precomputed_for,
    register_precomputed,
)
from diffusers_accel.kernels.linear.skinny import skinny_linear

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows_of(count, columns, dtype=torch.float16, seed=0):
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    x[:, 1] *= 50
    x[0] = 0
    return x.to(DEVICE, dtype)


def same_but_for_midpoints(found, scale, expected, expected_scale):
    """Scales are equal. Values are equal, or neighbours where the quotient is a midpoint."""
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    wrong = found.float() != expected.float()
    assert wrong.float().mean() < 2e-3
    assert ((found.float() - expected.float()).abs() <= (expected.float().abs() / 8).clamp_min(1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("count", "columns"), [(1, 16), (37, 160), (5, 3072), (3, 129)])
def test_rows(count, columns, dtype):
    x = rows_of(count, columns, dtype)
    for kind in (torch.float8_e4m3fn, torch.int8):
        found, scale = quantize_activations.quantize_rows(x, kind)
        same_but_for_midpoints(found, scale, *formats.quantize_rows(x, kind))
    strided = torch.nn.functional.pad(x, (0, 7))[:, :columns]  # rows with a stride
    again, _ = quantize_activations.quantize_rows(strided)
    assert torch.equal(again.float(), quantize_activations.quantize_rows(x)[0].float())


@pytest.mark.parametrize(("count", "columns"), [(1, 128), (37, 256), (33, 160)])
def test_groups(count, columns):
    x = rows_of(count, columns)
    x[count // 2, :128] = 0
    found, scale = quantize_activations.quantize_groups(x)
    assert found.shape[0] == scale.shape[0] == -(-count // 4) * 4 and scale.t().is_contiguous()
    assert found[count:].float().eq(0).all() and scale[count:].eq(1).all()
    same_but_for_midpoints(found[:count], scale[:count], *formats.quantize_groups(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("count", "columns"), [(1, 16), (37, 272), (16, 512)])
def test_nvfp4_weights(count, columns, dtype):
    x = rows_of(count, columns, dtype)
    x[-1, :16] = 1e-7 if dtype == torch.float32 else 0.0  # a block far below the others: its scale is 0
    if columns > 16:  # midpoints between neighbouring values, and values themselves
        x[-1, 16:32] = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -6, -5, -3.5, -2.5, -1.75, -0.75, 0, 4])
    for scale in (formats.tensor_scale(x, 6 * 448.0), torch.tensor([1.0], device=DEVICE)):
        found, expected = quantize_weights.quantize_nvfp4(x, scale), formats.quantize_nvfp4(x, scale)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1].float(), expected[1].float()) and found[2] is scale


def test_tensor():
    x = rows_of(37, 160)
    same_but_for_midpoints(*quantize_activations.quantize_tensor(x), *formats.quantize_tensor(x))
    given = torch.tensor([0.5], device=DEVICE)
    found, scale = quantize_activations.quantize_tensor(x, given)
    assert scale is given
    assert torch.equal(found.float(), formats.to_e4m3(x.float() / 0.5).float())
    assert quantize_activations.quantize_tensor(torch.zeros(4, 16, device=DEVICE))[1].item() == 1


@pytest.mark.parametrize(("count", "columns", "depth"), [(1, 48, 64), (130, 304, 208), (37, 16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear(count, columns, depth, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (count, depth), generator=generator, dtype=torch.int8).to(DEVICE)
    weight = torch.randint(-127, 128, (columns, depth), generator=generator, dtype=torch.int8).to(DEVICE)
    x_scale, weight_scale = torch.rand(count, 1).to(DEVICE), torch.rand(columns, 1).to(DEVICE)
    offset = torch.randn(columns).to(DEVICE, torch.float16) if bias else None
    expected = (x.double() @ weight.double().T) * x_scale.double() * weight_scale.double().T
    if bias:
        expected += offset.double()
    for cut in (None, gemm.Tile(64, 64, 64, 4, 2, band=2)):
        found = gemm.int8_linear(x, x_scale, weight, weight_scale, offset, torch.float32, cut)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2)
    half = gemm.int8_linear(x, x_scale / 1e4, weight, weight_scale, None, torch.float16)
    assert half.dtype == torch.float16 and half.isfinite().all()


@pytest.mark.parametrize(("count", "columns"), [(1, 16), (33, 160), (64, 256)])
@pytest.mark.parametrize("rank", [0, 5, 32])
def test_dequantize_nvfp4(count, columns, rank):
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    stored = formats.quantize_nvfp4(x)
    expected = formats.dequantize_nvfp4(*stored)
    found = gemm.dequantize_nvfp4(*stored, torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(gemm.dequantize_nvfp4(*stored, torch.float16), expected.half())
    scales = torch.linspace(0.5, 2, len(x), device=DEVICE)[:, None]  # of packed layers
    by_row = formats.dequantize_nvfp4(*stored[:2], scales)
    torch.testing.assert_close(gemm.dequantize_nvfp4(*stored[:2], scales, torch.float32), by_row, rtol=1e-6, atol=0)
    if rank:
        left, right = torch.randn(count, rank).to(DEVICE), torch.randn(rank, columns).to(DEVICE)
        found = gemm.dequantize_nvfp4(*stored, torch.float16, left.half(), right.half())
        exact = expected.double() + left.half().double() @ right.half().double()
        torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "e4m3"])
@pytest.mark.parametrize("shape", [(1, 16, 40), (3, 1200, 24), (4, 1024, 1), (2, 3072, 130)])
def test_skinny_gemm(shape, low, silu):
    """The Triton kernel and the plain reference, against float64."""
    count, depth, columns = shape
    full = torch.randn(columns, depth, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    x, bias = rows_of(count, depth, torch.float32), torch.linspace(-1, 1, columns).to(DEVICE)
    data, scale = formats.quantize_rows(full) if low else (full, None)
    weight = data.double() if scale is None else data.double() * scale.double()
    given = x.double() * torch.sigmoid(x.double()) if silu else x.double()
    for constant in (bias, None):
        expected = given @ weight.T + (0.0 if constant is None else constant.double())
        for function in (gemm.skinny_gemm, skinny_linear):
            found = function(x, data, scale, constant, silu)
            torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-5)
    # opcheck compares the arguments, which torch cannot do in e4m3.
    tests = ("test_faketensor", "test_aot_dispatch_dynamic") if low else None
    torch.library.opcheck(skinny_linear, (x, data, scale, bias, silu), **({"test_utils": tests} if tests else {}))


@pytest.mark.parametrize("low", [False, True], ids=["float32", "e4m3"])
@pytest.mark.parametrize("plain", [True, False], ids=["operator", "kernel"])
def test_precomputed_outputs(plain, low):
    """A precomputed output is copied for the input of the current step, and for no other input."""
    depth, columns = 200, 40
    full = torch.randn(columns, depth, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    data, scale = formats.quantize_rows(full) if low else (full, None)
    weight = data.double() if scale is None else data.double() * scale.double()
    bias = torch.linspace(-1, 1, columns).to(DEVICE)
    rows = torch.randn(3, 2, depth, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    inputs = PrecomputedInputs(rows)
    owners = [PrecomputedOutputs(inputs, torch.full((32, 2, columns), 7.0).to(DEVICE))]  # a value that no product gives
    register_precomputed({data.data_ptr(): owners[0]})

    def call(x, silu=True):
        if plain or not silu:
            return skinny_linear(x, data, scale, bias, silu)
        return gemm.precomputed_gemm(x, data, scale, bias, owners[0])

    def taken(x):
        before, found = int(inputs.misses), call(x)
        if torch.equal(found, torch.full_like(found, 7.0)):
            return int(inputs.misses) == before
        exact = x.double() * torch.sigmoid(x.double()) @ weight.T + bias.double()
        torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-5)
        assert int(inputs.misses) == before + 1
        return False

    inputs.load(rows)
    assert not taken(rows[1])  # no current step
    inputs.set_step(1)
    assert taken(rows[1]) and taken(rows[1].clone()) and not taken(rows[0])
    other = rows[1].clone()
    other[1, -1] += 1e-6
    found, before = call(other), call(rows[1])
    # A program computes one row: the first row is still looked up.
    assert plain or torch.equal(found[0], before[0])
    assert not torch.equal(found[1], before[1])
    torch.testing.assert_close(call(rows[1], silu=False).double(), rows[1].double() @ weight.T + bias.double(),
                               atol=1e-3, rtol=1e-5)  # fmt: skip
    inputs.set_step(3)
    assert not taken(rows[1])  # beyond the request's last step
    inputs.load(rows[:1])
    inputs.set_step(1)
    assert not taken(rows[1])  # loaded by a longer request before
    owners.clear()
    assert precomputed_for(data) is None
