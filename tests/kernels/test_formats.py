"""Low-bit formats, bit for bit against arithmetic of their own: float64 numpy over tables of all values of a type."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from diffusers_accel.kernels.linear import formats

# Every magnitude of e4m3 from its definition: subnormals m/8 * 2^-6, then (1 + m/8) * 2^(e-7); 480 would be NaN.
E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
)[:-1]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(x: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """The nearest value of a type, ties to the even code (its place in the table), larger ones to the last."""
    x = np.asarray(x, np.float64)
    above = np.searchsorted(magnitudes, np.abs(x), side="left").clip(0, len(magnitudes) - 1)
    below = (above - 1).clip(0)
    to_above, to_below = magnitudes[above] - np.abs(x), np.abs(x) - magnitudes[below]
    code = np.where(
        to_above < to_below, above, np.where(to_below < to_above, below, np.where(above % 2 == 0, above, below))
    )
    code = np.where(np.abs(x) >= magnitudes[-1], len(magnitudes) - 1, code)
    return np.copysign(magnitudes[code], x)


def awkward(rows=37, columns=160, seed=0):
    """Gaussian rows with outliers, rows of zeros, tiny and huge ones, and values that fall between two of a type."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 100
    x[1] = 0
    x[2, :16] = 0
    x[3] *= 1e-30
    x[4] *= 1e30
    x[5] = torch.linspace(-6, 6, columns)
    x[6, ::2] = 0.25
    return x


def quotient(x: torch.Tensor, scale: np.ndarray) -> np.ndarray:
    """What is rounded is the float32 quotient; that much belongs to the format."""
    return (x.numpy().astype(np.float32) / scale.astype(np.float32)).astype(np.float64)


def plain_scale(amax: np.ndarray, largest: float) -> np.ndarray:
    scale = amax.astype(np.float32) / np.float32(largest)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def test_rounding_of_every_type():
    x = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(1)) * 100, torch.linspace(-8, 8, 4097)])
    ties = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E4M3)], dtype=torch.float32)
    x = torch.cat([x, ties, -ties, torch.tensor([0.0, 447.0, 448.0, 464.0, 1e30, -1e30, 2.0**-10, 2.0**-9])])
    assert np.array_equal(formats.to_e4m3(x).double().numpy(), nearest(x.numpy(), E4M3))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat([x, ties, -ties])
    assert np.array_equal(formats.from_e2m1(formats.to_e2m1(x)).double().numpy(), nearest(x.numpy(), E2M1))
    assert np.array_equal(formats.to_int8(x).double().numpy(), np.rint(x.double().numpy()).clip(-127, 127))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_tensor(dtype):
    x = awkward().to(dtype)
    wide = x.float()
    amax = wide.abs().numpy().max(1, keepdims=True)
    values, scale = formats.quantize_rows(x)
    assert np.array_equal(scale.numpy(), plain_scale(amax, 448))
    assert np.array_equal(values.double().numpy(), nearest(quotient(wide, scale.numpy()), E4M3))
    values, scale = formats.quantize_rows(x, torch.int8)
    assert np.array_equal(scale.numpy(), plain_scale(amax, 127))
    assert np.array_equal(values.double().numpy(), np.rint(quotient(wide, scale.numpy())))
    values, scale = formats.quantize_tensor(x)
    assert np.array_equal(scale.numpy(), plain_scale(amax.max().reshape(1), 448))
    assert np.array_equal(values.double().numpy(), nearest(quotient(wide, scale.numpy()), E4M3))
    found = formats.dequantize(values, scale)
    assert torch.equal(found, values.float() * scale)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (130, 256), (37, 160), (1, 16), (256, 129)])
def test_blocks_and_groups(rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 3
    x[0, :128] = 0
    values, scale = formats.quantize_blocks(x)
    groups, group_scale = formats.quantize_groups(x)
    assert values.shape == groups.shape == x.shape
    assert scale.shape == (-(-rows // 128), -(-columns // 128)) and group_scale.shape == (rows, -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            amax = x[part].abs().numpy().max()
            assert scale[i, j].item() == plain_scale(amax.reshape(1), 448)[0]
            expected = nearest(quotient(x[part], scale[i, j].numpy()), E4M3)
            assert np.array_equal(values[part].double().numpy(), expected)
            assert torch.equal(formats.dequantize(values, scale)[part], values[part].float() * scale[i, j])
            each = group_scale[part[0], j]
            assert np.array_equal(each.numpy(), plain_scale(x[part].abs().numpy().max(1), 448))
            expected = nearest(quotient(x[part], each.numpy()[:, None]), E4M3)
            assert np.array_equal(groups[part].double().numpy(), expected)
            assert torch.equal(formats.dequantize(groups, group_scale)[part], groups[part].float() * each[:, None])


def test_nvfp4():
    x = awkward()
    x[4] /= 1e30  # one scale serves the whole matrix: 1e30 beside 1 would leave zeros alone
    packed, block_scale, global_scale = formats.quantize_nvfp4(x)
    assert packed.dtype == torch.uint8 and packed.shape == (37, 80) and block_scale.shape == (37, 10)
    amax = np.abs(x.numpy().reshape(37, 10, 16)).max(-1)
    expected = amax.max().astype(np.float32) / np.float32(6 * 448)
    assert global_scale.item() == expected
    blocks = nearest((plain_scale(amax, 6) / expected).astype(np.float64), E4M3)
    blocks = np.where(amax == 0, 1, blocks)
    assert np.array_equal(block_scale.double().numpy(), blocks)
    each = (blocks.astype(np.float32) * expected)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(each == 0, 0, x.numpy().reshape(37, 10, 16) / each)
    values = nearest(scaled.astype(np.float64), E2M1)
    codes = formats.unpack(packed)
    assert np.array_equal(formats.from_e2m1(codes).double().numpy(), values.reshape(37, 160))
    found = formats.dequantize_nvfp4(packed, block_scale, global_scale)
    assert np.array_equal(found.numpy(), (values.astype(np.float32) * each).reshape(37, 160))
    # The first of a pair lies in the low bits.
    assert torch.equal(packed & 15, codes[:, 0::2]) and torch.equal(packed >> 4, codes[:, 1::2])
    assert torch.equal(formats.pack(codes), packed)
    zero = formats.quantize_nvfp4(torch.zeros(4, 32))
    assert zero[0].eq(0).all() and zero[1].float().eq(1).all() and zero[2].item() == 1
    with pytest.raises(ValueError, match="multiple of 16"):
        formats.quantize_nvfp4(torch.zeros(4, 24))


def test_every_value_of_nvfp4_survives():
    """Values that the format holds come back as they were."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    block_scale = torch.tensor([[0.5, 448.0], [1.0, 448.0], [448.0, 2.0]]).to(torch.float8_e4m3fn)
    x = formats.dequantize_nvfp4(formats.pack(codes), block_scale, torch.tensor([0.125]))
    packed, scales, global_scale = formats.quantize_nvfp4(x)
    assert global_scale.item() == 0.125 and torch.equal(scales.float(), block_scale.float())
    found = formats.dequantize_nvfp4(packed, scales, global_scale)
    assert torch.equal(found, x)


def test_low_rank_of_matrices_with_few_directions():
    """One direction far above all others, fewer directions than asked for, none at all."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(96, 160, generator=generator) * 0.02
    few = torch.randn(96, 3, generator=generator) @ torch.randn(3, 160, generator=generator)
    for x in (noise + 1, noise * torch.logspace(0, -30, 96)[:, None], few, few + 1e-6 * noise, torch.zeros(96, 160)):
        left, right = formats.low_rank(x, 8)
        assert left.isfinite().all() and right.isfinite().all()
        best = torch.linalg.svdvals(x.double())[8:].norm()
        assert (x.double() - left.double() @ right.double()).norm() <= 1.1 * best + 1e-5 * x.double().norm()


def test_low_rank_is_nearly_the_best():
    x = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    x += 5 * torch.outer(torch.linspace(-1, 1, 96), torch.linspace(0, 1, 160))
    for rank in (1, 8, 32):
        left, right = formats.low_rank(x, rank)
        assert left.shape == (96, rank) and right.shape == (rank, 160)
        values = np.linalg.svd(x.double().numpy(), compute_uv=False)
        best = np.sqrt((values[rank:] ** 2).sum())
        assert float((x - left @ right).norm()) < 1.03 * best
    assert all(map(torch.equal, formats.low_rank(x, 8), formats.low_rank(x, 8)))
    left, right = formats.low_rank(torch.eye(4), 32)
    torch.testing.assert_close(left @ right, torch.eye(4))
