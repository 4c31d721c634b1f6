"""LTX-2: video and audio streams in every block; guidance batched in one call, with extra calls for perturbed branches.

No TeaCache constants were ever published for it: give `coefficients`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Stack
from .sequence import AttentionStreams, SequenceShardingPlan, TokenDim, VisualTokens
from .tensor_parallel import (
    HEADS,
    TensorParallelPlan,
    attention_columns,
    attention_rows,
    feed_forward_columns,
    feed_forward_rows,
)


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


_VIDEO, _AUDIO = ("hidden_states",), ("audio_hidden_states",)


def _tables(streams: tuple[str, ...]) -> list[TokenDim]:
    """The sharding of rotary tables: over all channels at once, or by head."""
    return [TokenDim(1, streams, ndim=3), TokenDim(2, streams, ndim=4)]


# In image to video every token has its own timestep, and so its own modulation.
_SEQUENCE = SequenceShardingPlan(
    streams={"hidden_states": 1, "audio_hidden_states": 1},
    attention={
        "attn1": AttentionStreams(_VIDEO, _VIDEO),
        "audio_attn1": AttentionStreams(_AUDIO, _AUDIO),
        "attn2": AttentionStreams(_VIDEO, ()),
        "audio_attn2": AttentionStreams(_AUDIO, ()),
        "audio_to_video_attn": AttentionStreams(_VIDEO, _AUDIO),
        "video_to_audio_attn": AttentionStreams(_AUDIO, _VIDEO),
    },
    arguments={
        "video_rotary_emb": _tables(_VIDEO),
        "audio_rotary_emb": _tables(_AUDIO),
        "ca_video_rotary_emb": _tables(_VIDEO),
        "ca_audio_rotary_emb": _tables(_AUDIO),
        **{name: TokenDim(1, _VIDEO, ndim=3) for name in ("temb", "temb_ca_scale_shift", "temb_ca_gate")},
        **{
            name: TokenDim(1, _AUDIO, ndim=3)
            for name in ("temb_audio", "temb_ca_audio_scale_shift", "temb_ca_audio_gate")
        },
    },
    gathered=("hidden_states", "audio_hidden_states"),
    refused={"video_self_attention_mask": "its mask over pairs of tokens is made for a whole sequence"},
)

_ATTENTION = tuple(_SEQUENCE.attention)

# Gates are per head; norms are over all heads.
_TENSOR = TensorParallelPlan(
    columns={
        **attention_columns(*_ATTENTION),
        **{f"{name}.to_gate_logits": (HEADS,) for name in _ATTENTION},
        **feed_forward_columns("ff", "audio_ff"),
    },
    rows={**attention_rows(*_ATTENTION), **feed_forward_rows("ff", "audio_ff")},
    norms=("norm_q", "norm_k"),
    counts={"heads": HEADS, "inner_dim": HEADS, "inner_kv_dim": HEADS},
    tables={
        "rope": "attn1",
        "audio_rope": "audio_attn1",
        "cross_attn_rope": "audio_to_video_attn",
        "cross_attn_audio_rope": "video_to_audio_attn",
    },
)

LTX2 = Adapter(
    classes=("LTX2VideoTransformer3DModel",),
    max_unquantized_features=0,
    unquantized_ends=(3, 3),
    value_only_processors=("LTX2PerturbedAttnProcessor",),
    fusable_processors=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    cross_attention=("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    stacks=(Stack("transformer_blocks", ("hidden_states", "audio_hidden_states")),),
    guidance="batched",
    branches=("cond_uncond", "uncond_stg", "uncond_modality"),
    block_signal=_signal,
    sequence=_SEQUENCE,
    visual=VisualTokens(("attn1",), lambda denoiser, arguments: _grid(arguments)),
    tensor=_TENSOR,
    denoised=("hidden_states", "audio_hidden_states"),
    grid=_grid,
    latents=_latents,
    static_arguments=("all_perturbed",),
)
