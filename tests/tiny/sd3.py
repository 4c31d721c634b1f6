"""Stable Diffusion 3 and 3.5 pipelines."""

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
    partial,
    picture,
    t5_text,
    t5_tokenizer,
)

SIZE = 32


def transformer(layers: int = 3, **options):
    from diffusers import SD3Transformer2DModel

    return energise(
        SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            **options,
        ),
        skip=("pos_embed.pos_embed",),
    )


def _pipe(cls: str = "StableDiffusion3Pipeline", **options):
    def make():
        import diffusers

        clip, t5 = clip_tokenizer(), t5_tokenizer()
        return getattr(diffusers, cls)(
            transformer=transformer(**options),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=image_vae(),
            text_encoder=clip_text(clip, 16, projection=16),
            tokenizer=clip,
            text_encoder_2=clip_text(clip, 16, projection=16),
            tokenizer_2=clip,
            text_encoder_3=t5_text(t5, 32),
            tokenizer_3=t5,
        )

    return make


def _call(**extra):
    def kwargs(steps: int) -> dict:
        out = {
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "height": SIZE,
            "width": SIZE,
            "num_inference_steps": steps,
            "guidance_scale": 5.0,
            "max_sequence_length": 16,
            "generator": generator(),
            "output_type": "pt",
        }
        out.update({key: value() if callable(value) else value for key, value in extra.items()})
        if out.pop("partial", False):
            out.update(partial(steps))
        return out

    return kwargs


ENTRIES = [
    TinyPipeline("sd3", "sd3", _pipe(), _call(), images),
    # skip-layer guidance acts strictly after step 0.01 n and before step 0.7 n: steps 1 and 2 of 4
    TinyPipeline(
        "sd3-slg",
        "sd3",
        _pipe(layers=4),
        _call(skip_guidance_layers=[1, 2], skip_layer_guidance_stop=0.7),
        images,
    ),
    TinyPipeline("sd35", "sd3", _pipe(qk_norm="rms_norm", dual_attention_layers=(0, 1)), _call(), images),
    TinyPipeline(
        "sd3-img2img",
        "sd3",
        _pipe("StableDiffusion3Img2ImgPipeline"),
        _call(image=lambda: picture(SIZE, SIZE), partial=True),
        images,
    ),
]
