"""The table of models and budgets, asked of the planner: no GPU, no weights.

Each pipeline is built at its published shape on the meta device. The estimates of `features/offload` and the planner of
`core/memory_plan.py` then see it as on an RTX 4090 behind PCIe 4, at the rates of `features/offload/estimates.py`.
Figures are predicted, not measured. `tests/test_pages.py` fails until the page says the same.

    python docs/budgets.py    # writes the table into docs/guides/memory.md, between the marks
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guides" / "memory.md"
BEGIN, END = "<!-- budgets: python docs/budgets.py -->", "<!-- end of budgets -->"
# Bytes a second of PCIe 4 with 16 lanes.
LINK = 24e9
GPU = ("cuda", "NVIDIA GeForce RTX 4090", (8, 9))
BUDGETS = (8, 12, 16, 24)
TIMES = "\N{MULTIPLICATION SIGN}"
_SECTIONS: dict[str, Any] = {"attention": "sdpa", "compile": True, "cuda_graph": True}
FORMATS: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": {"linear": "fp8"}}

_IMAGE_VAE: dict[str, Any] = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
}


def _t5(kind: str, vocabulary: int) -> Any:
    """The encoder of T5 or UMT5 XXL."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return getattr(transformers, f"{kind}EncoderModel")(config)


def _clip(width: int, layers: int, projected: bool) -> Any:
    """The text encoder of CLIP ViT-L or ViT-bigG."""
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        projection_dim=width,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def _qwen_vl() -> Any:
    """Qwen2.5-VL 7B."""
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _mistral() -> Any:
    """Mistral Small 3.1, 24B."""
    text = {
        "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 1540, "patch_size": 14,
    }  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


def _gemma() -> Any:
    """Gemma 3, 12B."""
    text = {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208,
    }  # fmt: skip
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    return transformers.Gemma3ForConditionalGeneration(config)


def _absent(kind: Any, **components: Any) -> Any:
    """A pipeline whose other components are absent."""
    names = kind._get_signature_keys(kind)[0]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return kind(**{**dict.fromkeys(names), "scheduler": scheduler, **components})


def _flux() -> Any:
    return _absent(
        diffusers.FluxPipeline,
        transformer=diffusers.FluxTransformer2DModel(guidance_embeds=True),
        text_encoder=_clip(768, 12, False),
        text_encoder_2=_t5("T5", 32128),
        vae=diffusers.AutoencoderKL(**_IMAGE_VAE),
    )


def _sd3() -> Any:
    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=128, num_layers=38, attention_head_dim=64, num_attention_heads=38, joint_attention_dim=4096,
        caption_projection_dim=2432, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192,
        qk_norm="rms_norm",
    )  # fmt: skip
    return _absent(
        diffusers.StableDiffusion3Pipeline,
        transformer=denoiser,
        text_encoder=_clip(768, 12, True),
        text_encoder_2=_clip(1280, 32, True),
        text_encoder_3=_t5("T5", 32128),
        vae=diffusers.AutoencoderKL(**_IMAGE_VAE),
    )


def _qwen() -> Any:
    return _absent(
        diffusers.QwenImagePipeline,
        transformer=diffusers.QwenImageTransformer2DModel(num_layers=60, in_channels=64, out_channels=16),
        text_encoder=_qwen_vl(),
        vae=diffusers.AutoencoderKLQwenImage(),
    )


def _wan(experts: int) -> Any:
    denoisers = [
        diffusers.WanTransformer3DModel(num_attention_heads=40, ffn_dim=13824, num_layers=40) for _ in range(experts)
    ]
    return _absent(
        diffusers.WanPipeline,
        transformer=denoisers[0],
        text_encoder=_t5("UMT5", 256384),
        vae=diffusers.AutoencoderKLWan(),
        **({"transformer_2": denoisers[1], "boundary_ratio": 0.875} if experts == 2 else {}),
    )


def _flux2() -> Any:
    return _absent(
        diffusers.Flux2Pipeline,
        transformer=diffusers.Flux2Transformer2DModel(),
        text_encoder=_mistral(),
        vae=diffusers.AutoencoderKLFlux2(),
    )


def _ltx2() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    return _absent(
        diffusers.LTX2Pipeline,
        transformer=diffusers.LTX2VideoTransformer3DModel(num_layers=48, rope_type="split"),
        text_encoder=_gemma(),
        connectors=LTX2TextConnectors(),
        vae=diffusers.AutoencoderKLLTX2Video(),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(),
        vocoder=LTX2Vocoder(),
    )


def _picture(size: str) -> dict[str, Any]:
    return {**_SECTIONS, "warmup": {"resolutions": (size,)}}


def _video(size: str, frames: int) -> dict[str, Any]:
    # A call takes seconds, of which graphs save none, and their memory holds a few blocks.
    return {**_SECTIONS, "cuda_graph": None, "warmup": {"resolutions": (size,), "num_frames": (frames,)}}


# Model and largest request -> its pipeline, and the sections beside `linear` and `offload`.
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "FLUX.1-dev, 1024x1024": (_flux, _picture("1024x1024")),
    "SD3.5 Large, 1024x1024": (_sd3, _picture("1024x1024")),
    "Qwen-Image, 1328x1328": (_qwen, _picture("1328x1328")),
    "FLUX.2-dev, 1024x1024": (_flux2, _picture("1024x1024")),
    "Wan2.1 14B, 480x832, 81 frames": (lambda: _wan(1), _video("480x832", 81)),
    "Wan2.2 A14B, 480x832, 81 frames": (lambda: _wan(2), _video("480x832", 81)),
    "LTX-2 19B, 512x768, 121 frames": (_ltx2, _video("512x768", 121)),
}


def built(make: Callable[[], Any]) -> Any:
    """A stock pipeline on the meta device, in bf16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return make()
    finally:
        torch.set_default_dtype(before)


def planned(pipe: Any, sections: dict[str, Any]) -> list[Any]:
    """The plan of a pipeline for each budget."""
    from diffusers_accel import AccelConfig
    from diffusers_accel.core.memory_plan import plan_memory
    from diffusers_accel.core.platform import Device
    from diffusers_accel.features import linear
    from diffusers_accel.features.context import Denoiser, PipelineContext
    from diffusers_accel.features.offload.estimates import block_seconds, largest_request, latent_shape, work
    from diffusers_accel.features.offload.models import Changes, models_of
    from diffusers_accel.features.offload.vae import estimate
    from diffusers_accel.models import adapter_for

    config = AccelConfig.from_dict({**sections, "offload": 3})
    denoisers = tuple(
        Denoiser(name, getattr(pipe, name), adapter_for(getattr(pipe, name)), Device(*GPU))
        for name in ("transformer", "transformer_2")
        if getattr(pipe, name, None) is not None
    )
    clock: Any = None
    context = PipelineContext(weakref.ref(pipe), denoisers, lambda name: 0, clock, config)
    with mock.patch("diffusers_accel.features.context.rank_device", return_value=torch.device("cuda", 0)):
        formats = linear.check(context, config.linear).formats if config.linear is not None else {}
    changes = Changes(formats)
    models = [
        model.sizes(
            changes,
            ()
            if model.denoiser is None
            else block_seconds(context, model.denoiser, [block.module for block in model.blocks]),
        )
        for model in models_of(context, changes, mapped=True)
    ]
    latents = latent_shape(context, largest_request(context))
    activations = replace(work(context), vae=estimate(pipe, latents, torch.device("cuda")))
    return [plan_memory(models, activations, LINK, budget=budget * 2**30) for budget in BUDGETS]


def cell(plan: Any, budget: int) -> str:
    """A cell of the table.

    Args:
        plan: The plan of a pipeline.
        budget: In GiB.
    """
    if plan.peak > budget * 2**30:
        return f"from {plan.peak / 2**30:.1f} GiB on"
    if plan.level < 3:
        return f"level {plan.level}"
    streamed = [model for model in plan.models if model.sizes.role == "denoiser"]
    kept = sum(sum(model.resident) for model in streamed) / sum(len(model.resident) for model in streamed)
    steps = [plan.step(model.sizes.name) for model in streamed]
    return f"{kept:.0%}, {sum(step.seconds for step in steps) / sum(step.compute for step in steps):.2f}{TIMES}"


def table() -> str:
    """The table in Markdown."""
    lines = [["model", "weights", *(f"{budget} GiB" for budget in BUDGETS)], ["---"] * (2 + len(BUDGETS))]
    for name, (make, sections) in MODELS.items():
        pipe = built(make)
        for form, more in FORMATS.items():
            plans = planned(pipe, {**sections, **more})
            lines.append([name, form, *map(cell, plans, BUDGETS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between(text: str) -> tuple[str, str, str]:
    """The page before, between and after the marks."""
    head, _, rest = text.partition(BEGIN)
    body, _, tail = rest.partition(END)
    return head, body.strip(), tail


def main() -> None:
    """Writes the table into the page."""
    found = table()
    head, _, tail = between(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(f"{head}{BEGIN}\n\n{found}\n\n{END}{tail}", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
