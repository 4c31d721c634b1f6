"""NVIDIA ModelOpt's layout of quantized weights: what a file says of each layer, and the layers made from it.

A transformer's folder is a stock one, but for two things: `config.json` holds a `quantization_config` with
`"quant_method": "modelopt"`, and a quantized layer's tensors are its low-bit `weight` beside scales. A single file says
the same in its header's metadata, under `quantization_config`, or layer by layer under `_quantization_metadata`.

| algorithm | weight | weight_scale | weight_scale_2 | more |
|---|---|---|---|---|
| FP8 | e4m3 | one | | input_scale, if activations have a fixed one |
| FP8_BLOCK_SCALES (fp8_pb_wo, fp8_pb_real) | e4m3 | one per 128 x 128; also named weight_scale_inv | | |
| NVFP4 | uint8, two values to a byte | e4m3, one per 16 features | one | input_scale, pre_quant_scale |
| NVFP4_SVD | the same | the same | one | svdquant_lora_a, svdquant_lora_b |
| MIXED_PRECISION | by layer: `quantized_layers` | | | |

What a layer is, is told by its own tensors; what the configuration says must agree. Everything is judged before a model
is built.
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

# ModelOpt's names of algorithms -> the family of layers.
_FAMILIES = {
    "FP8": "fp8",
    "FP8_BLOCK_SCALES": "fp8-block",
    "FP8_PB_WO": "fp8-block",
    "FP8_PB_REAL": "fp8-block",
    "NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "NVFP4_SVD": "svdq-nvfp4",
    "W4A16_NVFP4": "nvfp4",
}
_PARTS = (
    "weight", "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "pre_quant_scale",
    "svdquant_lora_a", "svdquant_lora_b",
)  # fmt: skip


class CheckpointError(AccelError, ValueError):
    """A quantized checkpoint that cannot be read: what it says and what it holds do not agree."""


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says of its quantization.

    Attributes:
        family: Of every layer that nothing else is said of; `None` for MIXED_PRECISION.
        layers: Layer -> family, where it is said by layer.
        ignore: Globs of layers that are not quantized.
        dynamic: Whether activations are scaled as they come.
        raw: As it stands in the file.
    """

    family: str | None
    layers: Mapping[str, str]
    ignore: tuple[str, ...]
    dynamic: bool
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str) -> Quantization:
        """From a `quantization_config`.

        Raises:
            CheckpointError: It is another method's, or names an algorithm that is not known here.
        """
        values = _mapping(values, f"{source}: quantization_config")
        method = values.get("quant_method", "modelopt")
        if isinstance(method, str) and method != "modelopt":
            raise CheckpointError(f"{source}: quantized by {method!r}; only ModelOpt's checkpoints can be read here.")
        try:
            said = _Said(**{key: values[key] for key in _Said.__dataclass_fields__ if key in values})
        except ConfigError as error:
            raise CheckpointError(f"{source}: {error}") from error
        algo = said.quant_algo.upper()
        if algo == "MIXED_PRECISION":
            layers = {}
            for name, layer in (said.quantized_layers or {}).items():
                where = f"{source}: quantization_config.quantized_layers[{name!r}]"
                layers[name] = _family(_mapping(layer, where).get("quant_algo"), where)
            family = None
        else:
            layers, family = {}, _family(algo, source)
        dynamic = said.dynamic
        if said.config_groups:
            flags = []
            for name, group in said.config_groups.items():
                where = f"{source}: quantization_config.config_groups[{name!r}]"
                activations = _mapping(group, where).get("input_activations")
                activations = _mapping({} if activations is None else activations, f"{where}.input_activations")
                flags.append(activations.get("dynamic", False))
                if not isinstance(flags[-1], bool):
                    raise CheckpointError(
                        f"{where}.input_activations.dynamic: expected true or false, got {shown(flags[-1])}."
                    )
            dynamic = all(flags)
        return cls(family, layers, said.ignore or (), dynamic, dict(values))


@dataclass(frozen=True, kw_only=True)
class _Said(Section):
    """The fields of a `quantization_config` that are read; it has others, which say nothing of how to read tensors."""

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


def _family(algo: Any, source: str) -> str:
    if not isinstance(algo, str) or algo.upper() not in _FAMILIES:
        raise CheckpointError(
            f"{source}: the algorithm {shown(plain(algo))} is not known here. "
            f"Known: {', '.join(_FAMILIES)}, MIXED_PRECISION."
        )
    return _FAMILIES[algo.upper()]


def read_quantization(folder: Path) -> Quantization | None:
    """What a model's folder says of its quantization, or `None` if it says nothing."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{str(folder)!r} holds no config.json: it is no model's folder.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(file)!r} is not JSON: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror}.") from error
    values = _mapping(config, str(file)).get("quantization_config")
    return None if values is None or values == {} else Quantization.read(values, str(file))


# Formats of `_quantization_metadata` -> the family of layers.
_FILE_FORMATS = {"float8_e4m3fn": "fp8", "nvfp4": "nvfp4"}


def read_file_quantization(file: Path) -> Quantization | None:
    """What a safetensors file says of its quantization in its header, or `None` if it says nothing.

    Raises:
        CheckpointError: It is no safetensors file, or what it says cannot be read.
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
        raise CheckpointError(f"{str(file)!r}: its header's quantization is not JSON: {error}.") from error
    if whole is not None and whole != {}:
        return Quantization.read(whole, str(file))
    if by_layer is None or by_layer == {}:
        return None
    layers, where = {}, f"{str(file)!r}: _quantization_metadata"
    for name, layer in _mapping(_mapping(by_layer, where).get("layers", {}), f"{where}.layers").items():
        kind = _mapping(layer, f"{where}.layers[{name!r}]").get("format")
        if not isinstance(kind, str) or kind not in _FILE_FORMATS:
            raise CheckpointError(
                f"{str(file)!r}, {name}: the format {shown(kind)} is not known here. Known: {', '.join(_FILE_FORMATS)}."
            )
        layers[name] = _FILE_FORMATS[kind]
    return Quantization(None, layers, (), True, by_layer)


def split(
    tensors: Mapping[str, torch.Tensor], quantization: Quantization
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The quantized layers' tensors by layer, and all others by name.

    Raises:
        CheckpointError: A layer lacks a scale or has one of another shape, or a scale is not a positive number.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "weight" and tensor.dtype in (torch.float8_e4m3fn, torch.uint8):
            layers[layer] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in layers and part in _PARTS:
            layers[layer]["weight_scale" if part == "weight_scale_inv" else part] = tensor
        else:
            rest[name] = tensor
    for name in layers:
        if any(fnmatchcase(name, glob) for glob in quantization.ignore):
            raise CheckpointError(f"{name}: the configuration ignores it, and its weight is quantized.")
    return {name: _checked(name, parts, quantization) for name, parts in layers.items()}, rest


def _checked(name: str, parts: dict[str, torch.Tensor], quantization: Quantization) -> dict[str, torch.Tensor]:
    weight, scale = parts["weight"], parts.get("weight_scale")
    packed = weight.dtype == torch.uint8
    if weight.ndim != 2:
        raise CheckpointError(f"{name}.weight: two dimensions, not {tuple(weight.shape)}.")
    said = quantization.layers.get(name, quantization.family)
    if said is not None and packed != ("nvfp4" in said):
        raise CheckpointError(f"{name}: the configuration says {said}, and the weight is {weight.dtype}.")
    if scale is None:
        raise CheckpointError(f"{name}: its weight is quantized, and there is no weight_scale.")
    rows, columns = weight.shape[0], weight.shape[1] * (2 if packed else 1)
    if scale.ndim == 4:  # block scales with dimensions of one in between
        scale = parts["weight_scale"] = scale.squeeze(3).squeeze(1)
    blocks = (-(-rows // 128), -(-columns // 128))
    expected = [(rows, columns // 16)] if packed else [(), (1,), blocks]
    if tuple(scale.shape) not in expected:
        wanted = " or ".join(map(str, expected))
        raise CheckpointError(f"{name}.weight_scale: shape {wanted}, not {tuple(scale.shape)}.")
    if packed and "weight_scale_2" not in parts:
        raise CheckpointError(f"{name}: NVFP4, and there is no weight_scale_2.")
    for part in ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"):
        if part in parts and not (parts[part].float().isfinite() & (parts[part].float() >= 0)).all():
            raise CheckpointError(f"{name}.{part}: a scale that is negative or not a number.")
    low_rank = [parts[part] for part in ("svdquant_lora_b", "svdquant_lora_a") if part in parts]
    if low_rank and (
        len(low_rank) != 2 or low_rank[0].shape != (rows, low_rank[1].shape[0]) or low_rank[1].shape[1] != columns
    ):
        raise CheckpointError(f"{name}: its low-rank branch is not (out, rank) and (rank, in).")
    return parts
