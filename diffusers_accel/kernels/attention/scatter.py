"""Heads on their way to several ranks and back, in Triton: one read, and one write to wherever each is to be, on this
GPU or, over NVLink, on another. What goes there is normed and rotated in the same pass.

A program takes one token with all its heads, as in `qk_norm_rope.py`; a table on the device says where each head, or
each rank's tokens, go. Imported only where a GPU is met: it needs triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..launching import on_its_device
from .qk_norm_rope import load_token, table_strides
from .record import Tables
from .rows import rotate_interleaved

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _token_scattered(
    part, s, b, to, heads, eps, NORM: tl.constexpr, ROPE: tl.constexpr, SHARED: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token's heads, each to where `to` says, (HEADS,). `part` is what `_part` makes."""
    x_ptr, norm_ptr, cos_ptr, sin_ptr = part[0] + b * part[4] + s * part[5], part[1], part[2], part[3]
    turn = b * part[7] + s * part[8]
    h = tl.arange(0, HEADS)
    if ROPE == "half":
        x, inside = load_token(
            x_ptr, part[6], heads, norm_ptr, eps, cos_ptr + turn, sin_ptr + turn, part[9], NORM, ROPE, D, W, HEADS
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
        inside = (h < heads)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + h[:, None] * part[6] + d[None, :], mask=inside, other=0.0)
        if (NORM != "") or (ROPE != ""):
            x = x.to(tl.float32)
        if NORM == "head":
            weight = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            x *= tl.rsqrt(tl.sum(x * x, 1) * (1.0 / D) + eps)[:, None] * weight
        if NORM == "all":
            weight = tl.load(norm_ptr + h[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            x *= tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / (heads * D) + eps) * weight
        if ROPE == "interleaved":
            if SHARED:
                cos = tl.load(cos_ptr + turn + d, mask=d < D, other=0.0)[None, :]
                sin = tl.load(sin_ptr + turn + d, mask=d < D, other=0.0)[None, :]
            else:
                own = turn + h.to(tl.int64)[:, None] * part[9] + d[None, :]
                cos = tl.load(cos_ptr + own, mask=inside, other=0.0)
                sin = tl.load(sin_ptr + own, mask=inside, other=0.0)
            x = rotate_interleaved(x, cos, sin)
        tl.store(to[:, None] + d[None, :], x.to(KIND), mask=inside)


@triton.jit
def _operand_scattered(
    parts, table_ptr, start, count, length, heads, eps, NORM: tl.constexpr, ROPE: tl.constexpr, SHARED: tl.constexpr,
    ALIGNED: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    DP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token of an operand of so many: of its first part, which has `count`, or of the second."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if s < length:
        h = tl.arange(0, HEADS)
        exists = h < heads
        to = tl.load(table_ptr + 3 * h, mask=exists, other=0).to(tl.pointer_type(KIND), bitcast=True)
        row = tl.load(table_ptr + 3 * h + 1, mask=exists, other=0)
        batch = tl.load(table_ptr + 3 * h + 2, mask=exists, other=0)
        to += b * batch + (s + start) * row
        if ALIGNED:
            # Nothing else says so of an address that was loaded: without it, values are written one by one.
            to = tl.multiple_of(to, 16)
        if s < count:
            _token_scattered(parts[0], s, b, to, heads, eps, NORM, ROPE, SHARED, KIND, D, W, DP, HEADS)
        elif PARTS > 1:
            _token_scattered(parts[1], s - count, b, to, heads, eps, NORM, ROPE, SHARED, KIND, D, W, DP, HEADS)


@on_its_device
@triton.jit(do_not_specialize=[
    "start_0", "count_0", "length_0", "start_1", "count_1", "length_1", "start_2", "count_2", "length_2",
])  # fmt: skip
def _scatter(
    parts_0, table_0, start_0, count_0, length_0, heads_0, parts_1, table_1, start_1, count_1, length_1, heads_1,
    parts_2, table_2, start_2, count_2, length_2, heads_2, eps,
    NORM_0: tl.constexpr, ROPE_0: tl.constexpr, SHARED_0: tl.constexpr, ALIGNED_0: tl.constexpr,
    PARTS_0: tl.constexpr,
    NORM_1: tl.constexpr, ROPE_1: tl.constexpr, SHARED_1: tl.constexpr, ALIGNED_1: tl.constexpr,
    PARTS_1: tl.constexpr,
    NORM_2: tl.constexpr, ROPE_2: tl.constexpr, SHARED_2: tl.constexpr, ALIGNED_2: tl.constexpr,
    PARTS_2: tl.constexpr,
    KIND: tl.constexpr, D: tl.constexpr, W: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, batch, operand). An operand without parts is none."""
    which = tl.program_id(2)
    if which == 0:
        _operand_scattered(
            parts_0, table_0, start_0, count_0, length_0, heads_0, eps, NORM_0, ROPE_0, SHARED_0, ALIGNED_0,
            PARTS_0, KIND, D, W, DP, HEADS,
        )  # fmt: skip
    if PARTS_1 > 0:  # noqa: SIM102 (known when it is compiled)
        if which == 1:
            _operand_scattered(
                parts_1, table_1, start_1, count_1, length_1, heads_1, eps, NORM_1, ROPE_1, SHARED_1, ALIGNED_1,
                PARTS_1, KIND, D, W, DP, HEADS,
            )  # fmt: skip
    if PARTS_2 > 0:  # noqa: SIM102
        if which == 2:
            _operand_scattered(
                parts_2, table_2, start_2, count_2, length_2, heads_2, eps, NORM_2, ROPE_2, SHARED_2, ALIGNED_2,
                PARTS_2, KIND, D, W, DP, HEADS,
            )  # fmt: skip


@on_its_device
@triton.jit(do_not_specialize=["rank", "ranks"])
def _hand_back(
    x_ptr, own_ptr, table_ptr, sx_b, sx_s, sx_h, so_b, so_s, rank, ranks, heads,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program (token of each rank, batch): for every rank one, so that all links, and this GPU's memory, have work at
    all times."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, DP)[None, :]
    inside = (h < heads) & (d < D)
    for step in range(1, ranks + 1):
        to_rank = (rank + step) % ranks
        row = table_ptr + 5 * to_rank
        first, length = tl.load(row), tl.load(row + 1)
        if s < length:
            x = tl.load(x_ptr + b * sx_b + (first + s) * sx_s + h * sx_h + d, mask=inside, other=0.0)
            if to_rank == rank:
                tl.store(own_ptr + b * so_b + s * so_s + h * D + d, x, mask=inside)
            else:
                to = tl.load(row + 2).to(tl.pointer_type(KIND), bitcast=True)
                to += b * tl.load(row + 4) + s * tl.load(row + 3)
                if ALIGNED:
                    to = tl.multiple_of(to, 16)
                tl.store(to + h * D + d, x, mask=inside)


@on_its_device
@triton.jit
def _collect(
    out_ptr, table_ptr, so_b, so_s, heads, first, count,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program (token, batch)."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, DP)[None, :]
    # All but this rank's.
    h = tl.where(h < first, h, h + count)
    exists = h < heads
    inside = (d < D) & exists[:, None]
    come = tl.load(table_ptr + 3 * h, mask=exists, other=0).to(out_ptr.dtype, bitcast=True)
    come += b * tl.load(table_ptr + 3 * h + 2, mask=exists, other=0)
    come += s * tl.load(table_ptr + 3 * h + 1, mask=exists, other=0)
    if ALIGNED:
        come = tl.multiple_of(come, 16)
    x = tl.load(come[:, None] + d, mask=inside, other=0.0)
    tl.store(out_ptr + b * so_b + s * so_s + h[:, None] * D + d, x, mask=inside)


def _aligned(rows: Sequence[Sequence[int]], size: int) -> bool:
    """Whether addresses, and steps of elements of `size` bytes, are multiples of 16 bytes."""
    return all(not at % 16 and all(not step * size % 16 for step in steps) for at, *steps in rows)


@dataclass(frozen=True)
class Places:
    """Where each head goes, or has come to.

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
        return cls(torch.tensor(rows).to(device), _aligned(rows, places[0].element_size()))


@dataclass(frozen=True)
class Ways:
    """Where each rank's tokens go.

    Attributes:
        table: Its first token, how many it has, the address of the first one, and the steps from token to token and
            from batch to batch, in elements: int64 (ranks, 5), on the device.
        longest: The most that any has.
        aligned: As in `Places`.
    """

    table: torch.Tensor
    longest: int
    aligned: bool

    @classmethod
    def of(cls, places: Sequence[torch.Tensor], device: torch.device) -> Ways:
        """Of memory, (batch, that rank's tokens, heads, head_dim) each, heads and channels next to each other."""
        lengths = [place.shape[1] for place in places]
        rows = [[place.data_ptr(), place.stride(1), place.stride(0)] for place in places]
        table = [[sum(lengths[:rank]), length, *rows[rank]] for rank, length in enumerate(lengths)]
        return cls(torch.tensor(table).to(device), max(lengths), _aligned(rows, places[0].element_size()))


# A part of a query, key or value, (batch, sequence, heads, head_dim), any strides but the last; weight of an RMS norm:
# (head_dim,), over the channels of a head, or (heads * head_dim,), over all; cosines and sines, float32, as
# `record.Rotary` has them.
Part = tuple[torch.Tensor, torch.Tensor | None, Tables | None]


# Parts of a query, key or value, one after another along the sequence, and where its heads go.
Going = tuple[Sequence[Part], Places]
# Operands and their parts in one launch.
_OPERANDS, _PARTS = 3, 2


def scatter(
    operands: Sequence[Going], eps: float = 0.0, rope_style: str = "interleaved", warps: int | None = None
) -> None:
    """Writes queries, keys and values, with their norm and rotation, to where their heads are to be.

    Args:
        operands: Of one batch, head_dim and dtype, on one device.
        eps: The norms'.
        rope_style: `"interleaved"` or `"half"`, as `record.Rotary` describes it.
        warps: Of a program, instead of those measured.
    """
    pieces: list[_Piece] = []
    for parts, places in operands:
        start = 0
        for part in parts:
            alike = pieces and pieces[-1].places is places and _kind(pieces[-1].parts[-1]) == _kind(part)
            if not alike or len(pieces[-1].parts) == _PARTS:
                pieces.append(_Piece([], places, start))
            pieces[-1].parts.append(part)
            start += part[0].shape[1]
    pieces = [piece for piece in pieces if piece.length and piece.parts[0][0].shape[0]]
    for first in range(0, len(pieces), _OPERANDS):
        _launch(pieces[first : first + _OPERANDS], eps, rope_style, warps)


@dataclass
class _Piece:
    """Parts of one kind, of one operand.

    Attributes:
        parts: They.
        places: Those of the operand's heads.
        start: Their first token's place there.
    """

    parts: list[Part]
    places: Places
    start: int

    @property
    def length(self) -> int:
        return sum(x.shape[1] for x, _, _ in self.parts)

    def plan(self, rope_style: str) -> tuple[Any, ...]:
        """What a kernel is compiled for: NORM, ROPE, SHARED, ALIGNED and PARTS."""
        norm, rotated, shared = _kind(self.parts[0])
        return norm, rope_style if rotated else "", shared, self.places.aligned, len(self.parts)

    def args(self) -> tuple[Any, ...]:
        """What it is given."""
        first = self.parts[0][0]
        parts = tuple(map(_part, self.parts))
        return parts, self.places.table, self.start, first.shape[1], self.length, first.shape[2]


def _kind(part: Part) -> tuple[str, bool, bool]:
    """What is done to a part: the norm, whether there is a rotation, and whether its tables are for all heads."""
    x, norm, tables = part
    norms = "" if norm is None else "head" if norm.numel() == x.shape[3] else "all"
    return norms, tables is not None, tables is None or tables[0].shape[2] == 1


def _part(part: Part) -> tuple[Any, ...]:
    """As a kernel takes it."""
    x, norm, tables = part
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = tables or (x, x)
    steps = table_strides(tables[0] if tables else None)
    return (x, x if norm is None else norm, cos, sin, x.stride(0), x.stride(1), x.stride(2), *steps)


def _launch(pieces: Sequence[_Piece], eps: float, rope_style: str, warps: int | None) -> None:
    first = pieces[0].parts[0][0]
    dim, heads = first.shape[3], max(piece.parts[0][0].shape[2] for piece in pieces)
    padded, wide = max(64, triton.next_power_of_2(dim)), triton.next_power_of_2(heads)
    plans = [piece.plan(rope_style) for piece in pieces]
    plans += [("", "", True, True, 0)] * (_OPERANDS - len(plans))
    args = [piece.args() for piece in pieces]
    args += args[:1] * (_OPERANDS - len(args))
    _scatter[(max(piece.length for piece in pieces), first.shape[0], len(pieces))](
        *(item for each in args for item in each), eps,
        *(item for plan in plans for item in plan), KIND=_TYPES[first.dtype], D=dim, W=padded // 4,
        DP=triton.next_power_of_2(dim), HEADS=wide, num_warps=warps or max(1, min(8, wide * padded // 1024)),
    )  # fmt: skip


def hand_back(x: torch.Tensor, own: torch.Tensor, ways: Ways, rank: int, warps: int | None = None) -> None:
    """Writes some heads of all tokens to the ranks whose tokens they are.

    Args:
        x: (batch, sequence, heads, head_dim), any strides but the last.
        own: Where this rank's tokens go: (batch, this rank's tokens, heads, head_dim), heads and channels next to each
            other.
        ways: Where the others' go.
        rank: This one.
        warps: Of a program, instead of those measured.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, length, heads, dim = x.shape
    if 0 in (batch, length):
        return
    wide, padded = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    ranks = ways.table.shape[0]
    _hand_back[(ways.longest, batch)](
        x, own, ways.table, x.stride(0), x.stride(1), x.stride(2), own.stride(0), own.stride(1), rank, ranks, heads,
        KIND=_TYPES[x.dtype], D=dim, DP=padded, HEADS=wide, ALIGNED=ways.aligned,
        num_warps=warps or max(1, min(8, wide * padded // 1024)),
    )  # fmt: skip


def collect(out: torch.Tensor, come: Places, first: int, count: int) -> None:
    """Writes those heads of some tokens that have come from other ranks to where this rank's are.

    Args:
        out: (batch, sequence, heads, channels), heads and channels next to each other.
        come: Where all heads of these tokens are, but for this rank's, which are not read.
        first: Which of the heads is this rank's first.
        count: How many it has.
    """
    batch, length, heads, dim = out.shape
    if 0 in (batch, length, heads - count):
        return
    wide, padded = triton.next_power_of_2(heads - count), triton.next_power_of_2(dim)
    _collect[(length, batch)](
        out, come.table, out.stride(0), out.stride(1), heads, first, count,
        D=dim, DP=padded, HEADS=wide, ALIGNED=come.aligned, num_warps=max(1, min(8, wide * padded // 1024)),
    )  # fmt: skip
