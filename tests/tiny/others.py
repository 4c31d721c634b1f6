"""Pipelines of families that no adapter is written for.

LTXPipeline and ZImagePipeline use diffusers' attention dispatcher (dispatch_attention_fn);
PixArtAlphaPipeline, AuraFlowPipeline and CogVideoXPipeline do not.
"""

from __future__ import annotations

from .components import (
    NEGATIVE,
    PROMPT,
    TinyPipeline,
    energise,
    frames,
    generator,
    image_vae,
    images,
    qwen_tokenizer,
    t5_text,
    t5_tokenizer,
)
from .flux2 import qwen3

SIZE = 32


def _text(umt5: bool = False) -> dict:
    t5 = t5_tokenizer()
    return {"tokenizer": t5, "text_encoder": t5_text(t5, umt5=umt5)}


def _pixart():
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        **_text(),
        vae=image_vae(),
        transformer=energise(transformer, skip=("pos_embed.pos_embed",)),
        scheduler=DPMSolverMultistepScheduler(),
    )


def _auraflow():
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        **_text(umt5=True),
        vae=image_vae(),
        transformer=energise(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def _cogvideox():
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXPipeline(
        **_text(),
        vae=energise(vae),
        transformer=energise(transformer, skip=("pos_embedding",)),
        scheduler=CogVideoXDDIMScheduler(),
    )


def _ltx():
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = False
    vae.use_framewise_decoding = False
    return LTXPipeline(
        **_text(),
        vae=energise(vae),
        transformer=energise(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _z_image():
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    tokenizer = qwen_tokenizer(max_length=512)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=energise(transformer),
    )


def _call(**extra):
    def kwargs(steps: int) -> dict:
        return {
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "height": SIZE,
            "width": SIZE,
            "num_inference_steps": steps,
            "guidance_scale": 4.0,
            "max_sequence_length": 16,
            "generator": generator(),
            "output_type": "pt",
            **extra,
        }

    return kwargs


ENTRIES = [
    TinyPipeline("pixart", "others", _pixart, _call(use_resolution_binning=False, clean_caption=False), images),
    TinyPipeline("auraflow", "others", _auraflow, _call(), images),
    TinyPipeline("cogvideox", "others", _cogvideox, _call(num_frames=9), frames),
    TinyPipeline("ltx", "others", _ltx, _call(num_frames=9), frames),
    TinyPipeline("z-image", "others", _z_image, _call(max_sequence_length=64), images),
]
