"""Triton kernels that write to the memory of peers. Each head of a token is read once, and written once to its address
on this GPU or, over NVLink, on another. Norm and rotation are applied in the same pass.

Owns the kernels of Ulysses' exchange (`ulysses.py`): `scatter_heads` sends query, key and value, `scatter_tokens` sends
the attention output back, and `gather_heads` copies it out of symmetric memory. A program takes one token with all its
heads, as in `qk_norm_rope.py`. A table on the device holds the address of each head, or of each rank's tokens. The
caller orders writes and reads by a barrier. Profiles and benchmark results name the kernels `_scatter`, `_hand_back`
and `_collect`. The module needs triton and is imported on GPUs only.
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
def _write_token(
    part, s, b, to, heads, eps, NORM: tl.constexpr, ROPE: tl.constexpr, SHARED: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Writes one token's heads to the addresses `to`, (HEADS,). `part` is a tuple of `_part_args`."""
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
        # A head's channels contiguously, so that NVLink carries longer packets.
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
def _write_operand(
    parts, table_ptr, start, count, length, heads, eps, NORM: tl.constexpr, ROPE: tl.constexpr, SHARED: tl.constexpr,
    ALIGNED: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    DP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Writes token s of an operand of `length` tokens: from its first part, of `count` tokens, or from the second."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if s < length:
        h = tl.arange(0, HEADS)
        exists = h < heads
        to = tl.load(table_ptr + 3 * h, mask=exists, other=0).to(tl.pointer_type(KIND), bitcast=True)
        row = tl.load(table_ptr + 3 * h + 1, mask=exists, other=0)
        batch = tl.load(table_ptr + 3 * h + 2, mask=exists, other=0)
        to += b * batch + (s + start) * row
        if ALIGNED:
            # The compiler knows nothing of a loaded address: without this hint, values are written one by one.
            to = tl.multiple_of(to, 16)
        if s < count:
            _write_token(parts[0], s, b, to, heads, eps, NORM, ROPE, SHARED, KIND, D, W, DP, HEADS)
        elif PARTS > 1:
            _write_token(parts[1], s - count, b, to, heads, eps, NORM, ROPE, SHARED, KIND, D, W, DP, HEADS)


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
    """Program (token, batch, operand); operands with PARTS 0 are absent."""
    which = tl.program_id(2)
    if which == 0:
        _write_operand(
            parts_0, table_0, start_0, count_0, length_0, heads_0, eps, NORM_0, ROPE_0, SHARED_0, ALIGNED_0,
            PARTS_0, KIND, D, W, DP, HEADS,
        )  # fmt: skip
    if PARTS_1 > 0:  # noqa: SIM102 (known when it is compiled)
        if which == 1:
            _write_operand(
                parts_1, table_1, start_1, count_1, length_1, heads_1, eps, NORM_1, ROPE_1, SHARED_1, ALIGNED_1,
                PARTS_1, KIND, D, W, DP, HEADS,
            )  # fmt: skip
    if PARTS_2 > 0:  # noqa: SIM102
        if which == 2:
            _write_operand(
                parts_2, table_2, start_2, count_2, length_2, heads_2, eps, NORM_2, ROPE_2, SHARED_2, ALIGNED_2,
                PARTS_2, KIND, D, W, DP, HEADS,
            )  # fmt: skip


@on_its_device
@triton.jit(do_not_specialize=["rank", "ranks"])
def _hand_back(
    x_ptr, own_ptr, table_ptr, sx_b, sx_s, sx_h, so_b, so_s, rank, ranks, heads,
    KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program (token of each rank, batch): one token for every rank, so that all links and this GPU's memory are busy
    at all times."""
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
    """Program (token, batch): copies the heads that peers have written."""
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, DP)[None, :]
    # All heads but this rank's own.
    h = tl.where(h < first, h, h + count)
    exists = h < heads
    inside = (d < D) & exists[:, None]
    received = tl.load(table_ptr + 3 * h, mask=exists, other=0).to(out_ptr.dtype, bitcast=True)
    received += b * tl.load(table_ptr + 3 * h + 2, mask=exists, other=0)
    received += s * tl.load(table_ptr + 3 * h + 1, mask=exists, other=0)
    if ALIGNED:
        received = tl.multiple_of(received, 16)
    x = tl.load(received[:, None] + d, mask=inside, other=0.0)
    tl.store(out_ptr + b * so_b + s * so_s + h[:, None] * D + d, x, mask=inside)


def _aligned(rows: Sequence[Sequence[int]], size: int) -> bool:
    """Whether addresses, and strides in elements of `size` bytes, are multiples of 16 bytes."""
    return all(not at % 16 and all(not step * size % 16 for step in steps) for at, *steps in rows)


@dataclass(frozen=True)
class HeadAddresses:
    """The address of each head's first token.

    Attributes:
        table: int64 (heads, 3) on the device: an address, and the strides of tokens and of samples in elements.
        aligned: Whether addresses and strides are multiples of 16 bytes.
    """

    table: torch.Tensor
    aligned: bool

    @classmethod
    def of(cls, addresses: Sequence[torch.Tensor], device: torch.device) -> HeadAddresses:
        """The addresses of heads in views, (batch, sequence, heads, head_dim) each, channels contiguous.

        Args:
            addresses: The views, in the order of heads.
            device: The device of the table.
        """
        rows = [
            [place.data_ptr() + head * place.stride(2) * place.element_size(), place.stride(1), place.stride(0)]
            for place in addresses
            for head in range(place.shape[2])
        ]
        return cls(torch.tensor(rows).to(device), _aligned(rows, addresses[0].element_size()))


@dataclass(frozen=True)
class TokenAddresses:
    """The address of each rank's first token.

    Attributes:
        table: int64 (ranks, 5) on the device. Columns: index of the rank's first token, number of tokens, address of
            the first token, and the strides of tokens and of samples in elements.
        longest: The largest number of tokens of a rank.
        aligned: Whether addresses and strides are multiples of 16 bytes.
    """

    table: torch.Tensor
    longest: int
    aligned: bool

    @classmethod
    def of(cls, addresses: Sequence[torch.Tensor], device: torch.device) -> TokenAddresses:
        """The addresses of tokens in views, one for each rank.

        Args:
            addresses: The views, (batch, that rank's tokens, heads, head_dim), heads and channels contiguous.
            device: The device of the table.
        """
        lengths = [place.shape[1] for place in addresses]
        rows = [[place.data_ptr(), place.stride(1), place.stride(0)] for place in addresses]
        table = [[sum(lengths[:rank]), length, *rows[rank]] for rank, length in enumerate(lengths)]
        return cls(torch.tensor(table).to(device), max(lengths), _aligned(rows, addresses[0].element_size()))


# A part of a query, key or value along the sequence. The tensor is (batch, sequence, heads, head_dim). An RMS norm's
# weight is (head_dim,) for each head, or (heads * head_dim,) across heads. Cosines and sines are as in `record.Rotary`.
Part = tuple[torch.Tensor, torch.Tensor | None, Tables | None]


# The parts of a query, key or value in the order of the sequence, and the addresses of its heads.
ScatterOperand = tuple[Sequence[Part], HeadAddresses]
# The most operands of one launch, and the most parts of each.
_OPERANDS, _PARTS = 3, 2


def scatter_heads(
    operands: Sequence[ScatterOperand], eps: float = 0.0, rope_style: str = "interleaved", warps: int | None = None
) -> None:
    """Norms and rotates queries, keys and values, and writes each head to its address.

    Args:
        operands: Operands of one batch, head_dim, dtype and device.
        eps: The norms' epsilon.
        rope_style: `"interleaved"` or `"half"`, as `record.Rotary` describes it.
        warps: Warps of a program; `None` for the measured choice.
    """
    segments: list[_Segment] = []
    for parts, addresses in operands:
        start = 0
        for part in parts:
            alike = (
                segments
                and segments[-1].addresses is addresses
                and _specialization(segments[-1].parts[-1]) == _specialization(part)
            )
            if not alike or len(segments[-1].parts) == _PARTS:
                segments.append(_Segment([], addresses, start))
            segments[-1].parts.append(part)
            start += part[0].shape[1]
    segments = [segment for segment in segments if segment.length and segment.parts[0][0].shape[0]]
    for first in range(0, len(segments), _OPERANDS):
        _launch(segments[first : first + _OPERANDS], eps, rope_style, warps)


@dataclass
class _Segment:
    """Parts of one operand that one kernel variant takes.

    Attributes:
        parts: The parts, in the order of the sequence.
        addresses: The addresses of the operand's heads.
        start: The first part's first token, counted from the addresses.
    """

    parts: list[Part]
    addresses: HeadAddresses
    start: int

    @property
    def length(self) -> int:
        return sum(x.shape[1] for x, _, _ in self.parts)

    def plan(self, rope_style: str) -> tuple[Any, ...]:
        """The kernel's constants NORM, ROPE, SHARED, ALIGNED and PARTS."""
        norm, rotated, shared = _specialization(self.parts[0])
        return norm, rope_style if rotated else "", shared, self.addresses.aligned, len(self.parts)

    def args(self) -> tuple[Any, ...]:
        """The kernel's arguments of one operand."""
        first = self.parts[0][0]
        parts = tuple(map(_part_args, self.parts))
        return parts, self.addresses.table, self.start, first.shape[1], self.length, first.shape[2]


def _specialization(part: Part) -> tuple[str, bool, bool]:
    """A part's norm, whether it is rotated, and whether all heads share one row of the tables."""
    x, norm, tables = part
    norms = "" if norm is None else "head" if norm.numel() == x.shape[3] else "all"
    return norms, tables is not None, tables is None or tables[0].shape[2] == 1


def _part_args(part: Part) -> tuple[Any, ...]:
    """A part as the kernel takes it: pointers, then strides."""
    x, norm, tables = part
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = tables or (x, x)
    steps = table_strides(tables[0] if tables else None)
    return (x, x if norm is None else norm, cos, sin, x.stride(0), x.stride(1), x.stride(2), *steps)


def _launch(segments: Sequence[_Segment], eps: float, rope_style: str, warps: int | None) -> None:
    first = segments[0].parts[0][0]
    dim, heads = first.shape[3], max(segment.parts[0][0].shape[2] for segment in segments)
    padded, wide = max(64, triton.next_power_of_2(dim)), triton.next_power_of_2(heads)
    plans = [segment.plan(rope_style) for segment in segments]
    plans += [("", "", True, True, 0)] * (_OPERANDS - len(plans))
    args = [segment.args() for segment in segments]
    args += args[:1] * (_OPERANDS - len(args))
    _scatter[(max(segment.length for segment in segments), first.shape[0], len(segments))](
        *(item for each in args for item in each), eps,
        *(item for plan in plans for item in plan), KIND=_TYPES[first.dtype], D=dim, W=padded // 4,
        DP=triton.next_power_of_2(dim), HEADS=wide, num_warps=warps or max(1, min(8, wide * padded // 1024)),
    )  # fmt: skip


def scatter_tokens(
    x: torch.Tensor, own: torch.Tensor, tokens: TokenAddresses, rank: int, warps: int | None = None
) -> None:
    """Writes this rank's heads of all tokens to the ranks that have the tokens.

    Args:
        x: (batch, sequence, heads, head_dim), channels contiguous or made so.
        own: Destination of this rank's tokens: (batch, this rank's tokens, heads, head_dim), heads and channels
            contiguous.
        tokens: Destinations of the other ranks' tokens.
        rank: This rank.
        warps: Warps of a program; `None` for the measured choice.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, length, heads, dim = x.shape
    if 0 in (batch, length):
        return
    wide, padded = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    ranks = tokens.table.shape[0]
    _hand_back[(tokens.longest, batch)](
        x, own, tokens.table, x.stride(0), x.stride(1), x.stride(2), own.stride(0), own.stride(1), rank, ranks, heads,
        KIND=_TYPES[x.dtype], D=dim, DP=padded, HEADS=wide, ALIGNED=tokens.aligned,
        num_warps=warps or max(1, min(8, wide * padded // 1024)),
    )  # fmt: skip


def gather_heads(out: torch.Tensor, received: HeadAddresses, first: int, count: int) -> None:
    """Copies the heads that other ranks have sent into a tensor that has this rank's heads already.

    Args:
        out: (batch, sequence, heads, head_dim), heads and channels contiguous; written to.
        received: Addresses of all heads of these tokens; this rank's own are not read.
        first: This rank's first head.
        count: This rank's number of heads.
    """
    batch, length, heads, dim = out.shape
    if 0 in (batch, length, heads - count):
        return
    wide, padded = triton.next_power_of_2(heads - count), triton.next_power_of_2(dim)
    _collect[(length, batch)](
        out, received.table, out.stride(0), out.stride(1), heads, first, count,
        D=dim, DP=padded, HEADS=wide, ALIGNED=received.aligned, num_warps=max(1, min(8, wide * padded // 1024)),
    )  # fmt: skip
