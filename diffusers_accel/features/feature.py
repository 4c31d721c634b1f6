"""What a feature is: a pure check and a generator of edits over one target.

`accelerate` runs the check of every feature that is on before the first edit of any, so a refusal changes nothing. A
check returns what the feature would do, which is what `explain` prints. Features never import each other and never
undo anything: the journal does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..config import AccelConfig
from ..core.edits import Edit
from ..core.mesh import own_gpu
from ..core.parts import parts
from ..core.platform import Device, describe
from ..core.step import StepClock, StepState
from ..core.windows import Windows
from ..errors import Unsupported
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
        device: Where it runs (under an offload hook its weights may be elsewhere).
    """

    name: str
    module: nn.Module
    adapter: Adapter
    device: Device

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations have: that of the model's largest floating-point parameter."""
        found = (item for part in parts(self.module) for item in part._parameters.values() if item is not None)
        return max((item for item in found if item.is_floating_point()), key=torch.Tensor.numel).dtype

    @property
    def config(self) -> dict[str, Any]:
        return dict(getattr(self.module, "config", {}))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Its stacks that have blocks."""
        return tuple(stack for stack in self.adapter.stacks if len(stack.blocks(self.module)))

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


@dataclass
class Target:
    """One pipeline, as the features see it.

    Attributes:
        pipe: The stock pipeline.
        denoisers: Its denoisers, those that are `None` left out.
        rank: Place of a named layer in the one order that `api.py` holds.
        clock: Places every denoiser call.
        attention_calls: Kernel name -> calls in the last request.
        attention_timings: Shape class -> kernel -> seconds, where `"auto"` chose among several.
        config: What is, or is to be, applied; for a feature that cannot be had together with another.
        taken: Components, besides the denoisers, that another pipeline which shares them has changed in the same way.
        begun: Called as a request begins, with its pipeline where that has done nothing yet, and with `None` where its
            denoiser is about to run.
        looked_at: (denoiser, id of a block) whose input some feature looks at from outside the block, besides each
            stack's first.
        phases: What features do otherwise from step to step within a block, as values to compare.
        transports: (denoiser, last part of an attention module's name) -> what carries its calls, where a sequence is
            divided among ranks.
        summed: Adds up a tensor over all ranks that share a forward; `None` where none is shared.
        windows: Of each group of ranks: what they exchange shards through, if it is no messages.
        gathered: Puts a block's weights in place for as long as its context lasts, for who reads them while the block
            does not run; every rank that shares them must ask at once.
        held: Name of a component -> bytes of its blocks' weights that this rank holds, where ranks share them.
        graphs: Of each denoiser: what holds its CUDA graphs, with how many are `captured` and the last request's
            `replays`.
        modulations: Of each denoiser: what holds its modulations of all steps, with the number of `layers` and the last
            request's `missed`.
        attention_broadcasts: `"computed"` and `"reused"` -> attention outputs of the last request, under PAB.
        cache_bytes: (denoiser, branch) -> bytes that step caching keeps between steps.
        cache_guarded: (denoiser, branch) -> what a cache's guard found in the last request.
        call_times: Calls of the last request's denoisers, and the moments at which each began and ended.
        cache_records: (denoiser, branch) -> what a recording cache saw, over all requests.
    """

    pipe: Any
    denoisers: tuple[Denoiser, ...]
    rank: Callable[[str], int]
    clock: StepClock
    attention_calls: Counter[str] = field(default_factory=Counter)
    attention_timings: dict[str, dict[str, float]] = field(default_factory=dict)
    config: AccelConfig | None = None
    taken: frozenset[str] = frozenset()
    begun: list[Callable[[Any], None]] = field(default_factory=list)
    looked_at: set[tuple[str, int]] = field(default_factory=set)
    phases: list[Callable[[], Hashable]] = field(default_factory=list)
    transports: dict[tuple[str, str], Callable[..., torch.Tensor]] = field(default_factory=dict)
    summed: Callable[[torch.Tensor], torch.Tensor] | None = None
    windows: list[Windows] = field(default_factory=list)
    gathered: Callable[[nn.Module], AbstractContextManager[Any]] = lambda block: nullcontext()
    held: dict[str, int] = field(default_factory=dict)
    graphs: list[Any] = field(default_factory=list)
    modulations: list[Any] = field(default_factory=list)
    attention_broadcasts: Counter[str] = field(default_factory=Counter)
    cache_bytes: dict[tuple[str, str], int] = field(default_factory=dict)
    cache_guarded: dict[tuple[str, str], Any] = field(default_factory=dict)
    call_times: list[tuple[StepState, Any, Any]] = field(default_factory=list)
    cache_records: dict[tuple[str, str], list[Any]] = field(default_factory=dict)

    @property
    def compiled(self) -> bool:
        """Whether the denoisers' blocks are, or are to be, compiled: in mode `"auto"` on CUDA alone."""
        compile = self.config.compile if self.config is not None else None
        on_cuda = all(denoiser.device.type == "cuda" for denoiser in self.denoisers)
        return compile is not None and (compile.mode != "auto" or on_cuda)

    @property
    def shares_weights(self) -> bool:
        """Whether ranks share, or are to share, the weights of blocks."""
        parallel = self.config.parallel if self.config is not None else None
        return parallel is not None and parallel.fsdp

    def rewrites(self, denoiser: Denoiser) -> bool:
        """Whether graphs of a denoiser's blocks are, or are to be, rewritten before they are compiled."""
        compile = self.config.compile if self.config is not None else None
        return compile is not None and compile.rewriting and denoiser.device.type in REWRITTEN_ON

    @property
    def device(self) -> Device:
        """Where the denoisers run, or the whole pipeline if none is loaded."""
        return self.denoisers[0].device if self.denoisers else describe(self.pipe._execution_device)

    def __str__(self) -> str:
        return str(self.denoisers[0]) if self.denoisers else str(self.pipe.__class__.__name__)

    @property
    def home(self) -> torch.device:
        """Where blocks run, or are to run: a model on the host may be meant for this rank's GPU."""
        if not self.denoisers:
            return torch.device(self.device.type)
        first = self.denoisers[0]
        now = next(first.module.parameters()).device
        return own_gpu() if now.type == "cpu" and first.device.type == "cuda" else now

    @property
    def blocks(self) -> int:
        return sum(len(denoiser.adapter.blocks(denoiser.module)) for denoiser in self.denoisers)


@dataclass(frozen=True)
class Plan:
    """What a feature would do.

    Attributes:
        action: In a few words.
        modules: On how many modules; 0 if it leaves everything as it is.
        notes: What a user should know of it, one sentence each.
        left: What stays undone or is done otherwise than asked; `accelerate` warns of it.
    """

    action: str
    modules: int
    notes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


class Feature(Protocol):
    """A row of the FEATURES table in `api.py`. A feature is a module with these two functions."""

    def check(self, target: Target, config: Any) -> Plan:
        """Says what would be done. Pure; raises `Unsupported`."""
        ...

    def edits(self, target: Target, config: Any) -> Iterator[Edit]:
        """The edits, each applied as it is yielded."""
        ...


def refuse_offloaded(feature: str, denoiser: Denoiser) -> None:
    """Group and sequential offloading hold on to the weights they know: whoever changes weights must come first.

    Raises:
        Unsupported: The denoiser is offloaded so.
    """
    if offloaded(denoiser.module):
        raise Unsupported(
            feature,
            "its weights are offloaded, and the hooks that move them know the stock weights only.",
            "accelerate first, then enable offloading.",
            str(denoiser),
        )


def offloaded(module: nn.Module) -> bool:
    """Whether group or sequential offloading has a hold on a module's weights."""
    for each in module.modules():
        hooks: Any = getattr(getattr(each, "_diffusers_hook", None), "hooks", {})
        if any("group_offload" in name for name in hooks) or any(
            item.is_meta for item in each.parameters(recurse=False)
        ):
            return True
    return False
