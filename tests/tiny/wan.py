"""Wan 2.1 and 2.2 pipelines: text to video, image to video, video to video, VACE."""

from __future__ import annotations

from .components import (
    NEGATIVE,
    PROMPT,
    TinyPipeline,
    clip_vision,
    energise,
    frames,
    generator,
    partial,
    pil_picture,
    t5_text,
    t5_tokenizer,
    unipc,
    wan22_vae,
    wan_vae,
)

HEIGHT, WIDTH, FRAMES = 48, 64, 9


def _dimensions(in_channels: int = 16, out_channels: int = 16, layers: int = 3, **extra) -> dict:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
        **extra,
    }


def transformer(**options):
    from diffusers import WanTransformer3DModel

    return energise(WanTransformer3DModel(**_dimensions(**options)))


def vace_transformer():
    from diffusers import WanVACETransformer3DModel

    return energise(WanVACETransformer3DModel(**_dimensions(layers=4, vace_layers=[0, 2], vace_in_channels=96)))


def components(vae=None) -> dict:
    t5 = t5_tokenizer()
    return {
        "tokenizer": t5,
        "text_encoder": t5_text(t5, umt5=True),
        "vae": (vae or wan_vae)(),
        "scheduler": unipc(),
    }


def _call(**extra):
    def kwargs(steps: int) -> dict:
        out = {
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "height": HEIGHT,
            "width": WIDTH,
            "num_frames": FRAMES,
            "num_inference_steps": steps,
            "guidance_scale": 5.0,
            "max_sequence_length": 16,
            "generator": generator(),
            "output_type": "pt",
        }
        out.update({key: value() if callable(value) else value for key, value in extra.items()})
        if out.pop("partial", False):
            out.update(partial(steps, rounds_down=True))
        return {key: value for key, value in out.items() if value is not None}

    return kwargs


def _text(high=True, low=False, vae=None, options=None, **config):
    def make():
        from diffusers import WanPipeline

        return WanPipeline(
            **components(vae),
            transformer=transformer(**(options or {})) if high else None,
            transformer_2=transformer(**(options or {})) if low else None,
            **config,
        )

    return make


def _image(encoder=False, high=True, low=False, vae=None, options=None, **config):
    def make():
        from diffusers import WanImageToVideoPipeline
        from transformers import CLIPImageProcessor

        return WanImageToVideoPipeline(
            **components(vae),
            transformer=transformer(**(options or {})) if high else None,
            transformer_2=transformer(**(options or {})) if low else None,
            image_encoder=clip_vision(32, 16, 8) if encoder else None,
            image_processor=CLIPImageProcessor(size=16, crop_size=16) if encoder else None,
            **config,
        )

    return make


def _vace():
    from diffusers import WanVACEPipeline

    return WanVACEPipeline(**components(), transformer=vace_transformer())


def _video_to_video():
    from diffusers import WanVideoToVideoPipeline

    return WanVideoToVideoPipeline(**components(), transformer=transformer())


def _picture():
    return pil_picture(HEIGHT, WIDTH)


def _video():
    return [pil_picture(HEIGHT, WIDTH, seed=10 + i) for i in range(FRAMES)]


def _masks():
    from PIL import Image

    return [Image.new("L", (WIDTH, HEIGHT), 0 if i == 0 else 255) for i in range(FRAMES)]


def _entry(name, make, call, denoisers=("transformer",)):
    return TinyPipeline(name, "wan", make, call, frames, denoisers)


BOTH = ("transformer", "transformer_2")
TI2V = {"in_channels": 48, "out_channels": 48}
WITH_IMAGE = {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 32}

ENTRIES = [
    _entry("wan", _text(), _call()),
    # four steps at flow shift 3 have sigma 1.0, 0.9, 0.75, 0.5: two steps for each expert
    _entry("wan22", _text(low=True, boundary_ratio=0.8), _call(guidance_scale=4.0, guidance_scale_2=3.0), BOTH),
    # boundary 0: every timestep is at or above it; boundary 1: UniPC's first timestep is 999, below it
    _entry("wan22-high-only", _text(boundary_ratio=0.0), _call()),
    _entry("wan22-low-only", _text(high=False, low=True, boundary_ratio=1.0), _call(), ("transformer_2",)),
    _entry(
        "wan-ti2v",
        _text(vae=wan22_vae, options=TI2V, expand_timesteps=True),
        _call(height=64, width=64),
    ),
    _entry("wan-i2v", _image(encoder=True, options=WITH_IMAGE), _call(image=_picture)),
    _entry(
        "wan22-i2v",
        _image(low=True, options={"in_channels": 36}, boundary_ratio=0.8),
        _call(image=_picture, guidance_scale=3.5),
        BOTH,
    ),
    _entry(
        "wan-ti2v-i2v",
        _image(vae=wan22_vae, options=TI2V, expand_timesteps=True),
        _call(image=lambda: pil_picture(64, 64), height=64, width=64),
    ),
    _entry("wan-vace", _vace, _call(video=_video, mask=_masks, conditioning_scale=0.8)),
    _entry("wan-v2v", _video_to_video, _call(video=_video, partial=True, num_frames=None)),
]
