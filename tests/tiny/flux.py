"""FLUX.1 pipelines: text to image, image to image, inpaint, fill, kontext, control, controlnet."""

from __future__ import annotations

import torch

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
    mask,
    partial,
    picture,
    t5_text,
    t5_tokenizer,
)

SIZE = 32
AXES = (4, 4, 8)


def transformer(guidance: bool = True, in_channels: int = 16, out_channels: int | None = 16, layers=(3, 3)):
    from diffusers import FluxTransformer2DModel

    return energise(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=layers[0],
            num_single_layers=layers[1],
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
            axes_dims_rope=AXES,
        )
    )


def controlnet():
    from diffusers import FluxControlNetModel

    return energise(
        FluxControlNetModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=AXES,
        ),
        gain=0.7,
    )


def components(**transformer_options) -> dict:
    from diffusers import FlowMatchEulerDiscreteScheduler

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": image_vae(),
        "text_encoder": clip_text(clip),
        "tokenizer": clip,
        "text_encoder_2": t5_text(t5),
        "tokenizer_2": t5,
        "transformer": transformer(**transformer_options),
    }


def _call(**extra):
    def kwargs(steps: int) -> dict:
        out = {
            "prompt": PROMPT,
            "height": SIZE,
            "width": SIZE,
            "num_inference_steps": steps,
            "guidance_scale": 3.5,
            "max_sequence_length": 16,
            "generator": generator(),
            "output_type": "pt",
        }
        out.update({key: value() if callable(value) else value for key, value in extra.items()})
        if out.pop("partial", False):
            out.update(partial(steps))
        return out

    return kwargs


def _pipe(cls: str, **options):
    def make():
        import diffusers

        parts = components(**options)
        if cls == "FluxControlNetPipeline":
            parts["controlnet"] = controlnet()
        return getattr(diffusers, cls)(**parts)

    return make


def _entry(name, cls, call, **options):
    return TinyPipeline(name, "flux", _pipe(cls, **options), call, images)


def _image():
    return picture(SIZE, SIZE)


def _mask():
    return mask(SIZE, SIZE)


ENTRIES = [
    _entry("flux", "FluxPipeline", _call()),
    _entry("flux-schnell", "FluxPipeline", _call(guidance_scale=0.0), guidance=False),
    _entry("flux-true-cfg", "FluxPipeline", _call(negative_prompt=NEGATIVE, true_cfg_scale=3.0)),
    _entry("flux-img2img", "FluxImg2ImgPipeline", _call(image=_image, partial=True)),
    _entry("flux-inpaint", "FluxInpaintPipeline", _call(image=_image, mask_image=_mask, partial=True)),
    _entry("flux-fill", "FluxFillPipeline", _call(image=_image, mask_image=_mask), in_channels=48),
    _entry(
        "flux-kontext",
        "FluxKontextPipeline",
        _call(image=_image, max_area=SIZE * SIZE, _auto_resize=False),
    ),
    _entry("flux-control", "FluxControlPipeline", _call(control_image=_image), in_channels=32),
    _entry("flux-controlnet", "FluxControlNetPipeline", _call(control_image=_image, controlnet_conditioning_scale=0.6)),
]


def load_ip_adapter(pipe) -> None:
    """Gives the tiny FLUX an IP-Adapter with random weights, for image embeddings of 24 channels."""
    width, text = 32, 32
    projection = {
        "proj.weight": torch.randn(4 * text, 24) / 5,
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    layers = {
        f"{index}.to_{name}_ip.{kind}": torch.randn(width, text) / 3 if kind == "weight" else torch.zeros(width)
        for index in range(3)
        for name in "kv"
        for kind in ("weight", "bias")
    }
    pipe.transformer._load_ip_adapter_weights({"image_proj": projection, "ip_adapter": layers})
