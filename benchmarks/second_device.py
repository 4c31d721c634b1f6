"""Checks a pipeline on a second GPU while the first is the current device, against the same on the first one.

- Every attention kernel and linear format that can run, on the same random inputs.
- A shipped checkpoint in bf16 under each of `WAYS`: its result on `cuda:1`, and after `restore`.

Both GPUs are of one kind and run the same kernels, so results are expected to be equal bit for bit, which is reported.
The bounds, relative, leave room for another choice among exact kernels: 1e-2 of one call, 5e-2 of four steps. Timings
of `"auto"` are made anew on each GPU. The current device must still be the first one after each check.

    python benchmarks/check_gpus.py --second-device           # benchmarks/results/second-device.json
    python benchmarks/check_gpus.py --second-device --short   # what is compiled left out: less than three minutes
    python benchmarks/check_gpus.py --second-device --short --device cpu    # a dry run of the script
"""

from __future__ import annotations

import copy
import faulthandler
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from torch import nn

from diffusers_accel import Unsupported, accelerate, demo, restore, stats
from diffusers_accel.core.platform import describe
from diffusers_accel.kernels.attention import KERNELS, AttentionDispatcher, Call, Fixed, Inputs
from diffusers_accel.kernels.attention.choice import CACHE_VARIABLE
from diffusers_accel.kernels.linear import LINEARS

FP8, INT8, NVFP4 = ({"linear": {"algo": algo, "smallest": 0}} for algo in ("fp8", "int8", "nvfp4"))
GRAPHS = {"cuda_graph": True}
# Name -> sections, and whether `--short` leaves it out.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "sdpa": ({"attention": "sdpa"}, False),
    "auto": ({"attention": "auto"}, False),
    "sage": ({"attention": "sage"}, False),
    "sage-fp8": ({"attention": "sage-fp8"}, False),
    "fa3-fp8": ({"attention": "fa3-fp8"}, False),
    "fp8": (FP8, False),
    "int8": (INT8, False),
    "nvfp4": (NVFP4, False),
    "nvfp4-fp8, fuse": ({"linear": {"algo": "nvfp4-fp8", "smallest": 0}, "fuse": True}, False),
    "int8 of all": ({"linear": {"algo": "int8", "smallest": 0, "targets": ["transformer", "text_encoder"]}}, False),
    "fbcache, sage": ({"attention": "sage", "cache": {"kind": "fbcache", "residual_diff_threshold": 0.1}}, False),
    "graphs": ({"attention": "sdpa", **GRAPHS}, False),
    "graphs, sage-fp8, fp8": ({"attention": "sage-fp8", **FP8, **GRAPHS}, False),
    "graphs, auto, vae": ({"attention": "auto", "cuda_graph": {"vae": True, "text_encoders": True}}, False),
    "compile": ({"attention": "sdpa", "compile": True}, True),
    "compile, auto, fp8": ({"attention": "auto", "compile": True, **FP8}, True),
    "compile, sage, int8, fuse, graphs": ({"attention": "sage", "compile": True, "fuse": True, **INT8, **GRAPHS}, True),
    "compile, sage-fp8, nvfp4": ({"attention": "sage-fp8", "compile": True, **NVFP4}, True),
    "compile, fa3-fp8, fp8, graphs": ({"attention": "fa3-fp8", "compile": True, **FP8, **GRAPHS}, True),
    "vae compile": ({"vae": {"compile": True}}, True),
}
CALL, REQUEST = 1e-2, 5e-2
SECONDS = 240


class Checks:
    """Figures of every check, and the checks that failed.

    Args:
        first: The current device.
        second: The other one.
    """

    def __init__(self, first: torch.device, second: torch.device):
        self.first, self.second = first, second
        self.found: dict[str, Any] = {}
        # Device -> the attention kernels of the last request there.
        self.ran: dict[str, Any] = {}
        self.wrong: list[str] = []

    def check(self, label: str, run: Callable[[torch.device], Any], bound: float) -> None:
        """The same on both, while the first is current."""
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        start, self.ran = time.perf_counter(), {}
        try:
            expected = run(self.first)
            found = run(self.second)
            error = _relative(found, expected)
            figures: dict[str, Any] = {"difference": error, "bit for bit": torch.equal(found, expected)}
            if self.ran:
                figures["attention"] = self.ran
            good = error < bound
            if self.first.type == "cuda" and torch.cuda.current_device() != self.first.index:
                figures["current device"], good = torch.cuda.current_device(), False
                torch.cuda.set_device(self.first)
            if not good:
                self.wrong.append(f"{label}: {figures}")
        except Unsupported as error:
            figures = {"refused": str(error)}
        except Exception as error:  # the others are of interest too
            figures = {"failed": f"{type(error).__name__}: {error}"[:500]}
            self.wrong.append(f"{label}: {figures['failed']}")
        figures["seconds"] = round(time.perf_counter() - start, 1)
        self.found[label] = figures
        print(label, figures, flush=True)
        faulthandler.cancel_dump_traceback_later()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def check_kernels(checks: Checks, dtype: torch.dtype) -> None:
    """Each attention kernel as a pipeline calls it, and each format of linear layers."""
    device = describe(checks.first)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((1, 333, 4, 64), generator=generator).to(dtype) for _ in range(3))
    for name in KERNELS:
        kernel = KERNELS.get(name)
        refused = kernel.missing(device) or kernel.refuses(Call.of(Inputs(query.to(checks.first), key, value)))
        if refused:
            checks.found[name] = {"refused": refused}
            continue
        dispatcher = AttentionDispatcher(lambda kernel=kernel: Fixed(kernel), Counter())  # type: ignore[misc]
        checks.check(
            name,
            lambda place, dispatcher=dispatcher: dispatcher.run(
                Inputs(*(item.to(place) for item in (query, key, value)))
            ).cpu(),
            CALL,
        )
    linear = nn.Linear(256, 512).to(dtype).requires_grad_(False)
    x = torch.randn((2, 65, 256), generator=generator).to(dtype)
    for name in LINEARS:
        record = LINEARS.get(name)
        refused = record.missing(device) or record.refuses(linear)
        if refused:
            checks.found[name] = {"refused": refused}
            continue

        def run(place: torch.device, record: Any = record) -> torch.Tensor:
            out: torch.Tensor = record.load()(copy.deepcopy(linear).to(place))(x.to(place))
            return out.cpu()

        checks.check(name, run, CALL)


def check_pipelines(checks: Checks, dtype: torch.dtype, short: bool) -> None:
    """A shipped checkpoint on each device."""
    record = demo.CHECKPOINTS["flux-shapes"]
    pipes = {place: demo.load(record.name, dtype).to(place) for place in (checks.first, checks.second)}
    stock: dict[torch.device, torch.Tensor] = {}

    def generate(pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = {**record.arguments, "num_inference_steps": 4}
        found: torch.Tensor = pipe(record.captions[0], generator=generator, output_type="pt", **arguments).images
        return found.float().cpu()

    for place, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        stock[place] = generate(pipe)
        repeats = torch.equal(generate(pipe), stock[place])
    for label, (sections, slow) in WAYS.items():
        if slow and short:
            continue

        def run(place: torch.device, sections: Any = sections) -> torch.Tensor:
            pipe = pipes[place]
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                os.environ[CACHE_VARIABLE] = folder
                torch.compiler.reset()
                accelerate(pipe, **sections)
                try:
                    # Graphs are recorded in the second request, and played in the third.
                    for _ in range(3):
                        out = generate(pipe)
                    seen = stats(pipe)
                finally:
                    restore(pipe)
                    del os.environ[CACHE_VARIABLE]
            if "cuda_graph" in sections and not seen.graph_replays:
                raise RuntimeError("no graph was played")
            if repeats and not torch.equal(generate(pipe), stock[place]):
                raise RuntimeError("after restore, the result is not the stock pipeline's")
            checks.ran[str(place)] = dict(seen.attention_kernels)
            return out

        checks.check(f"flux-shapes, {label}", run, REQUEST)


def main(device: str, short: bool, out: Path | None) -> None:
    """Runs them all; the exit status is 1 if something is wrong."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        sys.exit(f"--second-device: this machine has {torch.cuda.device_count()} GPUs.")
    places = [torch.device("cuda", index) for index in (0, 1)] if device == "cuda" else [torch.device(device)] * 2
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    checks = Checks(*places)
    check_kernels(checks, dtype)
    check_pipelines(checks, dtype, short)
    measure.write("second-device", {"checks": checks.found, "wrong": checks.wrong}, out)
    print("\n".join(checks.wrong) or "nothing wrong", flush=True)
    sys.exit(1 if checks.wrong else 0)
