"""A site: the place where one kind of attention call of one pipeline enters a kernel, and is counted.

All kernels are reached through one custom operator, so that under `torch.compile` a call is an opaque node: no graph
break, one compiled graph for all blocks, and the Python that chooses and counts runs on every call. That is why the
kernel may depend on the step, the layer and the shape without a second graph. A call the kernel cannot take (a mask, a
causal mask, another dtype or head dimension) runs on SDPA; that is counted under SDPA's name and warned of once, never
silent.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch

from ...core.operators import operator
from ...core.platform import on
from ...errors import Unsupported
from .choice import Choice, shape_class
from .pending import pending, settled
from .record import KERNELS, AttentionFunction, AttentionKernel, Call, Inputs


class AttentionSite:
    """Kernels as one pipeline uses them for one kind of call.

    Args:
        select: Returns the choice in force for the call that is being made (by step and layer).
        counts: Kernel name -> calls; shared with the pipeline's statistics.
        context_parallel: Attention over a sequence that is sharded among ranks; `None` for one rank.

    Attributes:
        kept: Query, key and value of a call in several steps, where there is no context parallelism.
    """

    def __init__(self, select: Callable[[], Choice], counts: Counter[str], context_parallel: Any = None):
        self.select, self.counts, self.context_parallel = select, counts, context_parallel
        self.kept: dict[int, Any] = {}
        self.number = _free_number()
        self._functions: dict[str, AttentionFunction] = {}
        self._warned: set[str] = set()

    def run(self, inputs: Inputs) -> torch.Tensor:
        """Attention by the kernel that is chosen and can take the call; query and key may be `Pending`."""
        if self.context_parallel is not None:
            # Ranks exchange query and key after their norm and rotation.
            inputs = replace(inputs, query=settled(inputs.query), key=settled(inputs.key))
            out: torch.Tensor = self.context_parallel(inputs, self.here)
            return out
        out = self.here(inputs)
        return out

    def here(self, inputs: Inputs) -> Any:
        """The same on this rank alone; with the logsumexp, if that is asked for."""
        with on(inputs.value):
            return self._here(inputs)

    def _here(self, inputs: Inputs) -> Any:
        folded = inputs
        query, key = inputs.query, inputs.key
        to_do = pending(query, key)
        if to_do is not None:
            rotary, norm = to_do
            folded = replace(inputs, query=query.plain(), key=key.plain(), rotary=rotary, norm=norm)  # type: ignore

        def run(kernel: AttentionKernel) -> Any:
            if to_do is not None and kernel.folds:
                return self._function(kernel)(folded)
            return self._function(kernel)(replace(inputs, query=settled(query), key=settled(key)))

        call = Call.of(folded)
        choice = self.select()
        kernel = choice.kernels[0]
        if len(choice.kernels) > 1:
            kernel = choice.pick(call, run, shape_class(folded, call))
        reason = kernel.refuses(call)
        if reason is not None:
            if reason not in self._warned:
                self._warned.add(reason)
                warnings.warn(f"attention {kernel.name!r} {reason}: such calls run on 'sdpa'.", stacklevel=2)
            kernel = KERNELS.get("sdpa")
        self.counts[kernel.name] += 1
        return run(kernel)

    def _function(self, kernel: AttentionKernel) -> AttentionFunction:
        if kernel.name not in self._functions:
            self._functions[kernel.name] = kernel.load()
        return self._functions[kernel.name]

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention on (batch, sequence, heads, head_dim) tensors, compiled or not."""
        if torch.compiler.is_compiling():
            return _attention(query, key, value, attn_mask, is_causal, scale, self.number)
        return self.run(Inputs(query, key, value, attn_mask, is_causal, scale))


# Sites by number, while the pipeline exists whose layers have them. The number is a constant in compiled graphs: freed
# numbers are used again, so that a restored and accelerated pipeline finds its compiled graphs.
SITES: WeakValueDictionary[int, AttentionSite] = WeakValueDictionary()


def _free_number() -> int:
    return next(number for number in range(len(SITES) + 1) if number not in SITES)


def enter(
    number: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention by the site of a number, on (batch, sequence, heads, head_dim) tensors, compiled or not."""
    if torch.compiler.is_compiling():
        return _attention(query, key, value, attn_mask, is_causal, scale, number)
    return _site(number).run(Inputs(query, key, value, attn_mask, is_causal, scale))


def _site(number: int) -> AttentionSite:
    found = SITES.get(number)
    if found is None:
        raise Unsupported(
            "attention",
            "a processor of a pipeline that was restored, or is gone, was called.",
            "a stock processor: set_attn_processor(...) with one of diffusers' own.",
        )
    return found


def _attention_fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@operator("attention", _attention_fake)
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    site: int,
) -> torch.Tensor:
    out = _site(site).run(Inputs(query, key, value, attn_mask, is_causal, scale))
    return out.contiguous()
