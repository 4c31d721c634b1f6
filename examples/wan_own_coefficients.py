"""Wan2.2's two experts with TeaCache: nobody has published coefficients for them, so they are given by hand.

The identity polynomial compares the time embedding's change itself with the threshold; `stats` shows how many steps it
skips in each expert, and the threshold is yours to choose.

    python examples/wan_own_coefficients.py
"""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

from diffusers_accel import AccelConfig, TeaCacheConfig, VAEConfig, accelerate, stats

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", dtype=torch.bfloat16).to("cuda")
config = AccelConfig(
    attention="auto",
    compile=True,
    cache=TeaCacheConfig(threshold=0.1, coefficients=(1.0, 0.0)),
    vae=VAEConfig(tiling=True),
)
accelerate(pipe, config)
video = pipe("a red fox running through the snow", num_frames=81, guidance_scale=4.0).frames[0]
export_to_video(video, "fox.mp4", fps=16)
print(stats(pipe))
