"""Attention on rounded operands, in Triton: INT8 or e4m3 QK with 16-bit or e4m3 PV, and 16-bit QK with e4m3 PV.

What makes it fast on Hopper:

- Integer logits start from an accumulator preset to the bits of 1.5 * 2^23 as a float, so that the integer sum *is* a
  float32 and nothing is converted; the offset leaves in the fused multiply-add that the softmax does anyway. |QK| is at
  most 127 * 127 * 128 < 2^21, well inside the 2^22 that this allows.
- A scale per whole tile of keys joins the row's scale, so a logit costs a single multiply-add.
- The keys of the transposed e4m3 V are permuted within every 16, so that P, rounded where the first product left it,
  already lies as the second product's operand must: no value moves between threads.
- The first product's accumulator keeps about 22 bits on Hopper, so every tile's PV is added in float32 outside it.

Imported only by the loaders of kernel records: it needs triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launching import on_its_device
from ..rounding import to_e4m3
from .norm import padded_dim
from .quantize import LOG2E, quantize
from .recipe import Recipe
from .record import QKNorm, Rotary

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
def _softmax(
    s, top, total, row_scale, key_scale_ptr, bias_ptr, tile, k_len,
    QK: tl.constexpr, PV: tl.constexpr, KB: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One tile's weights, the running maximum (base 2) and sum, and the factor that older results must be scaled by."""
    OFFSET: tl.constexpr = _MAGIC if QK == 0 else 0.0
    LIFT: tl.constexpr = _P_SCALE if PV == 1 else 0.0
    keys = tile * N + tl.arange(0, N)
    low = tl.zeros_like(row_scale)
    if QK != 2:
        if KB % N == 0:
            row_scale = row_scale * tl.load(key_scale_ptr + tile * N // KB)
            if QK == 0:
                # Logits of 8 million and more, a choice of one key long before, end here.
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
        raised = tl.maximum(top, tl.max(s, 1))
        # A row that has met no key yet has no maximum to subtract.
        base = tl.where(raised == -float("inf"), 0.0, raised)
        p = tl.exp2(s - (base - LIFT)[:, None])
    else:
        if MASKED:
            s = tl.where((keys < k_len)[None, :], s, -float("inf"))
        raised = tl.maximum(top, (tl.max(s, 1) - OFFSET) * row_scale if KB % N == 0 else tl.max(s, 1) * row_scale)
        base = raised
        shift = raised + low - LIFT
        if QK == 0:
            # Rounded up, by no more than an integer step of the logits: P must not leave the range of e4m3.
            shift += tl.abs(shift) * 1.2e-7
        p = tl.exp2(s * row_scale[:, None] - shift[:, None])
    factor = tl.exp2(top - base)
    # Sums over what one thread holds: eight columns lie across four threads, so nothing is exchanged until the end.
    return p, raised, total * factor[:, None] + tl.sum(p.reshape(p.shape[0], N // 8, 8), 1), factor


@triton.jit
def _add_values(
    p, acc, factor, v_desc, b, h, tile,
    PV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    if PV == 1:
        v = v_desc.load([b, h, 0, tile * N]).reshape(DP, N)
        p = to_e4m3(p.reshape(M, N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(M, N))
        return acc * factor[:, None] + tl.dot(p, v.T)
    else:
        v = v_desc.load([b, h, tile * N, 0]).reshape(N, DP)
        return tl.dot(p.to(v_desc.dtype), v, acc * factor[:, None])


@on_its_device
@triton.jit(do_not_specialize=["q_len", "k_len"])
def _attention(
    q_desc, k_desc, v_desc, o_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, shift_ptr, lse_ptr,
    list_ptr, count_ptr, logit_scale, q_len, k_len, heads, groups,
    QK: tl.constexpr, PV: tl.constexpr, KB: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    TAIL: tl.constexpr, BIAS: tl.constexpr, LISTED: tl.constexpr, LSE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Program (tile of M queries, batch x head). QK: 0 int8, 1 e4m3, 2 as it is; PV: 0 as it is, 1 e4m3."""
    start = tl.program_id(0) * M
    index = tl.program_id(1)
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
    scales = k_scale_ptr + (b * kv_heads + hk) * tl.cdiv(k_len, KB)
    bias = bias_ptr + b * k_len
    full = k_len // N
    if LISTED:
        tiles = tl.cdiv(k_len, N)
        place = index.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        for item in tl.range(0, tl.load(count_ptr + place), num_stages=STAGES):
            tile = tl.load(list_ptr + place * tiles + item)
            k = k_desc.load([b, hk, tile * N, 0]).reshape(N, DP)
            s = _logits(q, k, QK, M, N)
            p, top, total, factor = _softmax(
                s, top, total, row_scale, scales, bias, tile, k_len, QK, PV, KB, N, TAIL, BIAS
            )
            acc = _add_values(p, acc, factor, v_desc, b, hk, tile, PV, M, N, DP)
    else:
        if AHEAD:
            # The next tile's logits are under way while this one's softmax runs.
            if full > 0:
                k = k_desc.load([b, hk, 0, 0]).reshape(N, DP)
                s = _logits(q, k, QK, M, N)
                for tile in tl.range(0, full - 1, num_stages=STAGES):
                    k = k_desc.load([b, hk, (tile + 1) * N, 0]).reshape(N, DP)
                    following = _logits(q, k, QK, M, N)
                    p, top, total, factor = _softmax(
                        s, top, total, row_scale, scales, bias, tile, k_len, QK, PV, KB, N, False, BIAS
                    )
                    acc = _add_values(p, acc, factor, v_desc, b, hk, tile, PV, M, N, DP)
                    s = following
                p, top, total, factor = _softmax(
                    s, top, total, row_scale, scales, bias, full - 1, k_len, QK, PV, KB, N, False, BIAS
                )
                acc = _add_values(p, acc, factor, v_desc, b, hk, full - 1, PV, M, N, DP)
        else:
            for tile in tl.range(0, full, num_stages=STAGES):
                k = k_desc.load([b, hk, tile * N, 0]).reshape(N, DP)
                s = _logits(q, k, QK, M, N)
                p, top, total, factor = _softmax(
                    s, top, total, row_scale, scales, bias, tile, k_len, QK, PV, KB, N, False, BIAS
                )
                acc = _add_values(p, acc, factor, v_desc, b, hk, tile, PV, M, N, DP)
        if TAIL:
            k = k_desc.load([b, hk, full * N, 0]).reshape(N, DP)
            s = _logits(q, k, QK, M, N)
            p, top, total, factor = _softmax(
                s, top, total, row_scale, scales, bias, full, k_len, QK, PV, KB, N, True, BIAS
            )
            acc = _add_values(p, acc, factor, v_desc, b, hk, full, PV, M, N, DP)
    total = tl.sum(total, 1)
    if LSE:
        LIFT: tl.constexpr = _P_SCALE if PV == 1 else 0.0
        lse = (top + tl.log2(total) - LIFT) * _LN2
        if SHIFT:
            lse += tl.load(shift_ptr + index.to(tl.int64) * q_len + rows, mask=rows < q_len, other=0.0)
        tl.store(lse_ptr + index.to(tl.int64) * q_len + rows, lse, mask=rows < q_len)
    acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    if PV == 1:
        d = tl.arange(0, DP)
        acc = acc * tl.load(v_scale_ptr + (b * kv_heads + hk) * D + d, mask=d < D, other=0.0)[None, :]
    o_desc.store([b, start, h, 0], acc.to(o_desc.dtype).reshape(1, M, 1, DP))


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut: queries and keys per tile, warps, pipeline depth, whether logits run one tile ahead, and
    TFLOP/s of full waves, by which cuts are compared."""

    queries: int
    keys: int
    warps: int
    stages: int
    ahead: bool = False
    rate: float = 1.0


# (rounding of QK, of PV, head_dim up to 64) -> cuts for Hopper, with the rates of `benchmarks/attention.py --tiles`.
_HOPPER: dict[tuple[bool, bool, bool], tuple[Tile, ...]] = {
    (True, True, False): (Tile(64, 128, 4, 2),),
    (True, True, True): (Tile(64, 128, 4, 2),),
    (True, False, False): (Tile(128, 64, 8, 3, rate=625), Tile(64, 128, 4, 2, rate=560)),
    (True, False, True): (Tile(64, 128, 4, 2),),
    (False, True, False): (Tile(64, 128, 4, 2, ahead=True),),
    (False, True, True): (Tile(128, 128, 8, 3, rate=503), Tile(64, 128, 4, 2, rate=483)),
}


def tile(
    recipe: Recipe, head_dim: int, arch: tuple[int, int] | None, processors: int, queries: int, heads: int
) -> Tile:
    """The cut for a call: of those measured for the recipe, the one that wastes least of its rate on the last wave.

    Args:
        recipe: What is rounded.
        head_dim: As it is, unpadded.
        arch: Compute capability; `None` off CUDA.
        processors: Multiprocessors of the GPU.
        queries: Their number.
        heads: Times the batch.
    """
    if arch is not None and arch < (9, 0):
        # 99 KiB of shared memory on most of them, and no wgmma.
        return Tile(128, 64, 4 if head_dim <= 64 else 8, 2)
    cuts = _HOPPER[(recipe.qk is not None, recipe.pv is not None, head_dim <= 64)]
    if recipe.qk is not None and any(recipe.k_block % cut.keys for cut in cuts):
        cuts = (Tile(64, 128, 4, 2),)  # a scale per column costs registers that larger tiles do not have

    def worth(cut: Tile) -> float:
        waves = triton.cdiv(queries, cut.queries) * heads / (2 * processors)  # two programs fit on one
        return cut.rate * waves / math.ceil(waves)

    return max(cuts, key=worth)


def _gpu(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    if device.type != "cuda":
        return None, 132
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _descriptor(x: torch.Tensor, block: list[int]) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _loadable(x: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if the bulk copy engine could not read it: 16-byte strides and base, last dimension dense."""
    size = x.element_size()
    dense = x.stride(-1) == 1 and all(stride * size % 16 == 0 for stride in x.stride()[:-1])
    return x if dense and x.data_ptr() % 16 == 0 else x.contiguous()


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    recipe: Recipe,
    *,
    key_bias: torch.Tensor | None = None,
    scale: float | None = None,
    keep: torch.Tensor | None = None,
    return_lse: bool = False,
    rotary: Rotary | None = None,
    norm: QKNorm | None = None,
    cut: Tile | None = None,
) -> Any:
    """Quantizes the operands and computes attention.

    Args:
        query: (batch, sequence, heads, head_dim), bf16 or fp16, head_dim up to 128; key and value with their own
            sequence and number of heads, which divides the query's.
        recipe: What is rounded.
        key_bias: float32 (batch, key sequence), added to the logits; -inf hides a key.
        scale: Of the logits; head_dim ** -0.5 if not given.
        keep: bool (batch, heads, query tiles, key tiles): tiles that are False are skipped. Sizes of a tile: see
            `tile`.
        return_lse: Also return the logsumexp, float32 (batch, heads, sequence), natural logarithm.
        rotary: A rotary embedding to apply to query and key first; see `quantize`. Only where QK is rounded.
        norm: An RMS norm to apply to query and key before that; likewise.
        cut: Instead of the one that `tile` gives.

    Returns:
        The output, (batch, sequence, heads, head_dim); a row without any key is zero, its logsumexp -inf.
    """
    (batch, q_len, heads, dim), (_, k_len, kv_heads, _) = query.shape, key.shape
    scale = dim**-0.5 if scale is None else scale
    if cut is None:
        cut = tile(recipe, dim, *_gpu(query.device), q_len, batch * heads)
    data = quantize(query, key, value, recipe, scale, shift=return_lse, rotary=rotary, norm=norm)
    q, k, v = (_loadable(item) for item in (data.query, data.key, data.value))
    out = torch.empty((batch, q_len, heads, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device) if return_lse else None
    padded, m, n = padded_dim(dim), cut.queries, cut.keys
    unused = data.query_scale
    lists, counts = unused, unused
    if keep is not None:
        counts = keep.sum(-1, dtype=torch.int32).contiguous()
        # Kept tiles first, in their order.
        lists = keep.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices.to(torch.int32).contiguous()
    _attention[(triton.cdiv(q_len, m), batch * heads)](
        _descriptor(q, [1, 1, m, padded]),
        _descriptor(k, [1, 1, n, padded]),
        _descriptor(v, [1, 1, padded, n] if recipe.pv else [1, 1, n, padded]),
        _descriptor(out, [1, m, 1, padded]),
        data.query_scale, data.key_scale, data.value_scale,
        unused if key_bias is None else key_bias.contiguous(),
        unused if data.shift is None else data.shift,
        unused if lse is None else lse,
        lists, counts, scale * LOG2E, q_len, k_len, heads, heads // kv_heads,
        QK={"int8": 0, "fp8": 1, None: 2}[recipe.qk], PV=int(bool(recipe.pv)), KB=recipe.k_block or n,
        D=dim, DP=padded, M=m, N=n, STAGES=cut.stages, AHEAD=cut.ahead,
        TAIL=k_len % n != 0, BIAS=key_bias is not None, LISTED=keep is not None,
        LSE=lse is not None, SHIFT=data.shift is not None,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return (out, lse) if return_lse else out
