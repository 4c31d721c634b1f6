"""diffusers' own offloading of a pipeline ends where `offload` begins, and is put back by `restore`.

diffusers moves whole models (`enable_model_cpu_offload`), single layers (`enable_sequential_cpu_offload`) or groups of
blocks (`enable_group_offload`). Its hooks are removed before anything else is changed, so that all features see weights
on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...compat.accelerate_private import ACCELERATE_HOOK
from ...compat.diffusers_private import (
    MODEL_OFFLOAD_HOOKS,
    OFFLOAD_DEVICE,
    apply_group_offloading,
    group_offloading_config,
    remove_group_offloading,
)
from ...config import OffloadConfig
from ...core.edits import Edit
from ...errors import Unsupported
from ..context import PipelineContext
from ..feature import Plan


def check(context: PipelineContext, config: OffloadConfig) -> Plan:
    """The kinds of offloading that are taken over.

    Raises:
        Unsupported: Weights are offloaded to files.
    """
    known = (("of whole models", _has_models), ("of layers", _is_sequential))
    kinds = [name for name, found in known if found(context.pipe)]
    groups = _groups(context.pipe)
    for name, module in groups:
        if group_offloading_config(module).offload_to_disk_path is not None:
            raise Unsupported(
                "offload",
                f"enable_group_offload has moved weights of its {name} to files.",
                "group offloading without offload_to_disk_path, or none.",
                type(context.pipe).__name__,
            )
    kinds += ["of groups of blocks"] if groups else []
    if not kinds:
        return Plan("nothing: diffusers offloads nothing", 0)
    return Plan(f"diffusers' offloading {', '.join(kinds)} ends until restore(pipe)", len(kinds))


def edits(context: PipelineContext, config: OffloadConfig) -> Iterator[Edit]:
    """One edit for each kind of offloading."""
    if _has_models(context.pipe) or _is_sequential(context.pipe):
        yield _EndAccelerateHooks(context.pipe)
    for _, module in _groups(context.pipe):
        yield _EndGroups(module)


def _has_models(pipe: Any) -> bool:
    return bool(vars(pipe).get(MODEL_OFFLOAD_HOOKS))


def _is_sequential(pipe: Any) -> bool:
    models = (item for item in pipe.components.values() if isinstance(item, nn.Module))
    hooked = any(ACCELERATE_HOOK in vars(part) for model in models for part in model.modules())
    return hooked and not _has_models(pipe)


def _groups(pipe: Any) -> list[tuple[str, nn.Module]]:
    models = [(name, item) for name, item in pipe.components.items() if isinstance(item, nn.Module)]
    return [(name, module) for name, module in models if group_offloading_config(module) is not None]


@dataclass(eq=False)
class _EndAccelerateHooks:
    """Removes the hooks of `enable_model_cpu_offload` or `enable_sequential_cpu_offload`. `undo` enables it again."""

    pipe: Any
    _enable: str | None = field(default=None, init=False)
    _device: torch.device | None = field(default=None, init=False)

    def apply(self) -> None:
        models = _has_models(self.pipe)
        self._device = getattr(self.pipe, OFFLOAD_DEVICE, None)
        self._enable = "enable_model_cpu_offload" if models else "enable_sequential_cpu_offload"
        self.pipe.remove_all_hooks()
        for item in self.pipe.components.values():
            if models and isinstance(item, nn.Module):
                item.to("cpu")

    def undo(self) -> None:
        if self._enable is not None:
            enable, self._enable = self._enable, None
            getattr(self.pipe, enable)(device=self._device)


@dataclass(eq=False)
class _EndGroups:
    """Removes the hooks of `enable_group_offload` from a model. `undo` applies them again."""

    module: nn.Module
    _config: Any = field(default=None, init=False)

    @property
    def target(self) -> Any:
        """The instance that it changes."""
        return self.module

    def apply(self) -> None:
        self._config = group_offloading_config(self.module)
        remove_group_offloading(self.module)
        # Weights of groups that were just running.
        self.module.to(self._config.offload_device)

    def undo(self) -> None:
        if self._config is not None:
            config, self._config = self._config, None
            apply_group_offloading(self.module, config)
