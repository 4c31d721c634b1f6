"""Cosmos 1.0, Predict2 and Predict2.5: one denoiser class, separate guidance calls, no cache context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Checkpoint, Stack, TeaCacheRow
from .sequence import AttentionStreams, SequenceShardingPlan, TokenDim, VisualTokens, patches
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
    if arguments.get("extra_pos_emb") is not None:
        hidden_states = hidden_states + arguments["extra_pos_emb"]
    return block.norm1(hidden_states, arguments["embedded_timestep"], arguments.get("temb"))[0]


def _row(checkpoint: Checkpoint) -> str | None:
    # The published row was fitted on the first generation. Predict2 and later share the class, not the weights.
    return "cosmos-1.0" if checkpoint.pipeline.startswith(("CosmosTextToWorld", "CosmosVideoToWorld")) else None


_OWN = ("hidden_states",)

_SEQUENCE = SequenceShardingPlan(
    streams={"hidden_states": 1},
    attention={"attn1": AttentionStreams(_OWN, _OWN), "attn2": AttentionStreams(_OWN, ())},
    arguments={
        "image_rotary_emb": TokenDim(0, _OWN),
        "embedded_timestep": TokenDim(1, _OWN, ndim=3),
        "temb": TokenDim(1, _OWN, ndim=3),
        "extra_pos_emb": TokenDim(1, _OWN),
        "controlnet_residual": TokenDim(1, _OWN),
    },
)

# Predict2.5 attends to an image beside the text, and reads its channels from `out_dim`.
_TENSOR = TensorParallelPlan(
    columns={
        **attention_columns("attn1", "attn2"),
        **{f"attn2.{name}_img": (HEADS,) for name in "qkv"},
        **feed_forward_columns("ff"),
    },
    rows={**attention_rows("attn1", "attn2"), **feed_forward_rows("ff")},
    counts={"heads": HEADS, "inner_dim": HEADS, "out_dim": HEADS},
)

COSMOS = Adapter(
    classes=("CosmosTransformer3DModel",),
    fusable_processors=("CosmosAttnProcessor2_0", "CosmosAttnProcessor2_5"),
    cross_attention=("attn2",),
    stacks=(Stack("transformer_blocks", ("hidden_states",)),),
    block_signal=_signal,
    sequence=_SEQUENCE,
    visual=VisualTokens(("attn1",), patches),
    tensor=_TENSOR,
    teacache_rows={
        "cosmos-1.0": TeaCacheRow(
            (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633),
            0.3,
            "https://github.com/ali-vilab/TeaCache",
        )
    },
    published_row=_row,
)
