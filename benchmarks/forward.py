"""One eager forward of a model at its real shape, random weights, with each attention kernel, against stock.

Random weights cost what trained ones cost, so this measures speed only. Variants are called in turn over several
rounds. `fa3-fp8, stock rotation` leaves QK-norm and rotary embedding to the stock functions, which `fa3-fp8` otherwise
does in passing. The last variant is the configuration that lets `"auto"` choose among 8-bit kernels too.

    python benchmarks/forward.py wan
    python benchmarks/forward.py cosmos
    python benchmarks/forward.py ltx2 --layers 12
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import measure
import torch

from diffusers_accel import Unsupported, accelerate, restore, stats
from diffusers_accel.kernels.attention import KERNELS


@dataclass(frozen=True)
class Model:
    """A model's shape.

    Attributes:
        denoiser: Name of its class.
        pipeline: Name of its pipeline's class; components that a forward does not need are `None`.
        config: Of the published checkpoint.
        inputs: Makes the arguments of one call from a function that makes random tensors.
        work: What one call is, in words.
    """

    denoiser: str
    pipeline: str
    config: dict[str, Any]
    inputs: Callable[[Any], dict[str, Any]]
    work: str


def _wan(random: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(1, 16, 21, 60, 104),
        "timestep": torch.tensor([500], device="cuda"),
        "encoder_hidden_states": random(1, 512, 4096),
    }


def _cosmos(random: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(1, 16, 21, 60, 104),
        "timestep": torch.tensor([0.5], device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": random(1, 512, 1024),
        "fps": 16,
    }


def _ltx2(random: Any) -> dict[str, Any]:
    return {
        "hidden_states": random(2, 16 * 16 * 24, 128),
        "audio_hidden_states": random(2, 126, 128),
        "encoder_hidden_states": random(2, 1024, 3840),
        "audio_encoder_hidden_states": random(2, 1024, 3840),
        "encoder_attention_mask": torch.ones(2, 1024, device="cuda", dtype=torch.bfloat16),
        "audio_encoder_attention_mask": torch.ones(2, 1024, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.full((2,), 500.0, device="cuda"),
        "num_frames": 16,
        "height": 16,
        "width": 24,
        "audio_num_frames": 126,
    }


MODELS = {
    "wan": Model(
        "WanTransformer3DModel",
        "WanPipeline",
        {
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
        },
        _wan,
        "Wan2.1 1.3B shape, 480x832, 81 frames, batch 1",
    ),
    "cosmos": Model(
        "CosmosTransformer3DModel",
        "Cosmos2TextToImagePipeline",
        {
            "num_attention_heads": 16,
            "num_layers": 28,
            "rope_scale": (1.0, 4.0, 4.0),
            "extra_pos_embed_type": None,
            "concat_padding_mask": False,  # one more input channel, for which torchvision would be needed
        },
        _cosmos,
        "Cosmos-Predict2 2B shape, 480x832, 81 frames, batch 1",
    ),
    "ltx2": Model(
        "LTX2VideoTransformer3DModel",
        "LTX2Pipeline",
        {"num_layers": 48, "rope_type": "split"},
        _ltx2,
        "LTX-2 19B shape, 512x768, 121 frames with audio, batch 2 (guidance)",
    ),
}
VARIANTS: dict[str, Any] = {
    "stock": None,
    "sdpa": "sdpa",
    "auto, exact": "auto",
    "fa3": "fa3",
    "fa3-fp8": "fa3-fp8",
    "fa3-fp8, stock rotation": "fa3-fp8-unfolded",
    "fa3-fp8, cross-attention sdpa": {"backend": "fa3-fp8", "cross_attention": "sdpa"},
    "sage": "sage",
    "sage-fp8": "sage-fp8",
    "qk16pv8": "qk16pv8",
    "auto, 8-bit": {"backend": "auto", "fidelity": "8bit"},
}


def build(model: Model, layers: int) -> Any:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            denoiser = getattr(diffusers, model.denoiser)(**{**model.config, "num_layers": layers})
    finally:
        torch.set_default_dtype(default)
    kind = getattr(diffusers, model.pipeline)
    pipe = kind.__new__(kind)  # its other components are not needed, and their constructors want them
    diffusers.DiffusionPipeline.__init__(pipe)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    components = dict.fromkeys(kind._get_signature_keys(kind)[0])
    pipe.register_modules(**components | {"transformer": denoiser.eval().requires_grad_(False), "scheduler": scheduler})
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    model = MODELS[options.model]
    layers = options.layers or model.config["num_layers"]
    unfolded = replace(KERNELS.get("fa3-fp8"), name="fa3-fp8-unfolded", folds=False, auto=False)
    KERNELS.add("fa3-fp8-unfolded", unfolded)
    pipe = build(model, layers)
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    arguments = model.inputs(random)

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
    work = f"{model.work}, {layers} of {model.config['num_layers']} layers, bf16, one eager forward"
    print(measure.write(f"forward-{options.model}", {"work": work, "variants": result}, options.out))


if __name__ == "__main__":
    main()
