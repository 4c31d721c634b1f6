"""Pipelines from quantized checkpoints: the stock class, with its denoiser built on the meta device and filled layer by
layer, so that its stock weights are never held.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import nearest
from ..kernels.linear import ActivationCache, QuantizedLinear
from ..kernels.linear.eight_bit import Fp8BlockLinear, Fp8TensorLinear
from ..kernels.linear.four_bit import Nvfp4Linear, SvdNvfp4Linear
from .files import as_modelopt, is_foreign_naming, is_scaled, judge_file, read_json, read_tensors, weight_files
from .modelopt import CheckpointError, Quantization, read_file_quantization, read_quantization, split

# Arguments of diffusers' `from_pretrained` that say where on the hub a pipeline is, and what of it is wanted.
_HUB = (
    "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "variant", "use_safetensors",
    "custom_pipeline", "custom_revision", "trust_remote_code", "load_connected_pipeline",
)  # fmt: skip


def from_pretrained(
    path: str | Path, *, dtype: Any = torch.bfloat16, dynamic: bool | None = None, **arguments: Any
) -> Any:
    """Loads a pipeline whose models may be quantized in NVIDIA ModelOpt's layout.

    Args:
        path: A pipeline's folder, or its id on the Hugging Face Hub.
        dtype: Of everything that is not quantized; or a mapping from components' names, as diffusers takes it.
        dynamic: Whether activations are scaled as they come, whatever the checkpoint says; `False` wants the scales
            that it holds.
        arguments: As `DiffusionPipeline.from_pretrained` takes them, those of the hub among them (`revision`, `token`,
            `cache_dir`, `local_files_only`, `variant`, ...); and `subfolder`, the pipeline's place in a folder or
            repository. A model may be given as the path of a single quantized file too,
            `transformer="model.safetensors"`, with diffusers' names of layers; its configuration is that of the folder.
            ComfyUI's scaled fp8 is read like ModelOpt's FP8.

    Returns:
        The stock pipeline, on the host. `accelerate` takes it like any other; its linear layers are quantized already.

    Raises:
        CheckpointError: A quantized model cannot be read: the message names the file or the layer, and what is wrong
            with it.
    """
    import diffusers

    dtype = arguments.pop("torch_dtype", dtype)
    folder = _folder(path, arguments)
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{str(folder)!r} holds no model_index.json: it is no pipeline's folder.")
    components: dict[str, Any] = {}
    entries = read_json(index)
    names = [name for name, entry in entries.items() if isinstance(entry, list)]
    for name in [name for name, given in arguments.items() if name not in _HUB and _is_file(given)]:
        if name not in names:
            raise CheckpointError(f"{name}={str(arguments[name])!r}: {str(index)!r} has none. {nearest(name, names)}")
        if not (folder / name / "config.json").is_file():
            raise CheckpointError(f"{name}={str(arguments[name])!r}: {str(folder / name)!r} holds no config.json.")
    for name in names:
        if not (folder / name / "config.json").is_file():
            continue
        own = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, Mapping) else dtype
        if isinstance(arguments.get(name), (str, Path)):
            components[name] = load_file_model(Path(arguments.pop(name)), folder / name, own, dynamic)
        elif name in arguments or entries[name][0] != "diffusers":
            continue
        elif read_quantization(folder / name) is not None:
            components[name] = load_model(folder / name, own, dynamic, arguments.get("variant"))
    # The class itself: through the base class, a component that is optional in it would be loaded all the same.
    kind = getattr(diffusers, str(entries.get("_class_name")), diffusers.DiffusionPipeline)
    return kind.from_pretrained(folder, dtype=dtype, **components, **arguments)


def _folder(path: str | Path, arguments: dict[str, Any]) -> Path:
    """The pipeline's folder, fetched from the hub if it is not here; takes `subfolder` out of the arguments."""
    import diffusers
    from huggingface_hub import snapshot_download

    inside, folder = arguments.pop("subfolder", None) or "", Path(path).expanduser()
    if folder.is_file():
        judge_file(folder)
        raise CheckpointError(
            f"{str(path)!r} is one model's file. Give its pipeline's folder or id, and the file as that model: "
            f"from_pretrained(PIPELINE, transformer={str(path)!r})."
        )
    if folder.is_dir():
        return folder / inside
    if str(path).count("/") > 1 or str(path).startswith((".", "~", "/")) or _is_file(path):
        raise CheckpointError(f"There is no folder {str(path)!r}.")
    hub = {name: arguments[name] for name in _HUB if name in arguments}
    try:
        if inside:
            which = {name: item for name, item in hub.items() if name in _HUB[:6]}
            return Path(snapshot_download(str(path), allow_patterns=[f"{inside}/*"], **which)) / inside
        # A component that is given as an object need not be fetched.
        given = {name: item for name, item in arguments.items() if not isinstance(item, (str, Path))}
        return Path(diffusers.DiffusionPipeline.download(str(path), **{**given, **hub}))
    except (OSError, ValueError) as error:  # no such repository or revision, no access, no network, no valid name
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{str(path)!r} is no folder here, and could not be fetched: {reason}") from error


def _is_file(given: Any) -> bool:
    """Whether an argument is the path of a file of weights."""
    return isinstance(given, (str, Path)) and bool(
        isinstance(given, Path) or Path(given).suffix in (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
    )


def load_model(folder: Path, dtype: torch.dtype, dynamic: bool | None = None, variant: str | None = None) -> nn.Module:
    """A quantized model from its folder; see `from_pretrained`.

    Raises:
        CheckpointError: It cannot be read.
    """
    quantization = read_quantization(folder)
    if quantization is None:
        raise CheckpointError(f"{str(folder)!r}: its config.json has no quantization_config.")
    files = weight_files(folder, variant)
    source = str(folder if len(files) > 1 else files[0])
    return _model(folder, source, read_tensors(files), quantization, dtype, dynamic)


def load_file_model(file: Path, folder: Path, dtype: torch.dtype, dynamic: bool | None = None) -> nn.Module:
    """A quantized model from a single file, and the configuration in a folder; see `from_pretrained`.

    Raises:
        CheckpointError: It cannot be read.
    """
    tensors = read_tensors([file])
    if is_scaled(tensors):
        quantization: Quantization | None = Quantization("fp8", {}, (), True, {})
        tensors = as_modelopt(tensors)
    else:
        quantization = read_file_quantization(file)
    if quantization is None:
        low = next((name for name, item in tensors.items() if item.dtype.itemsize == 1), None)
        what = "its header says nothing of a quantization"
        if low is not None:
            what += f", and {low} is {tensors[low].dtype} without a scale"
        raise CheckpointError(
            f"{str(file)!r}: {what}. Instead: from_single_file({str(file)!r}) of the model's class, and the model "
            "itself as an argument; accelerate(pipe, linear=...) quantizes it."
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
    from accelerate import init_empty_weights

    if dynamic is not None:
        quantization = replace(quantization, dynamic=dynamic)
    layers, rest = split(tensors, quantization)
    config = read_json(folder / "config.json")
    kind = getattr(importlib.import_module("diffusers"), str(config.get("_class_name")), None)
    if kind is None:
        raise CheckpointError(f"{str(folder)!r}: diffusers has no class {config.get('_class_name')!r}.")
    config.pop("quantization_config", None)
    with init_empty_weights():
        model = kind.from_config(config)
    modules = dict(model.named_modules())
    _refuse_unknown(modules, layers, rest, source)
    wide = getattr(kind, "_keep_in_fp32_modules", None) or ()
    activation_cache = ActivationCache()
    for name, parts in layers.items():
        linear = modules[name]
        linear.weight.data = linear.weight.data.to(dtype)
        parent, _, child = name.rpartition(".")
        layer = _layer(linear, name, parts, quantization)
        layer.activation_cache = activation_cache
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
        stored |= Fp8BlockLinear.padded(weight, scale.float())
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
    return kind.from_tensors(linear, stored)


def _refuse_unknown(
    modules: Mapping[str, Any], layers: Mapping[str, Any], rest: Mapping[str, Any], source: str
) -> None:
    theirs = [name for name in (*layers, *rest) if name.rpartition(".")[0] not in modules and name not in modules]
    if is_foreign_naming(theirs):
        raise CheckpointError(
            f"{source!r} names layers as the model's own repository does, {theirs[0]!r} say, and only diffusers' names "
            "can be read here. Instead: from_single_file(FILE) of the model's class, and the model itself as an "
            "argument; accelerate(pipe, linear=...) quantizes it."
        )
    for name in layers:
        if type(modules.get(name)) is not nn.Linear:
            raise CheckpointError(f"{name}: quantized in the checkpoint, and no linear layer of the model.")
    for name in rest:
        holder, _, attribute = name.rpartition(".")
        owner = modules.get(holder)
        if owner is None or attribute not in {**owner._parameters, **owner._buffers}:
            raise CheckpointError(f"{name}: the model has no such tensor.")
