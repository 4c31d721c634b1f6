"""PSNR and SSIM against known values and against the formulas written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusers_accel.quality.metrics import psnr, ssim


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def test_psnr_known_values():
    zeros = np.zeros((2, 3, 4))
    assert psnr(zeros, zeros) == math.inf
    assert psnr(zeros, zeros + 0.1) == pytest.approx(20.0, abs=1e-12)
    assert psnr(zeros, zeros + 1) == pytest.approx(0.0, abs=1e-12)
    one = zeros.copy()
    one[0, 0, 0] = 1  # one wrong value of 24
    assert psnr(zeros, one) == pytest.approx(10 * math.log10(24), abs=1e-12)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, torch.float32, torch.bfloat16])
def test_psnr_is_taken_in_float64(kind):
    a, b = pictures(2, 8, 8, 3), pictures(2, 8, 8, 3, seed=1)
    if isinstance(kind, torch.dtype):
        first, second = torch.tensor(a, dtype=kind), torch.tensor(b, dtype=kind)
        a, b = first.double().numpy(), second.double().numpy()
    else:
        first, second = a.astype(kind), b.astype(kind)
        a, b = first.astype(np.float64), second.astype(np.float64)
    total = sum((float(x) - float(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True))
    # the same values summed in another order: only float64 rounding
    assert psnr(first, second) == pytest.approx(10 * math.log10(a.size / total), abs=1e-9)


def test_psnr_of_a_difference_below_single_precision():
    a = np.full((4, 4), 0.5)
    assert psnr(a, a + 1e-9) == pytest.approx(180.0, abs=1e-4)  # 0.5 + 1e-9 itself is rounded, by 5e-17


def written_out_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, with a uniform window of 7 and sample covariances; one channel, data range 1."""
    values = []
    for row in range(a.shape[0] - 6):
        for column in range(a.shape[1] - 6):
            x, y = a[row : row + 7, column : column + 7].ravel(), b[row : row + 7, column : column + 7].ravel()
            covariance = np.cov(x, y)
            luminance = (2 * x.mean() * y.mean() + 0.01**2) / (x.mean() ** 2 + y.mean() ** 2 + 0.01**2)
            rest = (2 * covariance[0, 1] + 0.03**2) / (covariance[0, 0] + covariance[1, 1] + 0.03**2)
            values.append(luminance * rest)
    return float(np.mean(values))


def test_ssim_is_the_formula():
    a = pictures(2, 12, 10, 3)
    b = np.clip(a + 0.2 * (pictures(2, 12, 10, 3, seed=1) - 0.5), 0, 1)
    expected = np.mean([written_out_ssim(a[i, ..., c], b[i, ..., c]) for i in range(2) for c in range(3)])
    assert 0.5 < expected < 0.99
    # float64 rounding; variances are differences of means there and centred sums here
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)


def test_ssim_known_values():
    a = pictures(3, 8, 8, 3)
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)
    # black against white: means 0 and 1, no variance
    black = np.zeros((8, 8, 1))
    assert ssim(black, black + 1) == pytest.approx(0.01**2 / (1 + 0.01**2), rel=1e-9)


def test_ssim_of_a_video_is_the_mean_over_frames_in_either_layout():
    a, b = pictures(2, 3, 8, 9, 3), pictures(2, 3, 8, 9, 3, seed=1)
    each = [ssim(a[i, j], b[i, j]) for i in range(2) for j in range(3)]
    assert np.std(each) > 1e-4
    assert ssim(a, b) == pytest.approx(np.mean(each), abs=1e-12)
    channels_first = [torch.tensor(np.moveaxis(item, -1, -3)) for item in (a, b)]
    assert ssim(*channels_first, channel_axis=-3) == pytest.approx(ssim(a, b), abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_is_no_picture_is_refused(metric):
    good = pictures(8, 8, 3)
    bad = good.copy()
    bad[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        metric(good, bad)
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        metric(good * 2 - 1, good)
    with pytest.raises(ValueError, match="divide bytes by 255"):
        metric((good * 255).astype(np.uint8), good)
    with pytest.raises(ValueError, match="divide bytes by 255"):
        metric(torch.zeros(8, 8, 3, dtype=torch.uint8), good)
    with pytest.raises(ValueError, match="shapes differ"):
        metric(good, good[:7])
    with pytest.raises(ValueError, match="nothing to compare"):
        metric(good[:0], good[:0])


def test_ssim_refuses_shapes_it_would_misread():
    with pytest.raises(ValueError, match="channel_axis"):
        ssim(pictures(3, 8, 8), pictures(3, 8, 8))
    with pytest.raises(ValueError, match="-1 or -3"):
        ssim(pictures(8, 8, 3), pictures(8, 8, 3), channel_axis=0)
    with pytest.raises(ValueError, match="at least 7 pixels"):
        ssim(pictures(6, 8, 3), pictures(6, 8, 3))
