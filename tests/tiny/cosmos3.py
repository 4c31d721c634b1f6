"""Cosmos 3: Cosmos3OmniPipeline, text to video and image to video. The transformer reads the tokens itself."""

from __future__ import annotations

import torch

from .components import NEGATIVE, PROMPT, TinyPipeline, energise, generator, pil_picture, qwen_tokenizer, unipc, wan_vae

HEIGHT, WIDTH, FRAMES = 32, 48, 9


def transformer(vocab_size: int, **options):
    from diffusers import Cosmos3OmniTransformer

    return energise(
        Cosmos3OmniTransformer(
            head_dim=16,
            hidden_size=32,
            intermediate_size=48,
            latent_channel=16,
            latent_patch_size=2,
            patch_latent_dim=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=3,
            rope_axes_dim=(4, 2, 2),
            vocab_size=vocab_size,
            **options,
        )
    )


def _make():
    from diffusers import Cosmos3OmniPipeline

    tokenizer = qwen_tokenizer()
    return Cosmos3OmniPipeline(
        transformer=transformer(len(tokenizer)),
        text_tokenizer=tokenizer,
        vae=wan_vae(),
        scheduler=unipc(),
        enable_safety_checker=False,
    )


def _call(steps: int) -> dict:
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "use_system_prompt": False,
        "generator": generator(),
        "output_type": "pt",
    }


def _call_image(steps: int) -> dict:
    return {**_call(steps), "image": pil_picture(HEIGHT, WIDTH)}


def video(result):
    return torch.as_tensor(result.video)


ENTRIES = [
    TinyPipeline("cosmos3", "cosmos3", _make, _call, video),
    TinyPipeline("cosmos3-i2v", "cosmos3", _make, _call_image, video),
]
