"""Weights that ranks share: a FLUX.1-dev-shaped request (1024x1024, latents), random weights, with whole weights on
every GPU and with weights divided among them, in one run. Seconds, peak memory, and how far outputs are from stock.

    torchrun --nproc-per-node 2 benchmarks/fsdp.py                  # benchmarks/results/fsdp-flux-2.json
    torchrun --nproc-per-node 2 benchmarks/fsdp.py --from-host      # a model that is divided before a GPU sees it
    torchrun --nproc-per-node 2 benchmarks/fsdp.py --tiny --device cpu    # a dry run of the script
"""

from __future__ import annotations

import time
from typing import Any

import flux
import measure
import ranks as several
import torch
import torch.distributed as dist

from diffusers_accel import ParallelConfig, accelerate, restore, stats


def ways(ranks: int, cuda: bool, from_host: bool) -> dict[str, dict[str, Any]]:
    """What is measured: name -> sections."""
    compiled: dict[str, Any] = {"attention": "auto", "compile": True} if cuda else {"attention": "sdpa"}
    fsdp, both = ParallelConfig(fsdp=True), ParallelConfig(fsdp=True, ulysses=ranks)
    found: dict[str, dict[str, Any]] = {
        "fsdp": {"attention": "sdpa", "parallel": fsdp},
        "fsdp, compiled": {**compiled, "parallel": fsdp},
        "fsdp, ulysses, compiled": {**compiled, "parallel": both},
        "fsdp, ulysses, int8, fused, compiled": {**compiled, "linear": "int8", "fuse": True, "parallel": both},
    }
    if from_host:
        return found
    whole = {name.replace("fsdp", "whole"): dict(sections) for name, sections in found.items()}
    for sections in whole.values():
        shared = sections.pop("parallel")
        if shared.ulysses > 1:
            sections["parallel"] = ParallelConfig(ulysses=ranks)
    # In turn, each beside the other.
    return {name: {**whole, **found}[name] for pair in zip(whole, found, strict=True) for name in pair}


def main() -> None:
    parser = several.parser(__doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--from-host", action="store_true", help="divide a model that lies in the host's memory")
    options = parser.parse_args()
    rank, ranks, dtype = several.start(options.device)
    cuda = options.device == "cuda"
    size, steps = (64, 2) if options.tiny else (options.size, options.steps)
    pipe: Any = flux.build(options.device, dtype, options.tiny)
    if options.from_host:
        pipe.to("cpu")
    torch.manual_seed(1)
    call = {
        name: torch.randn(*shape, device=options.device, dtype=dtype)
        for name, shape in {
            "prompt_embeds": (1, 512, pipe.transformer.config.joint_attention_dim),
            "pooled_prompt_embeds": (1, 768),
        }.items()
    }

    def generate() -> torch.Tensor:
        generator = torch.Generator(options.device).manual_seed(0)
        found: torch.Tensor = pipe(
            **call, height=size, width=size, num_inference_steps=steps, guidance_scale=3.5, generator=generator,
            output_type="latent",
        )[0]  # fmt: skip
        return found

    reference = None if options.from_host else generate().float()
    variants: dict[str, Any] = {}
    for name, sections in ways(ranks, cuda, options.from_host).items():
        if options.only and name not in options.only:
            continue
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        accelerate(pipe, **sections)
        measure.synchronize()
        figure: dict[str, Any] = {"accelerate, seconds": round(time.perf_counter() - start, 2)}
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            figure["memory before a request, GiB"] = round(torch.cuda.memory_allocated() / 2**30, 2)
        out = generate().float()
        assert torch.isfinite(out).all(), "the random model's output must be finite"
        dist.barrier()
        figure |= measure.summary(measure.seconds(generate, options.repeats, warm=1))
        figure["weights held, GiB"] = round(stats(pipe).weight_bytes_after / 2**30, 3)
        if cuda:
            figure["peak memory, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        reference = out if reference is None else reference
        figure["relative difference to stock"] = float((out - reference).norm() / reference.norm())
        restore(pipe)
        torch.compiler.reset()
        variants[name] = figure
        if rank == 0:
            print(name, figure, flush=True)
            work = f"FLUX.1-dev shape, {size}x{size}, {steps} steps, {dtype}, latents, {ranks} ranks: rank 0's figures"
            result = f"fsdp-flux-{ranks}" + ("-from-host" if options.from_host else "")
            result += "-dry-run" if options.tiny else ""
            measure.write(result, {"work": work, "ranks": ranks, "variants": variants}, options.out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
