"""Rewrites of a block's graph before inductor compiles it: fusions that inductor does not find, or does in more passes
over memory.

Inductor leaves matrix products to the library and fuses the operations between them. A reduction fused by inductor
reads its row several times. The rewrites, in the order of their application:

- `canonical.py`: operations that stock code writes in several forms get the one form that the other rewrites look for.
- `attention.py`: QK-norm, rotation and attention become one operator. It applies norm and rotation in one launch, or
  while it quantizes.
- `linear.py`: tanh-GELU after a linear layer moves into the GEMM's epilogue and acts on the float32 sum. A layer of
  concatenated tensors (FLUX's single-stream blocks) becomes GEMMs that add up. A few rows become a skinny GEMM.
- `rows.py`: a residual sum, its norm and its modulation become one pass, which rounds to 8 bits for a quantized layer.
  An activation and the rounding after it become one pass too.
- `overlap.py`: computation that does not depend on an exchange between ranks runs during the exchange.

The graph holds torch's functions as stock code calls them: the rewrites run before any decomposition.
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
        """Rewrites a graph in place. While autograd records, nothing is rewritten: the operators have no backward."""
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
    """A backend of `torch.compile` that rewrites a graph and passes it to `backend`, e.g. `"eager"`. Inductor needs
    none, because it calls `REWRITES` itself."""

    def compiled(module: GraphModule, inputs: list[Any], **options: Any) -> Any:
        REWRITES(module.graph)
        module.recompile()
        return lookup_backend(backend)(module, inputs, **options)

    return compiled
