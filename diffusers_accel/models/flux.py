"""FLUX.1: text to image, image to image, inpaint, Fill, Kontext, Control and ControlNet share one denoiser class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Checkpoint, Stack, TeaCacheRow

_TEACACHE = "https://github.com/ali-vilab/TeaCache"


def _signal(block: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


def _row(checkpoint: Checkpoint) -> str | None:
    if not checkpoint.has(num_layers=19, num_single_layers=38, num_attention_heads=24):
        return None
    if "Kontext" in checkpoint.pipeline:
        return "flux.1-kontext"
    return "flux.1-dev" if checkpoint.config.get("guidance_embeds") else "flux.1-schnell"


FLUX = Adapter(
    classes=("FluxTransformer2DModel",),
    smallest_linear=0,
    folding=("FluxAttnProcessor",),
    projections=(("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),),
    stacks=(
        Stack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),
        Stack("single_transformer_blocks", ("encoder_hidden_states", "hidden_states")),
    ),
    guidance="embedded",
    block_signal=_signal,
    rows={
        "flux.1-dev": TeaCacheRow(
            (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861), 0.25, _TEACACHE, 0.6
        ),
        "flux.1-schnell": TeaCacheRow((1.0, 0.0), 0.25, "TensorRT-LLM VisualGen"),
        "flux.1-kontext": TeaCacheRow(
            (-1046.55119, 312.563399, -16.9500694, 0.410995971, 0.0374537863), 0.25, "a ComfyUI port of TeaCache"
        ),
    },
    row=_row,
)
