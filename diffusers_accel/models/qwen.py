"""Qwen-Image, its Edit pipelines among them: joint blocks, separate guidance calls, text padded under a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapter import Adapter, Checkpoint, Stack, TeaCacheRow


def _signal(block: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    modulation = block.img_mod(arguments["temb"]).chunk(2, dim=-1)[0]
    normed = block.img_norm1(arguments["hidden_states"])
    return block._modulate(normed, modulation, arguments.get("modulate_index"))[0]


def _row(checkpoint: Checkpoint) -> str | None:
    return "qwen-image" if checkpoint.pipeline == "QwenImagePipeline" and checkpoint.has(num_layers=60) else None


QWEN = Adapter(
    classes=("QwenImageTransformer2DModel",),
    smallest_linear=0,
    wide_ends=(2, 2),
    stacks=(Stack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),),
    block_signal=_signal,
    rows={"qwen-image": TeaCacheRow((-450.0, 280.0, -45.0, 3.2, -0.02), 0.2, "vllm-omni")},
    row=_row,
)
