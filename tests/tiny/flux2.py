"""FLUX.2 pipelines. Flux2Pipeline takes prompt embeddings here; Flux2KleinPipeline encodes a prompt."""

from __future__ import annotations

from .components import PROMPT, TinyPipeline, energise, generator, images, pil_picture, qwen_tokenizer, tensor, wake

SIZE = 32
TEXT_LAYERS = (1, 2, 3)


def transformer(guidance: bool, layers=(3, 3)):
    from diffusers import Flux2Transformer2DModel

    return energise(
        Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=layers[0],
            num_single_layers=layers[1],
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32 * len(TEXT_LAYERS),
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
        )
    )


def vae():
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return energise(vae)


def scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def qwen3(tokenizer):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    return wake(Qwen3ForCausalLM(config))


def _flux2():
    from diffusers import Flux2Pipeline

    return Flux2Pipeline(
        scheduler=scheduler(), vae=vae(), text_encoder=None, tokenizer=None, transformer=transformer(True)
    )


def _klein():
    from diffusers import Flux2KleinPipeline

    tokenizer = qwen_tokenizer(max_length=512)
    return Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer(False),
        is_distilled=False,
    )


def _base(steps: int) -> dict:
    return {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "generator": generator(),
        "output_type": "pt",
    }


def _call_flux2(steps: int) -> dict:
    return {**_base(steps), "prompt_embeds": tensor(1, 16, 32 * len(TEXT_LAYERS))}


def _call_flux2_reference(steps: int) -> dict:
    # 64 x 64: the smallest image that the class takes
    return {**_call_flux2(steps), "image": pil_picture(64, 64)}


def _call_klein(steps: int) -> dict:
    return {
        **_base(steps),
        "prompt": PROMPT,
        "max_sequence_length": 32,
        "text_encoder_out_layers": TEXT_LAYERS,
    }


ENTRIES = [
    TinyPipeline("flux2", "flux2", _flux2, _call_flux2, images),
    TinyPipeline("flux2-image", "flux2", _flux2, _call_flux2_reference, images),
    TinyPipeline("flux2-klein", "flux2", _klein, _call_klein, images),
]
