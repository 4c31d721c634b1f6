"""What a budget of GPU memory costs: denoisers at their real shapes whose blocks are streamed from host memory.

Each row is a process of its own, whose share of the GPU is limited to the budget
(`torch.cuda.set_per_process_memory_fraction`). A row times a forward with all weights on the GPU, then the same
configuration with `offload=`, with the weights on the host beforehand, and compares the two results bit for bit. The
speed of copies to the GPU, and the time to touch and page-lock memory, are measured in the same process. `--row group`
measures diffusers' group offloading of FLUX.1 with a stream.

    python benchmarks/memory.py                       # all rows; memory.json
    python benchmarks/memory.py --row flux-bf16       # memory-flux-bf16.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import measure
import torch
from denoisers import MODELS, build_on_host, inputs

from diffusers_accel import accelerate, explain, restore, stats
from diffusers_accel.core.host_memory import LockedBuffer

_LOSSLESS: dict[str, Any] = {"attention": "auto", "compile": True, "cuda_graph": True}
_FP8: dict[str, Any] = {**_LOSSLESS, "linear": {"algo": "fp8", "keep_original": "drop"}}
_NVFP4: dict[str, Any] = {**_LOSSLESS, "linear": {"algo": "nvfp4", "keep_original": "drop"}}
# Row -> shape, sections, offload, share of the GPU in bytes, forwards.
ROWS: dict[str, tuple[str, dict[str, Any], Any, int | None, int]] = {
    "flux-bf16": ("flux", _LOSSLESS, {"level": 3}, None, 12),
    "flux-fp8": ("flux", _FP8, {"level": 3}, None, 16),
    "flux-fp8-8GiB": ("flux", _FP8, "8GiB", 8 * 2**30, 16),
    "flux-nvfp4-4GiB": ("flux", _NVFP4, "4GiB", 4 * 2**30, 16),
    "qwen-16GiB": ("qwen", _LOSSLESS, "16GiB", 16 * 2**30, 8),
    "wan-14b-bf16": ("wan-14b", _LOSSLESS, {"level": 3, "prefetch": 1}, None, 3),
    "wan-14b-fp8": ("wan-14b", _FP8, {"level": 3, "prefetch": 1}, None, 3),
}


def host_link() -> float:
    """GB/s of copies from page-locked memory."""
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    times = measure.seconds(lambda: target.copy_(source, non_blocking=True), 5)
    return source.numel() / min(times) / 1e9


def locking() -> float:
    """GB/s of touching and page-locking host memory."""
    begin = time.perf_counter()
    buffers = [LockedBuffer.allocate(2**30, torch.device("cuda")) for _ in range(4)]
    for buffer in buffers:
        buffer.memory.zero_()
        buffer.lock()
    return 4 * 2**30 / (time.perf_counter() - begin) / 1e9


def step(pipe: Any, given: dict[str, Any], count: int, copied: Any = lambda: 0) -> tuple[Any, ...]:
    """Milliseconds of one of several forwards in a row, the result, the peak of allocated bytes, and bytes copied."""

    pipe.scheduler.set_timesteps(28, device="cuda")
    makes_its_own = given["timestep"].is_floating_point() and given["timestep"].numel() == 1
    steps = [item.expand(1).to(given["timestep"].dtype) / 1000 for item in pipe.scheduler.timesteps]

    def forward(index: int) -> torch.Tensor:
        # The place of a call in its request is the scheduler's, as in a pipeline.
        pipe.scheduler.set_begin_index(index)
        timestep = {"timestep": steps[index]} if makes_its_own else {}
        with torch.no_grad():
            return pipe.transformer(**{**given, **timestep}, return_dict=False)[0]

    for index in range(4):
        result = forward(index).clone()
    measure.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begin = copied(), time.perf_counter()
    for index in range(count):
        forward(4 + index)
    measure.synchronize()
    milliseconds = 1000 * (time.perf_counter() - begin) / count
    return milliseconds, result, torch.cuda.max_memory_allocated(), (copied() - before) / count


def row(name: str) -> dict[str, Any]:
    """The figures of one row."""
    shape, sections, offload, share, count = ROWS[name]
    model = MODELS[shape]
    found: dict[str, Any] = {"work": model.work, "sections": str(sections), "offload": str(offload)}
    found["link, GB/s"] = round(host_link(), 1)
    found["touching and locking, GB/s"] = round(locking(), 2)
    torch.cuda.empty_cache()
    pipe = build_on_host(model)
    weights = sum(item.numel() * item.element_size() for item in pipe.transformer.parameters())
    found["weights, GB"] = round(weights / 1e9, 2)
    given = inputs(model, pipe)
    on_host = pipe.transformer
    pipe.transformer.to("cuda")
    keep = {**sections}
    if "linear" in keep:
        keep["linear"] = {**keep["linear"], "keep_original": "cpu"}
    accelerate(pipe, **keep)
    resident, expected, peak, _ = step(pipe, given, count)
    found["resident graphs, replays"] = [stats(pipe).graphs_captured, stats(pipe).graph_replays]
    found["resident, ms"], found["resident peak, GiB"] = round(resident, 2), round(peak / 2**30, 2)
    restore(pipe)
    on_host.to("cpu")
    torch.cuda.empty_cache()
    if share is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share / total)
    print(explain(pipe, **sections, offload=offload), flush=True)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        accelerate(pipe, **sections, offload=offload)
    found["enabling, s"] = round(time.perf_counter() - begin, 2)
    streamed, result, peak, calls = step(pipe, given, count, lambda: stats(pipe).offload["bytes"])
    found["streamed, ms"], found["peak, GiB"] = round(streamed, 2), round(peak / 2**30, 2)
    found["peak reserved, GiB"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    statistics = stats(pipe)
    found["stats"] = {
        **statistics.offload, "graphs": statistics.graphs_captured, "replays": statistics.graph_replays,
        "modulations": [statistics.modulations_precomputed, statistics.modulations_recomputed],
    }  # fmt: skip
    found["copied a step, GB"] = round(calls / 1e9, 2)
    found["copies, ms"] = round(calls / found["link, GB/s"] / 1e6, 1)
    bound = max(found["copies, ms"], resident)
    found["over the larger of copies and resident"] = round(streamed / bound, 3)
    found["over resident"] = round(streamed / resident, 3)
    found["over all bytes by link"] = round(streamed / (weights / found["link, GB/s"] / 1e6), 3)
    found["equal to resident, bit for bit"] = bool(torch.equal(result, expected))
    return found


def group() -> dict[str, Any]:
    """diffusers' group offloading of FLUX.1, with a stream."""
    model = MODELS["flux"]
    found: dict[str, Any] = {"work": model.work, "link, GB/s": round(host_link(), 1)}
    for record in (False, True):
        pipe = build_on_host(model)
        given = inputs(model, pipe)
        begin = time.perf_counter()
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=1, use_stream=True, record_stream=record,
        )  # fmt: skip
        enabling = time.perf_counter() - begin
        streamed, _, peak, _ = step(pipe, given, 6)
        found[f"record_stream={record}"] = {
            "enabling, s": round(enabling, 2), "streamed, ms": round(streamed, 2), "peak, GiB": round(peak / 2**30, 2),
        }  # fmt: skip
        del pipe
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    parser.add_argument("--row", choices=[*ROWS, "group"])
    options = parser.parse_args()
    torch._dynamo.config.automatic_dynamic_shapes = False
    if options.row:
        figures = group() if options.row == "group" else row(options.row)
        print(measure.write(f"memory-{options.row}", figures, options.out).read_text(), flush=True)
        return
    folder, all_rows = options.out or measure.RESULTS, {}
    for name in (*ROWS, "group"):
        subprocess.run([sys.executable, __file__, "--row", name, "--out", str(folder)], check=False)
        path = folder / f"memory-{name}.json"
        if path.is_file():
            all_rows[name] = json.loads(path.read_text())
            path.unlink()
    measure.write("memory", {"rows": all_rows}, options.out)


if __name__ == "__main__":
    main()
