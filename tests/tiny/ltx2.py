"""LTX-2 pipelines: video with audio. `output` gives (video, audio)."""

from __future__ import annotations

import torch

from .components import NEGATIVE, PROMPT, TinyPipeline, energise, generator, pil_picture, qwen_tokenizer, wake

HEIGHT, WIDTH, FRAMES = 32, 32, 5
TEXT_HIDDEN, TEXT_LAYERS = 32, 2


def transformer(**options):
    from diffusers import LTX2VideoTransformer3DModel

    return energise(
        LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=3,
            qk_norm="rms_norm_across_heads",
            caption_channels=TEXT_HIDDEN,
            rope_double_precision=False,
            rope_type="split",
            **options,
        )
    )


def connectors(**options):
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    settings = {
        "caption_channels": TEXT_HIDDEN,
        "text_proj_in_factor": TEXT_LAYERS + 1,
        "video_connector_num_attention_heads": 4,
        "video_connector_attention_head_dim": 8,
        "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": None,
        "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 8,
        "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": None,
        "connector_rope_base_seq_len": 32,
        "rope_theta": 10000.0,
        "rope_double_precision": False,
        "causal_temporal_positioning": False,
        "rope_type": "split",
    }
    return wake(LTX2TextConnectors(**{**settings, **options}))


def video_vae():
    from diffusers import AutoencoderKLLTX2Video

    vae = AutoencoderKLLTX2Video(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = False
    vae.use_framewise_decoding = False
    return energise(vae)


def audio_vae():
    from diffusers import AutoencoderKLLTX2Audio

    return energise(
        AutoencoderKLLTX2Audio(
            base_channels=4,
            output_channels=2,
            ch_mult=(1,),
            num_res_blocks=1,
            attn_resolutions=None,
            in_channels=2,
            resolution=32,
            latent_channels=2,
            norm_type="pixel",
            causality_axis="height",
            dropout=0.0,
            mid_block_add_attention=False,
            sample_rate=16000,
            mel_hop_length=160,
            is_causal=True,
            mel_bins=8,
        )
    )


def vocoder():
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    model = energise(
        LTX2Vocoder(
            in_channels=16,
            hidden_channels=32,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            leaky_relu_negative_slope=0.1,
            output_sampling_rate=16000,
        ),
        gain=1.5,
    )
    with torch.no_grad():  # the biases would drown what comes from the latents
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


def gemma(tokenizer):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    return wake(Gemma3ForConditionalGeneration(config))


def _pipe(cls: str, connector_options: dict | None = None, **options):
    def make():
        import diffusers

        tokenizer = qwen_tokenizer(max_length=256)
        return getattr(diffusers, cls)(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=video_vae(),
            audio_vae=audio_vae(),
            text_encoder=gemma(tokenizer),
            tokenizer=tokenizer,
            connectors=connectors(**(connector_options or {})),
            transformer=transformer(**options),
            vocoder=vocoder(),
        )

    return make


# what LTX-2.3 differs in: gated and modulated cross-attention, projections of the text in the connectors
LTX23 = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
    "use_prompt_embeddings": False,
}
LTX23_CONNECTORS = {
    "per_modality_projections": True,
    "video_hidden_dim": 32,
    "audio_hidden_dim": 16,
    "video_gated_attn": True,
    "audio_gated_attn": True,
    "proj_bias": True,
    "audio_connector_attention_head_dim": 4,
}

CFG_ONLY = {
    "guidance_scale": 4.0,
    "audio_guidance_scale": 5.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
}
# the class's own defaults (cfg 3, stg 1, modality 3), with a block that a tiny model has in place of block 28
ALL_GUIDANCE = {"spatio_temporal_guidance_blocks": [1]}


def _call(guidance: dict, image: bool = False):
    def kwargs(steps: int) -> dict:
        out = {
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": FRAMES,
            "frame_rate": 25.0,
            "num_inference_steps": steps,
            "max_sequence_length": 16,
            "generator": generator(),
            "output_type": "pt",
            **guidance,
        }
        if image:
            out["image"] = pil_picture(HEIGHT, WIDTH)
            out["image_crf"] = 0  # re-compression of the image needs PyAV
        return out

    return kwargs


def video_and_audio(result):
    return torch.as_tensor(result.frames), torch.as_tensor(result.audio)


def _entry(name, cls, call, **options):
    return TinyPipeline(name, "ltx2", _pipe(cls, **options), call, video_and_audio)


ENTRIES = [
    _entry("ltx2", "LTX2Pipeline", _call(CFG_ONLY)),
    _entry("ltx2-stg", "LTX2Pipeline", _call(ALL_GUIDANCE), perturbed_attn=True),
    _entry("ltx2-no-cfg", "LTX2Pipeline", _call({**CFG_ONLY, "guidance_scale": 1.0, "audio_guidance_scale": 1.0})),
    _entry("ltx23-stg", "LTX2Pipeline", _call(ALL_GUIDANCE), connector_options=LTX23_CONNECTORS, **LTX23),
    _entry("ltx2-i2v", "LTX2ImageToVideoPipeline", _call(CFG_ONLY, image=True)),
    _entry("ltx2-i2v-stg", "LTX2ImageToVideoPipeline", _call(ALL_GUIDANCE, image=True), perturbed_attn=True),
]
