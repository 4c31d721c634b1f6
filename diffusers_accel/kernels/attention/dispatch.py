"""The dispatcher: one attention call of a pipeline enters here, gets a kernel, is counted and runs.

All calls go through one custom operator. Under `torch.compile` a call is therefore an opaque node: no graph break, and
one compiled graph for all blocks. The kernel is chosen in Python on every call. So the choice may depend on the step,
the layer and the shape without a second graph.

A kernel may refuse a call because of a mask, a dtype or a head dimension. Such a call runs on SDPA, is counted under
SDPA's name, and is warned of once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch

from ...core.lazy_tensor import materialized
from ...core.operators import operator
from ...core.platform import device_guard
from ...errors import Unsupported
from .choice import Choice, shape_class
from .deferred import common_qk_norm_rope
from .record import KERNELS, AttentionFunction, AttentionKernel, Call, Inputs


class AttentionDispatcher:
    """The kernels of one pipeline for one role of attention layers.

    Args:
        select: Returns the choice for the current step and layer.
        counts: Kernel name -> number of calls. The pipeline's statistics own it.
        context_parallel: Runs attention over a sequence that several ranks share; `None` for a sequence on one rank.

    Attributes:
        number: Its key in `DISPATCHERS`, a constant in compiled graphs.
        operands: Query, key and value between `ulysses_send` and `ulysses_attention`, where no `context_parallel` takes
            them.
    """

    def __init__(self, select: Callable[[], Choice], counts: Counter[str], context_parallel: Any = None):
        self.select, self.counts, self.context_parallel = select, counts, context_parallel
        self.operands: dict[int, Any] = {}
        self.number = _free_number()
        self._functions: dict[str, AttentionFunction] = {}
        self._warned: set[str] = set()

    def run(self, inputs: Inputs) -> torch.Tensor:
        """Attention over the whole sequence, on this rank or through `context_parallel`.

        Args:
            inputs: The call; its query and key may be `DeferredQK`.
        """
        if self.context_parallel is not None:
            # The ranks exchange query and key with norm and rotation applied.
            inputs = replace(inputs, query=materialized(inputs.query), key=materialized(inputs.key))
            out: torch.Tensor = self.context_parallel(inputs, self.run_local)
            return out
        out = self.run_local(inputs)
        return out

    def run_local(self, inputs: Inputs) -> Any:
        """Attention over the tensors of this rank; returns (output, LSE) if `inputs.return_lse`."""
        with device_guard(inputs.value):
            return self._run_local(inputs)

    def _run_local(self, inputs: Inputs) -> Any:
        fused = inputs
        query, key = inputs.query, inputs.key
        deferred = common_qk_norm_rope(query, key)
        if deferred is not None:
            rotary, norm = deferred
            fused = replace(inputs, query=query.raw, key=key.raw, rotary=rotary, norm=norm)  # type: ignore

        def run(kernel: AttentionKernel) -> Any:
            if deferred is not None and kernel.fuses_qk_norm_rope:
                return self._function(kernel)(fused)
            return self._function(kernel)(replace(inputs, query=materialized(query), key=materialized(key)))

        call = Call.of(fused)
        choice = self.select()
        sparse, kernel = choice.sparse, choice.kernels[0]
        if sparse is not None and choice.sparse_kernel is not None and sparse.takes(inputs):
            kernel = choice.sparse_kernel
        elif len(choice.kernels) > 1:
            sparse, kernel = None, choice.pick(call, run, shape_class(fused, call))
        else:
            sparse = None
        reason = kernel.refuses(call)
        if reason is not None:
            if reason not in self._warned:
                self._warned.add(reason)
                warnings.warn(f"attention {kernel.name!r} {reason}: such calls run on 'sdpa'.", stacklevel=2)
            sparse, kernel = None, KERNELS.get("sdpa")
        if sparse is not None:
            inputs, fused = replace(inputs, sparse=sparse), replace(fused, sparse=sparse)
            self.counts[f"{kernel.name}, {sparse.label(inputs.key.shape[1])}"] += 1
            if sparse.clusters(inputs):
                ordered, back = sparse.clustered(
                    replace(inputs, query=materialized(query), key=materialized(key))
                )  # fmt: skip
                return back(self._function(kernel)(ordered))
        else:
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
        """Attention on (batch, sequence, heads, head_dim) tensors, in eager or compiled code. Eager code needs no entry
        in `DISPATCHERS`."""
        if torch.compiler.is_compiling():
            return _attention(query, key, value, attn_mask, is_causal, scale, self.number)
        return self.run(Inputs(query, key, value, attn_mask, is_causal, scale))


# Dispatchers by number; a pipeline's layers own them. The number is a constant in compiled graphs. A freed number is
# given out again, so that a pipeline that is restored and accelerated once more finds its compiled graphs.
DISPATCHERS: WeakValueDictionary[int, AttentionDispatcher] = WeakValueDictionary()


def _free_number() -> int:
    return next(number for number in range(len(DISPATCHERS) + 1) if number not in DISPATCHERS)


def dispatch(
    number: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention by the dispatcher of a number, on (batch, sequence, heads, head_dim) tensors, in eager or compiled
    code.

    Raises:
        Unsupported: No dispatcher has the number: its pipeline was restored or is gone.
    """
    if torch.compiler.is_compiling():
        return _attention(query, key, value, attn_mask, is_causal, scale, number)
    return _dispatcher(number).run(Inputs(query, key, value, attn_mask, is_causal, scale))


def _dispatcher(number: int) -> AttentionDispatcher:
    found = DISPATCHERS.get(number)
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
    dispatcher: int,
) -> torch.Tensor:
    out = _dispatcher(dispatcher).run(Inputs(query, key, value, attn_mask, is_causal, scale))
    return out.contiguous()
