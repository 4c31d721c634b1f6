"""NVIDIA ModelOpt's layout of quantized weights: the configuration of the quantization, and the tensors of each layer.

A quantized model's folder differs from a stock one in two things. Its `config.json` holds a `quantization_config` with
`"quant_method": "modelopt"`. A quantized layer's tensors are a low-bit `weight` and its scales. A single file holds the
configuration in the metadata of its header: under `quantization_config`, or by layer under `_quantization_metadata`.

| algorithm | weight | weight_scale | weight_scale_2 | more |
|---|---|---|---|---|
| FP8 | e4m3 | one | | input_scale, if activations have a calibrated scale |
| FP8_BLOCK_SCALES (fp8_pb_wo, fp8_pb_real) | e4m3 | one per 128 x 128; also named weight_scale_inv | | |
| NVFP4 | uint8, two values to a byte | e4m3, one per 16 features | one | input_scale, pre_quant_scale |
| NVFP4_SVD | as NVFP4 | as NVFP4 | one | svdquant_lora_a, svdquant_lora_b |
| MIXED_PRECISION | by layer: `quantized_layers` | | | |

A layer's tensors decide its format, and the configuration must agree with them. All checks come before a model is
built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..config.fields import REQUIRED, Section, option, plain
from ..errors import AccelError, ConfigError, shown

# ModelOpt's name of an algorithm -> name of the linear format.
_FORMATS = {
    "FP8": "fp8",
    "FP8_BLOCK_SCALES": "fp8-block",
    "FP8_PB_WO": "fp8-block",
    "FP8_PB_REAL": "fp8-block",
    "NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "NVFP4_SVD": "svdq-nvfp4",
    "W4A16_NVFP4": "nvfp4",
}
# Suffixes of a quantized layer's tensors.
_SUFFIXES = (
    "weight", "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "pre_quant_scale",
    "svdquant_lora_a", "svdquant_lora_b",
)  # fmt: skip

# The way out of tensors that contradict each other.
_REWRITE = "Download or quantize the checkpoint again."


class CheckpointError(AccelError, ValueError):
    """A quantized checkpoint that cannot be read. The message names the file or layer, the reason and the way out."""


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's statements about its quantization.

    Attributes:
        default: Format of every layer that `layers` does not list; `None` for MIXED_PRECISION.
        layers: Layer -> format, where the configuration lists layers.
        ignore: Globs of layers that are not quantized.
        dynamic: Whether the scales of activations are computed at every call; calibrated scales otherwise.
        raw: The mapping in the file.
    """

    default: str | None
    layers: Mapping[str, str]
    ignore: tuple[str, ...]
    dynamic: bool
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str) -> Quantization:
        """Reads a `quantization_config`.

        Args:
            values: The mapping in the file.
            source: File, for messages.

        Raises:
            CheckpointError: The configuration is another method's, names an unknown algorithm, or has a field of a
                wrong type.
        """
        values = _mapping(values, f"{source}: quantization_config")
        method = values.get("quant_method", "modelopt")
        if isinstance(method, str) and method != "modelopt":
            raise CheckpointError(
                f"{source}: quantized by {method!r}; only ModelOpt's checkpoints are supported. Instead: "
                "the stock model, and accelerate(pipe, linear=...)."
            )
        try:
            fields = _Fields(**{key: values[key] for key in _Fields.__dataclass_fields__ if key in values})
        except ConfigError as error:
            raise CheckpointError(f"{source}: {error}") from error
        algo = fields.quant_algo.upper()
        if algo == "MIXED_PRECISION":
            layers = {}
            for name, layer in (fields.quantized_layers or {}).items():
                where = f"{source}: quantization_config.quantized_layers[{name!r}]"
                layers[name] = _format(_mapping(layer, where).get("quant_algo"), where)
            default = None
        else:
            layers, default = {}, _format(algo, source)
        dynamic = fields.dynamic
        if fields.config_groups:
            flags = []
            for name, group in fields.config_groups.items():
                where = f"{source}: quantization_config.config_groups[{name!r}]"
                activations = _mapping(group, where).get("input_activations")
                activations = _mapping({} if activations is None else activations, f"{where}.input_activations")
                flags.append(activations.get("dynamic", False))
                if not isinstance(flags[-1], bool):
                    raise CheckpointError(
                        f"{where}.input_activations.dynamic: expected true or false, got {shown(flags[-1])}."
                    )
            dynamic = all(flags)
        return cls(default, layers, fields.ignore or (), dynamic, dict(values))


@dataclass(frozen=True, kw_only=True)
class _Fields(Section):
    """The fields of a `quantization_config` that this package reads. Its other fields do not concern the tensors."""

    quant_method: str = option("modelopt", "Whose layout it is.", choices=("modelopt",))
    quant_algo: str = option(REQUIRED, "The algorithm of every layer, or MIXED_PRECISION.")
    ignore: tuple[str, ...] | None = option(None, "Globs of layers that are not quantized.")
    dynamic: bool = option(True, "Whether activations are scaled as they come.")
    quantized_layers: dict[str, Any] | None = option(
        None,
        "Layer -> its settings, for MIXED_PRECISION.",
        key_kind="names",
        expected="a mapping of names to mappings",
    )
    config_groups: dict[str, Any] | None = option(
        None, "Layers that are quantized alike.", key_kind="names", expected="a mapping of names to mappings"
    )

    section: ClassVar[str] = "quantization_config"


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: expected a mapping, got {shown(value)}.")
    return value


def _format(algo: Any, source: str) -> str:
    if not isinstance(algo, str) or algo.upper() not in _FORMATS:
        raise CheckpointError(
            f"{source}: the algorithm {shown(plain(algo))} is not known. Known: {', '.join(_FORMATS)}, MIXED_PRECISION."
        )
    return _FORMATS[algo.upper()]


def read_quantization(folder: Path) -> Quantization | None:
    """The quantization of a model's folder, from its `config.json`; `None` if the model is not quantized.

    Raises:
        CheckpointError: The file is missing or is not JSON, or the configuration cannot be read.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{str(folder)!r} holds no config.json, so it is no model's folder. Give the folder of one model."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(file)!r} is not JSON: {error}. Was it downloaded in full?") from error
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror}. Check its permissions.") from error
    values = _mapping(config, str(file)).get("quantization_config")
    return None if values is None or values == {} else Quantization.read(values, str(file))


# Name of a format in `_quantization_metadata` -> name of the linear format.
_METADATA_FORMATS = {"float8_e4m3fn": "fp8", "nvfp4": "nvfp4"}


def read_file_quantization(file: Path) -> Quantization | None:
    """The quantization of a safetensors file, from the metadata in its header; `None` if there is none.

    Raises:
        CheckpointError: It is no safetensors file, or its metadata cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}. Was it downloaded in full?") from error
    try:
        whole, by_layer = (
            json.loads(metadata.get(key) or "null") for key in ("quantization_config", "_quantization_metadata")
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(file)!r}: the quantization in its header is not JSON: {error}. Download it again."
        ) from error
    if whole is not None and whole != {}:
        return Quantization.read(whole, str(file))
    if by_layer is None or by_layer == {}:
        return None
    layers, where = {}, f"{str(file)!r}: _quantization_metadata"
    for name, layer in _mapping(_mapping(by_layer, where).get("layers", {}), f"{where}.layers").items():
        name_in_file = _mapping(layer, f"{where}.layers[{name!r}]").get("format")
        if not isinstance(name_in_file, str) or name_in_file not in _METADATA_FORMATS:
            raise CheckpointError(
                f"{str(file)!r}, {name}: the format {shown(name_in_file)} is not known. "
                f"Known: {', '.join(_METADATA_FORMATS)}."
            )
        layers[name] = _METADATA_FORMATS[name_in_file]
    return Quantization(None, layers, (), True, by_layer)


def split(
    tensors: Mapping[str, torch.Tensor], quantization: Quantization
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Splits a checkpoint's tensors into tensors of quantized layers and all others.

    Args:
        tensors: Name -> tensor.
        quantization: The checkpoint's statements about its quantization.

    Returns:
        Layer -> suffix -> tensor, and name -> tensor of all others.

    Raises:
        CheckpointError: A layer lacks a scale, a tensor has a wrong shape, a scale is negative or not finite, or the
            configuration disagrees with the tensors.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight" and tensor.dtype in (torch.float8_e4m3fn, torch.uint8):
            layers[layer] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers and suffix in _SUFFIXES:
            layers[layer]["weight_scale" if suffix == "weight_scale_inv" else suffix] = tensor
        else:
            rest[name] = tensor
    for name in layers:
        if any(fnmatchcase(name, glob) for glob in quantization.ignore):
            raise CheckpointError(
                f"{name}: the configuration ignores it, and its weight is quantized. Remove it from `ignore` in the "
                "quantization_config."
            )
    return {name: _checked(name, own, quantization) for name, own in layers.items()}, rest


def _checked(name: str, tensors: dict[str, torch.Tensor], quantization: Quantization) -> dict[str, torch.Tensor]:
    """The tensors of one layer, suffix -> tensor, after checks of dtypes, shapes and scales."""
    weight, scale = tensors["weight"], tensors.get("weight_scale")
    packed = weight.dtype == torch.uint8
    if weight.ndim != 2:
        raise CheckpointError(f"{name}.weight: two dimensions, not {tuple(weight.shape)}. {_REWRITE}")
    expected_format = quantization.layers.get(name, quantization.default)
    if expected_format is not None and packed != ("nvfp4" in expected_format):
        raise CheckpointError(
            f"{name}: the configuration says {expected_format}, and the weight is {weight.dtype}. Is it the "
            "config.json of this checkpoint?"
        )
    if scale is None:
        raise CheckpointError(f"{name}: its weight is quantized, and there is no weight_scale. {_REWRITE}")
    rows, columns = weight.shape[0], weight.shape[1] * (2 if packed else 1)
    if scale.ndim == 4:  # block scales with dimensions of size one in between
        scale = tensors["weight_scale"] = scale.squeeze(3).squeeze(1)
    blocks = (-(-rows // 128), -(-columns // 128))
    expected = [(rows, columns // 16)] if packed else [(), (1,), blocks]
    if tuple(scale.shape) not in expected:
        wanted = " or ".join(map(str, expected))
        raise CheckpointError(f"{name}.weight_scale: shape {wanted}, not {tuple(scale.shape)}. {_REWRITE}")
    if packed and "weight_scale_2" not in tensors:
        raise CheckpointError(f"{name}: its weight is NVFP4, and there is no weight_scale_2. {_REWRITE}")
    for suffix in ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"):
        if suffix in tensors and not (tensors[suffix].float().isfinite() & (tensors[suffix].float() >= 0)).all():
            raise CheckpointError(f"{name}.{suffix}: a scale that is negative or not a number. {_REWRITE}")
    low_rank = [tensors[suffix] for suffix in ("svdquant_lora_b", "svdquant_lora_a") if suffix in tensors]
    if low_rank and (
        len(low_rank) != 2 or low_rank[0].shape != (rows, low_rank[1].shape[0]) or low_rank[1].shape[1] != columns
    ):
        raise CheckpointError(
            f"{name}: svdquant_lora_b and svdquant_lora_a are not (out, rank) and (rank, in). {_REWRITE}"
        )
    return tensors
