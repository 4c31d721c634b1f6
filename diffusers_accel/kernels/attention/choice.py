"""The choice of the kernel for a call: a fixed kernel, or the fastest of several by measurement.

When a class of shapes first occurs on a GPU, `Fastest` times every candidate on the tensors of that call. No kernel
changes its inputs. The result is kept in a small file for one GPU model and one set of package versions, so an upgrade
measures again. Lengths form classes half an octave wide: within a class the order of the kernels hardly changes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ...core.platform import Device, versions
from .record import KERNELS, AttentionKernel, Call, Inputs
from .sparse import Sparse

# Compute capability -> exact kernels in order of preference, for calls that cannot be measured: during the capture of a
# CUDA graph.
_PREFERENCE: dict[tuple[int, int] | None, tuple[str, ...]] = {(9, 0): ("fa3", "fa4"), (10, 0): ("fa4",)}
# Environment variable: the folder of kept timings, instead of the user's cache folder.
CACHE_VARIABLE = "DIFFUSERS_ACCEL_CACHE"


class Choice(Protocol):
    """A rule that picks the kernel of each call."""

    def pick(self, call: Call, run: Callable[[AttentionKernel], Any], shape: str) -> AttentionKernel:
        """The kernel for a call.

        Args:
            call: The facts of the call.
            run: Computes the call with a kernel, for measurement.
            shape: Name of the call's class of shapes.
        """
        ...

    @property
    def kernels(self) -> tuple[AttentionKernel, ...]:
        """All kernels that `pick` may return."""
        ...

    @property
    def sparse(self) -> Sparse | None:
        """Sparse attention of the calls that it takes; `None` for dense attention."""
        ...

    @property
    def sparse_kernel(self) -> AttentionKernel | None:
        """The kernel of sparse calls; `None` without any."""
        ...


@dataclass(frozen=True)
class Fixed:
    """One kernel for every call, dense or sparse."""

    kernel: AttentionKernel
    sparse: Sparse | None = None

    def pick(self, call: Call, run: Callable[[AttentionKernel], Any], shape: str) -> AttentionKernel:
        return self.kernel

    @property
    def kernels(self) -> tuple[AttentionKernel, ...]:
        return (self.kernel,)

    @property
    def sparse_kernel(self) -> AttentionKernel | None:
        return None if self.sparse is None else self.kernel


@dataclass
class Fastest:
    """The fastest of several kernels, by shape.

    Args:
        kernels: The candidates, each of which can run on this machine. Where nothing can be measured, the first one
            that supports the call is picked.
        timings: The kept measurements.
        measured: Class of shapes -> kernel -> seconds, for this pipeline. The pipeline's statistics own it.
        sparse: Sparse attention of the calls that it takes; `None` for dense attention.
        sparse_kernel: The kernel of sparse calls; `None` without any.
    """

    kernels: tuple[AttentionKernel, ...]
    timings: Timings
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    sparse: Sparse | None = None
    sparse_kernel: AttentionKernel | None = None

    def pick(self, call: Call, run: Callable[[AttentionKernel], Any], shape: str) -> AttentionKernel:
        able = [kernel for kernel in self.kernels if kernel.refuses(call) is None]
        if len(able) == 1:
            return able[0]
        known = self.timings.known(shape)
        lacking = [kernel for kernel in able if kernel.name not in known]
        if lacking and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return able[0]
        if lacking:
            known = self.timings.measure(shape, able, run)
        times = {kernel.name: known[kernel.name] for kernel in able}
        self.measured[shape] = times
        return min(able, key=lambda kernel: times[kernel.name])

    def remembered(self, head_dim: int | None) -> dict[str, dict[str, float]]:
        """Kept measurements of this machine for a head dimension, or all: class of shapes -> kernel -> seconds."""
        names = {kernel.name for kernel in self.kernels}
        return {
            shape: {name: seconds for name, seconds in times.items() if name in names}
            for shape, times in self.timings.shapes.items()
            if head_dim is None or f"x{head_dim} " in shape
        }


def candidates(device: Device, exact: bool = True) -> tuple[AttentionKernel, ...]:
    """The kernels that `"auto"` may choose from on a device, the preferred one first. SDPA is always among them."""
    if device.type != "cuda":
        return (KERNELS.get("sdpa"),)
    preferred = _PREFERENCE.get(device.arch, ())
    names = [*preferred, "sdpa", *(name for name in KERNELS if name not in (*preferred, "sdpa"))]
    found = (KERNELS.get(name) for name in names)
    return tuple(
        kernel for kernel in found if kernel.auto and (kernel.exact or not exact) and kernel.missing(device) is None
    )


def shape_class(inputs: Inputs, call: Call) -> str:
    """Name of a class of shapes, e.g. `"bfloat16 24x128 q4608 k4608"`. Heads (times batch) and lengths are rounded to
    half octaves."""
    query, key = inputs.query, inputs.key
    heads = _half_octave(query.shape[0] * query.shape[2])
    parts = [
        str(query.dtype).removeprefix("torch."),
        f"{heads}x{query.shape[3]}",
        f"q{_half_octave(query.shape[1])}",
        f"k{_half_octave(key.shape[1])}",
    ]
    if inputs.rotary is not None:
        parts.append("rotary")
    if inputs.norm is not None:
        parts.append("norm")
    if call.mask != "none":
        parts.append(f"mask-{call.mask}")
    if call.causal:
        parts.append("causal")
    if call.lse:
        parts.append("lse")
    if call.grouped:
        parts.append(f"groups{query.shape[2] // key.shape[2]}")
    return " ".join(parts)


def margin(times: Mapping[str, float]) -> str:
    """The fastest kernel and its lead, e.g. `"fa3 0.31 ms, 6% before fa4, 9% before cudnn"`.

    Args:
        times: Kernel -> seconds; infinity for a kernel that failed.
    """
    ordered = sorted((seconds, name) for name, seconds in times.items() if math.isfinite(seconds))
    if not ordered:
        return "not measured"
    best, winner = ordered[0]
    others = [f"{seconds / best - 1:.0%} before {name}" for seconds, name in ordered[1:4]]
    return ", ".join([f"{winner} {best * 1e3:.3g} ms", *others])


def _half_octave(number: int) -> int:
    return round(2 ** (round(2 * math.log2(number)) / 2)) if number else 0


class Timings:
    """Seconds of kernels by class of shapes, kept in a file for one GPU model and set of versions.

    Args:
        device: The GPU.
        folder: The folder of the file; `cache_folder()` if `None`.
    """

    def __init__(self, device: Device, folder: Path | None = None):
        self.facts = {"device": str(device), **versions()}
        self.facts["cuda"] = str(torch.version.cuda)
        self.facts["cudnn"] = str(torch.backends.cudnn.version())
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"attention-{digest}.json"
        self._lock = threading.Lock()
        self._known = self._read()

    @property
    def shapes(self) -> Mapping[str, Mapping[str, float]]:
        """All measurements: class of shapes -> kernel -> seconds."""
        return self._known

    def known(self, shape: str) -> dict[str, float]:
        """Kernel -> seconds for a class of shapes; empty if it was never measured."""
        return self._known.get(shape, {})

    def measure(
        self, shape: str, kernels: Sequence[AttentionKernel], run: Callable[[AttentionKernel], Any]
    ) -> dict[str, float]:
        """Times kernels on a call and keeps the seconds. A kernel that fails is warned of and counts as infinitely
        slow.

        Args:
            shape: Name of the class of shapes.
            kernels: The kernels to time.
            run: Computes the call with a kernel.

        Returns:
            Kernel -> seconds.
        """
        with self._lock:
            # Another dispatcher, or another process, may have measured the shape meanwhile.
            written = self._read()
            if all(kernel.name in written.get(shape, {}) for kernel in kernels):
                self._known = written
                return written[shape]
            found: dict[str, float] = {}
            sound = []
            for kernel in kernels:
                try:
                    run(kernel)  # untimed: the first call may compile
                    sound.append(kernel)
                except Exception as error:  # a package's kernel may raise anything on a shape that its record allows
                    reason = f"{type(error).__name__}: {error}"
                    warnings.warn(f"attention 'auto' leaves out {kernel.name!r} for {shape}: {reason}", stacklevel=2)
                    found[kernel.name] = math.inf
            times = _alternate({kernel.name: partial(run, kernel) for kernel in sound})
            found |= {name: sorted(each)[len(each) // 2] for name, each in times.items()}
            known = {**written, shape: {**self.known(shape), **found}}
            self._known = known
            self._write()
            return known[shape]

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            shapes = json.loads(self.path.read_text(encoding="utf-8"))["seconds"]
            return {shape: {name: float(value) for name, value in times.items()} for shape, times in shapes.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # missing, truncated or of another format: the next write replaces it

    def _write(self) -> None:
        # The next process tries a failed kernel again, since the cause may be gone.
        kept = {
            shape: {name: value for name, value in times.items() if math.isfinite(value)}
            for shape, times in self._known.items()
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump({"facts": self.facts, "seconds": kept}, file, indent=1)
            os.replace(file.name, self.path)
        except OSError as error:
            warnings.warn(
                f"attention timings could not be kept in {self.path}: {error}. They are measured again next time; set "
                f"{CACHE_VARIABLE} to a folder that can be written.",
                stacklevel=2,
            )


def cache_folder() -> Path:
    """The folder of kept measurements."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusers_accel"


def _alternate(functions: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each function on the current GPU. The functions are called in turn, so that a warming GPU affects all
    alike. Each is called three times or more, up to 15 times within 0.05 seconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for rounds in range(15):
        if rounds >= 3 and sum(map(sum, times.values())) > 0.05:
            break
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1000)
    return times
