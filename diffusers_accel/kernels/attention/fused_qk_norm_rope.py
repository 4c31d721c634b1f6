"""Attention that applies QK-norm and rotary embedding itself, as operators of compiled graphs.

In eager code `DeferredQK` carries norm and rotation to the kernel; in a compiled graph they are operators. The
processor emits `apply_rope` for a rotation. A rewrite of the graph then joins the norm, the rotation and attention to
one `fused_qk_norm_rope_attention`. A kernel that rounds query and key applies norm and rotation in the same pass. For
any other kernel one Triton launch applies both beforehand.

Async Ulysses splits that operator into `ulysses_send` and `ulysses_attention`, with other computation between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.operators import operator
from .deferred import DeferredQK
from .dispatch import DISPATCHERS, AttentionDispatcher
from .record import Inputs, QKNorm, Rotary, Tables
from .ulysses import KEY, QUERY, VALUE, Operand, apply_rotary, norm_and_rotate


def _apply_rope_fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope_style: str, heads: int
) -> torch.Tensor:
    return x.new_empty(x.shape)


@operator("apply_rope", _apply_rope_fake)
def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope_style: str, heads: int) -> torch.Tensor:
    """A rotary embedding.

    Args:
        x: (batch, sequence, heads, head_dim), (batch, heads, sequence, head_dim), or with the heads in the channels,
            (batch, sequence, heads * head_dim).
        cos: Cosines, of as many dimensions as `x`, each of the size of `x` or 1; half as many channels for `rope_style`
            "half".
        sin: Sines, of the shape of `cos`.
        rope_style: `"interleaved"` or `"half"`, as `Rotary` describes it.
        heads: Number of heads in the channels of a three-dimensional `x` whose heads rotate one by one; 0 otherwise.
    """
    cos, sin, found = cos.float(), sin.float(), x.float()
    if heads and x.ndim == 3:
        cos, sin, found = (item.unflatten(-1, (heads, -1)) for item in (cos, sin, found))
    return apply_rotary(found, cos, sin, rope_style).to(x.dtype).reshape(x.shape).contiguous()


@dataclass(frozen=True)
class _QueryKey:
    """Query and key in parts along the sequence, with the norm and rotation that are still to be applied.

    Attributes:
        parts: Parts of the query, then of the key: (batch, sequence of the part, heads, head_dim).
        norms: RMS-norm weights of the query's parts, then of the key's parts; empty without a norm.
        eps: Epsilon of the norms.
        tables: Cosines and sines of the query's parts, then of the key's parts; empty without a rotation.
        rope_style: `"interleaved"` or `"half"`, as `Rotary` describes it.
    """

    parts: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
    norms: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
    eps: float
    tables: tuple[Sequence[Tables], Sequence[Tables]]
    rope_style: str

    def applied(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key of the whole sequence, with norm and rotation applied."""
        query, key = (
            parts[0].new_empty((parts[0].shape[0], sum(part.shape[1] for part in parts), *parts[0].shape[2:]))
            for parts in self.parts
        )
        starts = [0, 0]
        for place, parts in enumerate(zip(*self.parts, strict=True)):
            outs = []
            for which, (part, whole) in enumerate(zip(parts, (query, key), strict=True)):
                outs.append(whole[:, starts[which] : starts[which] + part.shape[1]])
                starts[which] += part.shape[1]
            norms: list[Any] = [item[place] for item in self.norms] if self.norms[0] else [None, None]
            tables: list[Any] = [item[place] for item in self.tables] if self.tables[0] else [None, None]
            if query.is_cuda:
                from .qk_norm_rope import qk_norm_rope

                norm = QKNorm(norms[0], norms[1], self.eps) if self.norms[0] else None
                rotary = Rotary(tables[0], tables[1], self.rope_style) if self.tables[0] else None
                qk_norm_rope(parts[0], parts[1], outs[0], outs[1], norm, rotary)
            else:
                for part, out, weight, table in zip(parts, outs, norms, tables, strict=True):
                    out.copy_(norm_and_rotate(part, weight, self.eps, table, self.rope_style))
        return query, key

    def deferred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key for a dispatcher: `DeferredQK` where a kernel may norm and rotate them, else applied."""
        (query, *others), key = self.parts[0], self.parts[1][0]
        heads, dim = query.shape[-2:]
        by_head = all(weight.numel() == dim for weights in self.norms for weight in weights)
        # A norm over all heads needs unpadded heads in the quantizers, and as many heads of the key as of the query.
        over_all = dim in (64, 128) and heads == key.shape[-2]
        if others or not (by_head or over_all):
            return self.applied()
        both = functools.cache(self.applied)

        def one(which: int) -> torch.Tensor:
            apply: Callable[[Any], torch.Tensor] = lambda _: both()[which]  # noqa: E731
            norm = (self.norms[which][0], self.eps) if self.norms[which] else None
            tables = self.tables[which][0] if self.tables[which] else None
            return DeferredQK.wrap(self.parts[which][0], apply, norm, tables, self.rope_style)

        return one(0), one(1)


def _tables(found: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[Tables]:
    """Cosines and sines of each part, from tables of each part or of the whole sequence."""
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


def _fused_qk_norm_rope_attention_fake(
    query: list[torch.Tensor], key: list[torch.Tensor], value: torch.Tensor, norms: list[torch.Tensor], eps: float,
    query_tables: list[torch.Tensor], key_tables: list[torch.Tensor], rope_style: str, attn_mask: Any, is_causal: bool,
    scale: Any, dispatcher: int,
) -> torch.Tensor:  # fmt: skip
    first = query[0]
    length = sum(part.shape[1] for part in query)
    return first.new_empty((first.shape[0], length, first.shape[2], value.shape[3]))


@operator("fused_qk_norm_rope_attention", _fused_qk_norm_rope_attention_fake)
def fused_qk_norm_rope_attention(
    query: list[torch.Tensor],
    key: list[torch.Tensor],
    value: torch.Tensor,
    norms: list[torch.Tensor],
    eps: float,
    query_tables: list[torch.Tensor],
    key_tables: list[torch.Tensor],
    rope_style: str,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    dispatcher: int,
) -> torch.Tensor:
    """Norm, rotation and attention of a query and a key in parts along the sequence.

    Args:
        query: Parts of the query, (batch, sequence of the part, heads, head_dim) each.
        key: Parts of the key, as many as of the query, (batch, sequence of the part, kv_heads, head_dim) each.
        value: The value of the whole sequence, (batch, key sequence, kv_heads, value_dim).
        norms: RMS-norm weights of the query's parts, then of the key's parts, (head_dim,) or (heads * head_dim,) each;
            empty without a norm.
        eps: Epsilon of the norms.
        query_tables: Cosines and sines, alternating, float32, of each part of the query or of its whole sequence, in
            the shapes of `Rotary`; empty without a rotation.
        key_tables: Cosines and sines, alternating, float32, of each part of the key or of its whole sequence; empty
            without a rotation.
        rope_style: `"interleaved"` or `"half"`, as `Rotary` describes it.
        attn_mask: Boolean (True takes part) or additive, broadcast to (batch, heads, sequence, key sequence).
        is_causal: Hide later keys; the diagonal starts at the top left.
        scale: Softmax scale of the logits; head_dim ** -0.5 if `None`.
        dispatcher: Number of the dispatcher in `DISPATCHERS`.

    Returns:
        (batch, sequence, heads, value_dim), contiguous.
    """
    operands = _operands(query, key, [value], norms, eps, query_tables, key_tables, rope_style)
    found, heads = DISPATCHERS[dispatcher], (query[0].shape[2], key[0].shape[2])
    if _sends_to_ranks(found, heads, is_causal, *operands.values()):
        found.context_parallel.send(operands, heads, False)
        out: torch.Tensor = found.context_parallel.wait_and_attend(heads[0], attn_mask, scale, found.run_local)
        return out.contiguous()
    return _attention_of_operands(found, operands, attn_mask, is_causal, scale)


def _operands(
    query: Sequence[torch.Tensor], key: Sequence[torch.Tensor], value: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor], eps: float, query_tables: Sequence[torch.Tensor], key_tables: Sequence[torch.Tensor],
    rope_style: str,
) -> dict[int, Operand]:  # fmt: skip
    """The operands that are not empty, by `VALUE`, `QUERY` and `KEY`, the value first."""
    found = {VALUE: Operand(tuple(value))} if value else {}
    count = len(query)
    for which, parts, weights, tables in (
        (QUERY, query, norms[:count], query_tables),
        (KEY, key, norms[count:], key_tables),
    ):
        if parts:
            pairs = _tables(tables, [part.shape[1] for part in parts]) if tables else []
            found[which] = Operand(tuple(parts), weights, eps, pairs, rope_style)
    return found


def _attention_of_operands(
    dispatcher: AttentionDispatcher,
    operands: dict[int, Operand],
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: Any,
) -> torch.Tensor:
    """Attention of whole operands, by the dispatcher."""
    query, key = operands[QUERY], operands[KEY]
    query_key = _QueryKey(
        (query.parts, key.parts), (query.norms, key.norms), max(query.eps, key.eps), (query.tables, key.tables),
        query.rope_style,
    )  # fmt: skip
    (value,) = operands[VALUE].parts
    out: torch.Tensor = dispatcher.run(Inputs(*query_key.deferred(), value, attn_mask, is_causal, scale))
    return out.contiguous()


def _sends_to_ranks(
    dispatcher: AttentionDispatcher, heads: tuple[int, int], is_causal: bool, *operands: Operand
) -> bool:
    """Whether `context_parallel` takes query, key and value one by one."""
    alike = len({(item.parts[0].shape[3], item.parts[0].dtype) for item in operands}) == 1
    return (
        dispatcher.context_parallel is not None
        and alike
        and not is_causal
        and dispatcher.context_parallel.can_send(heads)
    )


# --- async Ulysses: the same attention in two steps, with other computation between them ----------------------------


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
    rope_style: str,
    heads: list[int],
    is_causal: bool,
    dispatcher: int,
) -> torch.Tensor:
    """Sends query, key, value or some of them to the ranks of their heads. `ulysses_attention` follows when all three
    are sent, the value with the first call. Without `context_parallel` the dispatcher keeps the operands until then.

    Args:
        query: Parts of the query, (batch, sequence of the part, heads, head_dim) each; empty to send it in another
            call.
        key: Parts of the key, (batch, sequence of the part, kv_heads, head_dim) each; empty to send it in another call.
        value: One tensor, (batch, key sequence, kv_heads, head_dim); empty to send it in another call.
        norms: RMS-norm weights of the given parts of the query, then of the key, (head_dim,) or (heads * head_dim,)
            each; empty without a norm.
        eps: Epsilon of the norms.
        query_tables: Cosines and sines, alternating, float32, of each part of the query or of its whole sequence, in
            the shapes of `Rotary`; empty without a rotation.
        key_tables: Cosines and sines, alternating, float32, of each part of the key or of its whole sequence; empty
            without a rotation.
        rope_style: `"interleaved"` or `"half"`, as `Rotary` describes it.
        heads: Number of heads of the query, then of the key.
        is_causal: Whether attention hides later keys; `context_parallel` then takes no operands one by one.
        dispatcher: Number of the dispatcher in `DISPATCHERS`.

    Returns:
        An empty tensor, on which `ulysses_attention` depends.
    """
    found = DISPATCHERS[dispatcher]
    operands = _operands(query, key, value, norms, eps, query_tables, key_tables, rope_style)
    if _sends_to_ranks(found, (heads[0], heads[1]), is_causal, *operands.values()):
        found.context_parallel.send(operands, (heads[0], heads[1]), True)
    else:
        found.operands |= operands
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
    dispatcher: int,
) -> torch.Tensor:
    """Attention of the operands that `ulysses_send` took.

    Args:
        sends: The results of the calls of `ulysses_send`.
        query: Parts of the query, (batch, sequence of the part, heads, head_dim) each, for their shapes alone.
        value: (batch, key sequence, kv_heads, value_dim), for its shape alone.
        attn_mask: Boolean (True takes part) or additive, broadcast to (batch, heads, sequence, key sequence).
        is_causal: Hide later keys; the diagonal starts at the top left.
        scale: Softmax scale of the logits; head_dim ** -0.5 if `None`.
        dispatcher: Number of the dispatcher in `DISPATCHERS`.

    Returns:
        (batch, sequence, heads, value_dim), contiguous.
    """
    found = DISPATCHERS[dispatcher]
    if found.operands:
        operands, found.operands = found.operands, {}
        return _attention_of_operands(found, operands, attn_mask, is_causal, scale)
    out: torch.Tensor = found.context_parallel.wait_and_attend(query[0].shape[2], attn_mask, scale, found.run_local)
    return out.contiguous()
