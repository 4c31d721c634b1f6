"""Rewrites of a block's graph before inductor compiles it: fusions that inductor does not find, or does in more passes
over memory.

Inductor leaves matrix products to the library and fuses the operations between them; it reads a row several times for
a reduction over it. The rewrites, in the order of their application:

- `canonical.py`: one form for operations that stock code writes in several, in which the other rewrites find them.
- `attention.py`: QK-norm, rotation and attention become one operator, which norms and rotates in one launch or while it
  quantizes.
- `linear.py`: the GELU in its tanh form after a linear layer moves into the product's epilogue and acts on the float32
  sum. A linear layer of two concatenated tensors (FLUX's single-stream blocks) becomes two products that add up.
- `rows.py`: a residual sum, its norm and its modulation become one pass, which rounds to 8 bits for a quantized layer.
  An activation and the rounding after it become one pass too.
- `overlap.py`: computation that does not depend on an exchange between ranks runs beside it.

The graph holds torch's own functions, before any decomposition, so the patterns are those of stock code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from ....compat.torch_private import custom_graph_pass, lookup_backend
from . import attention, canonical, linear, overlap, rows

_CustomGraphPass: Any = custom_graph_pass()


class Rewrites(_CustomGraphPass):
    """All rewrites, as one custom pass of inductor."""

    def __call__(self, graph: Graph) -> None:
        """Rewrites a graph in place. A graph that records gradients stays, because the operators have none."""
        if torch.is_grad_enabled():
            return
        for rewrite in (canonical.rewrite, attention.rewrite, linear.rewrite, rows.rewrite, overlap.rewrite):
            rewrite(graph)
        graph.lint()

    def uuid(self) -> str:
        """Names the rewrites in inductor's cache, so that a graph compiled with other rewrites is not reused."""
        return _version()


@cache
def _version() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


# A single instance: Dynamo finds compiled code again by the identity of the object it was compiled with.
REWRITES = Rewrites()


@cache
def rewritten(backend: str) -> Callable[..., Any]:
    """A backend of `torch.compile` that rewrites a graph and passes it on: `"eager"`, say, runs the rewritten graph.
    Inductor needs no such backend, since it calls `REWRITES` itself."""

    def compiled(module: GraphModule, inputs: list[Any], **options: Any) -> Any:
        REWRITES(module.graph)
        module.recompile()
        return lookup_backend(backend)(module, inputs, **options)

    return compiled
