"""Wan 2.1 and 2.2: text, image and video to video, two experts, per-token timesteps (TI2V-5B), and VACE.

The cache signal is the time embedding, which depends on the timestep alone. So a cache can decide a whole schedule
before the first step, without reading anything back from the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .adapter import Adapter, Checkpoint, MagCacheRow, Stack, TeaCacheRow
from .sequence import AttentionStreams, SequenceShardingPlan, TokenDim, VisualTokens, patches
from .tensor_parallel import (
    HEADS,
    TensorParallelPlan,
    attention_columns,
    attention_rows,
    feed_forward_columns,
    feed_forward_rows,
)

_TEACACHE = "https://github.com/ali-vilab/TeaCache"
_MAGCACHE = "https://github.com/Zehong-Ma/MagCache"


def _signal(denoiser: Any, timesteps: torch.Tensor, projected: bool) -> torch.Tensor:
    embedder = denoiser.condition_embedder
    dtype = next(iter(embedder.time_embedder.parameters())).dtype
    embedding = embedder.time_embedder(embedder.timesteps_proj(timesteps).to(dtype))
    if not projected:
        return embedding
    return embedder.time_proj(embedder.act_fn(embedding.to(embedder.time_proj.weight.dtype)))


# (in_channels, num_layers, heads) -> row of the published checkpoints that a configuration identifies. The 480P and
# 720P image-to-video checkpoints have the same configuration, so the user names their rows.
_CONFIGURATIONS: dict[tuple[Any, ...], str] = {
    (16, 30, 12): "wan2.1-t2v-1.3b",
    (16, 40, 40): "wan2.1-t2v-14b",
    (48, 30, 24): "wan2.2-ti2v-5b",
}


def _row(checkpoint: Checkpoint) -> str | None:
    if checkpoint.pipeline_config.get("boundary_ratio") is not None:
        # One MagCache table covers both experts; TeaCache's coefficients are published for neither.
        kind = {16: "t2v", 36: "i2v"}.get(checkpoint.config.get("in_channels") or 0)
        return f"wan2.2-{kind}-a14b" if kind and checkpoint.has(num_layers=40, num_attention_heads=40) else None
    key = tuple(checkpoint.config.get(name) for name in ("in_channels", "num_layers", "num_attention_heads"))
    name = _CONFIGURATIONS.get(key)
    return f"{name}-ret" if name and checkpoint.use_ret_steps else name


def _ret(coefficients: tuple[float, ...], threshold: float) -> TeaCacheRow:
    return TeaCacheRow(coefficients, threshold, _TEACACHE, use_ret_steps=True)


ROWS = {
    "wan2.1-t2v-1.3b": TeaCacheRow((2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774), 0.05, _TEACACHE),
    "wan2.1-t2v-1.3b-ret": _ret((-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664), 0.05),
    "wan2.1-t2v-14b": TeaCacheRow(
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), 0.14, _TEACACHE
    ),
    "wan2.1-t2v-14b-ret": _ret((-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525), 0.1),
    "wan2.1-i2v-480p": TeaCacheRow((-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289), 0.13, _TEACACHE),
    "wan2.1-i2v-480p-ret": _ret((257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977), 0.2),
    "wan2.1-i2v-720p": TeaCacheRow((-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), 0.2, _TEACACHE),
    "wan2.1-i2v-720p-ret": _ret((8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401), 0.2),
    "wan2.2-ti2v-5b": TeaCacheRow(
        (157472.669, -115702.395, 31076.1669, -3831.16651, 221.608777, -4.81179567), 0.26, "LightX2V"
    ),
}

# Ratios of the conditional branch; the unconditional branch's ratios differ in the fourth digit.
MAG_ROWS = {
    "wan2.1-t2v-1.3b": MagCacheRow(
        (
            1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957, 0.99511, 0.99535,
            0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415, 0.99419, 0.99396, 0.99388, 0.99349,
            0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068, 0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504,
            0.9836, 0.98202, 0.97977, 0.97717, 0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241,
            0.86821, 0.81838,
        ),
        _MAGCACHE,
    ),
    "wan2.1-t2v-14b": MagCacheRow(
        (
            1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533, 0.99468,
            0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418, 0.99271, 0.99313, 0.99215,
            0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838,
            0.98177, 0.98037, 0.97678, 0.97546, 0.97184, 0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693,
            0.8796, 0.86111,
        ),
        _MAGCACHE,
    ),
    "wan2.1-i2v-480p": MagCacheRow(
        (
            1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383, 0.98857, 0.99065,
            0.98845, 0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721, 0.98571, 0.98543, 0.98157, 0.98411,
            0.97952, 0.98149, 0.9774, 0.97825, 0.97355, 0.97085, 0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973,
            0.93217, 0.91878, 0.90955, 0.92617,
        ),
        _MAGCACHE,
    ),
    "wan2.1-i2v-720p": MagCacheRow(
        (
            1.0, 0.99428, 0.98588, 0.98273, 0.99018, 0.98911, 0.98646, 0.99454, 0.9891, 0.99124, 0.99102, 0.99215,
            0.99515, 0.99576, 0.99068, 0.99097, 0.99166, 0.99041, 0.99201, 0.99101, 0.98599, 0.98845, 0.98848, 0.98862,
            0.98718, 0.98497, 0.98264, 0.98389, 0.97938, 0.97535, 0.97498, 0.973, 0.96827, 0.96261, 0.95335, 0.94649,
            0.93397, 0.91636, 0.89088, 0.8679,
        ),
        _MAGCACHE,
    ),
    "wan2.2-ti2v-5b": MagCacheRow(
        (
            1.0, 0.99505, 0.99441, 0.99558, 0.99499, 0.99534, 0.99468, 0.99463, 0.9946, 0.99408, 0.9945, 0.99409,
            0.99403, 0.99382, 0.99349, 0.99377, 0.9933, 0.99303, 0.99217, 0.992, 0.99201, 0.99133, 0.99112, 0.99155,
            0.98958, 0.98959, 0.98838, 0.98826, 0.9883, 0.98711, 0.98562, 0.98511, 0.98414, 0.98284, 0.98104, 0.97981,
            0.97849, 0.97557, 0.97398, 0.97171, 0.96917, 0.96511, 0.96263, 0.95839, 0.95483, 0.94942, 0.9468, 0.94583,
            0.94843, 0.96949,
        ),
        _MAGCACHE,
    ),
    "wan2.2-t2v-a14b": MagCacheRow(
        (
            1.0, 1.00124, 0.99822, 0.99696, 0.99703, 0.9966, 0.99602, 0.99578, 0.99484, 0.99633, 0.99659, 0.99534,
            0.99584, 0.99681, 0.99563, 0.9944, 0.99594, 0.99466, 0.99453, 0.99389, 0.99391, 0.99354, 0.99283, 0.99268,
            0.99057, 0.99125, 0.65523, 0.98808, 0.98765, 0.9851, 0.98311, 0.9805, 0.97776, 0.97278, 0.96731, 0.95857,
            0.94385, 0.92118, 0.88108, 0.80263,
        ),
        _MAGCACHE,
    ),
    "wan2.2-i2v-a14b": MagCacheRow(
        (
            1.0, 0.99191, 0.99356, 0.99326, 0.99251, 0.99393, 0.9943, 0.99276, 0.99389, 0.99274, 0.99316, 0.99379,
            0.99268, 0.99222, 0.99175, 0.91076, 0.98931, 0.99087, 0.98852, 0.98895, 0.98806, 0.9871, 0.98613, 0.98434,
            0.983, 0.98185, 0.98131, 0.9783, 0.97619, 0.97264, 0.97088, 0.96568, 0.96045, 0.95322, 0.94579, 0.93297,
            0.91699, 0.89174, 0.8541, 0.79823,
        ),
        _MAGCACHE,
    ),
}  # fmt: skip

_OWN = ("hidden_states",)

# A `temb` of four dimensions modulates every token by itself (Wan2.2 TI2V).
_SEQUENCE = SequenceShardingPlan(
    streams={"hidden_states": 1},
    attention={"attn1": AttentionStreams(_OWN, _OWN), "attn2": AttentionStreams(_OWN, ())},
    arguments={"rotary_emb": TokenDim(1, _OWN), "temb": TokenDim(1, _OWN, ndim=4)},
)

# The hints of the side blocks are added after main blocks, the last one included.
_VACE_SEQUENCE = replace(
    _SEQUENCE, streams={"hidden_states": 1, "control_hidden_states": 1}, gathered_before="norm_out"
)

_TENSOR = TensorParallelPlan(
    columns={**attention_columns("attn1", "attn2"), **feed_forward_columns("ffn")},
    rows={**attention_rows("attn1", "attn2"), **feed_forward_rows("ffn")},
    norms=("norm_q", "norm_k", "norm_added_k"),
    counts={"heads": HEADS, "inner_dim": HEADS, "kv_inner_dim": HEADS},
)

WAN = Adapter(
    classes=("WanTransformer3DModel",),
    max_unquantized_features=0,
    unquantized_ends=(3, 3),
    fusable_processors=("WanAttnProcessor",),
    cross_attention=("attn2",),
    stacks=(Stack("blocks", ("hidden_states",)),),
    timestep_signal=_signal,
    sequence=_SEQUENCE,
    visual=VisualTokens(("attn1",), patches),
    tensor=_TENSOR,
    teacache_rows=ROWS,
    magcache_rows=MAG_ROWS,
    published_row=_row,
)

# Its side blocks compute hints that are added between the main blocks, and after them by configuration. They run on
# skipped steps too.
WAN_VACE = Adapter(
    classes=("WanVACETransformer3DModel",),
    max_unquantized_features=0,
    unquantized_ends=(3, 3),
    fusable_processors=("WanAttnProcessor",),
    # One value for each side block.
    unbatched=("control_hidden_states_scale",),
    cross_attention=("attn2",),
    stacks=(Stack("blocks", ("hidden_states",)),),
    side_stacks=(Stack("vace_blocks", ("control_hidden_states",)),),
    timestep_signal=_signal,
    sequence=_VACE_SEQUENCE,
    visual=VisualTokens(("attn1",), patches, beside=("control_hidden_states",)),
    tensor=_TENSOR,
    teacache_rows=ROWS,
    magcache_rows=MAG_ROWS,
)
