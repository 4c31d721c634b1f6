"""The attention kernels of this package in Triton: a record for each 8-bit backend and recipe, `"sage"`, `"sage-fp8"`,
`"qk16pv8"`, and the 16-bit kernel `"triton"`, which rounds nothing and takes lists of blocks.

The name of a backend alone stands for its first recipe. Another recipe follows a slash: `"sage-fp8/fp8-1-4-1"`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .recipe import RECIPES, Recipe
from .record import KERNELS, AttentionFunction, AttentionKernel, Inputs, SparseSupport


def _loader(recipe: Recipe) -> Callable[[], AttentionFunction]:
    def load() -> AttentionFunction:
        from .low_bit import attention as low_bit
        from .low_bit import tiles_of

        def attention(x: Inputs) -> Any:
            if x.sparse is None:
                return low_bit(x, recipe)
            if not x.sparse.within_tiles:
                return low_bit(x, recipe, choose=x.sparse.choose)
            computed = torch.zeros(1, dtype=torch.int32, device=x.query.device)
            found = low_bit(x, recipe, skip=x.sparse.threshold(x.key.shape[1]), computed=computed)
            x.sparse.count_tiles(computed, tiles_of(x, recipe))
            return found

        return attention

    return load


def _record(name: str, recipe: Recipe) -> AttentionKernel:
    return AttentionKernel(
        name=name,
        load=_loader(recipe),
        modules=("triton",),
        install="pip install triton",
        # e4m3 matrix units came with sm_89.
        at_least=(8, 9) if "fp8" in (recipe.qk, recipe.pv) else (8, 0),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=tuple(range(16, 129, 16)),
        mask=False,
        key_mask=True,
        causal=False,
        lse=True,
        exact=recipe.qk is None and recipe.pv is None,
        fuses_qk_norm_rope=recipe.qk is not None,
        sparse=SparseSupport(),
        auto="/" not in name and name != "triton",
    )


# Dense calls have faster kernels, so that only its name, or sparse attention, takes it.
KERNELS.add("triton", _record("triton", Recipe(qk=None, k_block=0, pv=None)))
for _backend, _recipes in RECIPES.items():
    for _place, (_name, _recipe) in enumerate(_recipes.items()):
        KERNELS.add(f"{_backend}/{_name}", _record(f"{_backend}/{_name}", _recipe))
        if _place == 0:
            KERNELS.add(_backend, _record(_backend, _recipe))
