"""Several GPUs on one request: FLUX.1-dev's shape (1024x1024, 28 steps) and Wan2.1 1.3B's (480x832, 81 frames, 12 steps
under guidance: 24 forwards), random weights, latents. Every kind of parallelism, beside one GPU and diffusers' own
Ulysses, in one run.

Communication is read off the profiler: the fraction of a request's time in which a kernel of NCCL runs, one that
writes to a peer's memory (and norms and rotates in the same pass), a barrier, or a copy engine, and the part of that
which does not overlap with other kernels. Waiting for the other ranks is part of it.

    torchrun --nproc-per-node 2 benchmarks/parallel.py flux       # benchmarks/results/parallel-flux-2.json
    torchrun --nproc-per-node 2 benchmarks/parallel.py wan
    torchrun --nproc-per-node 2 benchmarks/parallel.py wan --tiny --device cpu    # a dry run of the script
"""

from __future__ import annotations

import time
from typing import Any

import flux
import measure
import ranks as several
import torch
import torch.distributed as dist
import wan

from diffusers_accel import ParallelConfig, accelerate, restore, stats

LOSSLESS: dict[str, Any] = {"attention": "auto", "fuse": True, "compile": True, "cuda_graph": True}


def ways(ranks: int, guided: bool) -> dict[str, ParallelConfig]:
    """Configurations of parallelism for a number of ranks."""
    found = {
        "ulysses": ParallelConfig(ulysses=ranks),
        "ulysses, projections apart": ParallelConfig(ulysses=ranks),
        "ulysses, not overlapped": ParallelConfig(ulysses=ranks, async_ulysses=False),
        "ulysses, messages": ParallelConfig(ulysses=ranks, comm="collectives"),
        "ring": ParallelConfig(ring=ranks),
        f"tp {ranks}": ParallelConfig(tp=ranks),
    }
    if ranks == 2:
        found["attn2d 2 x 1"] = ParallelConfig(attn2d=(2, 1))
        found["attn2d 1 x 2"] = ParallelConfig(attn2d=(1, 2))
    if ranks == 4:
        found["attn2d 2 x 2"] = ParallelConfig(attn2d=(2, 2))
        found["ulysses 2, ring 2"] = ParallelConfig(ulysses=2, ring=2)
        found["tp 2, ulysses 2"] = ParallelConfig(tp=2, ulysses=2)
    if guided:
        found["cfg 2" if ranks == 2 else "cfg 2, ulysses 2"] = ParallelConfig(cfg=2, ulysses=ranks // 2)
    return found


def main() -> None:
    parser = several.parser(__doc__)
    parser.add_argument("work", choices=["flux", "wan"])
    options = parser.parse_args()
    rank, ranks, dtype = several.start(options.device)
    cuda = options.device == "cuda"
    pipe: Any = (flux if options.work == "flux" else wan).build(options.device, dtype, options.tiny)
    torch.manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=options.device, dtype=dtype)

    if options.work == "flux":
        size = 64 if options.tiny else 1024
        call: dict[str, Any] = {
            "prompt_embeds": random(1, 512, pipe.transformer.config.joint_attention_dim),
            "pooled_prompt_embeds": random(1, 768), "height": size, "width": size, "num_inference_steps": 28,
            "guidance_scale": 3.5,
        }  # fmt: skip
        described, forwards = f"FLUX.1-dev shape, {size}x{size}, 28 steps", 28
    else:
        height, width, frames = (32, 32, 5) if options.tiny else (480, 832, 81)
        call = {
            name: random(1, 512, pipe.transformer.config.text_dim)
            for name in ("prompt_embeds", "negative_prompt_embeds")
        }
        call |= {"height": height, "width": width, "num_frames": frames, "num_inference_steps": wan.STEPS,
                 "guidance_scale": 5.0}  # fmt: skip
        described, forwards = f"Wan2.1 1.3B shape, {height}x{width}, {frames} frames, {wan.STEPS} steps", 2 * wan.STEPS

    def generate(**changed: Any) -> torch.Tensor:
        generator = torch.Generator(options.device).manual_seed(0)
        return pipe(**{**call, **changed}, generator=generator, output_type="latent")[0]

    found: dict[str, Any] = {}
    reference = generate().float()
    assert torch.isfinite(reference).all(), "the random model's output must be finite"

    def measured(name: str, profiled: bool = True) -> None:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        out = generate().float()
        measure.synchronize()
        first = time.perf_counter() - start
        dist.barrier()
        figure = measure.summary(measure.seconds(generate, options.repeats, warm=1))
        figure["forward, ms"] = round(1000 * figure["seconds"] / forwards, 1)
        figure["first request, seconds"] = round(first, 2)
        figure["relative difference to stock"] = float((out - reference).norm() / reference.norm())
        if cuda:
            figure["peak memory, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if cuda and profiled:
            figure["a request on the GPU, ms"] = several.spans(generate)
        if vars(pipe).get("_diffusers_accel_session"):
            figure["attention kernels of one request"] = stats(pipe).attention_kernels
        found[name] = figure
        if rank:
            return
        print(name, figure, flush=True)
        result = f"parallel-{options.work}-{ranks}" + ("-dry-run" if options.tiny else "")
        work = f"{described}, {dtype}, latents, {ranks} GPUs, every rank timed alone: rank 0's figures"
        measure.write(result, {"work": work, "ranks": ranks, "variants": found}, options.out)

    variants: dict[str, ParallelConfig | None] = {"one GPU": None, **ways(ranks, options.work == "wan")}
    sections = LOSSLESS if cuda else {"attention": "sdpa"}
    for name, mesh in variants.items():
        if options.only and name not in options.only:
            continue
        # Layers that make query and key can only overlap with the value's exchange if they are not one with its own.
        changed = {"fuse": None} if name.endswith("apart") else {}
        accelerate(pipe, **{**sections, **changed}, parallel=mesh)
        measured(name, profiled=mesh is not None)
        restore(pipe)
        torch.compiler.reset()
    name = "diffusers' Ulysses" + (", compiled" if options.work == "flux" else "")
    if cuda and (not options.only or name in options.only):
        from diffusers import ContextParallelConfig

        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
        if options.work == "flux":  # Wan's blocks do not compile so
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
        measured(name)


if __name__ == "__main__":
    main()
