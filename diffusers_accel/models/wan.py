"""Wan 2.1 and 2.2: text, image and video to video, two experts, per-token timesteps (TI2V-5B), and VACE.

Its cache signal is the time embedding, which depends on the timestep alone, so a cache can decide a whole schedule
before the first step, without reading anything back from the device.
"""

from __future__ import annotations

from typing import Any

import torch

from .adapter import Adapter, Checkpoint, Stack, TeaCacheRow

_TEACACHE = "https://github.com/ali-vilab/TeaCache"


def _signal(denoiser: Any, timesteps: torch.Tensor, projected: bool) -> torch.Tensor:
    embedder = denoiser.condition_embedder
    dtype = next(iter(embedder.time_embedder.parameters())).dtype
    embedding = embedder.time_embedder(embedder.timesteps_proj(timesteps).to(dtype))
    if not projected:
        return embedding
    return embedder.time_proj(embedder.act_fn(embedding.to(embedder.time_proj.weight.dtype)))


# (in_channels, num_layers, heads) of the published checkpoints that one row describes without doubt. The 480P and 720P
# image-to-video checkpoints have one configuration, so their rows are taken by name only; so are Wan2.2's experts.
_CONFIGURATIONS: dict[tuple[Any, ...], str] = {
    (16, 30, 12): "wan2.1-t2v-1.3b",
    (16, 40, 40): "wan2.1-t2v-14b",
    (48, 30, 24): "wan2.2-ti2v-5b",
}


def _row(checkpoint: Checkpoint) -> str | None:
    if checkpoint.pipeline_config.get("boundary_ratio") is not None:
        return None
    key = tuple(checkpoint.config.get(name) for name in ("in_channels", "num_layers", "num_attention_heads"))
    name = _CONFIGURATIONS.get(key)
    return f"{name}-ret" if name and checkpoint.use_ret_steps else name


def _ret(coefficients: tuple[float, ...], threshold: float, fast: float) -> TeaCacheRow:
    return TeaCacheRow(coefficients, threshold, _TEACACHE, fast, use_ret_steps=True)


ROWS = {
    "wan2.1-t2v-1.3b": TeaCacheRow(
        (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774), 0.05, _TEACACHE, 0.08
    ),
    "wan2.1-t2v-1.3b-ret": _ret((-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664), 0.05, 0.1),
    "wan2.1-t2v-14b": TeaCacheRow(
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), 0.14, _TEACACHE, 0.2
    ),
    "wan2.1-t2v-14b-ret": _ret((-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525), 0.1, 0.2),
    "wan2.1-i2v-480p": TeaCacheRow(
        (-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289), 0.13, _TEACACHE, 0.26
    ),
    "wan2.1-i2v-480p-ret": _ret((257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977), 0.2, 0.3),
    "wan2.1-i2v-720p": TeaCacheRow(
        (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), 0.2, _TEACACHE, 0.3
    ),
    "wan2.1-i2v-720p-ret": _ret((8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401), 0.2, 0.3),
    "wan2.2-ti2v-5b": TeaCacheRow(
        (157472.669, -115702.395, 31076.1669, -3831.16651, 221.608777, -4.81179567), 0.26, "LightX2V"
    ),
}

WAN = Adapter(
    classes=("WanTransformer3DModel",),
    smallest_linear=0,
    wide_ends=(3, 3),
    folding=("WanAttnProcessor",),
    cross_attention=("attn2",),
    stacks=(Stack("blocks", ("hidden_states",)),),
    timestep_signal=_signal,
    rows=ROWS,
    row=_row,
)

# Its side blocks compute the hints that are added between (and, by configuration, after) the main blocks, so they run
# on skipped steps too.
WAN_VACE = Adapter(
    classes=("WanVACETransformer3DModel",),
    smallest_linear=0,
    wide_ends=(3, 3),
    folding=("WanAttnProcessor",),
    cross_attention=("attn2",),
    stacks=(Stack("blocks", ("hidden_states",)),),
    side_stacks=(Stack("vace_blocks", ("control_hidden_states",)),),
    timestep_signal=_signal,
    rows=ROWS,
)
