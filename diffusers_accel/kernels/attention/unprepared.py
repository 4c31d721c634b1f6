"""Attention of a query and a key that still lack their norm and rotation, for compiled graphs.

In eager code `Pending` carries what is put off; a compiled graph holds it as operators. `rotate` marks a rotation where
stock code makes one, and a rewrite of the graph joins it, the norm before it and the attention behind it to one call,
`attention_unprepared`. What happens then is decided at that call, by the kernel that is in force: one that rounds
query and key does the rest in passing, for any other one launch prepares both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.operators import operator
from .pending import Pending
from .record import Inputs, Tables
from .site import SITES, AttentionSite
from .ulysses import KEY, QUERY, VALUE, Operand, apply_rotary, norm_and_rotate


def _rotate_fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool, heads: int) -> torch.Tensor:
    return x.new_empty(x.shape)


@operator("rotate", _rotate_fake)
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, halves: bool, heads: int) -> torch.Tensor:
    """A rotary embedding.

    Args:
        x: (batch, sequence, heads, head_dim), (batch, heads, sequence, head_dim), or with the heads in the channels,
            (batch, sequence, heads * head_dim).
        cos: As many dimensions as `x`, of its sizes or 1; half of its channels if `halves`.
        sin: Likewise.
        halves: As in `Rotary`.
        heads: Of a tensor with the heads in the channels, if its halves are those of each head; 0 otherwise.
    """
    cos, sin, found = cos.float(), sin.float(), x.float()
    if heads and x.ndim == 3:
        cos, sin, found = (item.unflatten(-1, (heads, -1)) for item in (cos, sin, found))
    return apply_rotary(found, cos, sin, halves).to(x.dtype).reshape(x.shape).contiguous()


@dataclass(frozen=True)
class _Both:
    """Query and key in parts along the sequence, and what they lack.

    Attributes:
        parts: The query's, then the key's: (batch, sequence of the part, heads, head_dim).
        norms: Weights of the query's parts, then of the key's; empty without a norm.
        eps: The norms'.
        tables: Cosines and sines, of each of the query's parts, then of the key's; empty without a rotation.
        halves: As in `Rotary`.
    """

    parts: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
    norms: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
    eps: float
    tables: tuple[Sequence[Tables], Sequence[Tables]]
    halves: bool

    def prepared(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key as attention takes them."""
        query, key = (
            parts[0].new_empty((parts[0].shape[0], sum(part.shape[1] for part in parts), *parts[0].shape[2:]))
            for parts in self.parts
        )
        starts = [0, 0]
        for place, parts in enumerate(zip(*self.parts, strict=True)):
            pieces = []
            for which, (part, whole) in enumerate(zip(parts, (query, key), strict=True)):
                pieces.append(whole[:, starts[which] : starts[which] + part.shape[1]])
                starts[which] += part.shape[1]
            norms: list[Any] = [item[place] for item in self.norms] if self.norms[0] else [None, None]
            tables: list[Any] = [item[place] for item in self.tables] if self.tables[0] else [None, None]
            if query.is_cuda:
                from .prepare import prepare

                weights = (norms[0], norms[1]) if self.norms[0] else None
                turning = (*tables[0], *tables[1]) if self.tables[0] else None
                prepare(parts[0], parts[1], pieces[0], pieces[1], weights, self.eps, turning, self.halves)
            else:
                for part, piece, norm, table in zip(parts, pieces, norms, tables, strict=True):
                    piece.copy_(norm_and_rotate(part, norm, self.eps, table, self.halves))
        return query, key

    def pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key for a site: with what they lack put off, where a kernel could do it in passing."""
        (query, *others), key = self.parts[0], self.parts[1][0]
        heads, dim = query.shape[-2:]
        by_head = all(weight.numel() == dim for weights in self.norms for weight in weights)
        # Over all heads only where the quantizers need no padding, and a head of the key belongs to one of the query.
        over_all = dim in (64, 128) and heads == key.shape[-2]
        if others or not (by_head or over_all):
            return self.prepared()
        both = functools.cache(self.prepared)

        def one(which: int) -> torch.Tensor:
            apply: Callable[[Any], torch.Tensor] = lambda _: both()[which]  # noqa: E731
            rms = (self.norms[which][0], self.eps) if self.norms[which] else None
            tables = self.tables[which][0] if self.tables[which] else None
            return Pending._of(self.parts[which][0], apply, rms, tables, self.halves)

        return one(0), one(1)


def _tables(found: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[Tables]:
    """Cosines and sines by part, from those of each or those of the whole sequence."""
    ready = [item.float() for item in found]
    pairs = []
    for cos, sin in zip(ready[::2], ready[1::2], strict=True):
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        pairs.append((cos, sin))
    if len(pairs) == len(lengths):
        return pairs
    ((cos, sin),), start, parts = pairs, 0, []
    for length in lengths:
        parts.append((cos[:, start : start + length], sin[:, start : start + length]))
        start += length
    return parts


def _attention_unprepared_fake(
    query: list[torch.Tensor], key: list[torch.Tensor], value: torch.Tensor, norms: list[torch.Tensor], eps: float,
    query_tables: list[torch.Tensor], key_tables: list[torch.Tensor], halves: bool, attn_mask: Any, is_causal: bool,
    scale: Any, site: int,
) -> torch.Tensor:  # fmt: skip
    first = query[0]
    length = sum(part.shape[1] for part in query)
    return first.new_empty((first.shape[0], length, first.shape[2], value.shape[3]))


@operator("attention_unprepared", _attention_unprepared_fake)
def attention_unprepared(
    query: list[torch.Tensor],
    key: list[torch.Tensor],
    value: torch.Tensor,
    norms: list[torch.Tensor],
    eps: float,
    query_tables: list[torch.Tensor],
    key_tables: list[torch.Tensor],
    halves: bool,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    site: int,
) -> torch.Tensor:
    """Attention of a query and a key in parts along the sequence, which still lack norm and rotation.

    Args:
        query: (batch, sequence of the part, heads, head_dim) each.
        key: As many parts.
        value: Of the whole sequence.
        norms: Weights of an RMS norm, of the query's parts, then of the key's; empty for none.
        eps: The norms'.
        query_tables: Cosines and sines as in `Rotary`, of each part or of the whole sequence; empty for none.
        key_tables: Likewise.
        halves: As in `Rotary`.
        attn_mask: As in `Inputs`, as are the next two.
        is_causal: See there.
        scale: See there.
        site: Number of the site.
    """
    operands = _operands(query, key, [value], norms, eps, query_tables, key_tables, halves)
    found, heads = SITES[site], (query[0].shape[2], key[0].shape[2])
    if _sends_to_ranks(found, heads, is_causal, *operands.values()):
        found.context_parallel.send(operands, heads, False)
        out: torch.Tensor = found.context_parallel.wait_and_attend(heads[0], attn_mask, scale, found.here)
        return out.contiguous()
    return _attended(found, operands, attn_mask, is_causal, scale)


def _operands(
    query: Sequence[torch.Tensor], key: Sequence[torch.Tensor], value: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor], eps: float, query_tables: Sequence[torch.Tensor], key_tables: Sequence[torch.Tensor],
    halves: bool,
) -> dict[int, Operand]:  # fmt: skip
    """Those that there are, the value first."""
    found = {VALUE: Operand(tuple(value))} if value else {}
    count = len(query)
    for which, parts, weights, tables in (
        (QUERY, query, norms[:count], query_tables),
        (KEY, key, norms[count:], key_tables),
    ):
        if parts:
            pairs = _tables(tables, [part.shape[1] for part in parts]) if tables else []
            found[which] = Operand(tuple(parts), weights, eps, pairs, halves)
    return found


def _attended(
    site: AttentionSite, operands: dict[int, Operand], attn_mask: torch.Tensor | None, is_causal: bool, scale: Any
) -> torch.Tensor:
    """Attention on this rank, or with the site's context parallelism on whole tensors."""
    query, key = operands[QUERY], operands[KEY]
    both = _Both(
        (query.parts, key.parts), (query.norms, key.norms), max(query.eps, key.eps), (query.tables, key.tables),
        query.halves,
    )  # fmt: skip
    (value,) = operands[VALUE].parts
    out: torch.Tensor = site.run(Inputs(*both.pending(), value, attn_mask, is_causal, scale))
    return out.contiguous()


def _sends_to_ranks(site: AttentionSite, heads: tuple[int, int], is_causal: bool, *operands: Operand) -> bool:
    """Whether query, key and value are sent to other ranks by `ulysses_send`."""
    alike = len({(item.parts[0].shape[3], item.parts[0].dtype) for item in operands}) == 1
    return site.context_parallel is not None and alike and not is_causal and site.context_parallel.can_send(heads)


# --- the same in several steps, with something else to compute between them -------------------------------------------


def _ulysses_send_fake(
    query: list[torch.Tensor], key: list[torch.Tensor], value: list[torch.Tensor], *_: Any
) -> torch.Tensor:
    return (value + query + key)[0].new_empty(0)


@operator("ulysses_send", _ulysses_send_fake)
def ulysses_send(
    query: list[torch.Tensor],
    key: list[torch.Tensor],
    value: list[torch.Tensor],
    norms: list[torch.Tensor],
    eps: float,
    query_tables: list[torch.Tensor],
    key_tables: list[torch.Tensor],
    halves: bool,
    heads: list[int],
    is_causal: bool,
    site: int,
) -> torch.Tensor:
    """Sends query, key and value, or some of them, to the ranks that have their heads. The value is in the first call;
    `ulysses_attention` follows once all three are sent. Without context parallelism they are kept for it.

    Args:
        query: As in `attention_unprepared`, or none.
        key: Likewise.
        value: The value, or none.
        norms: As there, of what there is; so are the next four.
        eps: See there.
        query_tables: See there.
        key_tables: See there.
        halves: See there.
        heads: Of query and key.
        is_causal: As in `Inputs`.
        site: Number of the site.

    Returns:
        An empty tensor, which says that it has been sent.
    """
    found = SITES[site]
    operands = _operands(query, key, value, norms, eps, query_tables, key_tables, halves)
    if _sends_to_ranks(found, (heads[0], heads[1]), is_causal, *operands.values()):
        found.context_parallel.send(operands, (heads[0], heads[1]), True)
    else:
        found.kept |= operands
    return (value + query + key)[0].new_empty(0)


def _ulysses_attention_fake(
    sends: list[torch.Tensor], query: list[torch.Tensor], value: torch.Tensor, *_: Any
) -> torch.Tensor:
    first = query[0]
    return first.new_empty((first.shape[0], sum(part.shape[1] for part in query), first.shape[2], value.shape[3]))


@operator("ulysses_attention", _ulysses_attention_fake)
def ulysses_attention(
    sends: list[torch.Tensor],
    query: list[torch.Tensor],
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    site: int,
) -> torch.Tensor:
    """Attention of the operands that `ulysses_send` was given.

    Args:
        sends: The results of `ulysses_send`, which order it before this operator.
        query: Parts of the query, for their shapes.
        value: Likewise.
        attn_mask: As in `Inputs`, as are the next two.
        is_causal: See there.
        scale: See there.
        site: Number of the site.
    """
    found = SITES[site]
    if found.kept:
        operands, found.kept = found.kept, {}
        return _attended(found, operands, attn_mask, is_causal, scale)
    out: torch.Tensor = found.context_parallel.wait_and_attend(query[0].shape[2], attn_mask, scale, found.here)
    return out.contiguous()
