"""Estimates of a request before it runs: its tokens, the bytes of its activations, the seconds of each block.

An estimate decides how many blocks stay on the GPU, never a result. The request is the largest one of the section
`warmup`, or the pipeline's default.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.memory_plan import Work
from ...core.platform import Device
from ..context import Denoiser, PipelineContext
from .models import Changes, layer_shape

_GIB = 2**30
# Operations of a GPU that blocks reach, in 10^12 a second: (capability, 16 bits, 8 bits). Those of sm_90 follow
# measured steps (benchmarks/results/memory-*.json); the others are assumed, and were not measured.
_RATES = (((10, 0), 1100.0, 2000.0), ((9, 0), 700.0, 1000.0), ((12, 0), 190.0, 360.0), ((8, 9), 145.0, 250.0))
_OTHER_RATES = (100.0, 160.0)
# Activations of a compiled block for each token: so many times the streams' channels, and the widest layer's. Without
# compilation there are more, assumed. Measured peaks are 0.6 to 1 times these (benchmarks/results/memory-*.json).
_STREAMS, _WIDEST, _EAGER = 3.3, 3.3, 1.3
# Workspaces of cuBLAS and cuDNN, and fragmentation.
_RESERVE = _GIB // 2
# Bytes that the allocator takes for each byte of a VAE's tensors. Without a limit it takes 1.1 to 1.8
# (benchmarks/results/memory-vae.json), some of which it gives back where memory is short.
_FRAGMENTATION = 1.4
_TEXT = _GIB // 2
# Memory that the pool of CUDA graphs cannot share with other work, and the pool's share of the activations: assumed,
# after pools of 0.5 to 0.7 GiB for FLUX.1 and 2.7 for Wan 14B, which no committed script measures.
_GRAPHS, _POOL = _GIB // 8, 0.6
# Steps for which precomputed modulations have room.
_STEPS = 32
# Of most VAEs, for a pipeline without one.
_LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Request:
    """The size of a request.

    Attributes:
        height: In pixels.
        width: In pixels.
        frames: Number of frames; 1 for a picture.
    """

    height: int
    width: int
    frames: int


def largest_request(context: PipelineContext) -> Request:
    """The largest request of the section `warmup`, or the pipeline's default."""
    pipe = context.pipe
    parameters = inspect.signature(type(pipe).__call__).parameters
    default = _default_side(pipe)

    def argument(name: str, otherwise: int) -> int:
        value = parameters[name].default if name in parameters else None
        return value if isinstance(value, int) and value > 0 else otherwise

    sizes = [(argument("height", default), argument("width", default))]
    frames = [argument("num_frames", 1)]
    warmup = context.config.warmup if context.config is not None else None
    if warmup is not None:
        sizes = warmup.sizes or sizes
        frames = list(warmup.num_frames or frames)
    height, width = max(sizes, key=math.prod)
    return Request(height, width, max(frames))


def _default_side(pipe: Any) -> int:
    side = getattr(pipe, "default_sample_size", None)
    return int(side * _compression(pipe)[0]) if isinstance(side, int) else 1024


def _compression(pipe: Any) -> tuple[int, int]:
    """Pixels of a side, and frames, that one latent stands for."""
    space = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(pipe, "vae_spatial_compression_ratio", None)
    space = space or getattr(pipe, "vae_scale_factor", None) or 8
    time = getattr(pipe, "vae_scale_factor_temporal", None) or getattr(pipe, "vae_temporal_compression_ratio", None)
    return int(space), int(time or 4)


def latent_shape(context: PipelineContext, request: Request) -> tuple[int, int, int]:
    """(frames, height, width) of a request's latents."""
    space, time = _compression(context.pipe)
    return 1 + (request.frames - 1) // time, -(-request.height // space), -(-request.width // space)


def tokens(context: PipelineContext, denoiser: Denoiser, request: Request) -> int:
    """Tokens of a request in a denoiser's main stream, text included, over all ranks."""
    frames, height, width = latent_shape(context, request)
    config = denoiser.config
    patch = config.get("patch_size") or 1
    patch = patch if isinstance(patch, int) else patch[-1]
    channels = config.get("in_channels") or 0
    vae = getattr(getattr(context.pipe, "vae", None), "config", {})
    latents = vae.get("latent_channels") or vae.get("z_dim") or _LATENT_CHANNELS
    if patch == 1 and channels == 4 * latents:
        patch = 2  # packed by the pipeline
    return frames * -(-height // patch) * -(-width // patch) + 512


def block_seconds(
    context: PipelineContext, denoiser: Denoiser, blocks: list[nn.Module], changes: Changes | None = None
) -> tuple[float, ...]:
    """Predicted seconds of each block on a rank's device.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        blocks: Its blocks.
        changes: Planned changes to layers; `None` once they are applied.
    """
    length, (sequence, heads) = tokens(context, denoiser, largest_request(context)), _sharing(context)
    count = -(-length // sequence) * _batch(context, denoiser)
    rate = _rate(denoiser.device, quantized=context.config is not None and context.config.linear is not None)
    found = []
    for block in blocks:
        layers = [part for part in block.modules() if isinstance(part, nn.Linear)]
        # Modulations have one row.
        many_rows = [layer for layer in layers if not _modulates(denoiser, block, layer)]
        weights = sum(math.prod(layer_shape(layer, changes)) for layer in many_rows)
        attention = 2 * _width(layers) * length * count / heads
        found.append(2 * (weights * count + attention) / (rate * 1e12))
    return tuple(found)


def _largest_layer(denoiser: Denoiser) -> int:
    """Elements of the largest weight in a block."""
    blocks = denoiser.adapter.blocks(denoiser.module)
    return max(
        (
            layer.in_features * layer.out_features
            for block in blocks[:1]
            for layer in block.modules()
            if isinstance(layer, nn.Linear)
        ),
        default=0,
    )


def _precomputed_bytes(context: PipelineContext, denoiser: Denoiser, size: int) -> int:
    """Bytes of the modulations of all steps."""
    if not context.precomputes_modulations(denoiser):
        return 0
    blocks = denoiser.adapter.blocks(denoiser.module)
    features = sum(
        part.out_features
        for block in blocks
        for part in block.modules()
        if isinstance(part, nn.Linear) and _modulates(denoiser, block, part)
    )
    return features * _STEPS * _batch(context, denoiser) * size


def _modulates(denoiser: Denoiser, block: nn.Module, layer: nn.Module) -> bool:
    modulation = denoiser.adapter.modulation
    if modulation is None:
        return False
    return any(part is layer for path, part in block.named_modules() if path in modulation.layers)


def _rate(device: Device, quantized: bool) -> float:
    arch = device.arch or (0, 0)
    for known, exact, eight_bit in _RATES:
        if arch[0] == known[0] and arch >= known:
            return eight_bit if quantized else exact
    return _OTHER_RATES[quantized]


def _batch(context: PipelineContext, denoiser: Denoiser) -> int:
    """Samples of one call for one picture on a rank. CFG parallelism splits a call that holds several branches."""
    parallel = context.config.parallel if context.config is not None else None
    split = parallel is not None and parallel.cfg > 1
    return 2 if denoiser.adapter.guidance == "batched" and not split else 1


def _sharing(context: PipelineContext) -> tuple[int, int]:
    """Numbers of ranks that share a sequence's tokens, and the heads of attention."""
    parallel = context.config.parallel if context.config is not None else None
    return (1, 1) if parallel is None else (parallel.sequence, parallel.tp)


def _width(layers: list[Any]) -> int:
    """The number of channels of a block's streams."""
    return Counter(layer.in_features for layer in layers).most_common(1)[0][0] if layers else 0


def work(context: PipelineContext, changes: Changes | None = None) -> Work:
    """The bytes of activations in each stage, on a rank.

    Args:
        context: The pipeline.
        changes: Planned changes to layers; `None` once they are applied.
    """
    request = largest_request(context)
    records = context.config is not None and context.config.cuda_graph is not None
    denoise = graphs = 0
    for denoiser in context.denoisers:
        widest, width = 0, 0
        for block in denoiser.adapter.blocks(denoiser.module)[:1]:
            layers: list[Any] = [
                part
                for part in block.modules()
                if isinstance(part, nn.Linear) and not _modulates(denoiser, block, part)
            ]
            width = _width(layers)
            widest = max((layer_shape(layer, changes)[0] for layer in layers), default=0)
        count = -(-tokens(context, denoiser, request) // _sharing(context)[0]) * _batch(context, denoiser)
        size = torch.empty(0, dtype=denoiser.dtype).element_size()
        activations = int(count * size * (_STREAMS * width + _WIDEST * widest))
        activations = activations if context.compiled else int(_EAGER * activations)
        # Each graph has buffers for its inputs and outputs.
        buffers = 2 * len(denoiser.stacks) * count * size * width + _GRAPHS if records else 0
        if context.config is not None and context.config.linear is not None:
            # Low-bit weights may be widened for a product.
            activations += 2 * size * _largest_layer(denoiser)
        # The graphs of two denoisers share no memory.
        held = int(_POOL * activations) + buffers if records else 0
        graphs += held
        denoise = max(denoise, activations + buffers - held + _precomputed_bytes(context, denoiser, size))
    reserve = _RESERVE if context.device.type == "cuda" else 0
    text = _TEXT if context.device.type == "cuda" else 0
    fragmentation = _FRAGMENTATION if context.device.type == "cuda" else 1.0
    return Work(text, denoise + graphs, {"whole": 0}, reserve, graphs, fragmentation)
