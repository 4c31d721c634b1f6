"""Saving of quantized pipelines in NVIDIA ModelOpt's layout, which `from_pretrained` reads.

Quantized layers are written as they are stored, without another quantization. All checks come before the first file is
written. Components without quantized layers are saved by diffusers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..compat.torch_private import buffers_of, non_persistent_buffers_of, parameters_of
from ..errors import Unsupported
from ..kernels.linear import LinearSlice, QuantizedLinear, is_sharded, stock_modules
from ..kernels.linear.eight_bit import Fp8BlockLinear, Fp8TensorLinear
from ..kernels.linear.four_bit import Nvfp4Fp8Linear, Nvfp4Linear, Nvfp4NativeLinear, SvdNvfp4Linear

# Class of a layer -> ModelOpt's name of its algorithm. Formats without an entry cannot be saved.
_ALGORITHMS: dict[type[QuantizedLinear], str] = {
    Fp8TensorLinear: "FP8",
    Fp8BlockLinear: "FP8_BLOCK_SCALES",
    Nvfp4Linear: "NVFP4",
    Nvfp4Fp8Linear: "NVFP4",
    Nvfp4NativeLinear: "NVFP4",
    SvdNvfp4Linear: "NVFP4_SVD",
}


def save_quantized(pipe: Any, path: str | Path) -> None:
    """Saves a pipeline with its quantized layers in ModelOpt's layout.

    Args:
        pipe: A stock pipeline, accelerated with `linear=` or loaded by `from_pretrained`.
        path: The folder; created if it does not exist.

    Raises:
        Unsupported: No layer is quantized, ranks hold shards of the weights, or ModelOpt's layout has no name for a
            layer's format. Nothing was written.
    """
    models = {name: item for name, item in pipe.components.items() if isinstance(item, nn.Module)}
    quantized = {name: _quantized_layers(model) for name, model in models.items()}
    quantized = {name: layers for name, layers in quantized.items() if layers}
    if not quantized:
        raise Unsupported(
            "save_quantized",
            "no layer is quantized.",
            "accelerate(pipe, linear='fp8-tensor') first.",
            type(pipe).__name__,
        )
    if any(not item.numel() for model in models.values() for item in model.parameters()):
        raise Unsupported(
            "save_quantized", "weights are sharded over ranks.", "parallel without fsdp.", type(pipe).__name__
        )
    for name, layers in quantized.items():
        if is_sharded(models[name]):
            raise Unsupported(
                "save_quantized",
                f"this rank holds shards of {name}'s layers.",
                "accelerate(pipe, linear=...) without parallel.tp; or save_pretrained, which writes the stock weights.",
            )
        for layer, module in layers.items():
            if type(module) not in _ALGORITHMS:
                raise Unsupported(
                    "save_quantized",
                    f"{name}.{layer} is {module.kind}, for which ModelOpt's layout has no name.",
                    "linear='fp8-tensor', 'fp8-block', 'nvfp4' or 'svdq-nvfp4'; or save_pretrained, which writes the "
                    "stock weights.",
                )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    pipe.save_config(folder)
    for name, component in pipe.components.items():
        if name in quantized:
            _save_model(models[name], quantized[name], folder / name)
        elif hasattr(component, "save_pretrained"):
            component.save_pretrained(folder / name)


def _quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in _modules(model) if isinstance(module, QuantizedLinear)}


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules; slices of a packed layer as layers of their own."""
    for name, module in stock_modules(model):
        yield name, module.standalone() if isinstance(module, LinearSlice) else module


def _save_model(model: Any, layers: dict[str, QuantizedLinear], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = _description(model, layers)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors: dict[str, torch.Tensor] = {}
    for name, module in _modules(model):
        if isinstance(module, QuantizedLinear):
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in _tensors(module).items()}
        direct = {**parameters_of(module), **buffers_of(module)}
        passed_over = non_persistent_buffers_of(module)
        persistent = {key: item for key, item in direct.items() if key not in passed_over}
        tensors |= {f"{name}.{key}".lstrip("."): item for key, item in persistent.items() if item is not None}
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    # The header has the configuration too, so that the file can be read without its folder.
    metadata = {"format": "pt", "quantization_config": json.dumps(config["quantization_config"])}
    save_file(cpu, folder / "diffusion_pytorch_model.safetensors", metadata=metadata)


def _tensors(module: QuantizedLinear) -> dict[str, torch.Tensor]:
    """ModelOpt's suffix -> tensor, of one layer."""
    tensors = {"weight": module.weight_data, "weight_scale": module.weight_scale}
    if isinstance(module, Fp8BlockLinear):
        tensors["weight"] = module.weight_data[: module.out_features, : module.in_features]
        tensors["weight_scale"] = module.weight_scale[:, : -(-module.in_features // 128)]
    elif isinstance(module, Fp8TensorLinear):
        tensors["weight_scale"] = module.weight_scale.reshape(())
        if module.input_scale is not None:
            tensors["input_scale"] = module.input_scale.reshape(())
    elif isinstance(module, Nvfp4Linear):
        tensors["weight_scale_2"] = module.weight_scale_2.reshape(())
    if isinstance(module, SvdNvfp4Linear):
        tensors |= {"svdquant_lora_a": module.svdquant_lora_a, "svdquant_lora_b": module.svdquant_lora_b}
    if module.pre_quant_scale is not None:
        tensors["pre_quant_scale"] = module.pre_quant_scale
    return tensors


def _description(model: nn.Module, layers: dict[str, QuantizedLinear]) -> dict[str, Any]:
    """The `quantization_config` of a model."""
    algorithms = {name: _ALGORITHMS[type(module)] for name, module in layers.items()}
    static = all(getattr(module, "input_scale", None) is not None for module in layers.values())
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "ignore": [
            name
            for name, module in _modules(model)
            if isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear)
        ],
        "producer": {"name": "diffusers_accel", "version": __version__},
        "dynamic": not static,
    }
    if len(Counter(algorithms.values())) > 1:
        return {"quant_algo": "MIXED_PRECISION", "quantized_layers": {
            name: {"quant_algo": algorithm, **({"group_size": 16} if "NVFP4" in algorithm else {})}
            for name, algorithm in algorithms.items()
        }, **config}  # fmt: skip
    algorithm = next(iter(algorithms.values()))
    is_nvfp4 = "NVFP4" in algorithm
    weights = {
        "dynamic": False,
        "num_bits": 4 if is_nvfp4 else 8,
        "type": "float",
        **({"group_size": 16} if is_nvfp4 else {}),
    }
    if algorithm != "FP8_BLOCK_SCALES":
        config["config_groups"] = {
            "group_0": {
                "input_activations": {**weights, "dynamic": not static},
                "weights": weights,
                "targets": ["Linear"],
            }
        }
    ranks = {module.svdquant_lora_a.shape[0] for module in layers.values() if isinstance(module, SvdNvfp4Linear)}
    if ranks:
        config["lora_rank"] = max(ranks)
    return {"quant_algo": algorithm, **config}
