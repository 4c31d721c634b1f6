"""A pipeline as features see it, the values that features hand to each other, and the counters of a request.

Three objects with different lifetimes. A `PipelineContext` names the pipeline, its denoisers and the configuration, and
never changes. `FeatureOutputs` is filled while edits are applied: each field names the feature that
writes it. `RunStats` is filled by requests and emptied as the next one begins.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..compat.diffusers_private import execution_device, offload_gpu
from ..compat.torch_private import parameters_of
from ..config import AccelConfig
from ..core.mesh import rank_device
from ..core.platform import Device, describe
from ..core.step import StepClock, StepState
from ..core.streaming import WeightStream
from ..core.submodules import submodules
from ..core.symm_mem import SymmetricMemory
from ..kernels.attention import KeptBlocks
from ..models import Adapter, Stack

# Devices whose graphs are worth rewriting: it saves passes over memory, in kernels made for GPUs.
REWRITTEN_ON = ("cuda",)


@dataclass(frozen=True)
class Denoiser:
    """A denoiser of a pipeline.

    Attributes:
        name: The pipeline's name for it, e.g. `"transformer"`.
        module: The stock model.
        adapter: The data about its class.
        device: The device it runs on. Under an offload hook its weights may be elsewhere.
    """

    name: str
    module: nn.Module
    adapter: Adapter
    device: Device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: that of the model's largest floating-point parameter."""
        found = (item for part in submodules(self.module) for item in parameters_of(part).values() if item is not None)
        return max((item for item in found if item.is_floating_point()), key=torch.Tensor.numel).dtype

    @property
    def config(self) -> dict[str, Any]:
        return dict(getattr(self.module, "config", {}))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Its stacks that have blocks."""
        return tuple(stack for stack in self.adapter.stacks if len(stack.blocks(self.module)))

    def matches(self, path: str, glob: str) -> bool:
        """Whether a glob of the configuration matches a module's path, with or without the denoiser's name in front."""
        return fnmatchcase(path, glob) or fnmatchcase(f"{self.name}.{path}", glob)

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


@dataclass(eq=False)
class RunStats:
    """Counters of the last request, which `stats` prints.

    Attributes:
        attention_calls: Kernel name -> calls.
        attention_timings: Shape class -> kernel name -> seconds, where `"auto"` chose among several.
        kept_blocks: The shares of blocks that sparse attention computed.
        attention_broadcasts: `"computed"` and `"reused"` -> attention outputs, under PAB.
        cache_bytes: (denoiser, branch) -> bytes that step caching keeps between steps.
        cache_guarded: (denoiser, branch) -> report of the cache's guard.
        call_times: (place, begin, end) of each denoiser call, with timestamps of `core/timestamps.py`.
    """

    attention_calls: Counter[str] = field(default_factory=Counter)
    attention_timings: dict[str, dict[str, float]] = field(default_factory=dict)
    kept_blocks: KeptBlocks = field(default_factory=KeptBlocks)
    attention_broadcasts: Counter[str] = field(default_factory=Counter)
    cache_bytes: dict[tuple[str, str], int] = field(default_factory=dict)
    cache_guarded: dict[tuple[str, str], Any] = field(default_factory=dict)
    call_times: list[tuple[StepState, Any, Any]] = field(default_factory=list)

    def clear(self) -> None:
        """Empties all counters in place: layers hold on to them."""
        for counter in vars(self).values():
            counter.clear()


@dataclass(eq=False)
class FeatureOutputs:
    """Values that a feature hands to the features applied after it and to the request.

    Attributes:
        request_hooks: From any feature to `request`. Each is called twice in a request: with the pipeline as the
            request begins, and with `None` just before the first denoiser call.
        observed_blocks: From `cache` to `cuda_graph`. (denoiser, id of a block) whose input is read from outside the
            block, besides each stack's first.
        graph_keys: From `attention` and `compile` to `cuda_graph`. Functions whose values tell graph variants apart.
        context_parallel: From `parallel` to `attention` and `compile`. (denoiser, last part of an attention module's
            name) -> context parallelism for the module's calls.
        all_reduce: From `parallel` and `fsdp` to `cache`. Sums a tensor over the ranks that share a forward; `None` for
            a single rank.
        symm_mem: From `parallel` to its own check of inputs. The symmetric memory of every group that has any.
        unsharded: From `fsdp` to `cache`. A context within which a block's weights are whole; all ranks that shard them
            must enter it together.
        rank_device: From the process group to the session's check of a request. Whether the launcher decides this
            rank's device, so that a move to another device does not resolve the configuration again.
        weight_stream: From `offload` to `cuda_graph` and `stats`. The slots through which blocks are streamed.
        prompts: From `offload` to `stats`. An object with the `hits` of the last request.
        vae_choice: From `offload` to `stats`. An object with `taken`: method of the VAE -> its way in the last call.
        sharded_bytes: From `fsdp` to `stats`. Component -> bytes of its blocks' weights on this rank.
        graphs: From `cuda_graph` to `stats`. Objects with `captured`, and with `replays` of the last request.
        modulations: From `compile` to `stats`. Objects with the number of `layers`, and with `missed` of the last
            request.
        cache_records: From `cache` to `calibrate`. (denoiser, branch) -> records of all requests.
    """

    request_hooks: list[Callable[[Any], None]] = field(default_factory=list)
    observed_blocks: set[tuple[str, int]] = field(default_factory=set)
    graph_keys: list[Callable[[], Hashable]] = field(default_factory=list)
    context_parallel: dict[tuple[str, str], Callable[..., torch.Tensor]] = field(default_factory=dict)
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    symm_mem: list[SymmetricMemory] = field(default_factory=list)
    unsharded: Callable[[nn.Module], AbstractContextManager[Any]] = lambda block: nullcontext()
    rank_device: bool = False
    weight_stream: WeightStream | None = None
    prompts: Any = None
    vae_choice: Any = None
    sharded_bytes: dict[str, int] = field(default_factory=dict)
    graphs: list[Any] = field(default_factory=list)
    modulations: list[Any] = field(default_factory=list)
    cache_records: dict[tuple[str, str], list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PipelineContext:
    """One pipeline as features see it.

    Attributes:
        reference: The stock pipeline, held weakly, because layers that outlive the pipeline hold the context.
        denoisers: Its loaded denoisers.
        rank: Place of a named layer in the one order that `api.py` holds.
        clock: Places every call of a denoiser.
        config: The configuration that is, or is to be, applied; `None` before it is known.
        shared: Components besides the denoisers that another session has changed in the same way already.
        plans: Name of a feature -> its plan, of the features that were checked before the one that reads this.
        outputs: Values that features hand to each other.
        stats: Counters of the last request.
    """

    reference: weakref.ref[Any]
    denoisers: tuple[Denoiser, ...]
    rank: Callable[[str], int]
    clock: StepClock
    config: AccelConfig | None = None
    shared: frozenset[str] = frozenset()
    plans: Mapping[str, Any] = field(default_factory=dict)
    outputs: FeatureOutputs = field(default_factory=FeatureOutputs)
    stats: RunStats = field(default_factory=RunStats)

    @property
    def pipe(self) -> Any:
        """The stock pipeline; `None` once it is freed."""
        return self.reference()

    @property
    def compiled(self) -> bool:
        """Whether the denoisers' blocks are, or are to be, compiled: in mode `"auto"` on CUDA alone."""
        compile = self.config.compile if self.config is not None else None
        on_cuda = all(denoiser.device.type == "cuda" for denoiser in self.denoisers)
        return compile is not None and (compile.mode != "auto" or on_cuda)

    @property
    def fsdp(self) -> bool:
        """Whether the weights of blocks are, or are to be, sharded among ranks."""
        parallel = self.config.parallel if self.config is not None else None
        return parallel is not None and parallel.fsdp

    @property
    def takes_over_offloading(self) -> bool:
        """Whether diffusers' own offloading ends before all features but that begin."""
        return self.config is not None and self.config.offload is not None

    def rewrites(self, denoiser: Denoiser) -> bool:
        """Whether graphs of a denoiser's blocks are, or are to be, rewritten before they are compiled."""
        compile = self.config.compile if self.config is not None else None
        return compile is not None and compile.rewriting and denoiser.device.type in REWRITTEN_ON

    def precomputes_modulations(self, denoiser: Denoiser) -> bool:
        """Whether a denoiser's modulations of all steps are computed before a request's first step.

        The computation reads the weights of many blocks at once, and products are looked up by the weights' addresses.
        Under FSDP blocks share memory, so neither is possible.
        """
        return denoiser.adapter.modulation is not None and self.rewrites(denoiser) and not self.fsdp

    @property
    def device(self) -> Device:
        """The device of the denoisers, or of the whole pipeline if none is loaded."""
        return self.denoisers[0].device if self.denoisers else describe(execution_device(self.pipe))

    @property
    def home(self) -> torch.device:
        """The device that blocks run on, or are to run on: a model on the host may be meant for this rank's GPU."""
        if not self.denoisers:
            return torch.device(self.device.type)
        first = self.denoisers[0]
        now = next(first.module.parameters()).device
        if now.type not in ("cpu", "meta") or first.device.type != "cuda":
            return now
        return offload_gpu(self.pipe) or rank_device()

    @property
    def blocks(self) -> int:
        return sum(len(denoiser.adapter.blocks(denoiser.module)) for denoiser in self.denoisers)

    def __str__(self) -> str:
        return str(self.denoisers[0]) if self.denoisers else type(self.pipe).__name__
