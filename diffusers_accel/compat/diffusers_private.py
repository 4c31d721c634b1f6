"""Private names of diffusers.

Owns every name of diffusers that begins with an underscore, and the internals of its attention dispatcher. diffusers is
imported by the functions that need it, so floors that must not import it may read constants here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

READ = "diffusers 0.42.1"

# Private name -> what depends on it.
NAMES = {
    # The attention dispatcher.
    "attention_dispatch.AttentionBackendName": "attention: kernels registered as backends of the dispatcher",
    "attention_dispatch._AttentionBackendRegistry._backends": "attention: kernels registered as backends",
    "attention_dispatch._AttentionBackendRegistry._constraints": "attention: kernels registered as backends",
    "attention_dispatch._AttentionBackendRegistry._supported_arg_names": "attention: kernels registered as backends",
    "attention_dispatch.dispatch_attention_fn._parallel_config": "the refusal of two kinds of context parallelism",
    "FluxAttnProcessor._attention_backend": "attention: the backend of one processor",
    "FluxAttnProcessor._parallel_config": "the refusal of two kinds of context parallelism",
    # Hooks.
    "HookRegistry._diffusers_hook": "hooks on swapped modules, and checks for offloading",
    "HookRegistry._hook_order": "hooks on swapped modules",
    "hooks.layerwise_casting._LAYERWISE_CASTING_HOOK": "fuse, which packs no layer that is cast at every call",
    "hooks.group_offloading._apply_group_offloading": "offload, which puts diffusers' own group offloading back",
    "hooks.group_offloading._get_top_level_group_offload_hook": "offload, which takes group offloading over",
    "hooks.group_offloading._LAYER_EXECUTION_TRACKER": "offload, which takes group offloading over",
    "hooks.group_offloading._LAZY_PREFETCH_GROUP_OFFLOADING": "offload, which takes group offloading over",
    "hooks.group_offloading._GROUP_OFFLOADING": "the refusal to replace weights that are offloaded in groups",
    # Pipelines.
    "DiffusionPipeline._execution_device": "the device of a pipeline whose weights wait on the host",
    "DiffusionPipeline._all_hooks": "offload, which takes diffusers' offloading of whole models over",
    "DiffusionPipeline._offload_device": "the move of an offloaded pipeline to its rank's GPU",
    "DiffusionPipeline._offload_gpu_id": "the move of an offloaded pipeline to its rank's GPU",
    "DiffusionPipeline._progress_bar_config": "progress bars, which rank 0 alone shows",
    # Models.
    "ModelMixin._repeated_blocks": "models without an adapter of their own",
    "ModelMixin._no_split_modules": "models without an adapter of their own",
    "ModelMixin._keep_in_fp32_modules": "quantized checkpoints",
    "ModelMixin._parallel_config": "the refusal of two kinds of tensor parallelism",
    "ConfigMixin._class_name": "quantized checkpoints",
    "QwenImageTransformerBlock._modulate": "the cache signal of Qwen-Image",
}


# --- the attention dispatcher ----------------------------------------------------------------------------------------

# Attribute of a processor that names its backend.
ATTENTION_BACKEND = "_attention_backend"


def parallel_config_of(owner: Any) -> Any:
    """The configuration of diffusers' own parallelism on a model or processor; `None` without one."""
    return getattr(owner, "_parallel_config", None)


def attention_backend_tables() -> tuple[dict[Any, Any], ...]:
    """The tables of the dispatcher: functions, constraints and names of arguments, by backend."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    return registry._backends, registry._constraints, registry._supported_arg_names


def attention_backend_entry(function: Callable[..., Any]) -> tuple[Any, ...]:
    """The entries of the tables, in their order, for a function of `attention_backend_function`."""
    arguments = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
    return function, [], arguments | {"_parallel_config"}


def attention_backend_name(value: str) -> Any:
    """The name of a backend: an instance of diffusers' enumeration, which stays without a member of that name."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    name: Any = str.__new__(AttentionBackendName, value)
    name._name_, name._value_ = value, value
    return name


def attention_backend_function(
    number: int, dispatch: Callable[..., Any], refuse: Callable[[Any], None]
) -> Callable[..., Any]:
    """An attention function with the arguments of diffusers' backends.

    Args:
        number: First argument of `dispatch`.
        dispatch: Called with number, query, key, value, mask, `is_causal` and scale.
        refuse: Called first, with the configuration of diffusers' context parallelism.
    """

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        refuse(_parallel_config)
        return dispatch(number, query, key, value, attn_mask, is_causal, scale)

    return attention


# --- hooks -----------------------------------------------------------------------------------------------------------

# Key of a module's `__dict__`: its registry of diffusers' hooks.
HOOK_REGISTRY = "_diffusers_hook"
# The name of the hook that casts a module's weights before and after each call: diffusers' _LAYERWISE_CASTING_HOOK.
LAYERWISE_CASTING = "layerwise_casting"
# A part of the names of all hooks of group offloading, of which _GROUP_OFFLOADING moves weights.
GROUP_OFFLOADING = "group_offload"


def diffusers_hooks(module: Any) -> Mapping[str, Any]:
    """diffusers' hooks on a module, by name."""
    hooks: Mapping[str, Any] = getattr(vars(module).get(HOOK_REGISTRY), "hooks", {})
    return hooks


def group_offloading_config(module: Any) -> Any:
    """The configuration of a model's group offloading; `None` without."""
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    return getattr(_get_top_level_group_offload_hook(module), "config", None)


def remove_group_offloading(module: Any) -> None:
    """Removes all hooks of group offloading from a model."""
    from diffusers.hooks import HookRegistry, group_offloading

    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.remove_hook(group_offloading._GROUP_OFFLOADING, recurse=True)
    registry.remove_hook(group_offloading._LAYER_EXECUTION_TRACKER, recurse=True)
    registry.remove_hook(group_offloading._LAZY_PREFETCH_GROUP_OFFLOADING, recurse=True)


def apply_group_offloading(module: Any, config: Any) -> None:
    """Applies group offloading to a model, with a configuration of `group_offloading_config`."""
    from diffusers.hooks.group_offloading import _apply_group_offloading

    _apply_group_offloading(module, config)


def ordered_hooks(registry: Any) -> list[tuple[str, Any]]:
    """The names and hooks of a registry, in the order of their registration."""
    return [(name, registry.hooks[name]) for name in registry._hook_order]


# --- pipelines -------------------------------------------------------------------------------------------------------

# Attributes of a pipeline: the device and the number of the GPU that offloaded models run on, as the last call to
# enable offloading set them; the arguments of its progress bar.
OFFLOAD_DEVICE, OFFLOAD_GPU_ID = "_offload_device", "_offload_gpu_id"
PROGRESS_BAR_CONFIG = "_progress_bar_config"
# Attribute of a pipeline: the hooks that move whole models.
MODEL_OFFLOAD_HOOKS = "_all_hooks"


def execution_device(pipe: Any) -> torch.device:
    """The device that a pipeline runs on, also where its weights wait on the host."""
    device: torch.device = pipe._execution_device
    return device


def offload_gpu(pipe: Any) -> torch.device | None:
    """The GPU that a script has numbered in `enable_model_cpu_offload(gpu_id=...)`; `None` for none, or the first."""
    number = getattr(pipe, OFFLOAD_GPU_ID, None)
    return torch.device("cuda", number) if number else None


# --- models ----------------------------------------------------------------------------------------------------------

# Key of a component's configuration on disk: the name of its class.
CLASS_NAME = "_class_name"


def block_class_names(model: Any) -> set[str]:
    """Names of the classes of a model's repeated blocks, or of the modules that stay on one device. Empty where the
    model's class names neither."""
    return set(getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ())


def float32_modules(model_class: Any) -> tuple[str, ...]:
    """Names of the modules of a model class that are loaded in float32."""
    return tuple(getattr(model_class, "_keep_in_fp32_modules", None) or ())


def modulate_qwen(block: Any, x: torch.Tensor, modulation: torch.Tensor, index: Any) -> Any:
    """Shift, scale and gate in a block of Qwen-Image: the modulated `x`, and the gate."""
    return block._modulate(x, modulation, index)
