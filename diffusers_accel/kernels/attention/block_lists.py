"""Lists of key blocks for sparse attention, in Triton: chosen from scores, or made of a mask, without a sort.

A row of a score matrix belongs to one block of queries of one head. One program takes a row into registers. It finds
the threshold by bisection over the bits of the scores, marks the blocks above it, and writes their indices by a prefix
sum. The host reads nothing and no shape depends on a value, so that CUDA graphs replay it.

Only the loaders of kernel records import this module: it needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from .quantize import LOG2E, Quantized
from .record import Inputs


@dataclass(frozen=True)
class BlockLists:
    """The blocks of keys that each block of queries attends to.

    Attributes:
        indices: int32 (batch, heads, query blocks, key blocks): indices of the kept blocks in ascending order, then
            values without meaning.
        counts: int32 (batch, heads, query blocks), the number of kept blocks.
        query_block: Queries of a block.
        key_block: Keys of a block.
        even: Whether all counts are equal.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    query_block: int
    key_block: int
    even: bool = False


@on_its_device
@triton.jit(do_not_specialize=["length"])
def _means(
    x_ptr, scale_ptr, out_ptr, s_b, s_s, s_h, length, heads, factor,
    SCALED: tl.constexpr, GROUP: tl.constexpr, POOL: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The mean of POOL neighbouring tokens, times a factor. Program (mean, batch x head). SCALED: the values are
    rounded, and GROUP tokens share a scale."""
    group, index = tl.program_id(0), tl.program_id(1)
    rows, d = group * POOL + tl.arange(0, POOL), tl.arange(0, DP)
    at = x_ptr + (index // heads).to(tl.int64) * s_b + index % heads * s_h
    inside = (rows < length)[:, None] & (d < D)[None, :]
    x = tl.load(at + rows.to(tl.int64)[:, None] * s_s + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        scales = scale_ptr + index.to(tl.int64) * tl.cdiv(length, GROUP)
        x = x * tl.load(scales + rows // GROUP, mask=rows < length, other=0.0)[:, None]
    mean = tl.sum(x, 0) * (factor / tl.minimum(length - group * POOL, POOL))
    tl.store(out_ptr + (index.to(tl.int64) * tl.num_programs(0) + group) * D + d, mean, mask=d < D)


def means(x: torch.Tensor, size: int, scale: torch.Tensor | None = None, factor: float = 1.0) -> torch.Tensor:
    """The means of neighbouring tokens.

    Args:
        x: (batch, heads, sequence, head_dim) with contiguous channels; a floating dtype, int8 or e4m3.
        size: Number of tokens of a mean, a power of two. The last mean may have fewer.
        scale: float32 (batch, heads, scales): the factors of rounded values, each for as many neighbours; `None` for
            values that are not rounded.
        factor: Factor of the means.

    Returns:
        float32 (batch, heads, means, head_dim).
    """
    batch, heads, length, dim = x.shape
    groups = triton.cdiv(length, size)
    out = torch.empty((batch, heads, groups, dim), dtype=torch.float32, device=x.device)
    each = 1 if scale is None else shared_by(length, scale.shape[2])
    _means[(groups, batch * heads)](
        x, out if scale is None else scale, out, x.stride(0), x.stride(2), x.stride(1), length, heads, factor,
        SCALED=scale is not None, GROUP=each, POOL=size, D=dim, DP=triton.next_power_of_2(dim),
        num_warps=max(1, min(4, size // 16)),
    )  # fmt: skip
    return out


def operand_means(x: Inputs, data: Quantized, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of neighbouring queries, and of neighbouring keys, whose products are logits without the softmax scale.
    Of a rounded key, its mean over the sequence is subtracted, which changes all logits of a row alike.

    Args:
        x: The call.
        data: Its operands, rounded or not.
        queries: Number of queries of a mean, a power of two.
        keys: Number of keys of a mean, a power of two.

    Returns:
        float32 (batch, heads, means, head_dim), and float32 (batch, kv_heads, means, head_dim).
    """
    if data.query.is_floating_point() and data.query.element_size() > 1:
        return means(data.query, queries), means(data.key, keys)
    # The scale of a rounded query has the softmax scale and log2(e) within it.
    factor = 1 / (x.softmax_scale * LOG2E)
    return means(data.query, queries, data.query_scale, factor), means(data.key, keys, data.key_scale)


def shared_by(length: int, scales: int) -> int:
    """The number of tokens that share a scale, a power of two, where `scales` of them cover a length."""
    size = 1
    while triton.cdiv(length, size) > scales:
        size *= 2
    return size


@on_its_device
@triton.jit(do_not_specialize=["rows", "columns", "q_groups", "k_groups"])
def _scores(
    q_ptr, k_ptr, out_ptr, scale, rows, columns, q_groups, k_groups, heads, groups,
    QS: tl.constexpr, KS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The logits of R x C pairs of blocks. Program (query blocks, key blocks, batch x head). A block has QS or KS
    means: its logit is the log of the sum of exp over the pairs of means."""
    r, c = tl.program_id(0) * R, tl.program_id(1) * C
    index = tl.program_id(2).to(tl.int64)
    b, h = index // heads, index % heads
    kv = b * (heads // groups) + h // groups
    d = tl.arange(0, DP)
    q_at, k_at = r * QS + tl.arange(0, R * QS), c * KS + tl.arange(0, C * KS)
    q_mask, k_mask = q_at < q_groups, k_at < k_groups
    q_from, k_from = q_ptr + index * q_groups * D, k_ptr + kv * k_groups * D
    q = tl.load(q_from + q_at[:, None] * D + d[None, :], mask=q_mask[:, None] & (d < D)[None, :], other=0.0)
    k = tl.load(k_from + k_at[:, None] * D + d[None, :], mask=k_mask[:, None] & (d < D)[None, :], other=0.0)
    s = tl.where(q_mask[:, None] & k_mask[None, :], tl.dot(q, tl.trans(k)) * scale, -float("inf"))
    if QS * KS > 1:
        s = s.reshape(R, QS, C, KS)
        top = tl.max(tl.max(s, 3), 1)
        # A pair of blocks that do not exist has no maximum.
        base = tl.where(top == -float("inf"), 0.0, top)
        s = base + tl.log(tl.sum(tl.sum(tl.exp(s - base[:, None, :, None]), 3), 1))
    row, column = r + tl.arange(0, R), c + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + (index * rows + row[:, None]) * columns + column[None, :], s, mask=inside)


def block_scores(
    query_means: torch.Tensor, key_means: torch.Tensor, query_parts: int, key_parts: int, scale: float
) -> torch.Tensor:
    """The logits between blocks of queries and keys, from means of their parts: the log of the sum of exp over all
    pairs of parts.

    Args:
        query_means: float32 (batch, heads, parts, head_dim), contiguous.
        key_means: float32 (batch, kv_heads, parts, head_dim), contiguous.
        query_parts: Parts of a block of queries, a power of two. The last block may have fewer.
        key_parts: Parts of a block of keys, a power of two. The last block may have fewer.
        scale: Softmax scale of the logits.

    Returns:
        float32 (batch, heads, query blocks, key blocks).
    """
    (batch, heads, q_groups, dim), (_, kv_heads, k_groups, _) = query_means.shape, key_means.shape
    rows, columns = triton.cdiv(q_groups, query_parts), triton.cdiv(k_groups, key_parts)
    out = torch.empty((batch, heads, rows, columns), dtype=torch.float32, device=query_means.device)
    r, c = max(1, 64 // query_parts), max(1, 64 // key_parts)
    _scores[(triton.cdiv(rows, r), triton.cdiv(columns, c), batch * heads)](
        query_means, key_means, out, scale, rows, columns, q_groups, k_groups, heads, heads // kv_heads,
        QS=query_parts, KS=key_parts, D=dim, DP=triton.next_power_of_2(dim), R=r, C=c, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _ordered(x):
    """float32 -> uint32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@on_its_device
@triton.jit(do_not_specialize=["columns", "rows"])
def _select(
    score_ptr, forced_ptr, budget_ptr, index_ptr, count_ptr, rows, columns,
    RULE: tl.constexpr, FORCED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row's kept blocks. Program (row of all heads). RULE: "count" keeps the highest scores, as many as the budget;
    "mass" the highest ones whose softmax sums to the budget; "mask" those that are not zero."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    inside = c < columns
    if RULE == "mask":
        kept = tl.load(score_ptr + row * columns + c, mask=inside, other=0) != 0
    else:
        score = tl.load(score_ptr + row * columns + c, mask=inside, other=-float("inf")).to(tl.float32)
        always = c < 0
        if FORCED:
            always = tl.load(forced_ptr + row % rows * columns + c, mask=inside, other=0) != 0
        budget = tl.load(budget_ptr + row // rows)
        if RULE == "mass":
            top = tl.max(score, 0)
            weight = tl.where(inside, tl.exp(score - top), 0.0)
            weight = weight / tl.sum(weight, 0)
        else:
            weight = tl.where(inside, 1.0, 0.0)
        # Blocks that are kept anyway come first, and count.
        value = _ordered(tl.where(always, float("inf"), score))
        threshold = tl.zeros([1], tl.uint32)
        for place in tl.static_range(32):
            tried = threshold | (1 << (31 - place))
            reached = tl.sum(tl.where(value >= tried, weight, 0.0), 0)
            threshold = tl.where(reached >= budget, tried, threshold)
        kept = inside & (value > threshold)
        equal = inside & (value == threshold)
        if RULE == "count":
            # Of equal scores the first ones, up to the budget.
            left = budget - tl.sum(kept.to(tl.float32), 0)
            equal = equal & (tl.cumsum(equal.to(tl.int32), 0).to(tl.float32) <= left)
        kept = kept | equal | (always & inside)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(index_ptr + row * columns + place, c, mask=kept)
    tl.store(count_ptr + row, tl.sum(kept.to(tl.int32), 0))


def select(
    scores: torch.Tensor,
    budget: torch.Tensor,
    query_block: int,
    key_block: int,
    *,
    rule: str = "count",
    forced: torch.Tensor | None = None,
) -> BlockLists:
    """Keeps the blocks with the highest scores.

    Args:
        scores: (batch, heads, query blocks, key blocks), of any floating dtype. Logits for the rule `"mass"`.
        budget: float32 (batch * heads,). The number of blocks of each row for `"count"`, blocks that are kept anyway
            included; their share of the softmax, between 0 and 1, for `"mass"`.
        query_block: Queries of a block.
        key_block: Keys of a block.
        rule: `"count"` or `"mass"`.
        forced: bool (query blocks, key blocks), the blocks that are kept whatever their score.
    """
    scores = scores.contiguous()
    kept = None if forced is None else forced.to(torch.uint8).contiguous()
    return _launch(scores, budget, kept, rule, query_block, key_block)


def lists_of(mask: torch.Tensor, query_block: int, key_block: int) -> BlockLists:
    """The lists of a mask.

    Args:
        mask: bool (batch, heads, query blocks, key blocks), True for a block that is kept.
        query_block: Queries of a block.
        key_block: Keys of a block.
    """
    return _launch(mask.to(torch.uint8).contiguous(), None, None, "mask", query_block, key_block)


def _launch(
    scores: torch.Tensor,
    budget: torch.Tensor | None,
    forced: torch.Tensor | None,
    rule: str,
    query_block: int,
    key_block: int,
) -> BlockLists:
    batch, heads, rows, columns = scores.shape
    indices = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=scores.device)
    width = triton.next_power_of_2(columns)
    _select[(batch * heads * rows,)](
        scores, scores if forced is None else forced, scores if budget is None else budget, indices, counts, rows,
        columns, RULE=rule, FORCED=forced is not None, WIDTH=width, num_warps=max(1, min(8, width // 256)),
    )  # fmt: skip
    return BlockLists(indices, counts, query_block, key_block, even=rule == "count" and forced is None)


def long_first(counts: torch.Tensor) -> torch.Tensor:
    """Indices of rows, those with long lists first, so that no long one begins when others end. Rows of about equal
    lists stay in their order: neighbours read the same keys.

    Args:
        counts: int32 (batch, heads, query blocks).

    Returns:
        int32 (rows,).
    """
    coarse = (counts.flatten().float().clamp_min(1).log2() * 4).round()
    return coarse.argsort(descending=True, stable=True).to(torch.int32)
