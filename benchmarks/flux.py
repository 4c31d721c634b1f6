"""FLUX.1-dev's real shape, with random weights: stock diffusers, its regional compile, and this package, in one run.

Random weights cost what trained ones cost, so this measures speed only. Prompt embeddings are given, so that the text
encoders stay out; VAE decoding is included. Variants:

- `stock`: diffusers as it comes.
- `off`: `accelerate(pipe, AccelConfig())`, which places every call and changes nothing. Called in turn with `stock`.
- `diffusers compile`: `transformer.compile_repeated_blocks(fullgraph=True)`.
- Ours without loss: `lossless` (the preset: attention by measurement, compiled and rewritten), the same with CUDA
  graphs, with projections fused, and with the VAE's decoder compiled.
- Ours in 8 bits: fp8 layers, with FlashAttention 3 in 16 bits and in 8; `half the steps`: 14 of 28 computed.
- With `--rivals`, last, since they leave no way back: torchao's row-wise fp8 with FlashAttention 3 and regional
  compilation, and the same with cache-dit's static mask, which computes the same 14 steps.
- With `--linear` instead: `fp8` and `int8`, in eager and compiled, with projections apart and fused, beside torchao's
  row-wise fp8 with the same attention and the same regional compilation. torchao sets inductor's coordinate descent
  for the whole process; `tuned` variants of ours have the same.

    python benchmarks/flux.py --rivals             # on a CUDA device
    python benchmarks/flux.py --size 512           # benchmarks/results/flux-512.json
    python benchmarks/flux.py --tiny --device cpu  # a dry run of the script
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import measure
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from diffusers_accel import AccelConfig, StepMaskConfig, VAEConfig, accelerate, restore, stats

TRANSFORMER: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
VAE: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
}
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096,
             "base_shift": 0.5, "max_shift": 1.15}  # fmt: skip


def build(device: str, dtype: torch.dtype, tiny: bool) -> FluxPipeline:
    """The stock pipeline with random weights, made on the device."""
    torch.manual_seed(0)
    transformer, vae = dict(TRANSFORMER), dict(VAE)
    if tiny:
        transformer |= {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64}
        vae |= {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 8, "layers_per_block": 1}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            denoiser = FluxTransformer2DModel(**transformer).eval().requires_grad_(False)
            decoder = AutoencoderKL(**vae).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=decoder,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=denoiser,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# 14 of 28 steps: six at the beginning, eight of the other 22, the last one among them.
MASK = (1,) * 6 + (0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1)
GRAPHS: dict[str, Any] = {"compile": True, "cuda_graph": True}
EIGHT: dict[str, Any] = {**GRAPHS, "linear": "fp8", "fuse": True, "vae": VAEConfig(compile=True)}
OURS: dict[str, dict[str, Any]] = {
    "lossless": {"attention": "auto", "compile": True},
    "lossless, without rewrites": {"attention": "auto", "compile": {"rewrites": False}},
    "lossless, graphs": {"attention": "auto", **GRAPHS},
    "lossless, graphs, fused": {"attention": "auto", "fuse": True, **GRAPHS},
    "lossless, graphs, fused, VAE": {"attention": "auto", "fuse": True, **GRAPHS, "vae": VAEConfig(compile=True)},
    "fp8, FA3 in bf16": {"attention": "fa3", **EIGHT},
    "fp8, FA3 in fp8": {"attention": "fa3-fp8", **EIGHT},
    "fp8, FA3 in fp8, without graphs": {"attention": "fa3-fp8", **EIGHT, "cuda_graph": None},
    "fp8, FA3 in fp8, half the steps": {"attention": "fa3-fp8", **EIGHT, "cache": StepMaskConfig(mask=MASK)},
}
# What runs on a CPU too, for a dry run.
DRY = {"attention": "sdpa", "compile": None, "cuda_graph": None, "linear": None, "vae": None}


def torchao_fp8(pipe: Any) -> None:
    """What an expert writes by hand today, on the layers inside the blocks, as ours."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(
        pipe.transformer,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        filter_fn=lambda module, path: isinstance(module, torch.nn.Linear) and "blocks" in path,
    )


def cache_dit_mask(pipe: Any, mask: tuple[int, ...], warmup: int) -> None:
    """cache-dit with the same steps; it watches one block, which it computes on skipped steps too."""
    import cache_dit

    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            max_warmup_steps=warmup,
            num_inference_steps=len(mask),
            steps_computation_mask=list(mask),
            steps_computation_policy="static",
        ),
    )


def linear(
    pipe: FluxPipeline, note: Any, timed_first: Any, generate: Any, repeats: int, only: list[str] | None
) -> None:
    """Low-bit linear layers, ours and torchao's; torchao's come last, for it leaves no way back."""
    cuda = pipe.transformer.device.type == "cuda"
    attention = "fa3" if cuda else "sdpa"
    tuned = {"options": {"coordinate_descent_tuning": True, "coordinate_descent_check_all_directions": True}}
    for name, sections in {
        "bf16": {},
        "bf16, fused": {"fuse": True},
        "fp8": {"linear": "fp8"},
        "fp8, fused": {"linear": "fp8", "fuse": True},
        "int8": {"linear": "int8"},
        "fp8, fused, fa3-fp8": {"linear": "fp8", "fuse": True, "attention": "fa3-fp8" if cuda else "sdpa"},
        "bf16, compiled": {"compile": True},
        "bf16, fused, compiled": {"fuse": True, "compile": True},
        "fp8, compiled": {"linear": "fp8", "compile": True},
        "fp8, fused, compiled": {"linear": "fp8", "fuse": True, "compile": True},
        "int8, fused, compiled": {"linear": "int8", "fuse": True, "compile": True},
        "fp8, fused, compiled, tuned": {"linear": "fp8", "fuse": True, "compile": tuned},
    }.items():
        if only and name not in only:
            continue
        accelerate(pipe, **{"attention": attention, **sections})
        timed_first(name)
        note(name, measure.seconds(generate, repeats, warm=0))
        restore(pipe)
        torch.compiler.reset()
    if not cuda:
        return
    try:
        torchao_fp8(pipe)
    except ImportError:
        print("torchao is not installed", flush=True)
        return
    for name, sections in {"torchao": {}, "torchao, compiled": {"compile": True}}.items():
        if only and name not in only:
            continue
        accelerate(pipe, attention=attention, **sections)
        timed_first(name)
        note(name, measure.seconds(generate, repeats, warm=0))
        restore(pipe)


def write(
    options: argparse.Namespace, size: int, steps: int, dtype: torch.dtype, figures: Any, cold: Any, differences: Any,
    kernels: Any, modulations: Any,
) -> None:  # fmt: skip
    """The result file, and the same on the screen."""
    result = {
        "work": f"FLUX.1-dev shape, {size}x{size}, {steps} steps, batch 1, {dtype}, VAE decode included",
        "variants": {name: measure.summary(times) for name, times in figures.items()},
        "first call, compilation included, seconds": cold,
        "psnr against stock, dB": differences,
        "attention kernels of one request": kernels,
        "modulations of one request": modulations,
    }
    stock = result["variants"]["stock"]["seconds"]
    result["speed-up over stock"] = {
        name: round(stock / figure["seconds"], 3) for name, figure in result["variants"].items()
    }
    name = "flux-linear" if options.linear else "flux" if size in (64, 1024) else f"flux-{size}"
    name += "-dry-run" if options.tiny else ""
    measure.write(name, result, options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--linear", action="store_true", help="low-bit linear layers, beside torchao's")
    parser.add_argument("--rivals", action="store_true", help="torchao and cache-dit too")
    parser.add_argument("--only", nargs="*", help="of ours, or of --linear, these variants; all if not given")
    parser.add_argument("--tiny", action="store_true", help="a small model: a dry run of the script")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results if not given")
    options = parser.parse_args()
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    size, steps = (64, 2) if options.tiny else (options.size, options.steps)

    pipe = build(options.device, dtype, options.tiny)
    config = pipe.transformer.config
    embeddings = {
        "prompt_embeds": torch.randn(1, 512, config.joint_attention_dim, device=options.device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, device=options.device, dtype=dtype),
    }

    def generate() -> torch.Tensor:
        generator = torch.Generator(options.device).manual_seed(0)
        return pipe(
            **embeddings, height=size, width=size, num_inference_steps=steps, guidance_scale=3.5, generator=generator,
            output_type="pt",
        ).images  # fmt: skip

    def off() -> torch.Tensor:
        accelerate(pipe, AccelConfig())
        try:
            return generate()
        finally:
            restore(pipe)

    figures: dict[str, Any] = {}
    cold: dict[str, float] = {}
    kernels: dict[str, Any] = {}
    modulations: dict[str, Any] = {}

    def note(name: str, times: list[float]) -> None:
        figures.setdefault(name, []).extend(times)
        print(f"{name}: {measure.summary(times)}", flush=True)

    reference = generate().float()
    assert torch.isfinite(reference).all(), "the random model's output must be finite"
    for name, times in measure.alternate({"stock": generate, "off": off}, options.repeats).items():
        note(name, times)

    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    differences: dict[str, float] = {}

    def timed_first(name: str) -> None:
        measure.synchronize()
        start = time.perf_counter()
        found = generate().float()
        measure.synchronize()
        cold.setdefault(name, round(time.perf_counter() - start, 2))
        error = (found - reference).pow(2).mean()
        differences[name] = round(float(-10 * error.log10()), 2)

    if options.linear:
        linear(pipe, note, timed_first, generate, options.repeats, options.only)
        write(options, size, steps, dtype, figures, cold, differences, kernels, modulations)
        return

    cuda = pipe.transformer.device.type == "cuda"
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    timed_first("diffusers compile")
    note("diffusers compile", measure.seconds(generate, options.repeats, warm=0))
    # diffusers has no way back from compile_repeated_blocks.
    for block in blocks:
        block._compiled_call_impl = None
    for name, sections in OURS.items():
        if options.only and name not in options.only:
            continue
        accelerate(pipe, **(sections if cuda else {**sections, **DRY}))
        timed_first(name)
        note(name, measure.seconds(generate, options.repeats, warm=0))
        seen = stats(pipe)
        kernels[name] = seen.attention_kernels
        modulations[name] = {
            "layers, all steps at once": seen.modulations_precomputed,
            "missed": seen.modulations_recomputed,
        }
        restore(pipe)
        torch.compiler.reset()
        write(options, size, steps, dtype, figures, cold, differences, kernels, modulations)
    if options.rivals and cuda:
        torchao_fp8(pipe)
        accelerate(pipe, attention="fa3")  # diffusers wants FlashAttention 3 by a name that no wheel has
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        timed_first("torchao fp8, FA3, compiled")
        note("torchao fp8, FA3, compiled", measure.seconds(generate, options.repeats, warm=0))
        write(options, size, steps, dtype, figures, cold, differences, kernels, modulations)
        cache_dit_mask(pipe, MASK, warmup=6)
        timed_first("torchao fp8, FA3, compiled, cache-dit, half the steps")
        note(
            "torchao fp8, FA3, compiled, cache-dit, half the steps", measure.seconds(generate, options.repeats, warm=0)
        )
    write(options, size, steps, dtype, figures, cold, differences, kernels, modulations)


if __name__ == "__main__":
    main()
