"""A VAE's picture on several GPUs: decoding and encoding with Wan 2.1's VAE (480x832, 81 frames) and FLUX.1's
(1024x1024 and 2048x2048), real configurations with random weights, on one GPU and divided, in one run.

    torchrun --nproc-per-node 2 benchmarks/parallel_vae.py              # benchmarks/results/parallel-vae-2.json
    torchrun --nproc-per-node 2 benchmarks/parallel_vae.py --tiny --device cpu    # a dry run of the script
"""

from __future__ import annotations

from typing import Any

import flux
import measure
import ranks as several
import torch
import torch.distributed as dist
import wan
from diffusers import AutoencoderKL, AutoencoderKLWan

from diffusers_accel import ParallelConfig, accelerate, restore


def works(tiny: bool) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Name -> what makes the VAE, and its pictures' shape."""
    if tiny:
        small = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
        pictures = {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 8, "layers_per_block": 1}
        return {
            "wan": (lambda: AutoencoderKLWan(**small), (1, 3, 5, 64, 64)),
            "flux": (lambda: AutoencoderKL(**{**flux.VAE, **pictures}), (1, 3, 64, 64)),
        }
    return {
        "wan, 480x832, 81 frames": (AutoencoderKLWan, (1, 3, 81, 480, 832)),
        "flux, 1024x1024": (lambda: AutoencoderKL(**flux.VAE), (1, 3, 1024, 1024)),
        "flux, 2048x2048": (lambda: AutoencoderKL(**flux.VAE), (1, 3, 2048, 2048)),
    }


def main() -> None:
    options = several.parser(__doc__, repeats=3).parse_args()
    rank, ranks, dtype = several.start(options.device)
    cuda = options.device == "cuda"
    pipe: Any = wan.build(options.device, dtype, tiny=True)
    found: dict[str, Any] = {}
    for name, (make, shape) in works(options.tiny).items():
        if options.only and name not in options.only:
            continue
        torch.manual_seed(0)
        with torch.device(options.device):
            pipe.vae = make().to(dtype).eval().requires_grad_(False)
        pictures = torch.rand(shape, device=options.device, dtype=dtype) * 2 - 1
        with torch.no_grad():
            latents = pipe.vae.encode(pictures).latent_dist.mode()

        def decode(latents: torch.Tensor = latents) -> torch.Tensor:
            with torch.no_grad():
                return pipe.vae.decode(latents, return_dict=False)[0]

        def encode(pictures: torch.Tensor = pictures) -> torch.Tensor:
            with torch.no_grad():
                return pipe.vae.encode(pictures).latent_dist.mode()

        for what, function in (("decode", decode), ("encode", encode)):
            figure: dict[str, Any] = {}
            expected = function().float()
            for label in ("one GPU", f"{ranks} GPUs"):
                if label != "one GPU":
                    accelerate(pipe, parallel=ParallelConfig(dp=ranks, vae=ranks))
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                dist.barrier()
                timed = measure.summary(measure.seconds(function, options.repeats, warm=1))
                if cuda:
                    timed["peak memory, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                if label != "one GPU":
                    out = function().float()
                    timed["relative difference"] = float((out - expected).norm() / expected.norm())
                    timed["times as fast"] = round(figure["one GPU"]["seconds"] / timed["seconds"], 2)
                    if cuda:
                        timed["on the GPU, ms"] = several.spans(function)
                    restore(pipe)
                figure[label] = timed
            found[f"{name}, {what}"] = figure
            if rank == 0:
                print(name, what, figure, flush=True)
                work = f"VAEs, random weights, {dtype}, {ranks} GPUs, every rank timed alone: rank 0's figures"
                result = f"parallel-vae-{ranks}" + ("-dry-run" if options.tiny else "")
                measure.write(result, {"work": work, "ranks": ranks, "works": found}, options.out)


if __name__ == "__main__":
    main()
