"""Where Triton kernels are launched: on the GPU that their tensors are on.

Triton launches on the current device, whatever its pointers point to; a pipeline may be on another one (`cuda:1`). So
every kernel that is launched, and not only called by others, is decorated with `on_its_device`; a test reads the
sources and finds those that are not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..core.platform import device_guard


class on_its_device:
    """A Triton kernel that is launched on the device of the first tensor it is given.

    Args:
        kernel: What `triton.jit` returns.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(_launch, self.kernel[grid])


# Told by their type first: thousands of launches ask in every request.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _launch(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    for item in args:
        if type(item) in _PLAIN or isinstance(item, torch.Tensor):
            with device_guard(item):
                launch(*args, **kwargs)
            return
    raise TypeError("a kernel is launched with a tensor among its arguments")
