"""Stable Diffusion 1.5 and XL: UNets, called with the timestep by place, under schedulers that keep no index."""

from __future__ import annotations

from .components import (
    NEGATIVE,
    PROMPT,
    TinyPipeline,
    clip_text,
    clip_tokenizer,
    energise,
    generator,
    image_vae,
    images,
)


def _unet(cross_attention_dim: int, **more):
    from diffusers import UNet2DConditionModel

    return energise(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=cross_attention_dim,
            **more,
        )
    )


def _sd15():
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=clip_text(tokenizer),
        unet=_unet(32),
        vae=image_vae(),
        # As Stable Diffusion 1.5 has it.
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=clip_text(tokenizer),
        text_encoder_2=clip_text(tokenizer, projection=32),
        unet=_unet(
            64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            use_linear_projection=True,
        ),
        vae=image_vae(),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def _call(steps: int) -> dict:
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": 16,
        "width": 16,
        "guidance_scale": 4.0,
        "num_inference_steps": steps,
        "generator": generator(),
        "output_type": "pt",
    }


ENTRIES = [
    TinyPipeline("sd15", "others", _sd15, _call, images, denoisers=("unet",)),
    TinyPipeline("sdxl", "others", _sdxl, _call, images, denoisers=("unet",)),
]
