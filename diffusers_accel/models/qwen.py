"""Qwen-Image, its Edit pipelines among them: joint blocks, separate guidance calls, text padded under a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..compat.diffusers_private import modulate_qwen
from .adapter import Adapter, Checkpoint, MagCacheRow, Modulation, Stack, TeaCacheRow, unpacked
from .sequence import AttentionStreams, SequenceShardingPlan, TokenDim, VisualTokens
from .tensor_parallel import (
    TensorParallelPlan,
    attention_columns,
    attention_rows,
    feed_forward_columns,
    feed_forward_rows,
)

_MAGCACHE = "https://github.com/Zehong-Ma/MagCache"


def _signal(block: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    modulation = block.img_mod(arguments["temb"]).chunk(2, dim=-1)[0]
    normed = block.img_norm1(arguments["hidden_states"])
    return modulate_qwen(block, normed, modulation, arguments.get("modulate_index"))[0]


# Pipeline -> row: the denoisers of both have the same configuration.
_PIPELINES = {"QwenImagePipeline": "qwen-image", "QwenImageEditPipeline": "qwen-image-edit"}


def _row(checkpoint: Checkpoint) -> str | None:
    return _PIPELINES.get(checkpoint.pipeline) if checkpoint.has(num_layers=60) else None


def _grid(arguments: Mapping[str, Any]) -> tuple[int, int]:
    # The shapes of a request's images as (frames, rows, columns); the generated one comes first.
    first = arguments["img_shapes"][0]
    _, rows, columns = first[0] if isinstance(first, (list, tuple)) and isinstance(first[0], (list, tuple)) else first
    return int(rows), int(columns)


def _latents(denoiser: Any, arguments: Mapping[str, Any], grid: Any) -> list[torch.Tensor]:
    # The latents have `out_channels` channels; a token packs four values of each.
    return [unpacked(arguments["hidden_states"], grid, denoiser.config.out_channels)]


_MAG_ROWS = {
    "qwen-image": MagCacheRow(
        (
            1.0, 1.64062, 1.45312, 1.1875, 1.17188, 1.05469, 1.21094, 1.10938, 1.11719, 1.13281, 1.11719, 1.07812,
            1.07031, 1.08594, 1.08594, 1.07812, 1.03906, 1.04688, 1.07812, 1.07031, 1.03125, 1.07812, 1.04688,
            1.04688, 1.04688, 1.03906, 1.01562, 1.03125, 1.02344, 1.02344, 1.02344, 1.03906, 1.0, 1.01562, 1.0,
            0.99219, 1.00781, 0.98047, 0.95703, 0.96875, 0.99219, 0.92578, 0.92578, 0.90625, 0.85938, 0.80469,
            0.87891, 0.75, 0.60938, 0.55078,
        ),
        _MAGCACHE,
    ),
    "qwen-image-edit": MagCacheRow(
        (
            1.0, 1.41406, 1.09375, 1.3125, 1.20312, 1.0625, 1.125, 1.14062, 1.17969, 1.09375, 1.10938, 1.10938, 1.07031,
            1.04688, 1.09375, 1.03906, 1.0625, 1.04688, 1.0625, 1.04688, 1.07031, 1.03125, 1.03906, 1.03906, 1.02344,
            1.01562, 1.03125, 1.00781, 1.01562, 1.00781, 1.01562, 1.0, 1.0, 0.98828, 0.98047, 0.98047, 0.97266, 0.92578,
            0.94922, 0.98438, 0.89844, 0.91797, 0.92188, 0.84375, 0.82812, 0.78516, 0.87891, 0.71094, 0.56641, 0.50781,
        ),
        _MAGCACHE,
    ),
}  # fmt: skip

_TEXT, _IMAGE = ("encoder_hidden_states",), ("hidden_states",)

_SEQUENCE = SequenceShardingPlan(
    streams={"encoder_hidden_states": 1, "hidden_states": 1},
    attention={"attn": AttentionStreams(_TEXT + _IMAGE, _TEXT + _IMAGE)},
    arguments={
        "image_rotary_emb": (TokenDim(0, _IMAGE), TokenDim(0, _TEXT)),
        "encoder_hidden_states_mask": TokenDim(1, _TEXT),
        "modulate_index": TokenDim(1, _IMAGE),
    },
    inputs={"controlnet_block_samples": TokenDim(1, _IMAGE)},
    gathered_before="norm_out",
)

_TENSOR = TensorParallelPlan(
    columns={**attention_columns("attn"), **feed_forward_columns("img_mlp", "txt_mlp")},
    rows={**attention_rows("attn"), **feed_forward_rows("img_mlp", "txt_mlp")},
)

QWEN = Adapter(
    classes=("QwenImageTransformer2DModel",),
    max_unquantized_features=0,
    unquantized_ends=(2, 2),
    modulation=Modulation(
        "time_text_embed",
        ("img_mod.1", "txt_mod.1"),
        lambda timestep, dtype: timestep.to(dtype) / 1000,
        of_prompt=False,
    ),
    stacks=(Stack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),),
    block_signal=_signal,
    sequence=_SEQUENCE,
    visual=VisualTokens(("attn",), lambda denoiser, arguments: (1, *_grid(arguments))),
    tensor=_TENSOR,
    teacache_rows={"qwen-image": TeaCacheRow((-450.0, 280.0, -45.0, 3.2, -0.02), 0.2, "vllm-omni")},
    magcache_rows=_MAG_ROWS,
    published_row=_row,
    grid=_grid,
    latents=_latents,
)
