"""The launch of Triton kernels on the GPU of their tensors.

Triton launches on the current device, even if the pointers belong to another one, and a pipeline may be on any device
(`cuda:1`). Every kernel with a launch of its own is therefore decorated with `on_its_device`. A test reads the sources
and reports kernels without the decorator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..core.platform import device_guard


class on_its_device:
    """A Triton kernel that is launched on the device of its first positional tensor; without one, `TypeError`.

    Args:
        kernel: The result of `triton.jit`.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(_launch, self.kernel[grid])


# Tensors are recognized by their type first, which is faster: a request has thousands of launches.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _launch(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    for item in args:
        if type(item) in _PLAIN or isinstance(item, torch.Tensor):
            with device_guard(item):
                launch(*args, **kwargs)
            return
    raise TypeError("a kernel is launched with a tensor among its arguments")
