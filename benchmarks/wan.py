"""Wan2.1-1.3B's real shape (480x832, 81 frames), random weights: one eager forward with each kernel, against stock.

Random weights cost what trained ones cost, so this measures speed only. Variants are called in turn over several
rounds. The last is the configuration that lets `"auto"` choose among 8-bit kernels too.

    python benchmarks/wan.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import measure
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from diffusers_accel import Unsupported, accelerate, restore, stats

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
VARIANTS: dict[str, Any] = {
    "stock": None,
    "sdpa": "sdpa",
    "auto, exact": "auto",
    "fa3": "fa3",
    "fa3-fp8": "fa3-fp8",
    "fa3-fp8, cross-attention sdpa": {"backend": "fa3-fp8", "cross_attention": "sdpa"},
    "sage": "sage",
    "sage-fp8": "sage-fp8",
    "qk16pv8": "qk16pv8",
    "auto, 8-bit": {"backend": "auto", "fidelity": "8bit"},
}


def build(layers: int) -> Any:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = WanTransformer3DModel(**{**TRANSFORMER, "num_layers": layers}).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=FlowMatchEulerDiscreteScheduler()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=TRANSFORMER["num_layers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    pipe = build(options.layers)
    generator = torch.Generator("cuda").manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, 16, 21, 60, 104, generator=generator, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.tensor([500], device="cuda"),
        "encoder_hidden_states": torch.randn(1, 512, 4096, generator=generator, device="cuda", dtype=torch.bfloat16),
    }

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return pipe.transformer(**arguments, return_dict=False)[0]

    expected = forward().float()
    found: dict[str, Any] = {name: {"all": []} for name in VARIANTS}
    for _ in range(options.rounds):
        for name, section in VARIANTS.items():
            if "refused" in found[name]:
                continue
            if section is not None:
                try:
                    accelerate(pipe, attention=section)
                except Unsupported as error:
                    found[name] = {"refused": str(error)}
                    continue
            found[name]["all"] += measure.seconds(forward, 2)
            if section is not None:
                out = forward().float()
                found[name]["relative error"] = float((out - expected).norm() / expected.norm())
                statistics = stats(pipe)
                found[name]["kernels"] = statistics.attention_kernels
                if statistics.attention_timings:
                    found[name]["timings"] = statistics.attention_timings
                restore(pipe)
    result = {
        name: {**figure, **measure.summary(figure["all"])} if figure.get("all") else figure
        for name, figure in found.items()
    }
    stock = result["stock"]["seconds"]
    for figure in result.values():
        if "seconds" in figure:
            figure["speed-up over stock"] = round(stock / figure["seconds"], 3)
    for name, figure in result.items():
        print(name, {key: value for key, value in figure.items() if key not in ("all", "timings")}, flush=True)
    work = f"Wan2.1 1.3B shape, {options.layers} layers, 480x832, 81 frames, one eager forward, batch 1, bf16"
    print(measure.write("wan", {"work": work, "variants": result}, options.out))


if __name__ == "__main__":
    main()
