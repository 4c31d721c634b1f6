"""Rewrites of a block's graph before inductor sees it: what its own fusion cannot do, or does in more passes over
memory than it takes.

Inductor leaves matrix products to the library, and fuses what stands between them; a reduction over a row it reads
again and again. So:

- `attention.py`: QK-norm and rotation are left to the call of attention, which does them in one launch, or in its own
  quantization.
- `linear.py`: GELU in its tanh form, right after a linear layer, goes into the product's epilogue, and is applied to
  what was summed up in float32, before that is rounded. A linear layer of two tensors laid side by side (FLUX's
  single-stream blocks) becomes two products that add up.
- `rows.py`: a residual stream's sum, its norm and its modulation become one pass, which rounds to 8 bits if that is
  what a quantized layer reads; so do an activation and the rounding after it.
- `overlap.py`: what does not depend on an exchange between ranks is computed beside it.
- `canonical.py`: the one form in which the others find what stock code writes in several.

The graph is torch's own, before any decomposition, so the patterns are those that stock code writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from . import attention, canonical, linear, overlap, rows


class Rewrites(CustomGraphPass):
    """All rewrites, in the form of inductor's `pre_grad_custom_pass`."""

    def __call__(self, graph: Graph) -> None:
        """Rewrites a graph in place; where gradients are recorded, which our operators know nothing of, it stays."""
        if torch.is_grad_enabled():
            return
        for rewrite in (canonical.rewrite, attention.rewrite, linear.rewrite, rows.rewrite, overlap.rewrite):
            rewrite(graph)
        graph.lint()

    def uuid(self) -> str:
        """Names the rewrites in inductor's cache, which must not answer with what others made."""
        return _version()


@cache
def _version() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


# One for all: compiled code is found again by the very object it was compiled with.
REWRITES = Rewrites()


@cache
def rewritten(backend: str) -> Callable[..., Any]:
    """Another backend of `torch.compile` than inductor, which has a place for rewrites itself, behind them: `"eager"`
    runs a rewritten graph as it is."""

    def compiled(module: GraphModule, inputs: list[Any], **options: Any) -> Any:
        REWRITES(module.graph)
        module.recompile()
        return torch._dynamo.lookup_backend(backend)(module, inputs, **options)  # type: ignore[operator]

    return compiled
