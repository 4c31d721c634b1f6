"""What a skipped step and a gate cost at FLUX.1-dev's real shape, and what a static mask gains, beside cache-dit.

Random weights cost what trained ones cost, so this measures speed only. Prompt embeddings are given and latents come
out, so the denoiser and the scheduler are all that is timed.

- `gates`: every step computed, behind gates that measure nothing; `fbcache`: behind gates that watch the first block.
  Both are called in turn with stock: the difference is what gates add to a computed step.
- `mask`: 14 of 28 steps computed. A skipped step costs what is left of it once 14 computed steps are taken away.
- cache-dit has the same mask, static, watching one block, which it computes on skipped steps too; so has `mask, F1`.

    python benchmarks/caching_speed.py                       # on a CUDA device
    python benchmarks/caching_speed.py --tiny --device cpu   # a dry run of the script
"""

from __future__ import annotations

import argparse
import traceback
from pathlib import Path
from typing import Any

import measure
import torch
from flux import MASK, build, cache_dit_mask, torchao_fp8

from diffusers_accel import DBCacheConfig, FBCacheConfig, StepMaskConfig, accelerate, restore, stats

STEPS = 28
F1 = DBCacheConfig(Fn_compute_blocks=1, steps_computation_mask=MASK, steps_computation_policy="static")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model: a dry run of the script")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    assert len(MASK) == STEPS and sum(MASK) == STEPS // 2
    cuda = options.device != "cpu"
    dtype, size = (torch.bfloat16, 1024) if cuda and not options.tiny else (torch.float32, 64)
    pipe = build(options.device, dtype, options.tiny)
    config = pipe.transformer.config
    embeddings = {
        "prompt_embeds": torch.randn(1, 512, config.joint_attention_dim, device=options.device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, device=options.device, dtype=dtype),
    }

    def generate(target: Any = pipe) -> torch.Tensor:
        return target(
            **embeddings, height=size, width=size, num_inference_steps=STEPS, guidance_scale=3.5,
            generator=torch.Generator(options.device).manual_seed(0), output_type="latent",
        ).images  # fmt: skip

    figures: dict[str, list[float]] = {}

    def timed(name: str, cache: Any, **sections: Any) -> None:
        if cache is not None or sections:
            accelerate(pipe, cache=cache, **sections)
        figures[name] = measure.seconds(generate, options.repeats)
        if cache is not None:
            skipped = stats(pipe).steps_skipped
            assert skipped == (14 if "mask" in name else 0), (name, skipped)
        if cache is not None or sections:
            restore(pipe)
        print(name, measure.summary(figures[name]), flush=True)

    turns = {
        "stock": None,
        "gates": StepMaskConfig(mask=(1,)),
        "fbcache": FBCacheConfig(residual_diff_threshold=0.0),
    }
    generate()
    for _ in range(options.repeats + 2):
        for name, cache in turns.items():
            if cache is not None:
                accelerate(pipe, cache=cache)
            figures.setdefault(name, []).extend(measure.seconds(generate, 1, warm=0))
            if cache is not None:
                restore(pipe)
    for name in turns:
        print(name, measure.summary(figures[name]), flush=True)
    fast = {"linear": "fp8" if cuda else "int8", "compile": True} if not options.tiny else {"attention": "sdpa"}
    timed("mask", StepMaskConfig(mask=MASK))
    timed("mask, order 1", StepMaskConfig(mask=MASK, taylorseer_order=1))
    timed("mask, F1", F1)
    timed("fp8, compiled", None, **fast)
    timed("fp8, compiled, gates", StepMaskConfig(mask=(1,)), **fast)
    timed("fp8, compiled, mask", StepMaskConfig(mask=MASK), **fast)
    timed("fp8, compiled, mask, F1", F1, **fast)
    # Written before the rivals run and again after them: torchao's layers take minutes to compile.
    write(figures, {"cache-dit": "not run yet"}, size, dtype, options)
    problems = {}
    try:
        rivals(pipe, generate, figures, options)
    except Exception as error:  # a rival that breaks is reported, not hidden
        traceback.print_exc()
        problems["cache-dit"] = repr(error)
    print(write(figures, problems, size, dtype, options).read_text())


def write(
    figures: dict[str, list[float]], problems: dict[str, str], size: int, dtype: torch.dtype,
    options: argparse.Namespace,
) -> Path:  # fmt: skip
    """The result file."""
    seconds = {name: measure.summary(times)["seconds"] for name, times in figures.items()}

    def share(masked: str, full: str) -> float:
        computed = seconds[full] / STEPS
        return round((seconds[masked] - 14 * computed) / 14 / computed, 4)

    result = {
        "work": f"FLUX.1-dev shape, {size}x{size}, {STEPS} steps, batch 1, {dtype}, denoiser and scheduler",
        "variants": {name: measure.summary(times) for name, times in figures.items()},
        "speed-up over stock": {name: round(seconds["stock"] / value, 3) for name, value in seconds.items()},
        "a skipped step, of a computed one": {
            "eager": share("mask", "gates"),
            "eager, order 1": share("mask, order 1", "gates"),
            "fp8, compiled": share("fp8, compiled, mask", "fp8, compiled, gates"),
        },
        "what gates add to a computed step": {
            "eager": round(seconds["gates"] / seconds["stock"] - 1, 4),
            "eager, fbcache": round(seconds["fbcache"] / seconds["stock"] - 1, 4),
            "fp8, compiled": round(seconds["fp8, compiled, gates"] / seconds["fp8, compiled"] - 1, 4),
        },
        "problems": problems,
    }
    return measure.write("caching-speed" + ("-dry-run" if options.tiny else ""), result, options.out)


def rivals(pipe: Any, generate: Any, figures: dict[str, list[float]], options: argparse.Namespace) -> None:
    """cache-dit with the same mask; then with torchao fp8 and regional compilation, which leave no way back."""
    cache_dit_mask(pipe, MASK, warmup=6)
    figures["cache-dit, mask, F1"] = measure.seconds(generate, options.repeats)
    print("cache-dit", measure.summary(figures["cache-dit, mask, F1"]), flush=True)
    if options.tiny:
        return
    torchao_fp8(pipe)
    pipe.transformer.compile_repeated_blocks()
    figures["cache-dit, mask, F1, torchao fp8, compiled"] = measure.seconds(generate, options.repeats)


if __name__ == "__main__":
    main()
