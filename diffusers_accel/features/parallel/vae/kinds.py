"""The module classes of VAEs: which of them read beyond a strip, and how far.

Classes are identified by name, because several families have copies of the same classes. A VAE with a module of an
unknown class is refused before any computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

# VAEs whose `decode` and `encode` pass strips on to the modules below without looking across them.
VAES = (
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLWan",
    "AutoencoderKLQwenImage",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLCosmos",
    "AutoencoderKLCogVideoX",
)


def _of(family: str, kinds: str) -> Iterable[str]:
    return (family + kind for kind in kinds.split())


# Modules that do not look across strips themselves; their submodules may.
LOCAL = {
    *_of("", "ModuleList Sequential Identity Dropout SiLU Linear LayerNorm BatchNorm2d ZeroPad2d"),
    *_of("", "Encoder Decoder DownEncoderBlock2D UpDecoderBlock2D UNetMidBlock2D ResnetBlock2D"),
    *_of("", "Downsample2D Upsample2D RMSNorm PerChannelRMSNorm AvgDown3D DupUp3D"),
    *_of("", "PixArtAlphaCombinedTimestepSizeEmbeddings TimestepEmbedding Timesteps"),
    *_of("Wan", "Encoder3d Decoder3d MidBlock UpBlock ResidualBlock ResidualDownBlock ResidualUpBlock"),
    *_of("Wan", "Resample Upsample RMS_norm"),
    *_of("QwenImage", "Encoder3d Decoder3d MidBlock UpBlock ResidualBlock Resample Upsample RMS_norm"),
    *_of("LTXVideo", "Encoder3d Decoder3d MidBlock3d DownBlock3D 095DownBlock3D UpBlock3d ResnetBlock3d"),
    *_of("LTXVideo", "Downsampler3d Upsampler3d CausalConv3d"),
    *_of("LTX2Video", "Encoder3d Decoder3d MidBlock3d DownBlock3D UpBlock3d ResnetBlock3d"),
    *_of("LTX2Video", "Downsampler3d Upsampler3d CausalConv3d"),
    *_of("Cosmos", "Encoder3d Decoder3d MidBlock3d DownBlock3d UpBlock3d ResnetBlock3d Downsample3d Upsample3d"),
    *_of("Cosmos", "ConvProjection3d CausalGroupNorm PatchEmbed3d Unpatcher3d"),
    *_of("CogVideoX", "Encoder3D Decoder3D MidBlock3D DownBlock3D UpBlock3D ResnetBlock3D SpatialNorm3D"),
    *_of("CogVideoX", "Downsample3D Upsample3D CausalConv3d"),
}
CONVOLUTIONS = {
    *_of("", "Conv2d Conv3d WanCausalConv3d QwenImageCausalConv3d CosmosCausalConv3d CogVideoXSafeConv3d"),
}
NORMS = {"GroupNorm"}
ATTENTIONS = {"Attention", "WanAttentionBlock", "QwenImageAttentionBlock", "CosmosCausalAttention"}
# Processors of attention modules that have one: over the picture, by `scaled_dot_product_attention`, and over time
# alone.
SPATIAL = {"AttnProcessor2_0", "FusedAttnProcessor2_0", "CosmosSpatialAttentionProcessor2_0"}
TEMPORAL = {"CosmosTemporalAttentionProcessor2_0"}

# Classes whose stock code pads the input with zeros, into a new tensor, and then calls a convolution -> that
# convolution, and the rows of padding in front.
AHEAD: dict[str, Callable[[Any, int], tuple[nn.Module, int] | None]] = {
    "WanCausalConv3d": lambda conv, axis: (conv, conv.kernel_size[axis] // 2),
    "QwenImageCausalConv3d": lambda conv, axis: (conv, conv.kernel_size[axis] // 2),
    "CosmosCausalConv3d": lambda conv, axis: (conv, conv.spatial_pad[0]),
    "WanResample": lambda module, axis: _behind_padding(module.resample),
    "QwenImageResample": lambda module, axis: _behind_padding(module.resample),
    "Downsample2D": lambda module, axis: (module.conv, 0) if module.use_conv and module.padding == 0 else None,
    "CogVideoXDownsample3D": lambda module, axis: (module.conv, 0),
}
# Modules of an encoder that reduce rows and columns without a convolution's stride -> the factor.
STRIDES: dict[str, Callable[[Any, int], int]] = {
    "AutoencoderKLWan": lambda vae, axis: vae.config.patch_size or 1,
    "LTXVideoEncoder3d": lambda encoder, axis: encoder.patch_size,
    "LTX2VideoEncoder3d": lambda encoder, axis: encoder.patch_size,
    "LTXVideoDownsampler3d": lambda module, axis: module.stride[axis],
    "LTX2VideoDownsampler3d": lambda module, axis: module.stride[axis],
    "CosmosPatchEmbed3d": lambda module, axis: module.patch_size,
}


@dataclass(frozen=True)
class Halo:
    """The halo of a convolution: the rows of its neighbours' strips that it reads.

    Attributes:
        before: Number of rows before the strip.
        after: Number of rows after the strip.
        ahead: Whether stock code has padded the input with that many rows of zeros already.
    """

    before: int
    after: int
    ahead: bool


def kind(module: Any) -> str:
    """The name of a module's class, by which the tables list it."""
    return type(module).__name__


def unshardable(vae: nn.Module, axis: int) -> str | None:
    """The reason why a VAE's modules cannot be sharded along a dimension; `None` if they can."""
    known = LOCAL | CONVOLUTIONS | NORMS | ATTENTIONS | set(VAES)
    for path, module in vae.named_modules():
        if kind(module) not in known:
            return f"{path} is a {kind(module)}, and it is unknown how far it looks across strips."
        processor = getattr(module, "processor", None)
        if kind(module) in ATTENTIONS and processor is not None and kind(processor) not in SPATIAL | TEMPORAL:
            return f"{path} attends by {kind(processor)}, whose keys cannot be gathered."
        if getattr(module, "per_channel_scale1", None) is not None:
            return f"{path} adds noise, which would differ in every strip."
    try:
        halos(vae, axis)
    except ValueError as error:
        return str(error)
    return None


def halos(vae: nn.Module, axis: int) -> dict[nn.Module, Halo]:
    """The halos of a VAE's convolutions that look beyond a strip.

    Raises:
        ValueError: A convolution cannot be sharded.
    """
    pairs = (AHEAD[kind(module)](module, axis) for module in vae.modules() if kind(module) in AHEAD)
    ahead = dict(pair for pair in pairs if pair is not None)
    found = {}
    for path, module in vae.named_modules():
        if kind(module) not in CONVOLUTIONS:
            continue
        conv: Any = module
        if getattr(conv, "pad_mode", "constant") != "constant" or conv.padding_mode == "circular":
            raise ValueError(f"{path} pads with rows beyond its neighbours' strips.")
        reach, stride = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1, conv.stride[axis]
        before = ahead.get(conv, conv.padding[axis])
        if conv not in ahead and not 0 < reach - 2 * before <= stride:
            raise ValueError(f"{path} changes the picture's size by another factor than its stride.")
        halo = Halo(before, max(reach - stride - before, 0), conv in ahead)
        if halo.before or halo.after:
            found[module] = halo
    return found


def stride(vae: Any, axis: int) -> int:
    """The number of a picture's rows (or columns) that make one row (or column) of latents."""
    found = 1
    for module in (vae, *vae.encoder.modules()):
        if kind(module) in CONVOLUTIONS:
            found *= module.stride[axis]
        elif kind(module) in STRIDES:
            found *= STRIDES[kind(module)](module, axis)
    return found


def _behind_padding(layers: Any) -> tuple[nn.Module, int] | None:
    return (layers[1], 0) if isinstance(layers, nn.Sequential) and kind(layers[0]) == "ZeroPad2d" else None
