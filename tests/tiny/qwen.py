"""Qwen-Image pipelines: text to image with a tiny Qwen2.5-VL, and edit."""

from __future__ import annotations

import functools
import sys

from .components import (
    NEGATIVE,
    PROMPT,
    TinyPipeline,
    energise,
    generator,
    images,
    pil_picture,
    qwen_tokenizer,
    tensor,
    wake,
)

SIZE = 64
# the edit classes resize their image to 1024 x 1024 whatever they get, which a VAE takes seconds to encode: here, to
# 128 x 128
SHRUNK = 8


def _shrunk(stock, area, ratio):
    return stock(area / SHRUNK**2, ratio)


def transformer(**options):
    from diffusers import QwenImageTransformer2DModel

    return energise(
        QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            **options,
        )
    )


def vae(levels: int = 3, base_dim: int = 4):
    """AutoencoderKLQwenImage with spatial factor 2 ** levels."""
    from diffusers import AutoencoderKLQwenImage

    return energise(
        AutoencoderKLQwenImage(
            base_dim=base_dim,
            z_dim=4,
            dim_mult=[1] * (levels + 1),
            num_res_blocks=1,
            temperal_downsample=[False] * (levels - 2) + [True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    )


def scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")


def text_encoder(tokenizer, hidden: int = 32):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [2, 3, 3],
                "type": "mrope",
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return wake(Qwen2_5_VLForConditionalGeneration(config))


def _text_to_image():
    from diffusers import QwenImagePipeline

    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer(),
    )


def _edit(cls: str, **options):
    def make():
        import diffusers

        module = sys.modules[getattr(diffusers, cls).__module__]
        if module.calculate_dimensions.__module__ == module.__name__:
            module.calculate_dimensions = functools.partial(_shrunk, module.calculate_dimensions)
        return getattr(diffusers, cls)(
            scheduler=scheduler(),
            vae=vae(3, base_dim=2),
            text_encoder=None,
            tokenizer=None,
            processor=None,
            transformer=transformer(**options),
        )

    return make


def _base(steps: int) -> dict:
    return {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": steps,
        "true_cfg_scale": 3.0,
        "generator": generator(),
        "output_type": "pt",
    }


def _call(steps: int) -> dict:
    return {**_base(steps), "prompt": PROMPT, "negative_prompt": NEGATIVE, "max_sequence_length": 128}


def _call_edit(steps: int) -> dict:
    """Prompt embeddings instead of a Qwen2VLProcessor."""
    import torch

    return {
        **_base(steps),
        "image": pil_picture(64, 64),
        "prompt_embeds": tensor(1, 16, 32, seed=6),
        "prompt_embeds_mask": torch.ones(1, 16, dtype=torch.long),
        "negative_prompt_embeds": tensor(1, 12, 32, seed=7),
        "negative_prompt_embeds_mask": torch.ones(1, 12, dtype=torch.long),
        "output_type": "latent",
    }


ENTRIES = [
    TinyPipeline("qwen", "qwen", _text_to_image, _call, images),
    TinyPipeline("qwen-edit", "qwen", _edit("QwenImageEditPipeline"), _call_edit, images),
    TinyPipeline("qwen-edit-plus", "qwen", _edit("QwenImageEditPlusPipeline", zero_cond_t=True), _call_edit, images),
]
