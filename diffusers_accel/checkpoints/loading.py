"""Loading of stock pipelines from quantized checkpoints.

A quantized model is built on the meta device, with quantized layers in place of stock layers, and filled from the
files. So the stock weights are never in memory. The other components are loaded by diffusers. All checks of the
configuration and the tensors come before a model is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compat.diffusers_private import CLASS_NAME, float32_modules
from ..compat.torch_private import buffers_of, children_of, non_persistent_buffers_of, parameters_of
from ..errors import nearest
from ..kernels.linear import ActivationCache, QuantizedLinear
from ..kernels.linear.eight_bit import Fp8BlockLinear, Fp8TensorLinear
from ..kernels.linear.four_bit import Nvfp4Linear, SvdNvfp4Linear
from .files import as_modelopt, check_file, has_original_names, is_scaled, read_json, read_tensors, weight_files
from .modelopt import CheckpointError, Quantization, read_file_quantization, read_quantization, split

# Arguments of diffusers' `from_pretrained` for downloads from the hub.
_HUB_ARGUMENTS = (
    "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "variant", "use_safetensors",
    "custom_pipeline", "custom_revision", "trust_remote_code", "load_connected_pipeline",
)  # fmt: skip


def from_pretrained(
    path: str | Path, *, dtype: Any = torch.bfloat16, dynamic: bool | None = None, **arguments: Any
) -> Any:
    """Loads a pipeline whose models may be quantized: `diffusers_accel.from_pretrained` without `offload`.

    Args:
        path: Folder of a pipeline, or its id on the Hugging Face Hub.
        dtype: Dtype of all tensors that are not quantized, or a mapping from component names to dtypes.
        dynamic: Whether scales of activations are computed at every call; `None` follows the checkpoint.
        arguments: Arguments of `DiffusionPipeline.from_pretrained`. A model may be given as a single quantized file.

    Returns:
        The stock pipeline, on the host, with quantized linear layers.

    Raises:
        CheckpointError: A quantized model cannot be read. The message names the file or layer, and the reason.
    """
    import diffusers

    dtype = arguments.pop("torch_dtype", dtype)
    folder = _folder(path, arguments)
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no model_index.json, so it is no pipeline's folder. Give the folder that holds the "
            "components."
        )
    components: dict[str, Any] = {}
    entries = read_json(index)
    names = [name for name, entry in entries.items() if isinstance(entry, list)]
    for name in [name for name, given in arguments.items() if name not in _HUB_ARGUMENTS and _is_file(given)]:
        if name not in names:
            raise CheckpointError(
                f"{name}={str(arguments[name])!r}: the pipeline has no such component in {str(index)!r}. "
                f"{nearest(name, names)}"
            )
        if not (folder / name / "config.json").is_file():
            raise CheckpointError(
                f"{name}={str(arguments[name])!r}: {str(folder / name)!r} holds no config.json, from which the model "
                "is built. Give a pipeline's folder that has one."
            )
    for name in names:
        if not (folder / name / "config.json").is_file():
            continue
        model_dtype = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, Mapping) else dtype
        if isinstance(arguments.get(name), (str, Path)):
            components[name] = load_file_model(Path(arguments.pop(name)), folder / name, model_dtype, dynamic)
        elif name in arguments or entries[name][0] != "diffusers":
            continue
        elif read_quantization(folder / name) is not None:
            components[name] = load_model(folder / name, model_dtype, dynamic, arguments.get("variant"))
    # The pipeline's own class: the base class would load components that are optional in it.
    kind = getattr(diffusers, str(entries.get(CLASS_NAME)), diffusers.DiffusionPipeline)
    return kind.from_pretrained(folder, dtype=dtype, **components, **arguments)


def _folder(path: str | Path, arguments: dict[str, Any]) -> Path:
    """The pipeline's folder, downloaded from the hub if there is no local one.

    Args:
        path: A local folder, or an id on the hub.
        arguments: Those of `from_pretrained`; `subfolder` is removed.

    Raises:
        CheckpointError: There is no such folder, or it could not be downloaded.
    """
    import diffusers
    from huggingface_hub import snapshot_download

    subfolder, folder = arguments.pop("subfolder", None) or "", Path(path).expanduser()
    if folder.is_file():
        check_file(folder)
        raise CheckpointError(
            f"{str(path)!r} is the file of one model. Give its pipeline's folder or id, and the file as that model: "
            f"from_pretrained(PIPELINE, transformer={str(path)!r})."
        )
    if folder.is_dir():
        return folder / subfolder
    if str(path).count("/") > 1 or str(path).startswith((".", "~", "/")) or _is_file(path):
        raise CheckpointError(f"There is no folder {str(path)!r}. Give a pipeline's folder, or an id on the hub.")
    hub = {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}
    try:
        if subfolder:
            given = {name: item for name, item in hub.items() if name in _HUB_ARGUMENTS[:6]}
            return Path(snapshot_download(str(path), allow_patterns=[f"{subfolder}/*"], **given)) / subfolder
        # A component that is given as an object is not downloaded.
        objects = {name: item for name, item in arguments.items() if not isinstance(item, (str, Path))}
        return Path(diffusers.DiffusionPipeline.download(str(path), **{**objects, **hub}))
    except (OSError, ValueError) as error:  # no such repository or revision, no access, no network, no valid name
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{str(path)!r} is no local folder, and could not be downloaded: {reason} Give a folder, or an id "
            "on the hub that you have access to."
        ) from error


def _is_file(given: Any) -> bool:
    """Whether an argument is the path of a weights file."""
    return isinstance(given, (str, Path)) and bool(
        isinstance(given, Path) or Path(given).suffix in (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
    )


def load_model(folder: Path, dtype: torch.dtype, dynamic: bool | None = None, variant: str | None = None) -> nn.Module:
    """A quantized model from its folder.

    Args:
        folder: Folder with `config.json` and safetensors files.
        dtype: Dtype of all tensors that are not quantized.
        dynamic: Overrides the configuration: `True` computes the scales of activations at every call, `False` uses
            calibrated ones.
        variant: Variant in the file names.

    Raises:
        CheckpointError: The configuration says nothing of a quantization, or a file or tensor cannot be read.
    """
    quantization = read_quantization(folder)
    if quantization is None:
        raise CheckpointError(
            f"{str(folder)!r}: its config.json has no quantization_config, so the model is not quantized. Instead: "
            "from_pretrained of its diffusers class."
        )
    files = weight_files(folder, variant)
    source = str(folder if len(files) > 1 else files[0])
    return _model(folder, source, read_tensors(files), quantization, dtype, dynamic)


def load_file_model(file: Path, folder: Path, dtype: torch.dtype, dynamic: bool | None = None) -> nn.Module:
    """A quantized model from a single file.

    Args:
        file: A safetensors file.
        folder: Folder with the model's `config.json`.
        dtype: Dtype of all tensors that are not quantized.
        dynamic: Overrides the file: `True` computes the scales of activations at every call, `False` uses calibrated
            ones.

    Raises:
        CheckpointError: The file says nothing of a quantization, or a tensor cannot be read.
    """
    tensors = read_tensors([file])
    if is_scaled(tensors):
        quantization: Quantization | None = Quantization("fp8", {}, (), True, {})
        tensors = as_modelopt(tensors)
    else:
        quantization = read_file_quantization(file)
    if quantization is None:
        low = next((name for name, item in tensors.items() if item.dtype.itemsize == 1), None)
        reason = "its header says nothing of a quantization"
        if low is not None:
            reason += f", and {low} is {tensors[low].dtype} without a scale"
        raise CheckpointError(
            f"{str(file)!r}: {reason}. Instead: from_single_file({str(file)!r}) of the model's class, and the model "
            "object as the argument; accelerate(pipe, linear=...) quantizes it."
        )
    return _model(folder, str(file), tensors, quantization, dtype, dynamic)


def _model(
    folder: Path,
    source: str,
    tensors: Mapping[str, torch.Tensor],
    quantization: Quantization,
    dtype: torch.dtype,
    dynamic: bool | None,
) -> nn.Module:
    """Builds a model on the meta device and fills it.

    Args:
        folder: Folder with the model's `config.json`.
        source: File or folder of the tensors, for messages.
        tensors: All tensors under ModelOpt's names.
        quantization: The checkpoint's statements about its quantization.
        dtype: Dtype of all tensors that are not quantized.
        dynamic: Overrides `quantization.dynamic`; `None` does not.
    """
    from accelerate import init_empty_weights

    if dynamic is not None:
        quantization = replace(quantization, dynamic=dynamic)
    layers, rest = split(tensors, quantization)
    config = read_json(folder / "config.json")
    kind = getattr(importlib.import_module("diffusers"), str(config.get(CLASS_NAME)), None)
    if kind is None:
        raise CheckpointError(
            f"{str(folder)!r}: diffusers has no class {config.get(CLASS_NAME)!r}. Update diffusers, or correct "
            f"{CLASS_NAME} in config.json."
        )
    config.pop("quantization_config", None)
    with init_empty_weights():
        model = kind.from_config(config)
    modules = dict(model.named_modules())
    _refuse_unknown(modules, layers, rest, source)
    in_float32 = float32_modules(kind)
    activation_cache = ActivationCache()
    for name, layer_tensors in layers.items():
        linear = modules[name]
        linear.weight.data = linear.weight.data.to(dtype)
        parent, _, child = name.rpartition(".")
        layer = _layer(linear, name, layer_tensors, quantization)
        layer.activation_cache = activation_cache
        children_of(modules[parent])[child] = layer
    for name, tensor in rest.items():
        holder, _, attribute = name.rpartition(".")
        owner = model.get_submodule(holder)
        parameters, buffers = parameters_of(owner), buffers_of(owner)
        expected = parameters.get(attribute, buffers.get(attribute))
        if expected is not None and tensor.shape != expected.shape:
            raise CheckpointError(
                f"{name}: shape {tuple(tensor.shape)}; the model wants {tuple(expected.shape)}. Is it the config.json "
                "of this checkpoint?"
            )
        if attribute in parameters and (not tensor.is_floating_point() or tensor.dtype.itemsize < 2):
            raise CheckpointError(
                f"{name}: ModelOpt's layout has no {tensor.dtype} without scales. Only ModelOpt's layout is supported."
            )
        keep_dtype = any(part in name.split(".") for part in in_float32)
        value = tensor.to(dtype) if tensor.is_floating_point() and not keep_dtype else tensor
        if attribute in parameters:
            setattr(owner, attribute, nn.Parameter(value, requires_grad=False))
        else:
            buffers[attribute] = value
    missing = [name for name, item in model.named_parameters() if item.is_meta]
    for path, module in model.named_modules():
        persistent = set(buffers_of(module)) - non_persistent_buffers_of(module)
        missing += [name for name in (f"{path}.{key}".lstrip(".") for key in persistent) if name not in rest]
    if missing:
        raise CheckpointError(
            f"{source!r}: {len(missing)} tensors are missing, {missing[0]} among them. Was it downloaded in full?"
        )
    return model.eval()


def _layer(linear: Any, name: str, tensors: Mapping[str, torch.Tensor], quantization: Quantization) -> QuantizedLinear:
    """A quantized layer from ModelOpt's tensors.

    Args:
        linear: The stock layer, on the meta device.
        name: Its path, for messages.
        tensors: ModelOpt's suffix -> tensor, checked by `modelopt.split`.
        quantization: Tells whether activations have calibrated scales.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    shape = (weight.shape[0], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1))
    if shape != (linear.out_features, linear.in_features):
        raise CheckpointError(
            f"{name}: a weight of shape {shape}; the model wants {tuple(linear.weight.shape)}. Is it the config.json "
            "of this checkpoint?"
        )
    stored = {"weight_data": weight}
    if "pre_quant_scale" in tensors:
        stored["pre_quant_scale"] = tensors["pre_quant_scale"].float().reshape(-1)
    if weight.dtype == torch.uint8:
        stored |= {"weight_scale": scale, "weight_scale_2": tensors["weight_scale_2"].float().reshape(1)}
        kind: type[QuantizedLinear] = Nvfp4Linear
        if "svdquant_lora_a" in tensors:
            stored |= {key: tensors[key].to(linear.weight.dtype) for key in ("svdquant_lora_a", "svdquant_lora_b")}
            kind = SvdNvfp4Linear
    elif scale.ndim == 2:
        stored |= Fp8BlockLinear.padded(weight, scale.float())
        kind = Fp8BlockLinear
    else:
        stored["weight_scale"] = scale.float().reshape(1)
        if not quantization.dynamic:
            if "input_scale" not in tensors:
                raise CheckpointError(
                    f"{name}: its activations have a calibrated scale, and there is no input_scale. dynamic=True "
                    "computes scales at every call."
                )
            stored["input_scale"] = tensors["input_scale"].float().reshape(1)
        kind = Fp8TensorLinear
    return kind.from_tensors(linear, stored)


def _refuse_unknown(
    modules: Mapping[str, Any], layers: Mapping[str, Any], rest: Mapping[str, Any], source: str
) -> None:
    """Refuses tensors that the model has no place for."""
    unknown = [name for name in (*layers, *rest) if name.rpartition(".")[0] not in modules and name not in modules]
    if has_original_names(unknown):
        raise CheckpointError(
            f"{source!r} has the layer names of the model's original repository (e.g. {unknown[0]!r}), and only "
            "diffusers' names are supported. Instead: from_single_file(FILE) of the model's class, and the model "
            "object as the argument; accelerate(pipe, linear=...) quantizes it."
        )
    for name in layers:
        if type(modules.get(name)) is not nn.Linear:
            raise CheckpointError(
                f"{name}: quantized in the checkpoint, and the model has no such linear layer. Is it the config.json "
                "of this checkpoint?"
            )
    for name in rest:
        holder, _, attribute = name.rpartition(".")
        owner = modules.get(holder)
        if owner is None or attribute not in {**parameters_of(owner), **buffers_of(owner)}:
            raise CheckpointError(f"{name}: the model has no such tensor. Is it the config.json of this checkpoint?")
