"""LTX-2: video and audio streams in every block; guidance batched in one call, with extra calls for perturbed branches.

No TeaCache constants were ever published for it: give `coefficients`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Stack


def _signal(block: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    hidden_states = arguments["hidden_states"]
    modulation = block.get_mod_params(block.scale_shift_table, arguments["temb"], hidden_states.shape[0])
    shift, scale = modulation[:2]
    return block.norm1(hidden_states) * (1 + scale) + shift


def _grid(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    return arguments["num_frames"], arguments["height"], arguments["width"]


def _latents(denoiser: Any, arguments: Mapping[str, Any], grid: Any) -> list[torch.Tensor]:
    video = arguments["hidden_states"].unflatten(1, grid)
    return [video.movedim(-1, 1)]


LTX2 = Adapter(
    classes=("LTX2VideoTransformer3DModel",),
    smallest_linear=0,
    wide_ends=(3, 3),
    values_alone=("LTX2PerturbedAttnProcessor",),
    folding=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    cross_attention=("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    stacks=(Stack("transformer_blocks", ("hidden_states", "audio_hidden_states")),),
    guidance="batched",
    branches=("cond_uncond", "uncond_stg", "uncond_modality"),
    block_signal=_signal,
    denoised=("hidden_states", "audio_hidden_states"),
    grid=_grid,
    latents=_latents,
    static_arguments=("all_perturbed",),
)
