"""Checks on a CUDA device what the test suite cannot check without one.

- Every attention kernel that can run, against float64 on fresh random inputs, in the shapes of the models.
- The shipped checkpoints and small stock pipelines on the device: lossless settings against stock, and restored.

Relative error is ||found - reference|| / ||reference||; bf16 attention stays under 1e-2. The result is written like a
benchmark's, and the exit status is 1 if a check fails.

    python benchmarks/check_gpu.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import measure
import torch

from diffusers_accel import CompileConfig, accelerate, demo, restore, stats
from diffusers_accel.core.platform import describe
from diffusers_accel.kernels.attention import KERNELS

# (batch, query length, key length, heads, key heads, head_dim), causal
CALLS = {
    "flux": ((1, 1536, 1536, 24, 24, 128), False),
    "wan cross": ((1, 2000, 512, 12, 12, 128), False),
    "sd3": ((2, 1024 + 333, 1024 + 333, 24, 24, 64), False),
    "odd lengths": ((2, 77, 1111, 4, 4, 64), False),
    "cosmos3 causal, grouped": ((1, 300, 300, 32, 8, 128), True),
}
LIMIT = 1e-2


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    groups = query.shape[2] // key.shape[2]
    key, value = (item.repeat_interleave(groups, dim=2) for item in (key, value))
    q, k, v = (item.transpose(1, 2).double() for item in (query, key, value))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def check_kernels(device: torch.device) -> dict[str, Any]:
    """Relative error of each kernel on each call, or why it does not run."""
    found: dict[str, Any] = {}
    for name in KERNELS:
        kernel = KERNELS.get(name)
        missing = kernel.missing(describe(device))
        if missing is not None:
            found[name] = missing
            continue
        function, errors = kernel.load(), {}
        for label, ((batch, length, kv_length, heads, kv_heads, dim), causal) in CALLS.items():
            refused = kernel.refuses(torch.bfloat16, dim, device, False, causal, heads != kv_heads)
            if refused:
                errors[label] = refused
                continue
            shapes = [(batch, length, heads, dim), (batch, kv_length, kv_heads, dim), (batch, kv_length, kv_heads, dim)]
            tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
            copies = [item.clone() for item in tensors]
            out = function(*tensors, None, causal, None, heads != kv_heads)
            expected = reference(*tensors, causal)
            errors[label] = float((out.double() - expected).norm() / expected.norm())
            if not all(map(torch.equal, tensors, copies)):
                errors[label] = "changed its inputs"
        found[name] = errors
    return found


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
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    parser.add_argument("--skip-models", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda")
    kernels = check_kernels(device)
    print(kernels, flush=True)
    measure.write("check-gpu", {"kernels": kernels}, options.out)  # kept should a model break off
    models = {} if options.skip_models else check_models(device)
    wrong = [
        f"{kernel}, {label}: {error}"
        for kernel, errors in kernels.items()
        if isinstance(errors, dict)
        for label, error in errors.items()
        if error == "changed its inputs" or (isinstance(error, float) and not error < LIMIT)
    ]
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
