"""Wan2.1 1.3B's real shape, 480x832, 81 frames, with random weights: stock diffusers, its regional compile, what an
expert assembles by hand, and this package, in one run.

A request of 12 steps under guidance, without text encoder and VAE: 24 forwards, whose mean is given as `forward`.
Variants:

- `stock`, and `diffusers compile`: `transformer.compile_repeated_blocks(fullgraph=True)`.
- Ours: `lossless` (the preset), the same with projections fused; `8-bit`: every layer of every block in fp8,
  self-attention `fa3-fp8`; `8-bit, half the steps`: 6 of 12 computed; and the presets `balanced` and `fast`.
- With `--rivals`, last, since they leave no way back: torchao's row-wise fp8 with FlashAttention 3 and regional
  compilation, and the same with cache-dit's static mask, which computes the same 6 steps.

    python benchmarks/wan.py --rivals               # on a CUDA device: benchmarks/results/wan.json
    python benchmarks/wan.py --tiny --device cpu    # a dry run of the script
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import measure
import torch
from denoisers import MODELS
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from flux import cache_dit_mask, torchao_fp8

from diffusers_accel import StepMaskConfig, accelerate, restore, stats

STEPS = 12
MASK = (1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1)
GRAPHS: dict[str, Any] = {"compile": True, "cuda_graph": True}
EIGHT: dict[str, Any] = {
    "attention": {"backend": "fa3-fp8", "cross_attention": "auto"}, "linear": {"plan": {"*blocks.*": "fp8"}}, **GRAPHS,
}  # fmt: skip
OURS: dict[str, Any] = {
    "lossless": "lossless",
    "lossless, fused": {"attention": "auto", "fuse": True, **GRAPHS},
    "8-bit": EIGHT,
    "8-bit, fused": {**EIGHT, "fuse": True},
    "8-bit, half the steps": {**EIGHT, "cache": StepMaskConfig(mask=MASK)},
    "balanced": "balanced",
    "fast": "fast",
}
# What runs on a CPU too, for a dry run.
DRY = {"attention": "sdpa", "compile": None, "cuda_graph": None, "linear": None, "fuse": None}


def build(device: str, dtype: torch.dtype, tiny: bool) -> WanPipeline:
    """The stock pipeline with random weights, made on the device."""
    torch.manual_seed(0)
    config = dict(MODELS["wan"].config)
    if tiny:
        config |= {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 32}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            denoiser = WanTransformer3DModel(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=denoiser,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rivals", action="store_true", help="torchao and cache-dit too")
    parser.add_argument("--only", nargs="*", choices=list(OURS), help="of ours, these; all if not given")
    parser.add_argument("--tiny", action="store_true", help="a small model: a dry run of the script")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results if not given")
    options = parser.parse_args()
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    pipe = build(options.device, dtype, options.tiny)
    config = pipe.transformer.config
    height, width, frames = (32, 32, 5) if options.tiny else (480, 832, 81)
    embeddings = {
        name: torch.randn(1, 512, config.text_dim, device=options.device, dtype=dtype)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }

    def generate() -> torch.Tensor:
        generator = torch.Generator(options.device).manual_seed(0)
        return pipe(
            **embeddings, height=height, width=width, num_frames=frames, num_inference_steps=STEPS, guidance_scale=5.0,
            generator=generator, output_type="latent",
        ).frames  # fmt: skip

    found: dict[str, Any] = {}
    reference = generate().float()
    assert torch.isfinite(reference).all(), "the random model's output must be finite"

    def measured(name: str) -> None:
        measure.synchronize()
        start = time.perf_counter()
        out = generate().float()
        measure.synchronize()
        first = time.perf_counter() - start
        figure = measure.summary(measure.seconds(generate, options.repeats, warm=0))
        figure["forward, ms"] = round(1000 * figure["seconds"] / (2 * STEPS), 1)
        figure["first request, seconds"] = round(first, 2)
        figure["relative difference to stock"] = float((out - reference).norm() / reference.norm())
        if vars(pipe).get("_diffusers_accel_session"):
            seen = stats(pipe)
            figure["attention kernels of one request"] = seen.attention_kernels
            figure["steps"] = {"computed": seen.steps_computed, "skipped": seen.steps_skipped}
        found[name] = figure
        print(name, figure, flush=True)
        work = f"Wan2.1 1.3B shape, {height}x{width}, {frames} frames, {STEPS} steps under guidance, {dtype}, latents"
        name = "wan" + ("-dry-run" if options.tiny else "")
        measure.write(name, {"work": work, "variants": found}, options.out)

    measured("stock")
    cuda = pipe.transformer.device.type == "cuda"
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    measured("diffusers compile")
    for block in pipe.transformer.blocks:
        block._compiled_call_impl = None  # diffusers has no way back
    for name, sections in OURS.items():
        if options.only and name not in options.only:
            continue
        if isinstance(sections, str):
            accelerate(pipe, sections)
        else:
            accelerate(pipe, **(sections if cuda else {**sections, **DRY}))
        measured(name)
        restore(pipe)
        torch.compiler.reset()
    if options.rivals and cuda:
        torchao_fp8(pipe)
        accelerate(pipe, attention="fa3")  # diffusers wants FlashAttention 3 by a name that no wheel has
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        measured("torchao fp8, FA3, compiled")
        cache_dit_mask(pipe, MASK, warmup=3)
        measured("torchao fp8, FA3, compiled, cache-dit, half the steps")


if __name__ == "__main__":
    main()
