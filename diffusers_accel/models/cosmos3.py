"""Cosmos3: understanding and generation streams in every layer, grouped heads, separate guidance calls.

The model has no adaLN: the timestep enters with the tokens, so the first layer's normalized input is the cache signal.
No TeaCache constants are published for the model, so TeaCache needs `coefficients`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Stack
from .sequence import AttentionStreams, SequenceShardingPlan, TokenDim, VisualTokens
from .tensor_parallel import FEATURES, HEADS, KEY_HEADS, TensorParallelPlan, attention_columns, attention_rows


def _signal(block: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    return block.input_layernorm_moe_gen(arguments["gen_seq"])


def _latents(denoiser: Any, arguments: Mapping[str, Any], grid: Any) -> list[torch.Tensor]:
    # An image without noisy frames is a condition, not a noisy latent.
    pairs = zip(arguments["vision_tokens"], arguments["vision_noisy_frame_indexes"], strict=True)
    made = [latents for latents, noisy in pairs if noisy.numel()]
    return [item if item.ndim == 5 else item.unsqueeze(0) for item in made]


def _grid(denoiser: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    # The generation stream begins with the first item's patches; sides that a patch does not divide are padded.
    frames, height, width = arguments["vision_tokens"][0].shape[-3:]
    patch = denoiser.config.latent_patch_size
    return frames, -(-height // patch), -(-width // patch)


# The few tokens of the understanding stream attend to themselves alone, causally; every rank has all of them.
_SEQUENCE = SequenceShardingPlan(
    streams={"gen_seq": 0},
    attention={"self_attn": AttentionStreams(("gen_seq",), ("gen_seq",), replicated_keys=True)},
    arguments={"rotary_emb": (None, None, TokenDim(0, ("gen_seq",)), TokenDim(0, ("gen_seq",)))},
    gathered=("gen_seq",),
)

_STREAMS = ("mlp", "mlp_moe_gen")

_TENSOR = TensorParallelPlan(
    columns={
        **attention_columns("self_attn", keys=KEY_HEADS),
        **{f"{name}.{layer}": (FEATURES,) for name in _STREAMS for layer in ("gate_proj", "up_proj")},
    },
    rows={
        **attention_rows("self_attn", own="to_out"),
        **{f"{name}.down_proj": (FEATURES,) for name in _STREAMS},
    },
    counts={"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS},
)

COSMOS3 = Adapter(
    classes=("Cosmos3OmniTransformer",),
    stacks=(Stack("layers", ("und_seq", "gen_seq")),),
    block_signal=_signal,
    sequence=_SEQUENCE,
    visual=VisualTokens(("self_attn",), _grid, stream="gen_seq"),
    tensor=_TENSOR,
    denoised=("vision_tokens", "sound_tokens", "action_tokens"),
    latents=_latents,
)
