"""Checks on several CUDA devices what the test suite checks on processes without one: small stock pipelines of every
family, divided in every way, against the stock pipeline on one GPU, and restored bit for bit.

The script is as a user's would be: the launcher may show every process all GPUs, and the pipeline goes to "cuda". So
pipelines are moved, ranks communicate over symmetric memory and NCCL, and models that are offloaded are brought to the
right GPU.

float32 without TF32, relative: 2e-4; 1e-3 for Cosmos, whose guidance and preconditioning multiply differences, and with
compiled blocks. Layers quantized to int8 against the same on one GPU: 0.1, since these small models multiply a rounding
that flips; with what is exchanged rounded to e4m3, 0.2. The result is written like a benchmark's; the exit status is 1
if a check fails, and a check that does not end within two minutes ends the process with everybody's stack.

    torchrun --nproc-per-node 2 benchmarks/check_gpus.py                       # benchmarks/results/check-gpus-2.json
    torchrun --nproc-per-node 4 benchmarks/check_gpus.py --only flux wan
    torchrun --nproc-per-node 2 benchmarks/check_gpus.py --device cpu --only flux    # a dry run of the script
    python benchmarks/check_gpus.py --second-device    # one process, on the second GPU: see second_device.py
"""

from __future__ import annotations

import faulthandler
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import measure
import ranks as several
import second_device
import torch
import torch.distributed as dist

from diffusers_accel import accelerate, restore, stats
from diffusers_accel.core.mesh import init_process_group

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import TINY, same, tensors
from tiny.heads import with_heads

FAMILIES = ("flux-true-cfg", "flux2-klein", "wan", "wan-vace", "ltx2", "qwen", "cosmos", "cosmos3", "sd35")
# Of these, also what takes longer: compiled, quantized, offloaded.
CLOSELY = ("flux", "wan")
SECONDS = 120

PLAIN: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ulysses": {"ulysses": 2},
        "ring": {"ring": 2},
        "rows": {"attn2d": (2, 1)},
        "columns": {"attn2d": (1, 2)},
        "tp": {"tp": 2},
        "cfg, vae": {"cfg": 2, "vae": 2},
        "fsdp": {"fsdp": True},
    },
    4: {
        "ring": {"ring": 4},
        "grid": {"attn2d": (2, 2)},
        "ulysses, ring": {"ulysses": 2, "ring": 2},
        "tp, ulysses": {"tp": 2, "ulysses": 2},
        "cfg, ulysses, vae of two": {"cfg": 2, "ulysses": 2, "vae": 2, "vae_idle_ranks": "receive"},
        "dp, tp": {"dp": 2, "tp": 2},
    },
}
COMPILED = {"compile": True, "cuda_graph": True, "fuse": True}
INT8 = {"linear": {"algo": "int8", "smallest": 0}}
# How a pipeline is offloaded, and where it is before that: accelerated on a GPU, accelerated on the host (which says
# that ranks will communicate by collectives), or not accelerated yet.
OFFLOADED = [
    (kind, place)
    for kind in ("models", "sequential", "blocks", "leaves", "leaves, stream")
    for place in ("stock", "on a GPU", "on the host")
    # Refused by name: a stream of the GPU that the script has taken for its own.
    if (kind, place) != ("leaves, stream", "stock")
]


def offload(pipe: Any, kind: str) -> None:
    """Has models wait on the host for their turn."""
    if kind == "models":
        pipe.enable_model_cpu_offload()
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        options: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
        if kind != "blocks":
            options = {"offload_type": "leaf_level", "use_stream": kind == "leaves, stream"}
        pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), **options)


class Checks:
    """Figures of every check, and the checks that failed.

    Args:
        device: Type of the device.
    """

    def __init__(self, device: str):
        self.device, self.found, self.wrong = device, {}, []
        self._expected: dict[tuple[str, bool], tuple[torch.Tensor, ...]] = {}

    def run(self, pipe: Any, name: str) -> tuple[torch.Tensor, ...]:
        entry = TINY[name]
        moved = {key: each.to(self.device) for key, each in entry.call().items() if isinstance(each, torch.Tensor)}
        return tuple(each.float().cpu() for each in tensors(entry.run(pipe, steps=4, **moved)))

    def check(
        self, name: str, label: str, sections: dict[str, Any], bound: float, offloaded: tuple[str, str] | None = None
    ) -> None:
        """Requests under a configuration, and one after `restore`."""
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        start, figures = time.perf_counter(), {}
        label, quantized = f"{name}, {label}", "linear" in sections
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.set_device(0)  # as every process finds it
        pipe = with_heads(name, 2 * dist.get_world_size())
        try:
            if (name, False) not in self._expected:
                self._expected[name, False] = self.run(pipe.to(self.device), name)
            if quantized and (name, True) not in self._expected:
                accelerate(pipe.to(self.device), attention="sdpa", **{**sections, "parallel": None})
                self._expected[name, True] = self.run(pipe, name)
                restore(pipe)
            kind, place = offloaded or ("", "on a GPU")
            if place == "on a GPU":
                pipe.to(self.device)
            elif place == "stock":
                offload(pipe, kind)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                accelerate(pipe, **{"attention": "sdpa", **sections})
            if kind and place != "stock":
                offload(pipe, kind)
            outs = [self.run(pipe, name) for _ in range(3 if "cuda_graph" in sections else 2)]
            figures["attention"] = stats(pipe).attention_kernels
            if "cuda_graph" in sections:
                figures["replays"] = stats(pipe).graph_replays
            restore(pipe)
            figures |= {
                "differences": [_relative(out, self._expected[name, quantized]) for out in outs],
                "restored bit for bit": same(self.run(pipe, name), self._expected[name, False]),
                "by collectives": any("by collectives" in str(each.message) for each in said),
            }
            good = max(figures["differences"]) < bound and figures["restored bit for bit"]
            good &= figures["by collectives"] == (place == "on the host")
            # A rank that no branch of guidance is left for plays nothing.
            good &= figures.get("replays", 1) > 0 or not figures["attention"]
            reason = None if good else str(figures)
        except Exception as error:  # the others are of interest too
            reason = f"{type(error).__name__}: {error}"[:700]
        # A rank that fails alone would leave the others to wait for it; here all of them end up in this line.
        reasons: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        bad = {rank: each for rank, each in enumerate(reasons) if each is not None}
        self.found[label] = {**figures, "at most": bound, "seconds": round(time.perf_counter() - start, 1)}
        if bad:
            self.wrong.append(f"{label}: {bad}")
        if dist.get_rank() == 0:
            print(label, self.found[label], bad or "", flush=True)
        faulthandler.cancel_dump_traceback_later()


def _relative(these: Any, those: Any) -> float:
    pairs = [(one.double(), other.double()) for one, other in zip(these, those, strict=True)]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def main() -> None:
    parser = several.parser(__doc__)
    parser.add_argument("--second-device", action="store_true", help="one pipeline on cuda:1 (second_device.py)")
    parser.add_argument("--short", action="store_true", help="of that, what is not compiled")
    options = parser.parse_args()
    if options.second_device:
        second_device.main(options.device, options.short, options.out)
    torch.backends.cudnn.allow_tf32 = False
    init_process_group(options.device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    checks, plain = Checks(options.device), PLAIN[ranks]

    def chosen(name: str) -> bool:
        return not options.only or name in options.only

    def keep() -> None:
        if rank == 0:
            work = f"small stock pipelines, float32, {ranks} ranks, against one; rank 0's figures"
            figures = {"work": work, "ranks": ranks, "checks": checks.found, "wrong": checks.wrong}
            measure.write(f"check-gpus-{ranks}", figures, options.out)

    for name in filter(chosen, FAMILIES):
        for label, way in plain.items():
            checks.check(name, label, {"parallel": way}, 1e-3 if name.startswith("cosmos") else 2e-4)
        keep()
    for name in filter(chosen, CLOSELY):
        if options.device == "cuda":
            for label, way in plain.items():
                if "fsdp" not in way:
                    checks.check(name, f"{label}, compiled", {"parallel": way, **COMPILED}, 1e-3)
        divided = {"ulysses": ranks}
        checks.check(name, "ulysses, int8", {"parallel": divided, **INT8, "fuse": True}, 0.1)
        checks.check(name, "tp, int8", {"parallel": {"tp": 2, "ulysses": ranks // 2}, **INT8, "fuse": True}, 0.1)
        checks.check(name, "fsdp, ulysses, int8", {"parallel": {**divided, "fsdp": True}, **INT8}, 0.1)
        checks.check(name, "ulysses, fp8 on the way", {"parallel": {**divided, "comm_dtype": "fp8"}}, 0.2)
        if options.device == "cuda":
            for kind, place in OFFLOADED:
                checks.check(name, f"offloaded by {kind}, {place}", {"parallel": divided}, 2e-4, (kind, place))
        keep()
    if rank == 0:
        print("\n".join(checks.wrong) or "nothing wrong", flush=True)
    dist.barrier()
    sys.exit(1 if checks.wrong else 0)


if __name__ == "__main__":
    main()
