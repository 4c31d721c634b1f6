"""Pipelines from quantized checkpoints: the stock class, with its denoiser built on the meta device and filled layer by
layer, so that its stock weights are never held.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels.linear import QuantizedLinear, RoundedOnce
from ..kernels.linear.eight_bit import Fp8BlockLinear, Fp8TensorLinear
from ..kernels.linear.four_bit import Nvfp4Linear, SvdNvfp4Linear
from .modelopt import CheckpointError, Quantization, read_file_quantization, read_quantization, split


def from_pretrained(
    path: str | Path, *, dtype: torch.dtype = torch.bfloat16, dynamic: bool | None = None, **arguments: Any
) -> Any:
    """Loads a pipeline whose models may be quantized in NVIDIA ModelOpt's layout.

    Args:
        path: A pipeline's folder, or its id on the Hugging Face Hub.
        dtype: Of everything that is not quantized.
        dynamic: Whether activations are scaled as they come, whatever the checkpoint says; `False` wants the scales
            that it holds.
        arguments: As `DiffusionPipeline.from_pretrained` takes them. A model may be given as the path of a single
            quantized file too, `transformer="model.safetensors"`, with diffusers' names of layers; its configuration is
            that of the folder.

    Returns:
        The stock pipeline, on the host. `accelerate` takes it like any other; its linear layers are quantized already.

    Raises:
        CheckpointError: A quantized model cannot be read: the message names the layer and what is wrong with it.
    """
    import diffusers

    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(path)))
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{str(folder)!r} holds no model_index.json: it is no pipeline's folder.")
    components: dict[str, Any] = {}
    entries = json.loads(index.read_text(encoding="utf-8"))
    for name, entry in entries.items():
        if not isinstance(entry, list) or not (folder / name / "config.json").is_file():
            continue
        given = arguments.get(name)
        if isinstance(given, (str, Path)):
            components[name] = load_file_model(Path(arguments.pop(name)), folder / name, dtype, dynamic)
        elif name not in arguments and entry[0] == "diffusers" and read_quantization(folder / name) is not None:
            components[name] = load_model(folder / name, dtype, dynamic)
    # The class itself: through the base class, a component that is optional in it would be loaded all the same.
    kind = getattr(diffusers, str(entries.get("_class_name")), diffusers.DiffusionPipeline)
    return kind.from_pretrained(folder, dtype=dtype, **components, **arguments)


def load_model(folder: Path, dtype: torch.dtype, dynamic: bool | None = None) -> nn.Module:
    """A quantized model from its folder; see `from_pretrained`.

    Raises:
        CheckpointError: It cannot be read.
    """
    quantization = read_quantization(folder)
    if quantization is None:
        raise CheckpointError(f"{str(folder)!r}: its config.json has no quantization_config.")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{str(folder)!r} holds no safetensors file.")
    return _model(folder, files, quantization, dtype, dynamic)


def load_file_model(file: Path, folder: Path, dtype: torch.dtype, dynamic: bool | None = None) -> nn.Module:
    """A quantized model from a single file, and the configuration in a folder; see `from_pretrained`.

    Raises:
        CheckpointError: It cannot be read.
    """
    quantization = read_file_quantization(file)
    if quantization is None:
        raise CheckpointError(f"{str(file)!r}: its header says nothing of a quantization.")
    return _model(folder, [file], quantization, dtype, dynamic)


def _model(
    folder: Path, files: list[Path], quantization: Quantization, dtype: torch.dtype, dynamic: bool | None
) -> nn.Module:
    from accelerate import init_empty_weights

    if dynamic is not None:
        quantization = replace(quantization, dynamic=dynamic)
    layers, rest = split(_tensors(files), quantization)
    source = str(folder if len(files) > 1 else files[0])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = getattr(importlib.import_module("diffusers"), config["_class_name"], None)
    if kind is None:
        raise CheckpointError(f"{str(folder)!r}: diffusers has no class {config['_class_name']!r}.")
    config.pop("quantization_config", None)
    with init_empty_weights():
        model = kind.from_config(config)
    modules = dict(model.named_modules())
    _refuse_unknown(modules, layers, rest)
    wide = getattr(kind, "_keep_in_fp32_modules", None) or ()
    rounded_once = RoundedOnce()
    for name, parts in layers.items():
        linear = modules[name]
        linear.weight.data = linear.weight.data.to(dtype)
        parent, _, child = name.rpartition(".")
        layer = _layer(linear, name, parts, quantization)
        layer.rounded_once = rounded_once
        modules[parent]._modules[child] = layer
    for name, tensor in rest.items():
        holder, _, attribute = name.rpartition(".")
        owner = model.get_submodule(holder)
        expected = owner._parameters.get(attribute, owner._buffers.get(attribute))
        if expected is not None and tensor.shape != expected.shape:
            raise CheckpointError(f"{name}: shape {tuple(tensor.shape)}; the model wants {tuple(expected.shape)}.")
        if attribute in owner._parameters and (not tensor.is_floating_point() or tensor.dtype.itemsize < 2):
            raise CheckpointError(f"{name}: {tensor.dtype} is none of the types of ModelOpt's layout.")
        keep = any(part in name.split(".") for part in wide)
        value = tensor.to(dtype) if tensor.is_floating_point() and not keep else tensor
        if attribute in owner._parameters:
            setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
        else:
            owner._buffers[attribute] = value
    left = [name for name, item in model.named_parameters() if item.is_meta]
    for path, module in model.named_modules():
        lasting = set(module._buffers) - module._non_persistent_buffers_set
        left += [name for name in (f"{path}.{key}".lstrip(".") for key in lasting) if name not in rest]
    if left:
        raise CheckpointError(f"{source!r}: {len(left)} tensors are missing, {left[0]} among them.")
    return model.eval()


def _layer(linear: Any, name: str, parts: Mapping[str, torch.Tensor], quantization: Quantization) -> QuantizedLinear:
    """A layer from its tensors."""
    weight, scale = parts["weight"], parts["weight_scale"]
    shape = (weight.shape[0], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1))
    if shape != (linear.out_features, linear.in_features):
        raise CheckpointError(f"{name}: a weight of {shape}; the model wants {tuple(linear.weight.shape)}.")
    stored = {"weight_data": weight}
    if "pre_quant_scale" in parts:
        stored["pre_quant_scale"] = parts["pre_quant_scale"].float().reshape(-1)
    if weight.dtype == torch.uint8:
        stored |= {"weight_scale": scale, "weight_scale_2": parts["weight_scale_2"].float().reshape(1)}
        kind: type[QuantizedLinear] = Nvfp4Linear
        if "svdquant_lora_a" in parts:
            stored |= {key: parts[key].to(linear.weight.dtype) for key in ("svdquant_lora_a", "svdquant_lora_b")}
            kind = SvdNvfp4Linear
    elif scale.ndim == 2:
        stored |= Fp8BlockLinear.stored(weight, scale.float())
        kind = Fp8BlockLinear
    else:
        stored["weight_scale"] = scale.float().reshape(1)
        if not quantization.dynamic:
            if "input_scale" not in parts:
                raise CheckpointError(
                    f"{name}: its activations are to have a fixed scale, and there is no input_scale. dynamic=True "
                    "finds one at every call."
                )
            stored["input_scale"] = parts["input_scale"].float().reshape(1)
        kind = Fp8TensorLinear
    return kind.holding(linear, stored)


def _tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors of safetensors files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(file)!r} cannot be read: {error}. Was it downloaded in full?") from error
    return tensors


def _refuse_unknown(modules: Mapping[str, Any], layers: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
    for name in layers:
        if type(modules.get(name)) is not nn.Linear:
            raise CheckpointError(f"{name}: quantized in the checkpoint, and no linear layer of the model.")
    for name in rest:
        holder, _, attribute = name.rpartition(".")
        owner = modules.get(holder)
        if owner is None or attribute not in {**owner._parameters, **owner._buffers}:
            raise CheckpointError(f"{name}: the model has no such tensor.")
