"""Functions that ranks run in tests of sparse attention."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from tiny import TINY, tensors

from diffusers_accel import accelerate, restore, stats
from diffusers_accel.features.attention import sparse
from diffusers_accel.kernels.attention import KERNELS, AttentionKernel, SparseSupport
from diffusers_accel.kernels.attention.recipe import Recipe

from .requests import _pipeline


def _in_small_blocks(config):
    if config.sparse is None:
        return None
    found = replace(config.sparse)
    object.__setattr__(found, "block", 16)
    return found


def divided(name, parallel):
    """A request with sparse attention in blocks of 16 tokens, on this rank alone and divided among ranks.

    Returns:
        The largest difference over the largest value, and the counts of attention calls of the divided request.
    """
    from diffusers_accel.kernels.attention.low_bit import attention

    def function(x):
        choose = None if x.sparse is None else x.sparse.choose
        return attention(x, Recipe(qk=None, k_block=0, pv=None), choose=choose)

    pipe, entry = _pipeline(name, None, False), TINY[name]
    record = AttentionKernel(
        name="exact", load=lambda: function, sparse=SparseSupport(blocks=(16,)), mask=False, key_mask=True, causal=False
    )  # fmt: skip
    settings = {
        "backend": "sdpa",
        "layers": {"*.attn1": "exact"},
        "sparse": {"keep": 0.34, "min_tokens": 1, "order": "cubes"},
    }
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setitem(KERNELS._records, "exact", record)
        patch.setattr(sparse, "settings", _in_small_blocks)
        accelerate(pipe, attention=settings)
        alone = [item.clone() for item in tensors(entry.run(pipe, steps=1))]
        accelerate(pipe, attention=settings, parallel=parallel)
        found = tensors(entry.run(pipe, steps=1))
        counts = dict(stats(pipe).attention_kernels)
        restore(pipe)
    errors = [float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, alone, strict=True)]
    return max(errors), counts
