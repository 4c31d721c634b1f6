"""Attention kernels: one record each, the choice among them, and the site through which a pipeline calls them.

Importing this package registers the records and imports no kernel package. Where to look:

- `record.py`: what a kernel is, and `register_attention`. `choice.py`: a fixed kernel, or the fastest by measurement.
  `site.py`: the custom operator every call goes through.
- Records: `torch_native.py`, `flash.py`, `others.py` (packages a user may have), `sage.py` (ours).
- `pending.py`: query and key on their way to a kernel that does their QK-norm and rotary embedding itself.
- `context_parallel.py`: attention over a sequence that is sharded among ranks; `ulysses.py`: its all-to-all over
  symmetric memory, with the Triton kernels of `peer_writes.py`.
- `unprepared.py`: the same in compiled graphs; `prepare.py`: norm and rotation by themselves, in Triton.
- Ours: `recipe.py` (what is rounded, and plain references); in Triton, imported by loaders only, `rows.py`,
  `quantize.py`, `low_bit.py`.
"""

from __future__ import annotations

from . import flash, others, sage, torch_native  # noqa: F401  (each registers its records)
from .choice import Choice, Fastest, Fixed, Timings, candidates, margin
from .context_parallel import ContextParallelAttention, Layout
from .pending import Pending
from .recipe import RECIPES
from .record import KERNELS, AttentionKernel, Call, Inputs, recipes, register_attention
from .site import SITES, AttentionSite, enter
from .ulysses import Operand, UlyssesAllToAll
from .unprepared import attention_unprepared, rotate

__all__ = [
    "KERNELS",
    "RECIPES",
    "SITES",
    "AttentionKernel",
    "AttentionSite",
    "Call",
    "Choice",
    "Fastest",
    "Fixed",
    "Inputs",
    "Layout",
    "Operand",
    "Pending",
    "UlyssesAllToAll",
    "Timings",
    "ContextParallelAttention",
    "attention_unprepared",
    "candidates",
    "enter",
    "margin",
    "recipes",
    "register_attention",
    "rotate",
]
