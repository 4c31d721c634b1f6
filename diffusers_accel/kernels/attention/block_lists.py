"""Lists of key blocks for sparse attention, in Triton: chosen from scores, or made of a mask, without a sort.

A row of a score matrix belongs to one block of queries of one head. One program takes a row into registers. It finds
the threshold by bisection over the bits of the scores, marks the blocks above it, and writes their indices by a prefix
sum. The host reads nothing and no shape depends on a value, so that CUDA graphs replay it.

Only the loaders of kernel records import this module: it needs triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        kept: uint8 (batch, heads, query blocks, key blocks), 1 for a kept block; `None` if it was not asked for.
        centroids: The means of the blocks of keys and of values, which stand for the blocks that are not kept. `None`
            leaves these blocks out.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    query_block: int
    key_block: int
    even: bool = False
    kept: torch.Tensor | None = None
    centroids: tuple[torch.Tensor, torch.Tensor] | None = None


@on_its_device
@triton.jit(do_not_specialize=["length", "means"])
def _means(
    x_ptr, scale_ptr, out_ptr, s_b, s_s, s_h, length, means, heads, factor,
    SCALED: tl.constexpr, GROUP: tl.constexpr, POOL: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """The means of POOL neighbouring tokens, times a factor. Program (TOKENS tokens, batch x head). SCALED: the values
    are rounded, and GROUP tokens share a scale. DIRECTIONS: each token is divided by its length first."""
    index = tl.program_id(1)
    rows, d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, DP)
    at = x_ptr + (index // heads).to(tl.int64) * s_b + index % heads * s_h
    inside = (rows < length)[:, None] & (d < D)[None, :]
    x = tl.load(at + rows.to(tl.int64)[:, None] * s_s + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        scales = scale_ptr + index.to(tl.int64) * tl.cdiv(length, GROUP)
        x = x * tl.load(scales + rows // GROUP, mask=rows < length, other=0.0)[:, None]
    if DIRECTIONS:
        x = x * tl.rsqrt(tl.maximum(tl.sum(x * x, 1), 1e-20))[:, None]
    group = tl.program_id(0) * (TOKENS // POOL) + tl.arange(0, TOKENS // POOL)
    number = tl.maximum(tl.minimum(length - group * POOL, POOL), 1)
    mean = tl.sum(x.reshape(TOKENS // POOL, POOL, DP), 1) * (factor / number)[:, None]
    to = out_ptr + (index.to(tl.int64) * means + group)[:, None] * D + d[None, :]
    tl.store(to, mean.to(out_ptr.dtype.element_ty), mask=(group < means)[:, None] & (d < D)[None, :])


def means(
    x: torch.Tensor,
    size: int,
    scale: torch.Tensor | None = None,
    factor: float = 1.0,
    *,
    directions: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The means of neighbouring tokens.

    Args:
        x: (batch, heads, sequence, head_dim) with contiguous channels; a floating dtype, int8 or e4m3.
        size: Number of tokens of a mean, a power of two. The last mean may have fewer.
        scale: float32 (batch, heads, scales): the factors of rounded values, each for as many neighbours; `None` for
            values that are not rounded.
        factor: Factor of the means.
        directions: Whether each token is divided by its length first, so that no scale matters.
        dtype: The dtype of the result.

    Returns:
        (batch, heads, means, head_dim).
    """
    batch, heads, length, dim = x.shape
    groups = triton.cdiv(length, size)
    out = torch.empty((batch, heads, groups, dim), dtype=dtype, device=x.device)
    each = 1 if scale is None else shared_by(length, scale.shape[2])
    tokens = max(size, 64)
    _means[(triton.cdiv(length, tokens), batch * heads)](
        x, out if scale is None else scale, out, x.stride(0), x.stride(2), x.stride(1), length, groups, heads, factor,
        SCALED=scale is not None, GROUP=each, POOL=size, TOKENS=tokens, D=dim, DP=triton.next_power_of_2(dim),
        DIRECTIONS=directions, num_warps=4,
    )  # fmt: skip
    return out


def operand_means(x: Inputs, data: Quantized, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of neighbouring queries, and of neighbouring keys, whose products are logits without the softmax scale.
    Of a rounded key, its mean over the sequence is subtracted, which changes all logits of a row alike.

    The pass that rounds could make them as well. It has a head's rows on several warps, so that adding these up there
    took longer than a pass over the rounded operands, which have a byte for each value.

    Args:
        x: The call.
        data: Its operands, rounded or not.
        queries: Number of queries of a mean, a power of two.
        keys: Number of keys of a mean, a power of two.

    Returns:
        (batch, heads, means, head_dim), and (batch, kv_heads, means, head_dim), in the dtype of the call.
    """
    kind = x.value.dtype
    if data.query.is_floating_point() and data.query.element_size() > 1:
        return means(data.query, queries, dtype=kind), means(data.key, keys, dtype=kind)
    # The scale of a rounded query has the softmax scale and log2(e) within it.
    factor = 1 / (x.softmax_scale * LOG2E)
    return (
        means(data.query, queries, data.query_scale, factor, dtype=kind),
        means(data.key, keys, data.key_scale, dtype=kind),
    )


def centroids(x: Inputs, data: Quantized, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of each block of keys and of values. A block whose keys are equal has the same part in attention by its
    mean, with the number of its tokens as weight.

    Args:
        x: The call.
        data: Its operands, rounded or not.
        block: Number of keys of a block, a power of two.

    Returns:
        Means of the keys as they are transformed, and means of the values over the value's scales, (batch, kv_heads,
        blocks, head_dim) each, in the dtype of the call.
    """
    kind = x.value.dtype
    keys = means(data.key, block, data.key_scale if data.key.element_size() == 1 else None, dtype=kind)
    values = means(x.value.transpose(1, 2), block)
    if data.value.element_size() == 1:
        # The kernel multiplies its sum by these scales.
        values = values / data.value_scale.view(*values.shape[:2], 1, -1)
    return keys, values.to(kind)


def self_similarity(x: torch.Tensor, size: int) -> torch.Tensor:
    """The mean cosine between all pairs of tokens of a block: the squared length of the mean of their directions.

    Args:
        x: (batch, heads, sequence, head_dim) with contiguous channels; a floating dtype, int8 or e4m3 whose scales are
            shared by tokens of a block, or by one token each.
        size: Number of tokens of a block, a power of two. The last block may have fewer.

    Returns:
        float32 (batch, heads, blocks).
    """
    return means(x, size, directions=True).square().sum(-1)


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
        query_means: (batch, heads, parts, head_dim), contiguous, of any floating dtype.
        key_means: (batch, kv_heads, parts, head_dim), contiguous, of the queries' dtype.
        query_parts: Parts of a block of queries, a power of two. The last block may have fewer.
        key_parts: Parts of a block of keys, a power of two. The last block may have fewer.
        scale: Softmax scale of the logits.

    Returns:
        float32 (batch, heads, query blocks, key blocks).
    """
    (batch, heads, q_groups, dim), (_, kv_heads, k_groups, _) = query_means.shape, key_means.shape
    rows, columns = triton.cdiv(q_groups, query_parts), triton.cdiv(k_groups, key_parts)
    out = torch.empty((batch, heads, rows, columns), dtype=torch.float32, device=query_means.device)
    # Each program reads its means from L2: larger tiles read less.
    side = 128 if query_means.element_size() == 2 else 64
    r, c = max(1, side // query_parts), max(1, side // key_parts)
    _scores[(triton.cdiv(rows, r), triton.cdiv(columns, c), batch * heads)](
        query_means, key_means, out, scale, rows, columns, q_groups, k_groups, heads, heads // kv_heads,
        QS=query_parts, KS=key_parts, D=dim, DP=triton.next_power_of_2(dim), R=r, C=c, num_warps=side // 16,
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
    score_ptr, forced_ptr, budget_ptr, index_ptr, count_ptr, kept_ptr, bits_ptr, rows, columns,
    RULE: tl.constexpr, FORCED: tl.constexpr, MARK: tl.constexpr, PACK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row's kept blocks. Program (row of all heads). RULE: "count" keeps the highest scores, as many as the budget;
    "mass" the highest ones whose softmax sums to the budget; "spread" those above the row's mean by so many standard
    deviations, and the highest one; "mask" those that are not zero; "bits" those whose bit is set. A score of infinity
    is always kept. PACK: the bits of the kept blocks are written too."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    inside = c < columns
    if RULE == "mask":
        kept = tl.load(score_ptr + row * columns + c, mask=inside, other=0) != 0
    elif RULE == "bits":
        word = tl.load(score_ptr + row * tl.cdiv(columns, 32) + c // 32, mask=inside, other=0)
        kept = ((word >> (c % 32)) & 1) != 0
    else:
        score = tl.load(score_ptr + row * columns + c, mask=inside, other=-float("inf")).to(tl.float32)
        always = score == float("inf")
        if FORCED:
            always = always | (tl.load(forced_ptr + row % rows * columns + c, mask=inside, other=0) != 0)
        finite = inside & (score != float("inf"))
        budget = tl.load(budget_ptr + row // rows)
        if RULE == "spread":
            number = tl.maximum(tl.sum(finite.to(tl.float32), 0), 1.0)
            known = tl.where(finite, score, 0.0)
            mean = tl.sum(known, 0) / number
            away = tl.where(finite, score - mean, 0.0)
            deviation = tl.sqrt(tl.sum(away * away, 0) / number)
            top = tl.max(tl.where(finite, score, -float("inf")), 0)
            kept = finite & ((score > mean + budget * deviation) | (score == top))
        else:
            if RULE == "mass":
                top = tl.max(tl.where(finite, score, -float("inf")), 0)
                weight = tl.where(finite, tl.exp(score - top), 0.0)
                weight = weight / tl.maximum(tl.sum(weight, 0), 1e-30)
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
            kept = kept | equal
        kept = kept | (always & inside)
    if MARK:
        tl.store(kept_ptr + row * columns + c, kept.to(tl.uint8), mask=inside)
    if PACK:
        words = tl.arange(0, WIDTH // 32)
        bits = tl.sum(kept.to(tl.int32).reshape(WIDTH // 32, 32) << tl.arange(0, 32)[None, :], 1)
        tl.store(bits_ptr + row * tl.cdiv(columns, 32) + words, bits, mask=words < tl.cdiv(columns, 32))
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
    mark: bool = False,
    bits: torch.Tensor | None = None,
    even: bool = True,
) -> BlockLists:
    """Keeps the blocks with the highest scores. A block with a score of infinity is always kept.

    Args:
        scores: (batch, heads, query blocks, key blocks), of any floating dtype. Logits for the rule `"mass"`.
        budget: float32 (batch * heads,). The number of blocks of each row for `"count"`, blocks that are kept anyway
            included; their share of the softmax, between 0 and 1, for `"mass"`; the number of standard deviations above
            the row's mean for `"spread"`.
        query_block: Queries of a block.
        key_block: Keys of a block.
        rule: `"count"`, `"mass"` or `"spread"`.
        forced: bool (query blocks, key blocks), the blocks that are kept whatever their score.
        mark: Whether the lists have `kept` too.
        bits: int32 (batch, heads, query blocks, words of 32 key blocks), which receives a bit for each kept block;
            `None` to write none.
        even: Whether all rows have the same budget.
    """
    scores = scores.contiguous()
    always = None if forced is None else forced.to(torch.uint8).contiguous()
    lists = _launch(scores, scores.shape, budget, always, rule, query_block, key_block, mark, bits)
    return replace(lists, even=lists.even and even)


def lists_of(mask: torch.Tensor, query_block: int, key_block: int, *, mark: bool = False) -> BlockLists:
    """The lists of a mask.

    Args:
        mask: bool (batch, heads, query blocks, key blocks), True for a block that is kept.
        query_block: Queries of a block.
        key_block: Keys of a block.
        mark: Whether the lists have `kept` too.
    """
    return _launch(
        mask.to(torch.uint8).contiguous(), mask.shape, None, None, "mask", query_block, key_block, mark, None
    )


def lists_of_bits(
    bits: torch.Tensor, key_blocks: int, query_block: int, key_block: int, *, even: bool = False, mark: bool = False
) -> BlockLists:
    """The lists of bits that `select` has written.

    Args:
        bits: int32 (batch, heads, query blocks, words of 32 key blocks).
        key_blocks: Number of key blocks.
        query_block: Queries of a block.
        key_block: Keys of a block.
        even: Whether all rows have as many bits.
        mark: Whether the lists have `kept` too.
    """
    shape = torch.Size((*bits.shape[:3], key_blocks))
    return replace(_launch(bits, shape, None, None, "bits", query_block, key_block, mark, None), even=even)


def _launch(
    scores: torch.Tensor,
    shape: torch.Size,
    budget: torch.Tensor | None,
    forced: torch.Tensor | None,
    rule: str,
    query_block: int,
    key_block: int,
    mark: bool,
    bits: torch.Tensor | None,
) -> BlockLists:
    batch, heads, rows, columns = shape
    kept = torch.empty(shape, dtype=torch.uint8, device=scores.device) if mark else None
    indices = torch.empty(shape, dtype=torch.int32, device=scores.device)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=scores.device)
    width = max(32, triton.next_power_of_2(columns))
    _select[(batch * heads * rows,)](
        scores, scores if forced is None else forced, scores if budget is None else budget, indices, counts,
        counts if kept is None else kept, counts if bits is None else bits, rows, columns, RULE=rule,
        FORCED=forced is not None, MARK=mark, PACK=bits is not None, WIDTH=width,
        num_warps=max(1, min(8, width // 256)),
    )  # fmt: skip
    return BlockLists(indices, counts, query_block, key_block, even=rule == "count" and forced is None, kept=kept)


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
