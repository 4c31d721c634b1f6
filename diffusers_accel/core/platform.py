"""Facts about this machine (devices, installed packages), and transfers of tensors between host and GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """A device, as kernel records compare it with their limits.

    Attributes:
        type: Type of the device, as `torch.device.type`.
        name: Name of the GPU, or of the host's CPU architecture.
        arch: CUDA compute capability, e.g. (9, 0); `None` on other devices.
    """

    type: str
    name: str
    arch: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.arch[0]}{self.arch[1]})" if self.arch else f"{self.type} ({self.name})"


def describe(device: torch.device) -> Device:
    """The facts about a torch device."""
    if device.type == "cuda":
        return Device("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    return Device(device.type, platform.machine())


def default_device() -> Device:
    """The device that a pipeline runs on by default: the first GPU, or the CPU."""
    return describe(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


_NO_GUARD: AbstractContextManager[Any] = nullcontext()


def device_guard(x: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which a tensor's GPU is the current device. Triton, kernels of other packages, events and captures
    use the current device; torch's own operators need no guard. On the current device it costs half a microsecond."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


def has_module(name: str) -> bool:
    """Whether a Python module can be found, without importing it. Parents of a dotted name are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def version(package: str) -> str | None:
    """The installed version of a distribution, or `None`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that kernels depend on."""
    names = (
        "diffusers-accel",
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "triton",
        "fa3-fwd",
        "flash-attn-4",
        "flash-attn",
        "sageattention",
        "nvidia-modelopt",
        "torchao",
    )
    found = {name: version(name) for name in names}
    return {"python": sys.version.split()[0]} | {name: value for name, value in found.items() if value}


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device; the tensor itself if it is there. Between host and GPU a contiguous copy goes through
    page-locked memory, which torch reuses: this is several times as fast. Results on the host are pageable."""
    if x.device == device:
        return x
    if "cuda" not in (x.device.type, device.type) or "cpu" not in (x.device.type, device.type):
        return x.to(device)
    staged = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    staged.copy_(x)
    return staged.clone() if device.type == "cpu" else staged.to(device)


# One thread copies from page-locked to pageable memory, in parallel with transfers from the GPU. The semaphore bounds
# the number of tensors in page-locked memory.
_OFFLOADING = ThreadPoolExecutor(1, "diffusers_accel-offloading")
_PENDING = threading.BoundedSemaphore(4)


def offload_to_host(x: torch.Tensor) -> Future[None]:
    """Moves a tensor's data from a GPU to pageable host memory, in the background. The copies of up to four tensors
    overlap; a further call waits.

    Args:
        x: A tensor on a GPU. Its `data` is replaced; its values must not be read until the future is done.

    Returns:
        A future that is done when the data has arrived, or has the copy's error.
    """
    _PENDING.acquire()
    try:
        staged = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        staged.copy_(x.data, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(x.device))
        x.data = staged
    except BaseException:
        _PENDING.release()
        raise

    def move() -> None:
        try:
            arrived.synchronize()
            # An interrupted caller may have put the data back already.
            if x.data.data_ptr() == staged.data_ptr():
                x.data = staged.clone()
        finally:
            _PENDING.release()

    return _OFFLOADING.submit(move)
