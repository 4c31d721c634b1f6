"""Quantized pipelines written in NVIDIA ModelOpt's layout, as `from_pretrained` reads them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import Unsupported
from ..kernels.linear import Part, QuantizedLinear, is_sharded, modules_of
from ..kernels.linear.eight_bit import Fp8BlockLinear, Fp8TensorLinear
from ..kernels.linear.four_bit import Nvfp4Fp8Linear, Nvfp4Linear, Nvfp4NativeLinear, SvdNvfp4Linear

# Layers -> ModelOpt's name of their algorithm.
_ALGORITHMS: dict[type[QuantizedLinear], str] = {
    Fp8TensorLinear: "FP8",
    Fp8BlockLinear: "FP8_BLOCK_SCALES",
    Nvfp4Linear: "NVFP4",
    Nvfp4Fp8Linear: "NVFP4",
    Nvfp4NativeLinear: "NVFP4",
    SvdNvfp4Linear: "NVFP4_SVD",
}


def save_quantized(pipe: Any, path: str | Path) -> None:
    """Writes a pipeline with its quantized layers as they are stored.

    Args:
        pipe: A stock pipeline, accelerated with `linear=`, or loaded by `from_pretrained`.
        path: The folder; made if it is not there.

    Raises:
        Unsupported: Nothing is quantized, or a layer's format has no place in ModelOpt's layout; nothing was written.
    """
    models = {name: item for name, item in pipe.components.items() if isinstance(item, nn.Module)}
    quantized = {name: _layers(model) for name, model in models.items()}
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
            "save_quantized", "weights are divided among ranks.", "parallel without fsdp.", type(pipe).__name__
        )
    for name, layers in quantized.items():
        if is_sharded(models[name]):
            raise Unsupported(
                "save_quantized",
                f"this rank has a part of {name}'s layers.",
                "accelerate(pipe, linear=...) without parallel.tp; or save_pretrained, which writes the stock weights.",
            )
        for layer, module in layers.items():
            if type(module) not in _ALGORITHMS:
                raise Unsupported(
                    "save_quantized",
                    f"{name}.{layer} is {module.kind}, for which ModelOpt's layout has no place.",
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


def _layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in _modules(model) if isinstance(module, QuantizedLinear)}


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules; layers that are multiplied as one are told apart."""
    for name, module in modules_of(model):
        yield name, module.alone() if isinstance(module, Part) else module


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
            tensors |= {f"{name}.{part}": tensor for part, tensor in _parts(module).items()}
        direct = {**module._parameters, **module._buffers}
        lasting = {key: item for key, item in direct.items() if key not in module._non_persistent_buffers_set}
        tensors |= {f"{name}.{key}".lstrip("."): item for key, item in lasting.items() if item is not None}
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    # In the header too: the file alone says what it holds.
    metadata = {"format": "pt", "quantization_config": json.dumps(config["quantization_config"])}
    save_file(cpu, folder / "diffusion_pytorch_model.safetensors", metadata=metadata)


def _parts(module: QuantizedLinear) -> dict[str, torch.Tensor]:
    """A layer's tensors by ModelOpt's names."""
    parts = {"weight": module.weight_data, "weight_scale": module.weight_scale}
    if isinstance(module, Fp8BlockLinear):
        parts["weight"] = module.weight_data[: module.out_features, : module.in_features]
        parts["weight_scale"] = module.weight_scale[:, : -(-module.in_features // 128)]
    elif isinstance(module, Fp8TensorLinear):
        parts["weight_scale"] = module.weight_scale.reshape(())
        if module.input_scale is not None:
            parts["input_scale"] = module.input_scale.reshape(())
    elif isinstance(module, Nvfp4Linear):
        parts["weight_scale_2"] = module.weight_scale_2.reshape(())
    if isinstance(module, SvdNvfp4Linear):
        parts |= {"svdquant_lora_a": module.svdquant_lora_a, "svdquant_lora_b": module.svdquant_lora_b}
    if module.pre_quant_scale is not None:
        parts["pre_quant_scale"] = module.pre_quant_scale
    return parts


def _description(model: nn.Module, layers: dict[str, QuantizedLinear]) -> dict[str, Any]:
    """The `quantization_config`."""
    algorithms = {name: _ALGORITHMS[type(module)] for name, module in layers.items()}
    static = all(getattr(module, "input_scale", None) is not None for module in layers.values())
    found: dict[str, Any] = {
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
        }, **found}  # fmt: skip
    algorithm = next(iter(algorithms.values()))
    four = "NVFP4" in algorithm
    weights = {"dynamic": False, "num_bits": 4 if four else 8, "type": "float", **({"group_size": 16} if four else {})}
    if algorithm != "FP8_BLOCK_SCALES":
        found["config_groups"] = {
            "group_0": {
                "input_activations": {**weights, "dynamic": not static},
                "weights": weights,
                "targets": ["Linear"],
            }
        }
    ranks = {module.svdquant_lora_a.shape[0] for module in layers.values() if isinstance(module, SvdNvfp4Linear)}
    if ranks:
        found["lora_rank"] = max(ranks)
    return {"quant_algo": algorithm, **found}
