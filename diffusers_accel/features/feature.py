"""The interface of a feature: a pure check and a generator of edits over one pipeline.

`accelerate` runs the check of every feature that is on before the first edit of any, so a refusal changes nothing. A
check returns what the feature would do, which is what `explain` prints. Features never import each other and never
undo anything: the journal does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from ..compat.diffusers_private import GROUP_OFFLOADING, diffusers_hooks
from ..core.edits import Edit
from ..errors import Unsupported
from .context import Denoiser, PipelineContext

# inductor's modes that record graphs of their own.
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Plan:
    """The work of a feature, as its check plans it.

    Attributes:
        action: In a few words.
        modules: On how many modules; 0 if it leaves everything as it is.
        notes: Consequences for the user, one sentence each.
        left: Parts of the request that are not done, or done otherwise; `accelerate` warns of each.
        formats: From `linear` to `offload`. `id` of a stock layer -> the record of its format.
        shards: From the row `tensor parallel` to `offload`. `id` of a stock layer -> (outputs, inputs) of the largest
            shard that a rank gets.
    """

    action: str
    modules: int
    notes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    formats: Mapping[int, Any] = field(default_factory=dict)
    shards: Mapping[int, tuple[int, int]] = field(default_factory=dict)


class Feature(Protocol):
    """A row of the FEATURES table in `api.py`. A feature is a module with these two functions."""

    def check(self, context: PipelineContext, config: Any) -> Plan:
        """Says what would be done. Pure; raises `Unsupported`."""
        ...

    def edits(self, context: PipelineContext, config: Any) -> Iterator[Edit]:
        """The edits, each applied as it is yielded."""
        ...


def refuse_offloaded(feature: str, denoiser: Denoiser, context: PipelineContext) -> None:
    """Refuses a feature that replaces weights which group or sequential offloading already manages. With `offload`,
    that offloading ends before the feature begins.

    Raises:
        Unsupported: The denoiser is offloaded so.
    """
    if offloaded(denoiser.module) and not context.takes_over_offloading:
        raise Unsupported(
            feature,
            "its weights are offloaded, and the hooks that move them know the stock weights only.",
            "offload=..., which takes diffusers' offloading over, or accelerate first, then enable offloading.",
            str(denoiser),
        )


def refuse_own_graphs(feature: str, context: PipelineContext) -> None:
    """Refuses modes of torch.compile that record graphs, for a feature whose weights change places.

    Raises:
        Unsupported: The configuration has such a mode.
    """
    compile = context.config.compile if context.config is not None else None
    if compile is not None and compile.mode in _OWN_GRAPHS:
        raise Unsupported(
            feature,
            f"torch.compile records graphs in mode {compile.mode!r}, which replay on copies of the weights.",
            f"compile='default' or {compile.mode + '-no-cudagraphs'!r}.",
        )


def offloaded(module: nn.Module) -> bool:
    """Whether group or sequential offloading has a hold on a module's weights."""
    for each in module.modules():
        if any(GROUP_OFFLOADING in name for name in diffusers_hooks(each)) or any(
            item.is_meta for item in each.parameters(recurse=False)
        ):
            return True
    return False
