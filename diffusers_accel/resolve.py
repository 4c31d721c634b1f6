"""Resolution of the arguments of `accelerate`. A stock pipeline becomes a `PipelineContext`; a preset, file, mapping or
sections become one `AccelConfig`. Nothing is changed here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import names, presets
from .compat.diffusers_private import execution_device
from .compat.torch_private import is_compiled_copy, is_compiled_in_place
from .config import AccelConfig, AttentionConfig, ParallelConfig, read_yaml
from .core.mesh import rank_device
from .core.platform import describe
from .core.request_queue import RequestQueue
from .core.step import StepClock
from .errors import ConfigError, Unsupported, shown
from .features.context import Denoiser, PipelineContext
from .models import adapter_for
from .sessions import session_of

# Where pipelines keep their denoisers.
DENOISERS = ("transformer", "transformer_2", "unet", "prior")


def pipeline_context(
    pipe: Any, rank: Callable[[str], int], config: Any = None, sections: Mapping[str, Any] | None = None
) -> PipelineContext:
    """A pipeline as features see it. Under `parallel.fsdp` and `offload`, weights on the host are taken as weights for
    a GPU.

    Args:
        pipe: A stock pipeline.
        rank: Place of a named layer in the order of all.
        config: A preset's name, a file, an `AccelConfig`, a mapping of its fields or `None`.
        sections: Fields of `AccelConfig` that override those of `config`.

    Raises:
        TypeError: `pipe` is not a diffusers pipeline.
        Unsupported: The pipeline's class has no denoiser, or a denoiser is compiled or sharded among ranks.
    """
    import diffusers

    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(
            f"Expected a diffusers pipeline, got {type(pipe).__name__}. "
            "Give the object that DiffusionPipeline.from_pretrained(...) returns."
        )
    session = session_of(pipe)
    if session is not None and session.context.outputs.sharded_bytes:
        raise Unsupported(
            "accelerate", "its weights are divided among ranks.", "restore(pipe) first, on every rank.",
            type(pipe).__name__,
        )  # fmt: skip
    for_gpu = begins_on_host(config, sections or {})
    loaded = {name: getattr(pipe, name, None) for name in DENOISERS if name in pipe.components}  # type: ignore[attr-defined]
    denoisers = tuple(
        Denoiser(name, module, adapter_for(module), describe(_device(pipe, module, for_gpu)))
        for name, module in loaded.items()
        if isinstance(module, nn.Module)
    )
    if not loaded:
        reason = f"it has none of {', '.join(DENOISERS)}."
        raise Unsupported("accelerate", reason, "a pipeline that denoises.", type(pipe).__name__)
    for denoiser in denoisers:
        _refuse_compiled(denoiser)
    clock = _clock(pipe, [denoiser.module for denoiser in denoisers])
    return PipelineContext(weakref.ref(pipe), denoisers, rank, clock)


def _clock(pipe: Any, modules: list[nn.Module]) -> StepClock:
    """The clock that places calls of denoisers. The clock holds the pipeline weakly: others may share its denoisers."""
    import diffusers

    known, here = {id(module) for module in modules}, weakref.ref(pipe)

    def uses_denoiser(item: Any) -> bool:
        return isinstance(item, diffusers.DiffusionPipeline) and any(id(each) in known for each in vars(item).values())

    clock: StepClock
    queue = RequestQueue(uses_denoiser, between_steps=lambda: clock.current is None)
    clock = StepClock(
        lambda: getattr(here(), "scheduler", None), lambda: getattr(here(), "current_timestep", None), queue
    )
    return clock


def _device(pipe: Any, module: nn.Module, for_gpu: bool) -> torch.device:
    device = next(module.parameters()).device
    if device.type == "cpu" and for_gpu and torch.cuda.is_available():
        # A model that is larger than a GPU waits on the host until it is sharded or offloaded.
        return rank_device()
    # Under an offload hook the weights wait on the CPU (or on meta), and the pipeline knows where they will run.
    return device if device.type not in ("cpu", "meta") else execution_device(pipe)


def _refuse_compiled(denoiser: Denoiser) -> None:
    modules = [denoiser.module, *denoiser.adapter.blocks(denoiser.module)]
    if is_compiled_copy(denoiser.module) or any(map(is_compiled_in_place, modules)):
        raise Unsupported(
            "accelerate",
            "it is compiled already, and layers cannot be put inside a compiled module.",
            "load it uncompiled and use accelerate(pipe, compile=True).",
            str(denoiser),
        )


def resolve_config(
    context: PipelineContext, config: Any, sections: Mapping[str, Any]
) -> tuple[AccelConfig, tuple[str, ...]]:
    """The configuration to apply, and notes on sections that were left off or added.

    Args:
        context: The pipeline, for which presets are filled in.
        config: A preset's name, a file, an `AccelConfig`, a mapping of its fields, or `None` for the default.
        sections: Fields of `AccelConfig` that override those of `config`.

    Raises:
        ConfigError: The configuration cannot be read.
    """
    found, notes = _written(context, config, sections)
    names.refuse_unknown(found)
    if not context.denoisers:
        return _without_denoiser(context, found, notes)
    if found.parallel is not None and found.parallel.sequence > 1 and found.attention is None:
        # Stock attention would see one rank's part of the sequence.
        found = replace(found, attention=AttentionConfig(backend="sdpa"))
        notes = (*notes, "attention='sdpa', since the sequence is sharded; name a faster one.")
    return found, notes


def _without_denoiser(
    context: PipelineContext, config: AccelConfig, notes: tuple[str, ...]
) -> tuple[AccelConfig, tuple[str, ...]]:
    """The sections that change something else. Pipelines are loaded without a denoiser to encode prompts."""
    linear, graphs = config.linear, config.cuda_graph
    kept: dict[str, Any] = {
        "linear": linear if linear is not None and linear.targets is not None else None,
        "cuda_graph": graphs if graphs is not None and (graphs.vae or graphs.text_encoders) else None,
        "vae": config.vae,
        "request": config.request,
        "warmup": config.warmup,
    }
    off = [each.name for each in fields(config) if getattr(config, each.name) is not None and not kept.get(each.name)]
    note = f"no denoiser is loaded, so {', '.join(off)} {'is' if len(off) == 1 else 'are'} left off."
    return AccelConfig(**kept), (*notes, note) if off else notes


def _written(context: PipelineContext, config: Any, sections: Mapping[str, Any]) -> tuple[AccelConfig, tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if config is None:
        base, notes = (AccelConfig(), ()) if sections else presets.resolve("lossless", context)
    elif isinstance(config, AccelConfig):
        base = config
    elif isinstance(config, Mapping):
        base = AccelConfig.from_dict(config)
    elif isinstance(config, (str, Path)):
        # A file is meant by its ending, so that a missing one is not taken for an unknown preset.
        if isinstance(config, Path) or Path(config).suffix in (".yaml", ".yml", ".json"):
            base = AccelConfig.from_dict(read_yaml(config))
        else:
            return presets.resolve(config, context, sections)
    else:
        raise ConfigError(
            f"config: expected a preset's name, a file, an AccelConfig, a mapping or None, got {type(config).__name__} "
            f"({shown(config)})."
        )
    if not sections:
        return base, notes
    kept = {entry.name: getattr(base, entry.name) for entry in fields(base)}
    return AccelConfig.from_dict({**kept, **sections}), notes


def resolve_parallel(config: Any, sections: Mapping[str, Any]) -> ParallelConfig | None:
    """The section `parallel` of a configuration, before there is a pipeline. Presets have no such section.

    Args:
        config: A preset's name, a file, an `AccelConfig`, a mapping of its fields or `None`.
        sections: Fields of `AccelConfig` that override those of `config`.

    Raises:
        ConfigError: The configuration cannot be read.
    """
    found: ParallelConfig | None = resolve_section("parallel", config, sections)
    return found


def begins_on_host(config: Any, sections: Mapping[str, Any]) -> bool:
    """Whether weights may wait on the host until they are sharded (`parallel.fsdp`) or offloaded. The arguments are
    those of `resolve_parallel`.

    Raises:
        ConfigError: The configuration cannot be read.
    """
    ranks = resolve_parallel(config, sections)
    return (ranks is not None and ranks.fsdp) or resolve_section("offload", config, sections) is not None


def resolve_section(name: str, config: Any, sections: Mapping[str, Any]) -> Any:
    """A section of a configuration, before there is a pipeline: for sections that presets do not have.

    Args:
        name: The section's name.
        config: A preset's name, a file, an `AccelConfig`, a mapping of its fields or `None`.
        sections: Fields of `AccelConfig` that override those of `config`.

    Raises:
        ConfigError: The configuration cannot be read.
    """
    if name in sections:
        return getattr(AccelConfig.from_dict({name: sections[name]}), name)
    if isinstance(config, AccelConfig):
        return getattr(config, name)
    if isinstance(config, Mapping):
        return getattr(AccelConfig.from_dict(config), name)
    if isinstance(config, (str, Path)) and Path(config).suffix in (".yaml", ".yml", ".json"):
        return getattr(AccelConfig.from_yaml(config), name)
    return None
