"""FLUX.2 and FLUX.2 Klein: the single-stream stack takes text and image already concatenated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Checkpoint, Stack, TeaCacheRow, grid_of_ids, unpacked
from .sequence import AttentionStreams, SequenceShardingPlan, TokenDim, VisualTokens
from .tensor_parallel import FEATURES, HEADS, TensorParallelPlan, attention_columns, attention_rows


def _signal(block: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    # The modulation holds (shift, scale, gate) for attention, then for the MLP; the signal needs the first two.
    shift, scale = arguments["temb_mod_img"].chunk(6, dim=-1)[:2]
    if shift.ndim == 2:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    return (1 + scale) * block.norm1(arguments["hidden_states"]) + shift


def _row(checkpoint: Checkpoint) -> str | None:
    dev = checkpoint.has(num_layers=8, num_single_layers=48, num_attention_heads=48)
    return "flux.2-dev" if dev else None


def _latents(denoiser: Any, arguments: Mapping[str, Any], grid: Any) -> list[torch.Tensor]:
    packed = denoiser.config.out_channels or denoiser.config.in_channels
    return [unpacked(arguments["hidden_states"], grid, packed // 4)]


_JOINT = ("encoder_hidden_states", "hidden_states")

_SEQUENCE = SequenceShardingPlan(
    streams={"encoder_hidden_states": 1, "hidden_states": 1},
    attention={"attn": AttentionStreams(_JOINT, _JOINT)},
    arguments={"image_rotary_emb": TokenDim(0, _JOINT)},
    joined={"single_transformer_blocks": _JOINT},
    refused={"kv_cache": "keys and values of reference pictures are kept whole"},
)

_GATED = (FEATURES, FEATURES)

# A single-stream block computes query, key, value and feed-forward in one layer, and has one output layer.
_TENSOR = TensorParallelPlan(
    columns={
        **attention_columns("attn"),
        "attn.to_qkv_mlp_proj": (HEADS, HEADS, HEADS, *_GATED),
        "ff.linear_in": _GATED,
        "ff_context.linear_in": _GATED,
    },
    rows={
        **attention_rows("attn"),
        "attn.to_out": (HEADS, FEATURES),
        "ff.linear_out": (FEATURES,),
        "ff_context.linear_out": (FEATURES,),
    },
    counts={"heads": HEADS, "inner_dim": HEADS, "mlp_hidden_dim": FEATURES},
)

FLUX2 = Adapter(
    classes=("Flux2Transformer2DModel",),
    max_unquantized_features=0,
    fusable_processors=("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
    stacks=(
        Stack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),
        Stack("single_transformer_blocks", ("hidden_states",)),
    ),
    guidance="embedded",
    sequence=_SEQUENCE,
    visual=VisualTokens(("attn",), lambda denoiser, arguments: (1, *grid_of_ids(arguments["img_ids"]))),
    tensor=_TENSOR,
    block_signal=_signal,
    teacache_rows={
        "flux.2-dev": TeaCacheRow((104.58236, -6.87605554, -0.0861659379, 0.0537600252), 0.2, "TensorRT-LLM VisualGen")
    },
    published_row=_row,
    grid=lambda arguments: grid_of_ids(arguments["img_ids"]),
    latents=_latents,
)
