"""Attention kernels: a record of each, the choice among them, and the dispatcher that a pipeline's calls enter.

Importing this package registers the records and imports no kernel package. The files:

- `record.py`: what a kernel's record says, and `register_attention`. `choice.py`: a fixed kernel, or the fastest by
  measurement. `dispatch.py`: the dispatcher and its custom operator.
- Records: `torch_native.py`, `flash.py`, `packages.py` (optional packages), `sage.py` (the kernels of this package).
- `deferred.py`: query and key whose QK-norm and rotary embedding a kernel applies itself. `fused_qk_norm_rope.py`: the
  same idea as operators of compiled graphs. `qk_norm_rope.py`: norm and rotation alone, in Triton.
- `context_parallel.py`: attention over a sequence that is sharded among ranks. `ulysses.py`: its all-to-all over
  symmetric memory; `peer_writes.py`: the Triton kernels of that.
- `sparse.py`: sparse attention of a role's calls. `selectors.py`: the rules that score blocks of keys, and
  `register_sparse`. `token_grid.py`: orders of tokens and places of blocks. `block_lists.py`: Triton kernels of these.
  `clusters.py`: an order of tokens for each head and call, in Triton.
- `recipe.py`: the rounding of 8-bit attention, with plain references. Its Triton kernels, which only loaders import:
  `rows.py`, `norm.py`, `quantize.py`, `low_bit.py`.
"""

from __future__ import annotations

from . import flash, packages, sage, torch_native  # noqa: F401  (each registers its records)
from .choice import Choice, Fastest, Fixed, Timings, candidates, margin
from .context_parallel import ContextParallelAttention, Layout
from .deferred import DeferredQK
from .dispatch import DISPATCHERS, AttentionDispatcher, dispatch
from .fused_qk_norm_rope import apply_rope, fused_qk_norm_rope_attention
from .recipe import RECIPES
from .record import KERNELS, AttentionKernel, Call, Inputs, SparseSupport, recipes, register_attention
from .selectors import SELECTORS, Selector, register_sparse
from .sparse import Carried, KeptBlocks, Sparse
from .token_grid import Span
from .ulysses import Operand, UlyssesAllToAll

__all__ = [
    "DISPATCHERS",
    "KERNELS",
    "RECIPES",
    "SELECTORS",
    "AttentionDispatcher",
    "AttentionKernel",
    "Call",
    "Carried",
    "Choice",
    "DeferredQK",
    "Fastest",
    "Fixed",
    "Inputs",
    "KeptBlocks",
    "Layout",
    "Operand",
    "Selector",
    "Span",
    "Sparse",
    "SparseSupport",
    "ContextParallelAttention",
    "Timings",
    "UlyssesAllToAll",
    "apply_rope",
    "candidates",
    "dispatch",
    "fused_qk_norm_rope_attention",
    "margin",
    "recipes",
    "register_attention",
    "register_sparse",
]
