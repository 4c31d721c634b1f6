"""What this machine has: packages and GPUs. Answers are sentences a user can read where something is missing."""

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
    """Where a denoiser lives.

    Attributes:
        type: As in `torch.device.type`.
        name: The GPU's name, or the machine's architecture.
        arch: CUDA compute capability, e.g. (9, 0); `None` off CUDA.
    """

    type: str
    name: str
    arch: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.arch[0]}{self.arch[1]})" if self.arch else f"{self.type} ({self.name})"


def describe(device: torch.device) -> Device:
    """What is known of a torch device."""
    if device.type == "cuda":
        return Device("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    return Device(device.type, platform.machine())


def default_device() -> Device:
    """The device a pipeline would run on by default: the first GPU, or the CPU."""
    return describe(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


_AS_IT_IS: AbstractContextManager[Any] = nullcontext()


def device_guard(x: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which the tensor's GPU is the current one. torch's own operators need none; Triton, packages'
    kernels, events and captures go by the current device. It costs half a microsecond where that is the tensor's."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(x.device)


def has_module(name: str) -> bool:
    """Whether a module can be found, without importing it (parents of a dotted name excepted)."""
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
    """Versions of Python and of the packages that decide what can run here; absent ones left out."""
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
    """A tensor on another device. Between host and GPU it passes through page-locked memory, which torch keeps for the
    next one: several times as fast as a copy from or to ordinary memory, and the result lies in ordinary memory."""
    if x.device == device:
        return x
    if "cuda" not in (x.device.type, device.type) or "cpu" not in (x.device.type, device.type):
        return x.to(device)
    staged = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    staged.copy_(x)
    return staged.clone() if device.type == "cpu" else staged.to(device)


# Copies from page-locked to ordinary memory, beside the transfers from the GPU; and how many may wait for it.
_PARKING = ThreadPoolExecutor(1, "diffusers_accel-parking")
_WAITING = threading.BoundedSemaphore(4)


def offload_to_host(x: torch.Tensor) -> Future[None]:
    """Moves a tensor's data from a GPU to the host, as `to_device` does, its two copies beside those of other tensors.
    Meanwhile the tensor has its shape, and values that are not to be read.

    Returns:
        What ends when the data is there.
    """
    _WAITING.acquire()
    try:
        staged = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        staged.copy_(x.data, non_blocking=True)
        there = torch.cuda.Event()
        there.record(torch.cuda.current_stream(x.device))
        x.data = staged
    except BaseException:
        _WAITING.release()
        raise

    def move() -> None:
        try:
            there.synchronize()
            # Whoever was interrupted while the copy was under way may have put the data back already.
            if x.data.data_ptr() == staged.data_ptr():
                x.data = staged.clone()
        finally:
            _WAITING.release()

    return _PARKING.submit(move)
