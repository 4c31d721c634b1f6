"""Stable Diffusion 3 and 3.5: joint blocks, guidance batched in one call, an extra call for skip-layer guidance.

No TeaCache constants are published for these models, so TeaCache needs `coefficients`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Modulation, Stack
from .sequence import AttentionStreams, SequenceShardingPlan, TokenDim, VisualTokens, patches
from .tensor_parallel import (
    TensorParallelPlan,
    attention_columns,
    attention_rows,
    feed_forward_columns,
    feed_forward_rows,
)


def _signal(block: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


def _special_branch(arguments: Mapping[str, Any]) -> str | None:
    return "skip_layers" if arguments.get("skip_layers") is not None else None


# The joint attention concatenates image and text in this order.
_JOINT = ("hidden_states", "encoder_hidden_states")

_SEQUENCE = SequenceShardingPlan(
    streams={"encoder_hidden_states": 1, "hidden_states": 1},
    attention={
        "attn": AttentionStreams(_JOINT, _JOINT),
        "attn2": AttentionStreams(("hidden_states",), ("hidden_states",)),
    },
    inputs={"block_controlnet_hidden_states": TokenDim(1, ("hidden_states",))},
    gathered_before="norm_out",
)

_TENSOR = TensorParallelPlan(
    columns={**attention_columns("attn", "attn2"), **feed_forward_columns("ff", "ff_context")},
    rows={**attention_rows("attn", "attn2"), **feed_forward_rows("ff", "ff_context")},
)

SD3 = Adapter(
    classes=("SD3Transformer2DModel",),
    stacks=(Stack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),),
    guidance="batched",
    sequence=_SEQUENCE,
    visual=VisualTokens(("attn", "attn2"), patches),
    tensor=_TENSOR,
    branches=("cond_uncond",),
    special_branch=_special_branch,
    modulation=Modulation(
        "time_text_embed", ("norm1.linear", "norm1_context.linear"), lambda timestep, dtype: timestep
    ),
    block_signal=_signal,
)
