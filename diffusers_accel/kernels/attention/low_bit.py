"""Attention on rounded operands, in Triton: INT8 or e4m3 QK with 16-bit or e4m3 PV, and 16-bit QK with e4m3 PV.

The ideas that make it fast on Hopper:

- Integer logits start from an accumulator preset to the bits of 1.5 * 2^23 as a float. The integer sum then has the
  bits of a float32 and needs no conversion. The softmax's fused multiply-add subtracts the offset. The limit of |QK|
  is 2^22, and |QK| is at most 127 * 127 * 128 < 2^21.
- A scale per whole tile of keys is multiplied into the row's scale, so a logit costs a single multiply-add.
- The keys of the transposed e4m3 V are permuted within every 16. The layout in which the first product leaves P is then
  the operand layout of the second product: no value moves between threads.
- The first product's accumulator keeps about 22 bits on Hopper, so every tile's PV is added in float32 outside it.

Only the loaders of kernel records import this module: it needs triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from ..operands import tensor_descriptor
from ..rounding import to_e4m3
from .block_lists import BlockLists, long_first
from .norm import padded_dim
from .quantize import LOG2E, Quantized, quantize
from .recipe import Recipe
from .record import Inputs, key_bias

_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)
# log2(448): P is scaled to the range of e4m3 inside the exponent; the row sum carries the same factor.
_P_SCALE = tl.constexpr(8.807354922057604)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _logits(q, k, QK: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    if QK == 0:
        preset = tl.full([M, N], _MAGIC_BITS, tl.int32)
        return tl.dot(q, k.T, preset, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    else:
        return tl.dot(q, k.T)


@triton.jit
def _scale(
    s, row_scale, key_scale_ptr, bias_ptr, tile, k_len,
    QK: tl.constexpr, KB: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One tile's logits up to the factors of its rows, these factors, the logits' offsets, and the rows' maxima (base
    2). With a bias the logits are final."""
    OFFSET: tl.constexpr = _MAGIC if QK == 0 else 0.0
    keys = tile * N + tl.arange(0, N)
    low = tl.zeros_like(row_scale)
    if QK != 2:
        if KB % N == 0:
            row_scale = row_scale * tl.load(key_scale_ptr + tile * N // KB)
            if QK == 0:
                # Bounds logits at 8 million, far beyond where softmax picks one key.
                row_scale = tl.minimum(row_scale, 4.0)
            low = row_scale * OFFSET
        else:
            if MASKED:
                key_scale = tl.load(key_scale_ptr + keys // KB, mask=keys < k_len, other=0.0)
            else:
                key_scale = tl.load(key_scale_ptr + keys // KB)
            s = s * key_scale[None, :] - (key_scale * OFFSET)[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + keys, mask=keys < k_len, other=-float("inf"))
        s = s * row_scale[:, None] - low[:, None] + bias[None, :] * 1.4426950408889634
        highest = tl.max(s, 1)
    else:
        if MASKED:
            s = tl.where((keys < k_len)[None, :], s, -float("inf"))
        highest = (tl.max(s, 1) - OFFSET) * row_scale if KB % N == 0 else tl.max(s, 1) * row_scale
    return s, row_scale, low, highest


@triton.jit
def _accumulate(
    s, row_scale, low, highest, top, total, acc, v_desc, b, h, tile,
    QK: tl.constexpr, PV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and result with one tile's keys."""
    LIFT: tl.constexpr = _P_SCALE if PV == 1 else 0.0
    raised = tl.maximum(top, highest)
    if BIAS:
        # A row without a key so far has no maximum to subtract.
        base = tl.where(raised == -float("inf"), 0.0, raised)
        p = tl.exp2(s - (base - LIFT)[:, None])
    else:
        base = raised
        shift = raised + low - LIFT
        if QK == 0:
            # Rounded up, by no more than an integer step of the logits: P must not leave the range of e4m3.
            shift += tl.abs(shift) * 1.2e-7
        p = tl.exp2(s * row_scale[:, None] - shift[:, None])
    factor = tl.exp2(top - base)
    # Sums of each thread's own values: eight columns lie across four threads, which exchange nothing until the end.
    total = total * factor[:, None] + tl.sum(p.reshape(M, N // 8, 8), 1)
    if PV == 1:
        v = v_desc.load([b, h, 0, tile * N]).reshape(DP, N)
        p = to_e4m3(p.reshape(M, N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(M, N))
        acc = acc * factor[:, None] + tl.dot(p, v.T)
    else:
        v = v_desc.load([b, h, tile * N, 0]).reshape(N, DP)
        acc = tl.dot(p.to(v_desc.dtype), v, acc * factor[:, None])
    return raised, total, acc


@triton.jit
def _attend(
    s, row_scale, top, total, acc, computed, inside, skip, key_scale_ptr, bias_ptr, v_desc, b, h, tile, k_len,
    QK: tl.constexpr, PV: tl.constexpr, KB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr,
    MASKED: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and result with one tile's keys, and the number of computed tiles. SKIP: a tile is left
    out if it is below the running maximum by `skip` (base 2, negative) in all rows."""
    s, row_scale, low, highest = _scale(
        s, row_scale, key_scale_ptr, bias_ptr, tile, k_len, QK, KB, N, MASKED, BIAS
    )  # fmt: skip
    if SKIP:
        # Rows beyond the last query would keep every tile.
        if tl.max(tl.where(inside, highest - top, -float("inf")), 0) > skip:
            top, total, acc = _accumulate(
                s, row_scale, low, highest, top, total, acc, v_desc, b, h, tile, QK, PV, M, N, DP, BIAS
            )
            computed += 1
    else:
        top, total, acc = _accumulate(
            s, row_scale, low, highest, top, total, acc, v_desc, b, h, tile, QK, PV, M, N, DP, BIAS
        )
    return top, total, acc, computed


@triton.jit
def _add_centroids(
    q, row_scale, top, total, acc, kept_ptr, k_mean_ptr, v_mean_ptr, k_len,
    PV: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The part of key tiles that are not listed, by their means: the running maximum, sum and result."""
    LIFT: tl.constexpr = _P_SCALE if PV == 1 else 0.0
    WIDTH: tl.constexpr = 32
    tiles, d = tl.cdiv(k_len, N), tl.arange(0, DP)
    for first in tl.range(0, tiles, WIDTH, num_stages=3):
        at = first + tl.arange(0, WIDTH)
        inside = (at < tiles)[:, None] & (d < D)[None, :]
        k = tl.load(k_mean_ptr + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        left_out = tl.load(kept_ptr + at, mask=at < tiles, other=1) == 0
        # exp(s) of each of a tile's keys: the number of keys is a term of the exponent.
        number = tl.log2(tl.maximum(tl.minimum(k_len - at * N, N), 1).to(tl.float32))
        s = tl.dot(q.to(k.dtype), k.T) * row_scale[:, None] + number[None, :]
        s = tl.where(left_out[None, :], s, -float("inf"))
        raised = tl.maximum(top, tl.max(s, 1))
        base = tl.where(raised == -float("inf"), 0.0, raised)
        p = tl.exp2(s - (base - LIFT)[:, None])
        factor = tl.exp2(top - base)
        v = tl.load(v_mean_ptr + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        acc = acc * factor[:, None] + tl.dot(p.to(v.dtype), v)
        total = total * factor[:, None] + tl.sum(p.reshape(p.shape[0], WIDTH // 8, 8), 1)
        top = raised
    return top, total, acc


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len"])
def _attention(
    q_desc, k_desc, v_desc, o_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, correction_ptr, lse_ptr,
    index_ptr, count_ptr, order_ptr, kept_ptr, k_mean_ptr, v_mean_ptr, computed_ptr, skip,
    logit_scale, q_len, k_len, query_blocks, heads, groups,
    QK: tl.constexpr, PV: tl.constexpr, KB: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, PREFETCH_LOGITS: tl.constexpr,
    TAIL: tl.constexpr, BIAS: tl.constexpr, BLOCK_SPARSE: tl.constexpr, ORDERED: tl.constexpr,
    CENTROIDS: tl.constexpr, SKIP: tl.constexpr, LSE: tl.constexpr, CORRECT_LSE: tl.constexpr,
):  # fmt: skip
    """Program (tile of M queries, batch x head). QK: 0 int8, 1 e4m3, 2 as it is; PV: 0 as it is, 1 e4m3. BLOCK_SPARSE:
    the number of tiles that share a list of key tiles, 0 for all keys; program (tile of all heads), in the order of
    `order_ptr` if ORDERED. CENTROIDS: the means of the key tiles that are not listed take part, each as many times as
    the tile has keys. SKIP: tiles that are below the running maximum by `skip` are left out, and the others counted."""
    if BLOCK_SPARSE > 0:
        place = tl.program_id(0) // BLOCK_SPARSE
        if ORDERED:
            place = tl.load(order_ptr + place)
        index = place // query_blocks
        start = (place % query_blocks * BLOCK_SPARSE + tl.program_id(0) % BLOCK_SPARSE) * M
    else:
        index = tl.program_id(1)
        start = tl.program_id(0) * M
    b, h = index // heads, index % heads
    kv_heads = heads // groups
    hk = h // groups
    rows = start + tl.arange(0, M)
    q = q_desc.load([b, h, start, 0]).reshape(M, DP)
    if QK == 2:
        row_scale = tl.zeros([M], tl.float32) + logit_scale
    else:
        row_scale = tl.load(q_scale_ptr + index.to(tl.int64) * q_len + rows, mask=rows < q_len, other=0.0)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M, 8], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    computed, inside = 0, rows < q_len
    scales = k_scale_ptr + (b * kv_heads + hk) * tl.cdiv(k_len, KB)
    bias = bias_ptr + b * k_len
    full = k_len // N
    if BLOCK_SPARSE > 0:
        listed = index_ptr + place.to(tl.int64) * tl.cdiv(k_len, N)
        count = tl.load(count_ptr + place)
        tail = False
        if TAIL:
            # The list is in ascending order: a partial tile is its last.
            tail = tl.load(listed + count - 1, mask=count > 0, other=0) == full
            count -= tail.to(tl.int32)
        tile = tl.load(listed, mask=count > 0, other=0)
        if CENTROIDS:
            top, total, acc = _add_centroids(
                q, row_scale, top, total, acc, kept_ptr + place.to(tl.int64) * tl.cdiv(k_len, N),
                k_mean_ptr + (b * kv_heads + hk).to(tl.int64) * tl.cdiv(k_len, N) * D,
                v_mean_ptr + (b * kv_heads + hk).to(tl.int64) * tl.cdiv(k_len, N) * D,
                k_len, PV, N, D, DP,
            )  # fmt: skip
        if PREFETCH_LOGITS:
            if count > 0:
                k = k_desc.load([b, hk, tile * N, 0]).reshape(N, DP)
                s = _logits(q, k, QK, M, N)
                for item in tl.range(1, count, num_stages=STAGES):
                    next_tile = tl.load(listed + item)
                    k = k_desc.load([b, hk, next_tile * N, 0]).reshape(N, DP)
                    following = _logits(q, k, QK, M, N)
                    top, total, acc, computed = _attend(
                        s, row_scale, top, total, acc, computed, inside, skip, scales, bias, v_desc, b, hk, tile, k_len,
                        QK, PV, KB, M, N, DP, False, BIAS, SKIP,
                    )  # fmt: skip
                    s = following
                    tile = next_tile
                top, total, acc, computed = _attend(
                    s, row_scale, top, total, acc, computed, inside, skip, scales, bias, v_desc, b, hk, tile, k_len,
                    QK, PV, KB, M, N, DP, False, BIAS, SKIP,
                )  # fmt: skip
        else:
            for item in tl.range(0, count, num_stages=STAGES):
                # The next index is there before its keys are asked for.
                next_tile = tl.load(listed + item + 1, mask=item + 1 < count, other=0)
                k = k_desc.load([b, hk, tile * N, 0]).reshape(N, DP)
                s = _logits(q, k, QK, M, N)
                top, total, acc, computed = _attend(
                    s, row_scale, top, total, acc, computed, inside, skip, scales, bias, v_desc, b, hk, tile, k_len,
                    QK, PV, KB, M, N, DP, False, BIAS, SKIP,
                )  # fmt: skip
                tile = next_tile
        if tail:
            k = k_desc.load([b, hk, full * N, 0]).reshape(N, DP)
            s = _logits(q, k, QK, M, N)
            top, total, acc, computed = _attend(
                s, row_scale, top, total, acc, computed, inside, skip, scales, bias, v_desc, b, hk, full, k_len,
                QK, PV, KB, M, N, DP, True, BIAS, SKIP,
            )  # fmt: skip
    else:
        if PREFETCH_LOGITS:
            # The matrix units compute the next tile's logits while this tile's softmax runs.
            if full > 0:
                k = k_desc.load([b, hk, 0, 0]).reshape(N, DP)
                s = _logits(q, k, QK, M, N)
                for tile in tl.range(0, full - 1, num_stages=STAGES):
                    k = k_desc.load([b, hk, (tile + 1) * N, 0]).reshape(N, DP)
                    following = _logits(q, k, QK, M, N)
                    top, total, acc, computed = _attend(
                        s, row_scale, top, total, acc, computed, inside, skip, scales, bias, v_desc, b, hk, tile, k_len,
                        QK, PV, KB, M, N, DP, False, BIAS, SKIP,
                    )  # fmt: skip
                    s = following
                top, total, acc, computed = _attend(
                    s, row_scale, top, total, acc, computed, inside, skip, scales, bias, v_desc, b, hk, full - 1, k_len,
                    QK, PV, KB, M, N, DP, False, BIAS, SKIP,
                )  # fmt: skip
        else:
            for tile in tl.range(0, full, num_stages=STAGES):
                k = k_desc.load([b, hk, tile * N, 0]).reshape(N, DP)
                s = _logits(q, k, QK, M, N)
                top, total, acc, computed = _attend(
                    s, row_scale, top, total, acc, computed, inside, skip, scales, bias, v_desc, b, hk, tile, k_len,
                    QK, PV, KB, M, N, DP, False, BIAS, SKIP,
                )  # fmt: skip
        if TAIL:
            k = k_desc.load([b, hk, full * N, 0]).reshape(N, DP)
            s = _logits(q, k, QK, M, N)
            top, total, acc, computed = _attend(
                s, row_scale, top, total, acc, computed, inside, skip, scales, bias, v_desc, b, hk, full, k_len,
                QK, PV, KB, M, N, DP, True, BIAS, SKIP,
            )  # fmt: skip
    if SKIP:
        tl.atomic_add(computed_ptr, computed)
    total = tl.sum(total, 1)
    if LSE:
        LIFT: tl.constexpr = _P_SCALE if PV == 1 else 0.0
        lse = (top + tl.log2(total) - LIFT) * _LN2
        if CORRECT_LSE:
            lse += tl.load(correction_ptr + index.to(tl.int64) * q_len + rows, mask=rows < q_len, other=0.0)
        tl.store(lse_ptr + index.to(tl.int64) * q_len + rows, lse, mask=rows < q_len)
    acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    if PV == 1:
        d = tl.arange(0, DP)
        acc = acc * tl.load(v_scale_ptr + (b * kv_heads + hk) * D + d, mask=d < D, other=0.0)[None, :]
    o_desc.store([b, start, h, 0], acc.to(o_desc.dtype).reshape(1, M, 1, DP))


@dataclass(frozen=True)
class Tile:
    """Tile sizes and launch parameters of the attention kernel.

    Attributes:
        queries: Queries per tile.
        keys: Keys per tile.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        prefetch_logits: Whether logits are computed one tile ahead of the softmax.
        rate: Measured TFLOP/s of full waves, for the choice among tiles.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    prefetch_logits: bool = False
    rate: float = 1.0


# (QK is rounded, PV is rounded, head_dim is 64 or less) -> tiles for Hopper, with the rates that
# `benchmarks/attention.py --tiles` measured.
_HOPPER: dict[tuple[bool, bool, bool], tuple[Tile, ...]] = {
    (True, True, False): (Tile(64, 128, 4, 2),),
    (True, True, True): (Tile(64, 128, 4, 2),),
    (True, False, False): (Tile(128, 64, 8, 3, rate=625), Tile(64, 128, 4, 2, rate=560)),
    (True, False, True): (Tile(64, 128, 4, 2),),
    (False, True, False): (Tile(64, 128, 4, 2, prefetch_logits=True),),
    (False, True, True): (Tile(128, 128, 8, 3, rate=503), Tile(64, 128, 4, 2, rate=483)),
    # `benchmarks/sparse.py --tiles`; a head_dim of 64 was not measured.
    (False, False, False): (Tile(128, 64, 8, 3, prefetch_logits=True),),
    (False, False, True): (Tile(128, 64, 8, 3, prefetch_logits=True),),
}


def choose_tile(
    recipe: Recipe, head_dim: int, arch: tuple[int, int] | None, processors: int, queries: int, heads: int
) -> Tile:
    """The tile for a call: among the recipe's measured tiles, the tile with the highest rate after the loss in the last
    wave.

    Args:
        recipe: The rounding of the operands.
        head_dim: Channels of a head, unpadded.
        arch: Compute capability; `None` off CUDA.
        processors: Multiprocessors of the GPU.
        queries: Number of queries.
        heads: Heads times batch.
    """
    if arch is not None and arch < (9, 0):
        # 99 KiB of shared memory on most of them, and no wgmma.
        return Tile(128, 64, 4 if head_dim <= 64 else 8, 2)
    tiles = _HOPPER[(recipe.qk is not None, recipe.pv is not None, head_dim <= 64)]
    if recipe.qk is not None and any(recipe.k_block % tile.keys for tile in tiles):
        tiles = (Tile(64, 128, 4, 2),)  # a scale per column costs registers that larger tiles do not have

    def throughput(tile: Tile) -> float:
        waves = triton.cdiv(queries, tile.queries) * heads / (2 * processors)  # two programs fit on one
        return tile.rate * waves / math.ceil(waves)

    return max(tiles, key=throughput)


def _gpu(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    if device.type != "cuda":
        return None, 132
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def tma_compatible(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if TMA can read it, a contiguous copy otherwise. TMA needs a contiguous last dimension, and a
    base and strides that are multiples of 16 bytes."""
    size = x.element_size()
    dense = x.stride(-1) == 1 and all(stride * size % 16 == 0 for stride in x.stride()[:-1])
    return x if dense and x.data_ptr() % 16 == 0 else x.contiguous()


def sparse_tile(recipe: Recipe, head_dim: int, arch: tuple[int, int] | None, query_block: int, key_block: int) -> Tile:
    """The tile for blocks of these sizes: as many keys as a block has, and a part of its queries.

    Args:
        recipe: The rounding of the operands.
        head_dim: Channels of a head, unpadded.
        arch: Compute capability; `None` off CUDA.
        query_block: Queries of a block.
        key_block: Keys of a block.
    """
    if recipe.qk is None and recipe.pv is None and head_dim > 64 and query_block >= 128:
        return Tile(128, key_block, 8, 2 if key_block >= 128 else 3, prefetch_logits=True)
    # Three stages where their memory lets two programs share a multiprocessor.
    deep = key_block < 128 or (recipe.qk is not None and recipe.pv is not None)
    return Tile(min(query_block, 64), key_block, 4, 3 if deep else 2, prefetch_logits=recipe.qk is None)


def tiles_of(x: Inputs, recipe: Recipe) -> int:
    """The number of pairs of tiles of a dense call."""
    (batch, q_len, heads, dim), k_len = x.query.shape, x.key.shape[1]
    tile = choose_tile(recipe, dim, *_gpu(x.query.device), q_len, batch * heads)
    return triton.cdiv(q_len, tile.queries) * triton.cdiv(k_len, tile.keys) * batch * heads


def attention(
    x: Inputs,
    recipe: Recipe,
    *,
    choose: Callable[[Inputs, Quantized], BlockLists] | None = None,
    skip: float | None = None,
    computed: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> Any:
    """Quantizes the operands and computes attention.

    Args:
        x: The call. Query, key and value are bf16 or fp16, head_dim is at most 128, and a mask is over keys alone.
            `norm` and `rotary` need a recipe that rounds QK.
        recipe: The rounding of the operands.
        choose: Returns the blocks of keys that each block of queries attends to, from the call and its rounded
            operands. `None` for all keys.
        skip: Share of the softmax's running maximum below which all weights of a tile of keys are left out; `None` to
            leave out none. Not with a mask.
        computed: int32 (1,), to which the number of tiles that are not left out is added, if `skip` is given.
        tile: Tile sizes; `choose_tile` or `sparse_tile` picks them if `None`. With `choose`, they divide the blocks.

    Returns:
        The output, (batch, sequence, heads, head_dim), in the query's dtype; with `return_lse` also the LSE, float32
        (batch, heads, sequence), natural logarithm. A row without any key is zero, and its LSE is -inf.
    """
    (batch, q_len, heads, dim), (_, k_len, kv_heads, _) = x.query.shape, x.key.shape
    device, bias = x.query.device, key_bias(x)
    data = quantize(x, recipe)
    lists = None if choose is None else choose(x, data)
    arch, processors = _gpu(device)
    if tile is None and lists is None:
        tile = choose_tile(recipe, dim, arch, processors, q_len, batch * heads)
    elif tile is None:
        assert lists is not None
        tile = sparse_tile(recipe, dim, arch, lists.query_block, lists.key_block)
    q, k, v = (tma_compatible(item) for item in (data.query, data.key, data.value))
    out = torch.empty((batch, q_len, heads, dim), dtype=x.query.dtype, device=device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device) if x.return_lse else None
    padded, m, n = padded_dim(dim), tile.queries, tile.keys
    unused = data.query_scale
    indices, counts, order, shared, query_blocks = unused, unused, unused, 0, 0
    kept, k_means, v_means, replaced = unused, unused, unused, False
    grid: tuple[int, ...] = (triton.cdiv(q_len, m), batch * heads)
    if lists is not None:
        shared = lists.query_block // m
        if lists.query_block % m or lists.key_block != n:
            raise ValueError(f"tiles of {m} x {n} do not divide blocks of {lists.query_block} x {lists.key_block}")
        indices, counts, query_blocks = lists.indices, lists.counts, lists.counts.shape[2]
        order = counts if lists.even else long_first(counts)
        grid = (counts.numel() * shared,)
        if lists.centroids is not None and lists.kept is not None:
            kept, (k_means, v_means), replaced = lists.kept, lists.centroids, True
    _attention[grid](
        tensor_descriptor(q, [1, 1, m, padded]),
        tensor_descriptor(k, [1, 1, n, padded]),
        tensor_descriptor(v, [1, 1, padded, n] if recipe.pv else [1, 1, n, padded]),
        tensor_descriptor(out, [1, m, 1, padded]),
        data.query_scale, data.key_scale, data.value_scale,
        unused if bias is None else bias.contiguous(),
        unused if data.lse_correction is None else data.lse_correction,
        unused if lse is None else lse,
        indices, counts, order, kept, k_means, v_means, unused if computed is None else computed,
        0.0 if skip is None else math.log2(skip),
        x.softmax_scale * LOG2E, q_len, k_len, query_blocks, heads, heads // kv_heads,
        QK={"int8": 0, "fp8": 1, None: 2}[recipe.qk], PV=int(bool(recipe.pv)), KB=recipe.k_block or n,
        D=dim, DP=padded, M=m, N=n, STAGES=tile.stages, PREFETCH_LOGITS=tile.prefetch_logits,
        TAIL=k_len % n != 0, BIAS=bias is not None, BLOCK_SPARSE=shared, ORDERED=lists is not None and not lists.even,
        CENTROIDS=replaced, SKIP=skip is not None, LSE=lse is not None, CORRECT_LSE=data.lse_correction is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return (out, lse) if x.return_lse else out
