"""The two trained checkpoints of the package: records, loading and recommended call arguments.

They are ordinary diffusers pipeline folders (float16, a few MiB each), small enough for a CPU, trained on captioned
scenes of coloured shapes. Each folder also holds `accel.yaml`, the configuration that suits the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import AccelError, nearest

ROOT = Path(__file__).resolve().parent / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that ships with the package.

    Attributes:
        name: The checkpoint's name, and its folder's.
        pipeline: Name of the stock pipeline class.
        kind: Kind of the output: `"image"` or `"video"`.
        arguments: Recommended arguments of the pipeline's call. Sizes are in pixels.
        captions: Captions of combinations that were held out of training.
        config: Name of the configuration file in the folder.
    """

    name: str
    pipeline: str
    kind: Literal["image", "video"]
    arguments: Mapping[str, Any]
    captions: tuple[str, ...]
    config: str = "accel.yaml"

    @property
    def folder(self) -> Path:
        """The pipeline folder."""
        return ROOT / self.name

    @property
    def config_file(self) -> Path:
        """The checkpoint's configuration file, for `accelerate`."""
        return self.folder / self.config


CHECKPOINTS: dict[str, Checkpoint] = {
    "flux-shapes": Checkpoint(
        name="flux-shapes",
        pipeline="FluxPipeline",
        kind="image",
        # no guidance: the model has no guidance embedding
        arguments={"height": 128, "width": 128, "num_inference_steps": 24, "max_sequence_length": 64},
        captions=(
            "a large cyan square on the left and a small orange cross at the top, on a striped gray background",
            "a small orange square at the bottom right, a small green ring on the right and a large orange cross"
            " at the top, on a dotted beige background",
            "a small red circle at the bottom left and a small purple square in the center, on a dotted dark"
            " background",
            "a large purple square at the bottom left and a small purple ring at the top right, on a checkered beige"
            " background",
            "a small orange cross at the bottom, on a striped dark background",
            "a large blue triangle at the bottom right, on a plain gray background",
        ),
    ),
    "wan-shapes": Checkpoint(
        name="wan-shapes",
        pipeline="WanPipeline",
        kind="video",
        arguments={
            "height": 128,
            "width": 128,
            "num_frames": 17,
            "num_inference_steps": 24,
            "guidance_scale": 4.0,
            "max_sequence_length": 64,
        },
        captions=(
            "a small orange triangle moving right, on a checkered gray background",
            "a small yellow square moving right and a large blue triangle moving left, on a plain light background",
            "a large cyan ring moving left and a small red cross moving up, on a striped beige background",
            "a small cyan cross moving up, on a gradient gray background",
            "a small purple circle moving up, on a gradient dark background",
            "a large orange cross staying still, on a checkered gray background",
        ),
    ),
}


def checkpoint(name: str) -> Checkpoint:
    """The record of a shipped checkpoint.

    Raises:
        AccelError: There is no checkpoint of that name. The message has the nearest name.
    """
    if name not in CHECKPOINTS:
        raise AccelError(f"There is no demo checkpoint {name!r}. {nearest(name, CHECKPOINTS)}")
    return CHECKPOINTS[name]


def load(name: str, torch_dtype: torch.dtype = torch.float32) -> Any:
    """The stock pipeline of a shipped checkpoint, on the CPU.

    Args:
        name: `"flux-shapes"` or `"wan-shapes"`.
        torch_dtype: The dtype of the loaded weights. The files hold float16.

    Raises:
        AccelError: There is no checkpoint of that name, or its folder is missing from this installation.
    """
    record = checkpoint(name)
    if not (record.folder / "model_index.json").is_file():
        raise AccelError(
            f"The checkpoint {name!r} is missing from this installation: there is no {record.folder}. "
            "Install the package again with its data files."
        )
    import diffusers

    pipeline = getattr(diffusers, record.pipeline)
    return pipeline.from_pretrained(record.folder, dtype=torch_dtype, local_files_only=True)


def call_arguments(name: str) -> dict[str, Any]:
    """The recommended arguments of the pipeline's call besides `prompt` and `generator`, as a new dictionary.

    Raises:
        AccelError: There is no checkpoint of that name.
    """
    return dict(checkpoint(name).arguments)


__all__ = ["CHECKPOINTS", "ROOT", "Checkpoint", "call_arguments", "checkpoint", "load"]
