"""Cosmos3: understanding and generation streams in every layer, grouped heads, separate guidance calls.

It has no adaLN; the timestep enters with the tokens, so the normalized input of the first layer is its cache signal. No
TeaCache constants were ever published for it: give `coefficients`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Stack


def _signal(block: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    return block.input_layernorm_moe_gen(arguments["gen_seq"])


def _latents(denoiser: Any, arguments: Mapping[str, Any], grid: Any) -> list[torch.Tensor]:
    # A picture without noisy frames is a condition, not what is made.
    pairs = zip(arguments["vision_tokens"], arguments["vision_noisy_frame_indexes"], strict=True)
    made = [latents for latents, noisy in pairs if noisy.numel()]
    return [item if item.ndim == 5 else item.unsqueeze(0) for item in made]


COSMOS3 = Adapter(
    classes=("Cosmos3OmniTransformer",),
    stacks=(Stack("layers", ("und_seq", "gen_seq")),),
    block_signal=_signal,
    denoised=("vision_tokens", "sound_tokens", "action_tokens"),
    latents=_latents,
)
