"""Balanced clusters of queries and of keys, in Triton: an order of tokens for each head and call.

Blocks of sparse attention hold neighbouring tokens. A block is worth keeping or not as a whole, so that its tokens
should be alike: queries that attend to the same keys, and keys that the same queries attend to. The leading singular
vectors of the matrix of logits say which are. Within a chunk of neighbouring tokens, a k-d tree over the coordinates
along these vectors halves the tokens along the axis in which they differ most, down to blocks. Every cluster then has
as many tokens as a block, and lists of blocks and their kernels stay as they are.

The vectors come from covariances of a sample of the tokens, by subspace iteration. No shape depends on a value and the
host reads nothing, so that CUDA graphs replay all of it.

Only `sparse.py` imports this module, for a call that is clustered: it needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from .norm import padded_dim
from .token_grid import CHUNK_BLOCKS

# Coordinates of the tree's tokens, columns of the matrix units that compute them, and steps of the subspace iteration.
_RANK, _COLUMNS, _ITERATIONS = 8, 16, 8
# Tokens of a covariance.
_SAMPLE = 1024


@on_its_device
@triton.jit
def _singular_vectors(
    query_cov_ptr, key_cov_ptr, query_ptr, key_ptr,
    D: tl.constexpr, DP: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """Vectors onto which queries and keys are projected. Program (batch x key head).

    The right singular vectors of the logits are eigenvectors of the product of both covariances, which is self-adjoint
    under the keys' covariance: the iteration multiplies by the product, and makes the columns orthogonal in that
    sense."""
    index = tl.program_id(0).to(tl.int64)
    d, column = tl.arange(0, DP), tl.arange(0, COLUMNS)
    inside = (d < D)[:, None] & (d < D)[None, :]
    at = index * D * D + d[:, None] * D + d[None, :]
    queries = tl.load(query_cov_ptr + at, mask=inside, other=0.0)
    keys = tl.load(key_cov_ptr + at, mask=inside, other=0.0)
    diagonal = d[:, None] == d[None, :]
    query_size = tl.maximum(tl.sum(tl.where(diagonal, queries, 0.0)), 1e-30)
    key_size = tl.maximum(tl.sum(tl.where(diagonal, keys, 0.0)), 1e-30)
    # Both matrices of half precision fit into the shared memory of small GPUs.
    queries, keys = (queries / query_size).to(tl.float16), (keys / key_size).to(tl.float16)
    # Columns of a cosine transform: a start that no head is orthogonal to, the same in every run.
    w = tl.cos((d[:, None] + 0.5) * (column[None, :] + 0.37) * (3.14159265 / D))
    w = tl.where((d < D)[:, None] & (column < RANK)[None, :], w, 0.0)
    v, key_w = w, w
    for step in range(ITERATIONS):
        # The strongest column has length one, and no other leaves the range of half precision.
        w *= tl.rsqrt(tl.maximum(tl.max(tl.sum(w * w, 0), 0), 1e-30))
        v = tl.dot(keys, w.to(tl.float16))
        before = tl.sum(w * v, 0)
        for j in tl.static_range(RANK):
            own = column == j
            w_own, v_own = tl.sum(tl.where(own[None, :], w, 0.0), 1), tl.sum(tl.where(own[None, :], v, 0.0), 1)
            square = tl.sum(w_own * v_own, 0)
            # Fewer directions than columns: what is left of the others in the end is rounding.
            own_before = tl.sum(tl.where(own, before, 0.0), 0)
            sound = (square > 1e-20) & ((square > 1e-3 * own_before) | (step + 1 < ITERATIONS))
            factor = tl.where(sound, tl.rsqrt(tl.maximum(square, 1e-20)), 0.0)
            w_own, v_own = w_own * factor, v_own * factor
            share = tl.where(column > j, tl.sum(w * v_own[:, None], 0), 0.0)
            w = tl.where(own[None, :], w_own[:, None], w - w_own[:, None] * share[None, :])
            v = tl.where(own[None, :], v_own[:, None], v - v_own[:, None] * share[None, :])
        key_w = w
        w = tl.dot(queries, tl.minimum(tl.maximum(v, -6e4), 6e4).to(tl.float16))
    strength = tl.maximum(tl.sum(v * w, 0), 0.0)
    largest = tl.maximum(tl.max(strength, 0), 1e-30)
    # Coordinates of both sides then have equal spreads: 1 along the first axis.
    to = index * D * COLUMNS + d[:, None] * COLUMNS + column[None, :]
    tl.store(query_ptr + to, v * tl.rsqrt(largest) * tl.rsqrt(query_size), mask=(d < D)[:, None])
    factor = tl.sqrt(strength / largest) * tl.rsqrt(key_size)
    tl.store(key_ptr + to, key_w * factor[None, :], mask=(d < D)[:, None])


@on_its_device
@triton.jit(do_not_specialize=["first", "count"])
def _project(
    x_ptr, mean_ptr, vector_ptr, out_ptr, s_b, s_s, s_h, first, count, heads, groups,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Coordinates of `count` tokens from `first` on. Program (ROWS tokens, batch x head); `groups` heads share
    vectors."""
    index = tl.program_id(1)
    b, h = (index // heads).to(tl.int64), index % heads
    vectors = b * (heads // groups) + h // groups
    row, d, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (d < D)[None, :]
    at = x_ptr + b * s_b + h * s_h + (first + row).to(tl.int64)[:, None] * s_s + d[None, :]
    x = tl.load(at, mask=inside, other=0.0)
    vector = tl.load(
        vector_ptr + vectors * D * COLUMNS + d[:, None] * COLUMNS + column[None, :], mask=(d < D)[:, None], other=0.0
    ).to(x.dtype)
    mean = tl.load(mean_ptr + index.to(tl.int64) * D + d, mask=d < D, other=0.0)
    y = tl.dot(x, vector) - tl.sum(mean[:, None] * vector.to(tl.float32), 0)[None, :]
    to = out_ptr + (index.to(tl.int64) * count + row)[:, None] * RANK + column[None, :]
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=(row < count)[:, None] & (column < RANK)[None, :])


@triton.jit
def _halve(y_ptr, order_ptr, order, number, SEGMENTS: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr):
    """The tokens of each segment, those of the lower half first along the axis in which they differ most, otherwise in
    their order. Those beyond the last token come last. The order passes through memory, from thread to thread."""
    HALF: tl.constexpr = SIZE // 2
    order = order.reshape(SEGMENTS, SIZE)
    inside = order < number
    size = tl.maximum(tl.sum(inside.to(tl.float32), 1), 1.0)
    largest = tl.full([SEGMENTS], -1.0, tl.float32)
    widest = tl.zeros([SEGMENTS], tl.int32)
    for axis in range(RANK):
        y = tl.load(y_ptr + order * RANK + axis, mask=inside, other=0.0).to(tl.float32)
        away = tl.where(inside, y - (tl.sum(y, 1) / size)[:, None], 0.0)
        spread = tl.sum(away * away, 1)
        # Of equal spreads, the first axis.
        widest = tl.where(spread > largest, axis, widest)
        largest = tl.maximum(largest, spread)
    value = tl.load(y_ptr + order * RANK + widest[:, None], mask=inside, other=0.0)
    bits = value.to(tl.int16, bitcast=True).to(tl.int32)
    rank = tl.where(inside, (bits ^ ((bits >> 15) & 0x7FFF)) + 32768, 65535)
    # The largest number with no more than half of the ranks below it, two bits at a time. One sum has three counts.
    median = tl.zeros([SEGMENTS], tl.int32)
    for place in range(8):
        step = 1 << (14 - 2 * place)
        below = (rank < (median + step)[:, None]).to(tl.int64)
        below += (rank < (median + 2 * step)[:, None]).to(tl.int64) << 20
        below += (rank < (median + 3 * step)[:, None]).to(tl.int64) << 40
        counts = tl.sum(below, 1)
        median += tl.where((counts & 0xFFFFF) <= HALF, step, 0)
        median += tl.where(((counts >> 20) & 0xFFFFF) <= HALF, step, 0)
        median += tl.where((counts >> 40) <= HALF, step, 0)
    lower, equal = rank < median[:, None], rank == median[:, None]
    left = HALF - tl.sum(lower.to(tl.int32), 1)
    lower = lower | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))
    before = tl.cumsum(lower.to(tl.int32), 1)
    token = tl.arange(0, SIZE)[None, :]
    place = tl.where(lower, before - 1, HALF + token - before)
    tl.store(order_ptr + tl.arange(0, SEGMENTS)[:, None] * SIZE + place, order)
    tl.debug_barrier()
    order = tl.load(order_ptr + tl.arange(0, SEGMENTS * SIZE))
    tl.debug_barrier()
    return order


@on_its_device
@triton.jit(do_not_specialize=["first", "count", "total"])
def _tree(
    y_ptr, passing_ptr, order_ptr, first, count, total,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The tokens of a chunk in the order of a k-d tree's leaves. Program (chunk, batch x head)."""
    index = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * CHUNK
    number = tl.minimum(count - start, CHUNK)
    order = tl.arange(0, CHUNK)
    y_ptr += (index * count + start) * RANK
    passing_ptr += (index * tl.num_programs(0) + tl.program_id(0)) * CHUNK
    for level in tl.static_range(LEVELS):
        order = _halve(y_ptr, passing_ptr, order, number, 1 << level, CHUNK >> level, RANK)
    place = tl.arange(0, CHUNK)
    to = order_ptr + index * total + first + start + place
    tl.store(to, first + start + order, mask=place < number)


def singular_vectors(query_cov: torch.Tensor, key_cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors along which queries and keys have the leading singular coordinates of their logits. The first axis has a
    spread of one on both sides, and the others have theirs in proportion to their singular values.

    Args:
        query_cov: float32 (heads, head_dim, head_dim), covariances of queries.
        key_cov: float32 (heads, head_dim, head_dim), covariances of keys.

    Returns:
        float32 (heads, head_dim, columns) each; columns beyond the eighth are zero.
    """
    heads, dim, _ = query_cov.shape
    query, key = (torch.empty(heads, dim, _COLUMNS, dtype=torch.float32, device=query_cov.device) for _ in range(2))
    _singular_vectors[(heads,)](
        query_cov.contiguous(), key_cov.contiguous(), query, key, D=dim, DP=padded_dim(dim), RANK=_RANK,
        COLUMNS=_COLUMNS, ITERATIONS=_ITERATIONS, num_warps=8,
    )  # fmt: skip
    return query, key


def tree_order(coordinates: torch.Tensor, order: torch.Tensor, first: int, block: int) -> None:
    """Orders the tokens of each chunk by the leaves of a k-d tree.

    Args:
        coordinates: float16 (batch, heads, tokens, 8), contiguous.
        order: int32 (batch, heads, sequence), of which the part from `first` on is written.
        first: Place of the first of the tokens.
        block: Tokens of a leaf, a power of two.
    """
    batch, heads, count, rank = coordinates.shape
    chunk = CHUNK_BLOCKS * block
    chunks = triton.cdiv(count, chunk)
    passing = torch.empty(batch * heads, chunks, chunk, dtype=torch.int32, device=order.device)
    _tree[(chunks, batch * heads)](
        coordinates, passing, order, first, count, order.shape[2], CHUNK=chunk, LEVELS=CHUNK_BLOCKS.bit_length() - 1,
        RANK=rank, num_warps=max(4, chunk // 256),
    )  # fmt: skip


def cluster(
    query: torch.Tensor, key: torch.Tensor, block: int, spans: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of queries and of keys in each head in which blocks are clusters.

    Args:
        query: (batch, sequence, heads, head_dim) with contiguous channels, bf16 or fp16.
        key: (batch, key sequence, kv_heads, head_dim) with contiguous channels, of the query's dtype.
        block: Tokens of a block, a power of two.
        spans: Places of the first and behind the last of the tokens that move, among the queries and among the keys.

    Returns:
        int32 (batch, heads, sequence) and (batch, kv_heads, key sequence): the token at each place.
    """
    (batch, _, heads, dim), kv_heads = query.shape, key.shape[2]
    parts = []
    for x, (begin, end) in zip((query, key), spans, strict=True):
        sample = x[:, begin : end : max(1, (end - begin) // _SAMPLE)].transpose(1, 2).float()
        mean = sample.mean(2, keepdim=True)
        sample = sample - mean
        parts.append((mean, sample.transpose(2, 3) @ sample / sample.shape[2]))
    (query_mean, query_cov), (key_mean, key_cov) = parts
    query_cov = query_cov.view(batch * kv_heads, heads // kv_heads, dim, dim).mean(1)
    vectors = singular_vectors(query_cov, key_cov.reshape(-1, dim, dim))
    found = []
    for x, mean, vector, (begin, end) in zip((query, key), (query_mean, key_mean), vectors, spans, strict=True):
        number = x.shape[2]
        coordinates = torch.empty(batch, number, end - begin, _RANK, dtype=torch.float16, device=x.device)
        _project[(triton.cdiv(end - begin, 128), batch * number)](
            x, mean.contiguous(), vector, coordinates, x.stride(0), x.stride(1), x.stride(2), begin, end - begin,
            number, number // kv_heads, D=dim, DP=padded_dim(dim), ROWS=128, RANK=_RANK, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
        order = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).repeat(batch, number, 1)
        tree_order(coordinates, order, begin, block)
        found.append(order)
    return found[0], found[1]


@on_its_device
@triton.jit(do_not_specialize=["length"])
def _move(
    x_ptr, order_ptr, out_ptr, s_b, s_s, s_h, length, heads,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rows in another order. Program (ROWS places, batch x head). BACK: each row returns to its token's place."""
    index = tl.program_id(1)
    b, h = (index // heads).to(tl.int64), index % heads
    place, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    token = tl.load(order_ptr + index.to(tl.int64) * length + place, mask=place < length, other=0)
    source, target = (place, token) if BACK else (token, place)
    inside = (place < length)[:, None] & (d < D)[None, :]
    x = tl.load(
        x_ptr + b * s_b + h * s_h + source.to(tl.int64)[:, None] * s_s + d[None, :], mask=inside, other=0.0
    )  # fmt: skip
    to = out_ptr + ((b * length + target) * heads + h)[:, None] * D + d[None, :]
    tl.store(to, x, mask=inside)


def ordered(x: torch.Tensor, order: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Tokens in another order in each head.

    Args:
        x: (batch, sequence, heads, head_dim) with contiguous channels.
        order: int32 (batch, heads, sequence), the token at each place.
        back: Whether the tokens of `x` are in that order, and return to their own places.

    Returns:
        (batch, sequence, heads, head_dim), contiguous.
    """
    batch, length, heads, dim = x.shape
    out = torch.empty((batch, length, heads, dim), dtype=x.dtype, device=x.device)
    _move[(triton.cdiv(length, 64), batch * heads)](
        x, order, out, x.stride(0), x.stride(1), x.stride(2), length, heads, D=dim, DP=padded_dim(dim), ROWS=64,
        BACK=back, num_warps=4,
    )  # fmt: skip
    return out
