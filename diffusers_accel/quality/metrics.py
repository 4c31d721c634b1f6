"""Fidelity metrics of pictures and videos: PSNR and SSIM, computed in float64 on values in [0, 1].

Both compare the results of two pipelines with the same seed. Neither measures a picture's quality. Values that no
picture can have (NaN, bytes, [-1, 1]) are refused, so that a broken output cannot score by accident.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Pictures: TypeAlias = "torch.Tensor | NDArray[Any]"

# An SSIM window is 7 pixels wide (Wang et al. 2004 use an 11-pixel Gaussian; scikit-image's default is 7, uniform).
_WINDOW = 7
# Arithmetic in bfloat16 may leave a value this far outside [0, 1].
_SLACK = 1e-2


def psnr(a: Pictures, b: Pictures) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / mean squared error), over all values together.

    Args:
        a: Values in [0, 1], floating point, any shape, on any device.
        b: Values in [0, 1], floating point, in the shape of `a`, on any device.

    Returns:
        The ratio in dB; infinite for equal values.

    Raises:
        ValueError: The shapes differ, or a value is not finite or not in [0, 1].
    """
    first, second = _pair(a, b)
    error = float(np.mean(np.square(first - second)))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Pictures, b: Pictures, channel_axis: int = -1) -> float:
    """Structural similarity (Wang et al. 2004) as scikit-image computes it, averaged over pictures and frames.

    Args:
        a: Values in [0, 1], floating point, (..., height, width, channels), the layout of a pipeline's
            `output_type="np"`. All dimensions in front are pictures or frames.
        b: Values in [0, 1], floating point, in the shape of `a`.
        channel_axis: -1, or -3 for (..., channels, height, width), the layout of a pipeline's `output_type="pt"`.

    Returns:
        The mean similarity; 1 for equal pictures, and less otherwise.

    Raises:
        ValueError: The shapes differ, a value is not finite or not in [0, 1], a side is shorter than 7 pixels, or the
            channel axis does not have 1 to 4 channels.
        ModuleNotFoundError: scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ssim needs scikit-image: pip install 'diffusers-accel[demo]'") from error

    first, second = _pair(a, b)
    if channel_axis not in (-1, -3):
        raise ValueError(f"channel_axis is -1 or -3, not {channel_axis}.")
    if first.ndim < 3 or first.shape[channel_axis] > 4:
        raise ValueError(f"A shape {first.shape} has no 1 to 4 channels at {channel_axis}; see channel_axis.")
    first, second = (np.moveaxis(item, channel_axis, -1) for item in (first, second))
    height, width, channels = first.shape[-3:]
    if min(height, width) < _WINDOW:
        raise ValueError(f"SSIM needs sides of at least {_WINDOW} pixels, got {height} x {width}.")
    pictures = zip(first.reshape(-1, height, width, channels), second.reshape(-1, height, width, channels), strict=True)
    values = [structural_similarity(x, y, channel_axis=-1, data_range=1.0, win_size=_WINDOW) for x, y in pictures]
    return float(np.mean(values))


def _pair(a: Pictures, b: Pictures) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both pictures as float64 arrays.

    Raises:
        ValueError: The shapes differ or are empty, or a value is not finite or not in [0, 1].
    """
    first, second = _array(a), _array(b)
    if first.shape != second.shape:
        raise ValueError(f"The shapes differ: {first.shape} and {second.shape}.")
    if first.size == 0:
        raise ValueError(f"There is nothing to compare in the shape {first.shape}.")
    return first, second


def _array(values: Pictures) -> NDArray[np.float64]:
    floating = values.is_floating_point() if isinstance(values, torch.Tensor) else values.dtype.kind == "f"
    if not floating:
        raise ValueError(f"Expected floating point values in [0, 1], got {values.dtype}; divide bytes by 255.")
    array: NDArray[np.float64] = (
        values.detach().to("cpu", torch.float64).numpy()
        if isinstance(values, torch.Tensor)
        else values.astype(np.float64)
    )
    if not np.isfinite(array).all():
        raise ValueError("Some values are not finite.")
    if array.size and (array.min() < -_SLACK or array.max() > 1 + _SLACK):
        raise ValueError(f"Expected values in [0, 1], got [{array.min():.3g}, {array.max():.3g}].")
    return array
