"""Where every millisecond of one forward goes: by kernel and by kind, for stock and for configurations of ours.

The forward is timed as it is (median of several), then profiled; the profiler's kernel times are summed up by kind.
What the GPU did nothing in is `idle`: the time of the forward minus the time that kernels were running. `difference` is
that of the forward's result to stock's, relative, in the 2-norm; `host` is how long the forward keeps the host busy,
which shows once the GPU is faster; `stock, compiled` is diffusers' `compile_repeated_blocks`.

    python benchmarks/budget.py flux                  # benchmarks/results/budget-flux.json
    python benchmarks/budget.py wan --only stock "lossless, compiled"
"""

from __future__ import annotations

import argparse
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import measure
import torch
from denoisers import MODELS, build, inputs

from diffusers_accel import Unsupported, accelerate, restore

# Kinds by the kernels' names: the first that matches.
KINDS = (
    ("attention", r"flash|fmha|sdpa|_attention$|FlashAttn"),
    ("fused passes", r"^_residual_norm$|^_concat_quantize$|^_qk_norm_rope$|^_narrow$|^_known$"),
    ("quantize", r"_rows|_round|_reduce$|_combine|_amax$|_tensor$|_groups$|_add$|to_float8|scaled_mm_quant"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|cublas|_int8$|splitK|device_kernel"),
    ("copy", r"Memcpy|Memset|copy|CatArray|triton_poi_fused_(clone|cat)"),
)
OTHER = "elementwise and norms"
REWRITTEN: dict[str, Any] = {"compile": {"rewrites": True}}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "stock, compiled": None,
    "exact": {"attention": "auto"},
    "exact, compiled": {"attention": "auto", "compile": {"rewrites": False}},
    "exact, rewritten": {"attention": "auto", **REWRITTEN},
    "exact, rewritten, graphs": {"attention": "auto", "cuda_graph": True, **REWRITTEN},
    "exact, fused, rewritten": {"attention": "auto", "fuse": True, **REWRITTEN},
    "exact, fused, rewritten, graphs": {"attention": "auto", "fuse": True, "cuda_graph": True, **REWRITTEN},
    "exact, rewritten, not compiled": {"attention": "auto", "compile": {"backend": "eager", "rewrites": True}},
    "fp8, compiled": {"attention": "auto", "linear": "fp8", "compile": {"rewrites": False}},
    "fp8, rewritten": {"attention": "auto", "linear": "fp8", **REWRITTEN},
    "fp8, fa3-fp8": {"attention": "fa3-fp8", "linear": "fp8"},
    "fp8, fa3-fp8, compiled": {"attention": "fa3-fp8", "linear": "fp8", "compile": {"rewrites": False}},
    "fp8, fa3-fp8, rewritten": {"attention": "fa3-fp8", "linear": "fp8", **REWRITTEN},
    "fp8, fused, fa3-fp8, rewritten": {"attention": "fa3-fp8", "linear": "fp8", "fuse": True, **REWRITTEN},
    "fp8, fa3-fp8, rewritten, graphs": {
        "attention": "fa3-fp8", "linear": "fp8", "cuda_graph": True, **REWRITTEN,
    },
    # Every layer of every block, and cross-attention, which is short, in 16 bits.
    "8-bit": {
        "attention": {"backend": "fa3-fp8", "cross_attention": "auto"}, "linear": {"plan": {"*blocks.*": "fp8"}},
        **REWRITTEN,
    },
    "8-bit, graphs": {
        "attention": {"backend": "fa3-fp8", "cross_attention": "auto"}, "linear": {"plan": {"*blocks.*": "fp8"}},
        "cuda_graph": True, **REWRITTEN,
    },
}  # fmt: skip


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), OTHER)


def profiled(forward: Any, count: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Milliseconds of a forward by kernel and by kind."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(count):
            forward()
        torch.cuda.synchronize()
    kernels: dict[str, dict[str, Any]] = {}
    kinds: dict[str, float] = {}
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        each = kernels.setdefault(event.name[:120], {"ms": 0.0, "calls": 0, "kind": kind_of(event.name)})
        spent = event.time_range.elapsed_us() / 1000 / count
        each["ms"] += spent
        each["calls"] += 1
        kinds[each["kind"]] = kinds.get(each["kind"], 0.0) + spent
    for each in kernels.values():
        each["ms"], each["calls"] = round(each["ms"], 3), each["calls"] / count
    order = sorted(kernels, key=lambda name: -kernels[name]["ms"])
    return {name: kernels[name] for name in order[:40]}, kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    model = MODELS[options.model]
    pipe = build(model, options.layers)
    arguments = inputs(model, pipe)

    def forward() -> torch.Tensor:
        named = getattr(pipe.transformer, "cache_context", None)
        with torch.no_grad(), named("cond") if named is not None else nullcontext():
            return pipe.transformer(**arguments, return_dict=False)[0]

    found: dict[str, Any] = {}
    reference = forward().float()
    for name in options.only or VARIANTS:
        sections = VARIANTS[name]
        if name == "stock, compiled":
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
        elif sections is not None:
            try:
                accelerate(pipe, **sections)
            except Unsupported as error:
                found[name] = {"refused": str(error)}
                continue
        difference = float((forward().float() - reference).norm() / reference.norm())
        times = [1000 * item for item in measure.seconds(forward, options.repeats, warm=3)]
        host = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            forward()
            host.append(1000 * (time.perf_counter() - start))
        kernels, kinds = profiled(forward, 2)
        if sections is not None:
            restore(pipe)
            torch.compiler.reset()
        elif name == "stock, compiled":
            for block in pipe.transformer.modules():
                block._compiled_call_impl = None  # diffusers has no way back
        whole = sorted(times)[len(times) // 2]
        budget = {kind: round(value, 2) for kind, value in sorted(kinds.items(), key=lambda item: -item[1])}
        budget["idle"] = round(max(0.0, whole - sum(kinds.values())), 2)
        found[name] = {"ms": round(whole, 2), "all": [round(item, 2) for item in times], "budget": budget}
        found[name] |= {"difference": difference, "host": round(sorted(host)[1], 2)}
        found[name]["kernels"] = kernels
        print(name, found[name]["ms"], budget, found[name]["host"], difference, flush=True)
        for label, each in list(kernels.items())[:25]:
            print(f"   {each['ms']:8.3f} ms {each['calls']:6.0f} {each['kind']:22s} {label[:110]}", flush=True)
        work = f"{model.work}, bf16, one forward" + (f", {options.layers} layers" if options.layers else "")
        path = measure.write(f"budget-{options.model}", {"work": work, "variants": found}, options.out)
    print(path)


if __name__ == "__main__":
    main()
