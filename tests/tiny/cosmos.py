"""Cosmos 1.0, Predict2 and Predict2.5 pipelines, with a stand-in for the safety checker."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.utils import is_torchvision_available
from diffusers.video_processor import VideoProcessor

from .components import (
    NEGATIVE,
    PROMPT,
    TinyPipeline,
    energise,
    frames,
    generator,
    images,
    pil_picture,
    t5_text,
    t5_tokenizer,
    tensor,
    unipc,
    wan_vae,
)

HEIGHT, WIDTH, FRAMES = 32, 48, 9


class Unrounded(VideoProcessor):
    """Keeps the frames that it has made last."""

    def postprocess_video(self, video, output_type="np", **options):
        made = super().postprocess_video(video, output_type, **options)
        if output_type == "np":
            self.frames = made
        return made


class SafetyChecker(torch.nn.Module):
    """Lets everything pass. The stock one needs the package cosmos_guardrail and its weights.

    Stock pipelines round what it is shown to 8 bits, by cutting off, so that a difference of 1e-8 can move a value by
    1/255. Where the pipeline's processor is `Unrounded`, what comes back is the frames before that.
    """

    def __init__(self):
        super().__init__()
        self._dtype = torch.float32
        self.processor = None

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video):
        if self.processor is None:
            return video
        (whole,) = (
            255 * item for item in self.processor.frames if np.array_equal((item * 255).astype(np.uint8), video)
        )
        return whole

    @property
    def device(self):
        return torch.device("cpu")

    @property
    def dtype(self):
        return self._dtype


def transformer(in_channels: int = 16, **options):
    from diffusers import CosmosTransformer3DModel

    settings = {
        "in_channels": in_channels,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "mlp_ratio": 2.0,
        "text_embed_dim": 32,
        "adaln_lora_dim": 8,
        "max_size": (4, 16, 16),
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        # the resize of the padding mask needs torchvision
        "concat_padding_mask": is_torchvision_available(),
        "extra_pos_embed_type": None,
    }
    return energise(CosmosTransformer3DModel(**{**settings, **options}))


def cosmos_vae():
    from diffusers import AutoencoderKLCosmos

    return energise(
        AutoencoderKLCosmos(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            patch_size=4,
            patch_type="haar",
            scaling_factor=1.0,
            spatial_compression_ratio=8,
            temporal_compression_ratio=8,
        ),
        gain=0.6,
    )


def _text_parts() -> dict:
    t5 = t5_tokenizer()
    return {"tokenizer": t5, "text_encoder": t5_text(t5)}


def _text2world():
    from diffusers import CosmosTextToWorldPipeline, EDMEulerScheduler

    return CosmosTextToWorldPipeline(
        **_text_parts(),
        transformer=transformer(extra_pos_embed_type="learnable"),
        vae=cosmos_vae(),
        scheduler=EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=80,
            sigma_data=0.5,
            sigma_schedule="karras",
            num_train_timesteps=1000,
            prediction_type="epsilon",
            rho=7.0,
            final_sigmas_type="sigma_min",
        ),
        safety_checker=SafetyChecker(),
    )


def _predict2(cls: str, in_channels: int):
    def make():
        import diffusers

        return getattr(diffusers, cls)(
            **_text_parts(),
            transformer=transformer(in_channels=in_channels),
            vae=wan_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
            safety_checker=SafetyChecker(),
        )

    return make


def _predict25():
    from diffusers import Cosmos2_5_PredictBasePipeline

    return Cosmos2_5_PredictBasePipeline(
        text_encoder=None,
        tokenizer=None,
        # 17 channels: latents and condition mask
        transformer=transformer(
            in_channels=17,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=48,
            encoder_hidden_states_channels=32,
        ),
        vae=wan_vae(),
        scheduler=unipc(),
        safety_checker=SafetyChecker(),
    )


def _base(steps: int) -> dict:
    return {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "generator": generator(),
        "output_type": "pt",
    }


def _prompts() -> dict:
    return {"prompt": PROMPT, "negative_prompt": NEGATIVE, "max_sequence_length": 16}


def _call_text2world(steps: int) -> dict:
    return {**_base(steps), **_prompts(), "num_frames": FRAMES, "fps": 30}


def _call_text2image(steps: int) -> dict:
    return {**_base(steps), **_prompts()}


def _call_video2world(steps: int) -> dict:
    return {**_base(steps), **_prompts(), "num_frames": FRAMES, "image": pil_picture(HEIGHT, WIDTH)}


def _call_predict25(steps: int) -> dict:
    return {
        **_base(steps),
        "num_frames": FRAMES,
        "prompt_embeds": tensor(1, 12, 48, seed=6),
        "negative_prompt_embeds": tensor(1, 12, 48, seed=7),
    }


def _video():
    return [pil_picture(HEIGHT, WIDTH, seed=10 + i) for i in range(FRAMES)]


def _call_predict25_video(steps: int) -> dict:
    return {**_call_predict25(steps), "video": _video(), "num_latent_conditional_frames": 1}


def _unrounded(pipe):
    pipe.video_processor = pipe.safety_checker.processor = Unrounded(vae_scale_factor=pipe.vae_scale_factor_spatial)
    return pipe


def _entry(name, make, call, output=frames):
    return TinyPipeline(name, "cosmos", lambda: _unrounded(make()), call, output)


ENTRIES = [
    _entry("cosmos", _text2world, _call_text2world),
    _entry("cosmos-predict2", _predict2("Cosmos2TextToImagePipeline", 16), _call_text2image, images),
    _entry("cosmos-predict2-v2w", _predict2("Cosmos2VideoToWorldPipeline", 17), _call_video2world),
    _entry("cosmos-predict25", _predict25, _call_predict25),
    _entry("cosmos-predict25-v2w", _predict25, _call_predict25_video),
]
