"""FLUX.1: text to image, image to image, inpaint, Fill, Kontext, Control and ControlNet share one denoiser class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Checkpoint, MagCacheRow, Modulation, Stack, TeaCacheRow, grid_of_ids, unpacked
from .sequence import AttentionStreams, SequenceShardingPlan, TokenDim, VisualTokens
from .tensor_parallel import (
    FEATURES,
    HEADS,
    TensorParallelPlan,
    attention_columns,
    attention_rows,
    feed_forward_columns,
    feed_forward_rows,
)

_TEACACHE = "https://github.com/ali-vilab/TeaCache"
_MAGCACHE = "https://github.com/Zehong-Ma/MagCache"


def _signal(block: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


def _row(checkpoint: Checkpoint) -> str | None:
    if not checkpoint.has(num_layers=19, num_single_layers=38, num_attention_heads=24):
        return None
    if "Kontext" in checkpoint.pipeline:
        return "flux.1-kontext"
    return "flux.1-dev" if checkpoint.config.get("guidance_embeds") else "flux.1-schnell"


def _latents(denoiser: Any, arguments: Mapping[str, Any], grid: Any) -> list[torch.Tensor]:
    packed = denoiser.config.out_channels or denoiser.config.in_channels
    return [unpacked(arguments["hidden_states"], grid, packed // 4)]


_MAG_ROWS = {
    "flux.1-dev": MagCacheRow(
        (
            1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047,
            1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484,
            0.95703, 0.93359, 0.89062,
        ),
        _MAGCACHE,
    ),
    "flux.1-kontext": MagCacheRow(
        (
            1.0, 1.19531, 1.07812, 1.02344, 1.03125, 1.00781, 1.02344, 1.01562, 1.01562, 1.0, 1.01562, 1.0, 1.00781,
            1.0, 1.00781, 1.0, 1.00781, 0.99609, 1.01562, 0.99219, 1.0, 0.99219, 0.98438, 0.99609, 0.96484, 0.96094,
            0.9375, 0.93359,
        ),
        _MAGCACHE,
    ),
}  # fmt: skip

_JOINT = ("encoder_hidden_states", "hidden_states")

_SEQUENCE = SequenceShardingPlan(
    streams={"encoder_hidden_states": 1, "hidden_states": 1},
    attention={"attn": AttentionStreams(_JOINT, _JOINT)},
    arguments={"image_rotary_emb": TokenDim(0, _JOINT)},
    inputs={
        "controlnet_block_samples": TokenDim(1, ("hidden_states",)),
        "controlnet_single_block_samples": TokenDim(1, ("hidden_states",)),
    },
    gathered_before="norm_out",
)

# The last layer of a single-stream block reads attention and feed-forward concatenated.
_TENSOR = TensorParallelPlan(
    columns={**attention_columns("attn"), **feed_forward_columns("ff", "ff_context"), "proj_mlp": (FEATURES,)},
    rows={**attention_rows("attn"), **feed_forward_rows("ff", "ff_context"), "proj_out": (HEADS, FEATURES)},
)

FLUX = Adapter(
    classes=("FluxTransformer2DModel",),
    max_unquantized_features=0,
    fusable_processors=("FluxAttnProcessor",),
    projections=(("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),),
    activated=("proj_mlp",),
    modulation=Modulation(
        "time_text_embed",
        ("norm1.linear", "norm1_context.linear", "norm.linear"),
        lambda timestep, dtype: timestep.to(dtype) / 1000 * 1000,
    ),
    stacks=(
        Stack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),
        Stack("single_transformer_blocks", ("encoder_hidden_states", "hidden_states")),
    ),
    guidance="embedded",
    sequence=_SEQUENCE,
    visual=VisualTokens(("attn",), lambda denoiser, arguments: (1, *grid_of_ids(arguments["img_ids"]))),
    tensor=_TENSOR,
    block_signal=_signal,
    teacache_rows={
        "flux.1-dev": TeaCacheRow((498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861), 0.25, _TEACACHE),
        "flux.1-schnell": TeaCacheRow((1.0, 0.0), 0.25, "TensorRT-LLM VisualGen"),
        "flux.1-kontext": TeaCacheRow(
            (-1046.55119, 312.563399, -16.9500694, 0.410995971, 0.0374537863), 0.25, "a ComfyUI port of TeaCache"
        ),
    },
    magcache_rows=_MAG_ROWS,
    published_row=_row,
    grid=lambda arguments: grid_of_ids(arguments["img_ids"]),
    latents=_latents,
)
