"""Checks on a CUDA device what the test suite cannot check without one.

- Every attention kernel that can run, against float64 on fresh random inputs, in the shapes of the models: output,
  LSE where it has one, masks over keys where it takes them.
- The shipped checkpoints and small stock pipelines on the device: lossless settings against stock, and restored.
- Blocks compiled and rewritten, of a small pipeline of every family, with the rewrites that only real sizes have: in
  float32 against stock, relative, to 2e-4; with quantized layers against the same without compilation, within twice
  their own distance to stock (a few rows are not rounded in a rewritten graph).
- Streamed weights on small pipelines of every family, beside caches, compiled blocks, graphs and quantized layers, from
  the GPU and from the host: against the same configuration without offloading, bit for bit, and restored.
- CUDA graphs on the same, beside caches and compiled blocks: played against the same configuration without graphs, bit
  for bit, over several requests of two sizes.

Relative error is ||found - reference|| / ||reference||: 4e-3 for exact kernels in bf16. An 8-bit kernel must keep a
cosine of 0.999; 0.998 where Q and K are e4m3, whose three bits of mantissa put 2.6% of noise on each of Q, K, P and V,
which on Gaussian inputs leaves 0.9985 to 0.9990. The result is written like a benchmark's, and the exit status is 1
if a check fails.

    python benchmarks/check_gpu.py
    python benchmarks/check_gpu.py --only graphs      # check-gpu-graphs.json
    python benchmarks/check_gpu.py --only whole       # check-gpu-whole.json
    python benchmarks/check_gpu.py --only rewrites    # check-gpu-rewrites.json
    python benchmarks/check_gpu.py --only offload     # check-gpu-offload.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch

from diffusers_accel import (
    CompileConfig,
    CudaGraphConfig,
    DBCacheConfig,
    StepMaskConfig,
    Unsupported,
    accelerate,
    demo,
    restore,
    stats,
)
from diffusers_accel.core.platform import describe
from diffusers_accel.kernels.attention import KERNELS, AttentionKernel, Call, Inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import exact

# (batch, query length, key length, heads, key heads, head_dim), causal, masked, mean of the values over their spread
CALLS = {
    "flux": ((1, 1536, 1536, 24, 24, 128), False, False, 0.0),
    "flux, odd": ((1, 4621, 4621, 2, 2, 128), False, False, 0.0),
    "wan cross": ((1, 2000, 512, 12, 12, 128), False, False, 0.0),
    "sd3": ((2, 1024 + 333, 1024 + 333, 24, 24, 64), False, False, 0.0),
    "odd lengths": ((2, 77, 1111, 4, 4, 64), False, False, 0.0),
    "one query, one key": ((1, 1, 1, 2, 2, 64), False, False, 0.0),
    "head_dim 96": ((1, 257, 65, 2, 2, 96), False, False, 0.0),
    "padded, grouped": ((2, 300, 700, 8, 2, 128), False, True, 0.0),
    "long, values with a mean": ((1, 32760, 32760, 1, 1, 128), False, False, 1.0),
    "cosmos3 causal, grouped": ((1, 300, 300, 32, 8, 128), True, False, 0.0),
}
ERROR = 4e-3
# Kind of kernel -> least cosine, largest error of the LSE.
BOUNDS = {"exact": (0.9999, 5e-3), "8-bit": (0.999, 0.03), "e4m3 QK": (0.998, 0.2)}


def kind(kernel: AttentionKernel) -> str:
    """Which bounds a kernel must keep; what it rounds is in its name."""
    if kernel.exact:
        return "exact"
    return "e4m3 QK" if kernel.name.startswith("fa3-fp8") or "/fp8" in kernel.name else "8-bit"


def check_kernels(device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """Errors of each kernel on each call, or why it does not run; and what is out of bounds."""
    found: dict[str, Any] = {}
    wrong = []
    for name in KERNELS:
        kernel = KERNELS.get(name)
        missing = kernel.missing(describe(device))
        if missing is not None:
            found[name] = missing
            continue
        function, calls = kernel.load(), {}
        for label, ((batch, length, keys, heads, kv_heads, dim), causal, masked, mean) in CALLS.items():
            shapes = [(batch, length, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim)]
            query, key, value = (torch.randn(shape, device=device) for shape in shapes)
            key += 8 * torch.randn(dim, device=device) * (torch.rand(dim, device=device) < 0.1)
            # What Hopper's matrix units cut off when they add e4m3 products shows where sums grow with every key.
            value += mean * torch.randn(dim, device=device)
            tensors = [item.bfloat16() for item in (query, key, value)]
            mask = None
            if masked:
                mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=device)
                mask[0, ..., keys // 3 :] = False
            given = Inputs(*tensors, mask, causal)
            refused = kernel.refuses(Call.of(given))
            if refused:
                calls[label] = refused
                continue
            copies = [item.clone() for item in tensors]
            expected, expected_lse = exact.attention(*tensors, mask, causal)
            try:
                out = function(given)
                lse_too = function(replace(given, return_lse=True)) if kernel.lse else None
            except Exception as error:
                calls[label] = f"failed: {type(error).__name__}: {error}"
                wrong.append(f"{name}, {label}: {calls[label]}")
                continue
            figures = {"error": exact.relative(out, expected), "cosine": exact.cosine(out, expected)}
            if lse_too is not None:
                out, lse = lse_too
                figures["error with LSE"] = exact.relative(out, expected)
                figures["LSE off by"] = float((lse.double() - expected_lse).abs().max())
            calls[label] = figures
            cosine, lse_bound = BOUNDS[kind(kernel)]
            good = figures["cosine"] > cosine and figures.get("LSE off by", 0) < lse_bound
            good &= max(figures["error"], figures.get("error with LSE", 0)) < 0.1  # a cosine sees no loss of size
            good &= not kernel.exact or max(figures["error"], figures.get("error with LSE", 0)) < ERROR
            if not good or not all(map(torch.equal, tensors, copies)):
                wrong.append(f"{name}, {label}: {figures}")
        found[name] = calls
    return found, wrong


def check_pipeline(pipe: Any, run: Any, **sections: Any) -> dict[str, Any]:
    """PSNR in dB of an accelerated pipeline against stock, what ran, and whether `restore` was exact."""
    stock = run(pipe).float()
    again = run(pipe).float()
    accelerate(pipe, **sections)
    found = run(pipe).float()
    statistics = stats(pipe)
    restore(pipe)
    error = float((found - stock).pow(2).mean())
    scale = float(stock.max() - stock.min()) ** 2
    return {
        "psnr": float("inf") if error == 0 else float(10 * torch.tensor(scale / error).log10()),
        "attention": statistics.attention_kernels,
        "steps": [statistics.steps_computed, statistics.steps_skipped],
        "stock repeats bit for bit": bool(torch.equal(stock, again)),
        "restored bit for bit": bool(torch.equal(run(pipe).float(), stock)),
    }


def check_models(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, record in demo.CHECKPOINTS.items():
        if not record.folder.is_dir():
            continue
        pipe = demo.load(name, torch.bfloat16).to(device)
        pipe.set_progress_bar_config(disable=True)

        def run(pipe: Any, record: Any = record) -> torch.Tensor:
            generator = torch.Generator(device).manual_seed(0)
            out = pipe(record.captions[0], generator=generator, output_type="pt", **record.arguments)
            return out.images if record.kind == "image" else out.frames

        found[f"{name}, attention auto"] = check_pipeline(pipe, run, attention="auto")
        found[f"{name}, attention auto, compile"] = check_pipeline(pipe, run, attention="auto", compile=True)
        found[f"{name}, vae compile"] = check_pipeline(pipe, run, vae={"compile": True})
    from tiny import TINY, build

    for name in ("sd3", "cosmos", "cosmos3", "qwen", "ltx2-stg", "flux2"):
        entry, pipe = TINY[name], build(name).to(device)

        def small(pipe: Any, entry: Any = entry) -> torch.Tensor:
            moved = {key: item.to(device) for key, item in entry.call().items() if isinstance(item, torch.Tensor)}
            out = entry.run(pipe, **moved)
            return torch.cat([item.float().flatten() for item in (out if isinstance(out, tuple) else (out,))])

        sections: dict[str, Any] = {"attention": "sdpa", "compile": CompileConfig()}
        found[f"{name} (tiny, float32), sdpa, compile"] = check_pipeline(pipe, small, **sections)
    return found


GRAPHED: dict[str, dict[str, Any]] = {
    "eager": {},
    "auto": {"attention": "auto"},
    "int8": {"linear": {"algo": "int8", "smallest": 0}},
    "mask": {"cache": StepMaskConfig(mask=(1, 1, 0, 1, 0, 0), taylorseer_order=1)},
    "dbcache": {
        "cache": DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=9.0,
            max_continuous_cached_steps=1,
        )
    },
    "compile": {"compile": True},
    "compile, fuse, fp8, mask": {
        "compile": True, "fuse": True, "linear": {"algo": "fp8", "smallest": 0}, "cache": StepMaskConfig(mask="medium"),
    },
}  # fmt: skip


def check_graphs(device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """Captured and played graphs of each configuration, and what differed."""
    from tiny import TINY, build

    found: dict[str, Any] = {}
    wrong: list[str] = []

    def check(name: str, pipe: Any, requests: list[Any], variants: list[str]) -> None:
        for variant in variants:
            sections, label = GRAPHED[variant], f"{name}, {variant}"
            torch.compiler.reset()
            try:
                accelerate(pipe, **{"attention": "sdpa", **sections})
                for run in requests:  # kernels are timed and compiled
                    run(pipe)
                expected = [run(pipe) for run in requests]
                accelerate(pipe, **{"attention": "sdpa", **sections}, cuda_graph=True)
                same = [all(map(torch.equal, run(pipe), one)) for _ in range(3)
                        for run, one in zip(requests, expected, strict=True)]  # fmt: skip
                statistics = stats(pipe)
                found[label] = {
                    "same": same, "captured": statistics.graphs_captured, "replays": statistics.graph_replays,
                }  # fmt: skip
                if not all(same) or not statistics.graph_replays:
                    wrong.append(f"{label}: {found[label]}")
                restore(pipe)
            except Exception as error:  # the other configurations are of interest too
                wrong.append(f"{label}: {error!r}"[:500])
                if vars(pipe).get("_diffusers_accel_session"):
                    restore(pipe)
            print(label, found.get(label), flush=True)

    # A size has one compiled graph, whichever was met before: one for several sizes rounds otherwise.
    torch._dynamo.config.automatic_dynamic_shapes = False
    for name in ("flux", "wan22", "ltx2", "qwen", "cosmos", "cosmos3", "sd3", "flux2"):
        entry, pipe = TINY[name], build(name).to(device)

        def small(pipe: Any, entry: Any = entry, **changed: Any) -> tuple[torch.Tensor, ...]:
            moved = {key: item.to(device) for key, item in entry.call().items() if isinstance(item, torch.Tensor)}
            out = entry.run(pipe, steps=6, **{**moved, **changed})
            return out if isinstance(out, tuple) else (out,)

        # Another prompt plays the same graphs: nothing of the first one may be left in them.
        given = entry.call()
        other = {"prompt": "a small blue ring"}
        if "prompt_embeds" in given:
            other = {"prompt_embeds": given["prompt_embeds"].flip(1).to(device)}
        more = [lambda pipe, small=small, other=other: small(pipe, **other)]
        more += [lambda pipe, small=small: small(pipe, height=64)] if name in ("flux", "qwen", "sd3") else []
        every = name in ("flux", "wan22")
        check(name, pipe, [small, *more], list(GRAPHED) if every else ["eager", "mask", "compile"])
    for name, record in demo.CHECKPOINTS.items():
        pipe = demo.load(name, torch.bfloat16).to(device)
        pipe.set_progress_bar_config(disable=True)

        def run(pipe: Any, record: Any = record, caption: int = 0) -> tuple[torch.Tensor, ...]:
            generator = torch.Generator(device).manual_seed(0)
            out = pipe(record.captions[caption], generator=generator, output_type="pt", **record.arguments)
            return (out.images if record.kind == "image" else out.frames,)

        second = lambda pipe, run=run: run(pipe, caption=1)  # noqa: E731
        check(name, pipe, [run, second], ["auto", "dbcache", "compile, fuse, fp8, mask"])
    return found, wrong


def check_whole(device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """The VAE's decoder and the text encoders as graphs, against the same pipeline without; and what differed."""
    import warnings

    from tiny import TINY, build, tensors

    found: dict[str, Any] = {}
    wrong: list[str] = []
    for name in ("flux", "sd3", "flux-shapes"):
        pipe = demo.load(name, torch.bfloat16) if name in demo.CHECKPOINTS else build(name)
        pipe = pipe.to(device)
        pipe.set_progress_bar_config(disable=True)

        def run(pipe: Any, prompt: str, name: str = name) -> tuple[torch.Tensor, ...]:
            if name not in demo.CHECKPOINTS:
                return tensors(TINY[name].run(pipe, steps=2, prompt=prompt))
            generator = torch.Generator(device).manual_seed(0)
            arguments = demo.CHECKPOINTS[name].arguments
            return (pipe(prompt, generator=generator, output_type="pt", **arguments).images,)

        prompts = ("a red circle", "a blue square", "a red circle", "a green star")
        accelerate(pipe, attention="sdpa", cuda_graph=True)
        expected = [run(pipe, prompt) for prompt in prompts]
        accelerate(pipe, attention="sdpa", cuda_graph=CudaGraphConfig(vae=True, text_encoders=True))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            same = [
                all(map(torch.equal, run(pipe, prompt), one)) for prompt, one in zip(prompts, expected, strict=True)
            ]
        graphs = vars(pipe)["_diffusers_accel_session"].context.outputs.graphs
        held = {each.name: each.captured for each in graphs if hasattr(each, "name")}
        found[name] = {"same": same, "captured": held, "said": sorted({str(each.message)[:200] for each in said})}
        if not all(same) or not held["vae.decoder"]:
            wrong.append(f"{name}: {found[name]}")
        print(name, found[name], flush=True)
    return found, wrong


REWRITTEN = (
    "flux", "flux-true-cfg", "flux2", "wan", "wan22", "wan-ti2v", "qwen", "ltx2", "ltx2-i2v", "sd3", "cosmos",
    "cosmos3",
)  # fmt: skip


OFFLOADED: dict[str, dict[str, Any]] = {
    "eager": {},
    "graphs": {"cuda_graph": True},
    "compile": {"compile": True},
    "compile, graphs, fuse, fp8, mask": {
        "compile": True, "cuda_graph": True, "fuse": True, "linear": {"algo": "fp8", "smallest": 0},
        "cache": StepMaskConfig(mask=(1, 1, 1, 1, 0, 1, 0, 0)),
    },
}  # fmt: skip


def check_offload(device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """Streamed pipelines of each configuration, and what differed."""
    from tiny import TINY, build

    found: dict[str, Any] = {}
    wrong: list[str] = []
    torch._dynamo.config.automatic_dynamic_shapes = False
    wrong += _taken_over(device)
    for name in ("flux", "flux2", "wan22", "ltx2", "qwen", "cosmos", "cosmos3", "sd3"):
        entry = TINY[name]
        pipes = {"from the GPU": build(name).to(device), "from the host": build(name)}
        moved = {key: item.to(device) for key, item in entry.call().items() if isinstance(item, torch.Tensor)}

        def run(pipe: Any, entry: Any = entry, moved: Any = moved) -> tuple[torch.Tensor, ...]:
            out = entry.run(pipe, steps=8, **moved)
            return out if isinstance(out, tuple) else (out,)

        for variant, given in OFFLOADED.items():
            sections: dict[str, Any] = {"attention": "sdpa", **given}
            torch.compiler.reset()
            resident = pipes["from the GPU"]
            try:
                accelerate(resident, **sections)
                run(resident)
                expected = run(resident)
                restore(resident)
                for place, pipe in pipes.items():
                    label = f"{name}, {variant}, {place}"
                    before = [item.detach().cpu().clone() for item in pipe.transformer.state_dict().values()]
                    accelerate(pipe, **sections, offload={"level": 3, "prompt_cache": 0})
                    same = [all(map(torch.equal, run(pipe), expected)) for _ in range(3)]
                    statistics = stats(pipe)
                    restore(pipe)
                    after = list(pipe.transformer.state_dict().values())
                    back = all(torch.equal(one, other.cpu()) for one, other in zip(before, after, strict=True))
                    home = {item.device.type for item in after} == {device.type if place == "from the GPU" else "cpu"}
                    found[label] = {
                        "same": same, "restored": back and home, "offload": statistics.offload,
                        "replays": statistics.graph_replays,
                    }  # fmt: skip
                    if not (all(same) and back and home and statistics.offload["bytes"]):
                        wrong.append(f"{label}: {found[label]}")
            except Exception as error:  # the other configurations are of interest too
                wrong.append(f"{name}, {variant}: {error!r}"[:700])
                for pipe in pipes.values():
                    if vars(pipe).get("_diffusers_accel_session"):
                        restore(pipe)
        print(name, wrong[-1:], flush=True)
    return found, wrong


def _taken_over(device: torch.device) -> list[str]:
    """diffusers' own offloading, taken over and put back: what differed."""
    from tiny import TINY, build

    entry, wrong = TINY["flux"], []
    groups = {"onload_device": device, "offload_device": torch.device("cpu"), "num_blocks_per_group": 1}
    kinds: dict[str, Any] = {
        "model": lambda pipe: pipe.enable_model_cpu_offload(),
        "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
        "group": lambda pipe: pipe.enable_group_offload(**groups),
        "group, stream": lambda pipe: pipe.enable_group_offload(**groups, use_stream=True),
    }
    expected = entry.run(build("flux").to(device))
    for name, enable in kinds.items():
        for called in (False, True):
            pipe = build("flux")
            try:
                enable(pipe)
                if called:
                    entry.run(pipe)
                accelerate(pipe, offload=3)
                same = [torch.equal(entry.run(pipe).cpu(), expected.cpu()) for _ in range(2)]
                restore(pipe)
                same.append(torch.equal(entry.run(pipe).cpu(), expected.cpu()))
                if not all(same):
                    wrong.append(f"taken over: {name}, called before {called}: {same}")
            except Exception as error:  # the other kinds are of interest too
                wrong.append(f"taken over: {name}, called before {called}: {error!r}"[:500])
    return wrong


def check_rewrites(device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """Relative differences of rewritten, compiled pipelines; what was found in them; and what is too far off."""
    found: dict[str, Any] = {}
    wrong: list[str] = []
    with multiprocessing.get_context("spawn").Pool(6, torch.set_num_threads, (2,), 1) as pool:
        for one, other in pool.imap_unordered(_rewritten, REWRITTEN):
            found |= one
            wrong += other
            print(*one.items(), *other, sep="\n", flush=True)
    return found, wrong


def _rewritten(name: str) -> tuple[dict[str, Any], list[str]]:
    """The same of one family, in a process of its own."""
    from tiny import TINY, build, tensors

    from diffusers_accel.features.compile import rewrites

    rewrites.rows._NARROWEST = rewrites.linear._LEAST_ELEMENTS = 1
    put = rewrites.graph.put
    made: Counter[str] = Counter()

    def counted(graph: Any, before: Any, target: Any, *args: Any) -> Any:
        if "diffusers_accel" in str(target):
            made[str(target).removeprefix("diffusers_accel.").removesuffix(".default")] += 1
        return put(graph, before, target, *args)

    for module in (rewrites.attention, rewrites.linear, rewrites.rows):
        module.put = counted  # type: ignore[attr-defined]

    def relative(these: Any, those: Any) -> float:
        pairs = [(one.double(), other.double()) for one, other in zip(these, those, strict=True)]
        return max(float((one - other).norm() / other.norm()) for one, other in pairs)

    torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {}
    wrong: list[str] = []
    entry, device = TINY[name], torch.device("cuda")
    for quantized in (None, "fp8", "int8"):
        label = f"{name}, {quantized}" if quantized else name
        pipe = build(name).to(device)
        # Matrix units for 8 bits write bf16.
        pipe = pipe if quantized is None else pipe.to(torch.bfloat16)
        arguments = {key: item.to(device) for key, item in entry.call().items() if isinstance(item, torch.Tensor)}
        arguments |= {key: item.to(pipe.dtype) for key, item in arguments.items() if key.endswith("embeds")}
        layers = {"linear": {"algo": quantized, "smallest": 0}} if quantized else {}
        torch.compiler.reset()
        made.clear()
        try:
            expected, bound = tensors(entry.run(pipe, **arguments)), 2e-4
            if quantized:
                accelerate(pipe, attention="sdpa", **layers)
                wide, expected = expected, tensors(entry.run(pipe, **arguments))
                bound = relative(expected, wide)
            accelerate(pipe, attention="sdpa", compile=True, **layers)
            difference = relative(tensors(entry.run(pipe, **arguments)), expected)
            known = stats(pipe).modulations_precomputed, stats(pipe).modulations_recomputed
        except Unsupported as error:
            found[label] = {"refused": str(error)}
            continue
        except Exception as error:  # the others are of interest too
            wrong.append(f"{label}: {error!r}"[:700])
            continue
        found[label] = {"difference": difference, "at most": bound, "made": dict(made), "modulations": known}
        # The second branch of a prompt that is embedded is multiplied.
        if not difference < (2 * bound if quantized else bound) or not made or (known[1] and name != "flux-true-cfg"):
            wrong.append(f"{label}: {found[label]}")
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    parser.add_argument("--skip-models", action="store_true")
    parser.add_argument("--only", choices=["graphs", "whole", "rewrites", "offload"])
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda")
    if options.only:
        checks = {
            "graphs": check_graphs, "whole": check_whole, "rewrites": check_rewrites, "offload": check_offload,
        }  # fmt: skip
        part, wrong = checks[options.only](device)
        path = measure.write(f"check-gpu-{options.only}", {options.only: part, "wrong": wrong}, options.out)
        print(path.read_text())
        sys.exit(1 if wrong else 0)
    kernels, wrong = check_kernels(device)
    print("\n".join(wrong), flush=True)
    measure.write("check-gpu", {"kernels": kernels, "wrong": wrong}, options.out)  # kept should a model break off
    models = {} if options.skip_models else check_models(device)
    wrong += [
        f"{name}: {figures}"
        for name, figures in models.items()
        if not figures["psnr"] > 30 or (figures["stock repeats bit for bit"] and not figures["restored bit for bit"])
    ]
    path = measure.write("check-gpu", {"kernels": kernels, "models": models, "wrong": wrong}, options.out)
    print(path.read_text())
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
