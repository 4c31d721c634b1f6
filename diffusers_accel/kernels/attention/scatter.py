"""Norm and rotation of a query or key whose heads go to several ranks, in Triton: one read, and one write to wherever
each head is to be, on this GPU or, over NVLink, on another.

A program takes one token with all its heads, as in `prepare.py`; a table on the device says where each head goes.
Imported only where a GPU is met: it needs triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .prepare import token, turns
from .record import Tables
from .rows import rotated

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["start"])
def _scatter(
    x_ptr, table_ptr, norm_ptr, cos_ptr, sin_ptr, sx_b, sx_s, sx_h, st_b, st_s, st_h, start, heads, eps,
    NORM: tl.constexpr, ROTATE: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, W: tl.constexpr, DP: tl.constexpr,
    HEADS: tl.constexpr, SHARED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program (token, batch)."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h = tl.arange(0, HEADS)
    exists = h < heads
    to = tl.load(table_ptr + 3 * h, mask=exists, other=0).to(tl.pointer_type(KIND), bitcast=True)
    row = tl.load(table_ptr + 3 * h + 1, mask=exists, other=0)
    batch = tl.load(table_ptr + 3 * h + 2, mask=exists, other=0)
    to += b * batch + (s + start) * row
    if ALIGNED:
        # Nothing else says so of an address that was loaded: without it, values are written one by one.
        to = tl.multiple_of(to, 16)
    base = x_ptr + b * sx_b + s * sx_s
    if ROTATE == "halves":
        turn = b * st_b + s * st_s
        x, inside = token(
            base, sx_h, heads, norm_ptr, eps, cos_ptr + turn, sin_ptr + turn, st_h, NORM, ROTATE, D, W, HEADS
        )
        Q: tl.constexpr = D // 4
        at = to[:, None] + tl.arange(0, W)[None, :]
        tl.store(at, x[0].to(KIND), mask=inside)
        tl.store(at + Q, x[1].to(KIND), mask=inside)
        tl.store(at + 2 * Q, x[2].to(KIND), mask=inside)
        tl.store(at + 3 * Q, x[3].to(KIND), mask=inside)
    else:
        # A head's channels in one piece: what goes over a link goes in longer packets.
        d = tl.arange(0, DP)
        inside = exists[:, None] & (d < D)[None, :]
        x = tl.load(base + h[:, None] * sx_h + d[None, :], mask=inside, other=0.0)
        if (NORM != "") or (ROTATE != ""):
            x = x.to(tl.float32)
        if NORM == "head":
            weight = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            x *= tl.rsqrt(tl.sum(x * x, 1) * (1.0 / D) + eps)[:, None] * weight
        if NORM == "all":
            weight = tl.load(norm_ptr + h[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            x *= tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / (heads * D) + eps) * weight
        if ROTATE == "neighbours":
            turn = b * st_b + s * st_s
            if SHARED:
                cos = tl.load(cos_ptr + turn + d, mask=d < D, other=0.0)[None, :]
                sin = tl.load(sin_ptr + turn + d, mask=d < D, other=0.0)[None, :]
            else:
                own = turn + h.to(tl.int64)[:, None] * st_h + d[None, :]
                cos = tl.load(cos_ptr + own, mask=inside, other=0.0)
                sin = tl.load(sin_ptr + own, mask=inside, other=0.0)
            x = rotated(x, cos, sin)
        tl.store(to[:, None] + d[None, :], x.to(KIND), mask=inside)


@triton.jit
def _collect(
    out_ptr, own_ptr, come_ptr, so_b, so_s, sc_b, sc_s, sw_b, sw_s, heads, first, count,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, batch)."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, DP)[None, :]
    own = (h >= first) & (h < first + count)
    inside = (d < D) & (h < heads)[:, None]
    mine = tl.load(own_ptr + b * sw_b + s * sw_s + (h - first)[:, None] * D + d, mask=inside & own[:, None], other=0.0)
    come = tl.load(come_ptr + b * sc_b + s * sc_s + h[:, None] * D + d, mask=inside & ~own[:, None], other=0.0)
    at = out_ptr + b * so_b + s * so_s + h[:, None] * D + d
    tl.store(at, tl.where(own[:, None], mine, come), mask=inside)


@dataclass(frozen=True)
class Places:
    """Where each head goes.

    Attributes:
        table: Its address, and the steps from token to token and from batch to batch, in elements: int64 (heads, 3),
            on the device.
        aligned: Whether all of them are multiples of 16 bytes.
    """

    table: torch.Tensor
    aligned: bool

    @classmethod
    def of(cls, places: Sequence[torch.Tensor], device: torch.device) -> Places:
        """Of memory, (batch, sequence, heads, head_dim) each, one rank's heads after another's, channels next to each
        other."""
        rows = [
            [place.data_ptr() + head * place.stride(2) * place.element_size(), place.stride(1), place.stride(0)]
            for place in places
            for head in range(place.shape[2])
        ]
        size = places[0].element_size()
        aligned = all(not (at % 16 or token * size % 16 or batch * size % 16) for at, token, batch in rows)
        return cls(torch.tensor(rows).to(device), aligned)


def scatter(
    x: torch.Tensor,
    places: Places,
    start: int,
    norm: torch.Tensor | None,
    eps: float,
    tables: Tables | None,
    halves: bool,
    warps: int | None = None,
) -> None:
    """Writes a query, key or value, with its norm and rotation, to where its heads are to be.

    Args:
        x: (batch, sequence, heads, head_dim), any strides but the last.
        places: Those of its heads.
        start: The place of its first token there.
        norm: Weight of an RMS norm: (head_dim,), over the channels of a head, or (heads * head_dim,), over all.
        eps: The norm's.
        tables: Cosines and sines, float32, as `record.Rotary` has them.
        halves: As there.
        warps: Of a program, instead of those measured.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, length, heads, dim = x.shape
    if 0 in (batch, length):
        return
    padded, wide = max(64, triton.next_power_of_2(dim)), triton.next_power_of_2(heads)
    cos, sin = tables or (x, x)
    _scatter[(length, batch)](
        x, places.table, x if norm is None else norm, cos, sin, x.stride(0), x.stride(1), x.stride(2),
        *turns(tables[0] if tables else None), start, heads, eps,
        NORM="" if norm is None else "head" if norm.numel() == dim else "all",
        ROTATE="" if tables is None else "halves" if halves else "neighbours", KIND=_TYPES[x.dtype], D=dim,
        W=padded // 4, DP=triton.next_power_of_2(dim), HEADS=wide,
        SHARED=tables is None or tables[0].shape[2] == 1, ALIGNED=places.aligned,
        num_warps=warps or max(1, min(8, wide * padded // 1024)),
    )  # fmt: skip


def collect(out: torch.Tensor, own: torch.Tensor, come: torch.Tensor, first: int) -> None:
    """Writes all heads of some tokens: this rank's own ones, and those that have come from others.

    Args:
        out: (batch, sequence, heads, channels), heads and channels next to each other, as are the next two.
        own: This rank's heads.
        come: Like `out`; this rank's heads of it are not read.
        first: Which of the heads is this rank's first.
    """
    batch, length, heads, dim = out.shape
    if 0 in (batch, length):
        return
    wide, padded = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    _collect[(length, batch)](
        out, own, come, out.stride(0), out.stride(1), come.stride(0), come.stride(1), own.stride(0), own.stride(1),
        heads, first, own.shape[2], D=dim, DP=padded, HEADS=wide, num_warps=max(1, min(8, wide * padded // 1024)),
    )  # fmt: skip
