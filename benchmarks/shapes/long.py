"""Load wan-shapes-long, the checkpoint of 4,096 tokens that sparse attention is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent / "wan-shapes-long"
# Arguments of its training: 16 latent frames of 16x16 tokens.
CALL: dict[str, Any] = {
    "height": 256,
    "width": 256,
    "num_frames": 61,
    "num_inference_steps": 24,
    "guidance_scale": 4.0,
    "max_sequence_length": 64,
}


def load_long(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", folder: Path = FOLDER) -> Any:
    """A stock WanPipeline; call it with a caption and `**CALL`."""
    from diffusers import WanPipeline

    pipeline: Any = WanPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
