"""The cost of a budget of GPU memory: denoisers at their real shapes, with blocks that are streamed from host memory.

Each part is a process of its own. A denoiser's part times a forward with all weights on the GPU, then the same
configuration with `offload=`, with the weights on the host beforehand, and compares the two results bit for bit. The
process's share of the GPU is then limited to the row's budget (`torch.cuda.set_per_process_memory_fraction`). The speed
of copies to the GPU, and the time to touch and page-lock memory, are measured in the same process.

Other parts: diffusers' group offloading of FLUX.1 with a stream (`group`), predicted and measured peaks of VAEs
(`vae`), whole pipelines of FLUX.1 and Wan2.1 14B within 12 GB (`pipeline`, `wan-pipeline`), and the difference between
tiles and whole decoding with the trained VAEs of the shipped checkpoints (`seams`, which needs no GPU).

    python benchmarks/memory.py                 # all parts; memory.json
    python benchmarks/memory.py --part flux     # memory-flux.json
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measure
import torch
from denoisers import MODELS, build_on_host, inputs, on_host

from diffusers_accel import accelerate, explain, restore, stats
from diffusers_accel.core.host_memory import LockedBuffer

_BF16: dict[str, Any] = {"attention": "auto", "compile": True, "cuda_graph": True}
# Format of linear layers -> sections.
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": _BF16,
    "fp8": {**_BF16, "linear": "fp8"},
    "nvfp4": {**_BF16, "linear": "nvfp4"},
}
# Model -> forwards to time, and (format, offload, share of the GPU in bytes) of each row.
ROWS: dict[str, tuple[int, list[tuple[str, Any, int | None]]]] = {
    "flux": (
        16,
        [
            ("bf16", {"level": 3}, None),
            ("fp8", {"level": 3}, None),
            ("fp8", "8GiB", 8 * 2**30),
            ("nvfp4", "4GiB", 4 * 2**30),
        ],
    ),
    "qwen": (10, [("bf16", "16GiB", 16 * 2**30)]),
    "wan-14b": (2, [("bf16", {"level": 3, "prefetch": 1}, None), ("fp8", {"level": 3, "prefetch": 1}, None)]),
}
# The planned size, where it is not the pipeline's default.
SIZES: dict[str, dict[str, Any]] = {"qwen": {"warmup": {"resolutions": ["1328x1328"]}}}
PARTS = (*ROWS, "group", "vae", "pipeline", "wan-pipeline", "seams")


def host_link() -> float:
    """GB/s of copies from page-locked memory."""
    source = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    times = measure.seconds(lambda: target.copy_(source, non_blocking=True), 5)
    return source.numel() / min(times) / 1e9


def locking() -> float:
    """GB/s of touching and page-locking host memory."""
    begin = time.perf_counter()
    buffers = [LockedBuffer.allocate(2**30, torch.device("cuda")) for _ in range(4)]
    for buffer in buffers:
        buffer.memory.zero_()
        buffer.lock()
    return 4 * 2**30 / (time.perf_counter() - begin) / 1e9


def limit(share: int | None) -> None:
    """Limits the process to so many bytes of the GPU; `None` for all."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if share is None else share / total)


def step(pipe: Any, given: dict[str, Any], count: int, copied: Any = lambda: 0) -> tuple[Any, ...]:
    """Milliseconds of one of several forwards in a row, the result, the peak of allocated bytes, and bytes copied."""
    pipe.scheduler.set_timesteps(28, device="cuda")
    makes_its_own = given["timestep"].is_floating_point() and given["timestep"].numel() == 1
    steps = [item.expand(1).to(given["timestep"].dtype) / 1000 for item in pipe.scheduler.timesteps]

    def forward(index: int) -> torch.Tensor:
        # The place of a call in its request is the scheduler's, as in a pipeline.
        pipe.scheduler.set_begin_index(index)
        timestep = {"timestep": steps[index]} if makes_its_own else {}
        with torch.no_grad():
            return pipe.transformer(**{**given, **timestep}, return_dict=False)[0]

    warm = 3 if count < 4 else 4
    torch.cuda.reset_peak_memory_stats()
    for index in range(warm):
        result = forward(index).clone()
    measure.synchronize()
    before, begin = copied(), time.perf_counter()
    for index in range(count):
        forward(warm + index)
    measure.synchronize()
    milliseconds = 1000 * (time.perf_counter() - begin) / count
    return milliseconds, result, torch.cuda.max_memory_allocated(), (copied() - before) / count


def denoiser(name: str) -> dict[str, Any]:
    """The rows of a denoiser."""
    count, rows = ROWS[name]
    model = MODELS[name]
    found: dict[str, Any] = {"work": model.work, "link, GB/s": round(host_link(), 1)}
    found["touching and locking, GB/s"] = round(locking(), 2)
    limit(None)
    pipe = build_on_host(model)
    parameters = list(pipe.transformer.parameters())
    weights = sum(item.numel() * item.element_size() for item in parameters)
    found["weights, GB"] = round(weights / 1e9, 2)
    given, host = inputs(model, pipe), [item.data for item in parameters]
    resident: dict[str, tuple[float, torch.Tensor]] = {}
    size = SIZES.get(name, {})
    for kind, offload, share in rows:
        if kind not in resident:
            limit(None)
            for item in parameters:
                item.data = item.data.cuda()
            buffers = list(pipe.transformer.buffers())
            pipe.transformer.to("cuda")
            accelerate(pipe, **FORMATS[kind])
            milliseconds, result, peak, _ = step(pipe, given, count)
            resident[kind] = (milliseconds, result)
            found[f"{kind}, resident"] = {
                "ms": round(milliseconds, 2), "peak, GiB": round(peak / 2**30, 2),
                "graphs, replays": [stats(pipe).graphs_captured, stats(pipe).graph_replays],
            }  # fmt: skip
            restore(pipe)
            for item, data in zip(parameters, host, strict=True):
                item.data = data
            del buffers
            pipe.transformer.to("cpu")
        limit(share)
        row: dict[str, Any] = {"on the GPU before, MiB": round(torch.cuda.memory_allocated() / 2**20)}
        try:
            (plan,) = (
                each
                for each in explain(pipe, **FORMATS[kind], **size, offload=offload).rows
                if each.feature == "offload"
            )
            row["plan"] = [plan.action, *plan.notes]
            begin = time.perf_counter()
            accelerate(pipe, **FORMATS[kind], **size, offload=offload)
            row["enabling, s"] = round(time.perf_counter() - begin, 2)
            milliseconds, result, peak, copied = step(pipe, given, count, lambda: stats(pipe).offload["bytes"])
            statistics = stats(pipe)
            copies = copied / found["link, GB/s"] / 1e6
            row |= {
                "ms": round(milliseconds, 2), "copied, GB": round(copied / 1e9, 2), "copies, ms": round(copies, 1),
                "over the larger of copies and resident": round(milliseconds / max(copies, resident[kind][0]), 3),
                "over resident": round(milliseconds / resident[kind][0], 3), "peak, GiB": round(peak / 2**30, 2),
                "peak reserved, GiB": round(torch.cuda.max_memory_reserved() / 2**30, 2),
                "equal to resident, bit for bit": bool(torch.equal(result, resident[kind][1])),
                "graphs, replays": [statistics.graphs_captured, statistics.graph_replays],
                "modulations": [statistics.modulations_precomputed, statistics.modulations_recomputed],
                "blocks ahead, late": [statistics.offload["ahead"], statistics.offload["late"]],
            }  # fmt: skip
            restore(pipe)
        except Exception as error:  # the other rows are of interest too
            row["failed"] = f"{type(error).__name__}: {error}"[:600]
        found[f"{kind}, {offload}"] = row
        print(json.dumps({f"{kind}, {offload}": row}), flush=True)
    return found


def group() -> dict[str, Any]:
    """diffusers' group offloading of FLUX.1, with a stream."""
    model = MODELS["flux"]
    found: dict[str, Any] = {"work": model.work, "link, GB/s": round(host_link(), 1)}
    for record in (False, True):
        pipe = build_on_host(model)
        given = inputs(model, pipe)
        begin = time.perf_counter()
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=1, use_stream=True, record_stream=record,
        )  # fmt: skip
        enabling = time.perf_counter() - begin
        milliseconds, _, peak, _ = step(pipe, given, 6)
        found[f"record_stream={record}"] = {
            "enabling, s": round(enabling, 2), "ms": round(milliseconds, 2), "peak, GiB": round(peak / 2**30, 2),
        }  # fmt: skip
        del pipe
    return found


_WAN_22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
# VAE -> class, configuration, and (shape of the latents, way) of each decode.
VAES: dict[str, tuple[str, dict[str, Any], list[tuple[tuple[int, ...], str]]]] = {
    "FLUX.1": ("AutoencoderKL", "flux", [((1, 16, 128, 128), "whole"), ((1, 16, 128, 128), "tiles"),
                                         ((1, 16, 256, 256), "whole"), ((1, 16, 256, 256), "tiles")]),
    "Qwen-Image": ("AutoencoderKLQwenImage", {}, [((1, 16, 1, 166, 166), "whole"), ((1, 16, 1, 166, 166), "tiles")]),
    "Wan2.1": ("AutoencoderKLWan", {}, [((1, 16, 21, 60, 104), "whole"), ((1, 16, 21, 60, 104), "tiles")]),
    "LTX-2": ("AutoencoderKLLTX2Video", {}, [((1, 128, 16, 16, 24), "whole"), ((1, 128, 16, 16, 24), "tiles")]),
    "FLUX.2": ("AutoencoderKLFlux2", {}, [((1, 32, 128, 128), "whole"), ((1, 32, 128, 128), "tiles")]),
    "Wan2.2 5B": ("AutoencoderKLWan", _WAN_22, [((1, 48, 11, 44, 80), "whole"), ((1, 48, 11, 44, 80), "tiles")]),
    # Its `use_tiling` changes nothing.
    "Cosmos": ("AutoencoderKLCosmos", {}, [((1, 16, 4, 88, 160), "whole")]),
}  # type: ignore[dict-item]  # fmt: skip


def vae() -> dict[str, Any]:
    """Predicted and measured peaks of decoding, in GiB, beside weights and latents."""
    import diffusers
    from flux import VAE

    from diffusers_accel.features.offload.vae import DecodeChoice, predicted_bytes

    found: dict[str, Any] = {}
    for name, (kind, config, calls) in VAES.items():
        settings = VAE if config == "flux" else config
        model = on_host(lambda kind=kind, settings=settings: getattr(diffusers, kind)(**settings))
        model.to("cuda")
        for shape, way in calls:
            z = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            choice = DecodeChoice(model, way=way)
            with torch.no_grad():
                begin = time.perf_counter()
                choice.around_decode(model.decode, z)
                measure.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                begin = time.perf_counter()
                choice.around_decode(model.decode, z)
                measure.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            predicted = predicted_bytes(model, shape, torch.bfloat16, way)
            found[f"{name}, {shape}, {way}"] = {
                "measured": round(peak / 2**30, 3), "predicted without workspaces": round(predicted / 2**30, 3),
                "ratio": round(peak / predicted, 3), "seconds": round(time.perf_counter() - begin, 3),
                "reserved": round((torch.cuda.max_memory_reserved() - before) / 2**30, 3),
            }  # fmt: skip
            print(name, shape, way, found[f"{name}, {shape}, {way}"], flush=True)
        del model
        torch.cuda.empty_cache()
    return found


def seams() -> dict[str, Any]:
    """Tiles against whole decoding: the shipped checkpoints' VAEs, over pictures of held-out scenes. They were trained
    on 128 pixels, so that tiles are 64 pixels here: half of the size that is known to decode well whole."""
    sys.path.insert(0, str(Path(__file__).parent / "shapes"))
    import scenes

    from diffusers_accel import demo
    from diffusers_accel.features.offload import vae as ways
    from diffusers_accel.quality.metrics import psnr, ssim

    ways._TILE, side = 64, 128
    found: dict[str, Any] = {}
    for name, count, frames in (("flux-shapes", 64, 1), ("wan-shapes", 16, 17)):
        vae = demo.load(name).vae.float()
        held_out, _ = scenes.held_out_captions(demo.CHECKPOINTS[name].kind, count, seed=7)
        pictures: dict[str, list[torch.Tensor]] = {"original": [], "whole": [], "tiles": []}
        for pixels in scenes.render(held_out, side, frames=frames).split(1):
            pictures["original"].append(pixels)
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mode()
                for way in ("whole", "tiles"):
                    choice = ways.DecodeChoice(vae, way=way)
                    pictures[way].append(choice.around_decode(vae.decode, latents, return_dict=False)[0])
        original, whole, tiles = (
            (torch.cat(items).float() / 2 + 0.5).clamp(0, 1).transpose(1, -3) for items in pictures.values()
        )
        difference = 255 * (tiles - whole).abs()
        # A seam is a step between two rows of pixels, at the same row of every picture, that whole decoding lacks.
        steps = [255 * item.diff(dim=-2).abs().flatten(0, -3).mean((0, 2)) for item in (whole, tiles)]
        found[name] = {
            "work": f"{count} held-out scenes, {side}x{side}, {frames} frames, tiles of {ways._TILE} pixels",
            "whole against the picture, dB": round(psnr(whole, original), 2),
            "tiles against the picture, dB": round(psnr(tiles, original), 2),
            "tiles against whole, dB": round(psnr(tiles, whole), 2),
            "tiles against whole, SSIM": round(ssim(tiles, whole, -3), 4),
            "mean and largest difference, of 255": [
                round(float(difference.mean()), 3), round(float(difference.max()), 1)
            ],
            "mean step between rows, whole and tiles, of 255": [round(float(item.mean()), 3) for item in steps],
            "largest excess of a row's step, of 255": round(float((steps[1] - steps[0]).max()), 3),
        }  # fmt: skip
        print(name, found[name], flush=True)
    return found


def pipeline() -> dict[str, Any]:
    """FLUX.1's whole pipeline within 12 GiB, from the host: text encoders, denoiser and VAE at their real shapes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import diffusers
    from flux import SCHEDULER, TRANSFORMER, VAE
    from tiny.components import clip_tokenizer, t5_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=on_host(lambda: diffusers.AutoencoderKL(**VAE)),
        text_encoder=on_host(lambda: CLIPTextModel(clip)),
        tokenizer=clip_tokenizer(77),
        text_encoder_2=on_host(lambda: T5EncoderModel(t5)),
        tokenizer_2=t5_tokenizer(512),
        transformer=on_host(lambda: diffusers.FluxTransformer2DModel(**TRANSFORMER)),
    )
    return _requests(pipe, 12 * 2**30, {"offload": "12GiB"}, num_inference_steps=8)


def wan_pipeline() -> dict[str, Any]:
    """Wan2.1 14B's whole pipeline on a card of 12 GB, from the host: text encoder, denoiser and VAE at their real
    shapes. Of such a card 11 GiB are free."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import diffusers
    from tiny.components import t5_tokenizer
    from transformers import UMT5Config, UMT5EncoderModel

    umt5 = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    pipe = diffusers.WanPipeline(
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=on_host(lambda: diffusers.AutoencoderKLWan()),
        text_encoder=on_host(lambda: UMT5EncoderModel(umt5)),
        tokenizer=t5_tokenizer(512),
        transformer=on_host(lambda: diffusers.WanTransformer3DModel(**MODELS["wan-14b"].config)),
    )
    size = {"resolutions": ["480x832"], "num_frames": [81]}
    sections = {"offload": "11GiB", "warmup": size}
    return _requests(pipe, 11 * 2**30, sections, num_inference_steps=3, height=480, width=832, num_frames=81)


def _requests(pipe: Any, share: int, sections: dict[str, Any], **call: Any) -> dict[str, Any]:
    """Seconds and peaks of three requests of one prompt in a process that may use so many bytes of the GPU."""
    pipe.set_progress_bar_config(disable=True)
    limit(share)
    plan = explain(pipe, **_BF16, **sections)
    print(plan, flush=True)
    (row,) = (each for each in plan.rows if each.feature == "offload")
    found: dict[str, Any] = {"call": call, "plan": [row.action, *row.notes]}
    begin = time.perf_counter()
    accelerate(pipe, **_BF16, **sections)
    found["enabling, s"] = round(time.perf_counter() - begin, 2)
    encode = pipe.encode_prompt
    spent: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        measure.synchronize()
        start = time.perf_counter()
        result = encode(*args, **kwargs)
        measure.synchronize()
        spent.append(time.perf_counter() - start)
        return result

    pipe.encode_prompt = timed
    for request in ("first", "second", "third"):
        begin = time.perf_counter()
        picture = pipe("a red fox in the snow", output_type="pt", return_dict=False, **call)[0]
        measure.synchronize()
        found[f"{request} request, s"] = round(time.perf_counter() - begin, 2)
        found[f"{request} prompt, s"] = round(spent[-1], 3)
    del pipe.encode_prompt
    pipe.encode_prompt = encode
    found["peak, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    found["peak reserved, GiB"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    found["stats"] = str(stats(pipe)).splitlines()
    found["finite"] = bool(picture.isfinite().all())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    parser.add_argument("--part", choices=PARTS)
    options = parser.parse_args()
    torch._dynamo.config.automatic_dynamic_shapes = False
    if options.part:
        others = {"group": group, "vae": vae, "pipeline": pipeline, "wan-pipeline": wan_pipeline, "seams": seams}
        figures = others[options.part]() if options.part in others else denoiser(options.part)
        print(measure.write(f"memory-{options.part}", figures, options.out).read_text(), flush=True)
        return
    folder, parts = options.out or measure.RESULTS, {}
    for name in PARTS:
        subprocess.run([sys.executable, __file__, "--part", name, "--out", str(folder)], check=False)
        path = folder / f"memory-{name}.json"
        if path.is_file():
            parts[name] = json.loads(path.read_text())
            path.unlink()
    measure.write("memory", {"parts": parts}, options.out)


if __name__ == "__main__":
    main()
