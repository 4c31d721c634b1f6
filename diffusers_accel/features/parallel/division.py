"""A denoiser's tokens, divided among ranks where they enter the blocks and put together where they leave them.

One layer around each block, outside everything else that stands there: what comes whole leaves it as this rank's shard.
Streams that a block returned are shards already, and are told from whole ones by their length. What is shared by all
blocks (rotary tables, say) is divided once in a call, so that it stays one object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...core.comm import Group, shares
from ...errors import Unsupported
from ...kernels.attention import Inputs, Layout, Operand, Transport
from ...kernels.attention.shipping import QUERY
from ...models import Stack
from ...models.adapter import by_name, parameter_names
from ...models.sequence import Along, Attends, SequencePlan
from ..context import Denoiser


class Division:
    """The division of one denoiser's tokens.

    Args:
        denoiser: The denoiser.
        plan: What its blocks are given.
        group: Ranks that have a sequence among them.
    """

    def __init__(self, denoiser: Denoiser, plan: SequencePlan, group: Group):
        self.denoiser, self.plan, self.group = denoiser, plan, group
        self._names = parameter_names(denoiser.module)
        # Stream -> its whole length in the call that is running.
        self._lengths: dict[str, int] = {}
        # By the id of what is whole, which is kept so that the id stays its own.
        self._shards: dict[tuple[int, Any], tuple[torch.Tensor, torch.Tensor]] = {}
        self._arguments: dict[tuple[int, str], tuple[Any, Any]] = {}

    # --- the layers ---------------------------------------------------------------------------------------------------

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: forgets the last call, and divides what reaches tokens between
        blocks."""
        self._forget()
        arguments = by_name(self._names, args, kwargs)
        for name, reason in self.plan.refused.items():
            if arguments.get(name) is not None:
                raise Unsupported("parallel", f"{reason} ({name}).", "parallel without ulysses, ring and attn2d.",
                                  str(self.denoiser))  # fmt: skip
        divided = {
            name: self._divided(arguments[name], where)
            for name, where in self.plan.inputs.items()
            if arguments.get(name) is not None
        }
        args = tuple(divided.pop(name, value) for name, value in zip(self._names, args, strict=False))
        try:
            return inner(*args, **{**kwargs, **divided})
        finally:
            self._forget()

    def around_block(self, stack: Stack, block: nn.Module, last: bool) -> Callable[..., Any]:
        """The layer around one block."""
        names, plan = parameter_names(block), self.plan
        joined = plan.joined.get(stack.path)

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = by_name(names, args, kwargs)
            changed: dict[str, Any] = {}
            for name, dim in plan.streams.items():
                if isinstance(given.get(name), torch.Tensor):
                    streams = joined if joined is not None and name in stack.streams else (name,)
                    changed[name] = self._entering(given[name], dim, streams)
            for name, where in plan.arguments.items():
                if given.get(name) is not None:
                    changed[name] = self._once(name, given[name], where)
            # In the way they came: by place or by name.
            args = tuple(changed.get(name, value) for name, value in zip(names, args, strict=False))
            out = inner(*args, **{name: changed.get(name, value) for name, value in kwargs.items()})
            return self._leaving(out, stack, joined) if last and plan.gathered_before is None else out

        return forward

    def before_module(self, inner: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer around the module that is given the stream to be gathered."""
        (name,) = self.plan.gathered
        return inner(self._gathered(x, self.plan.streams[name], (name,)), *args, **kwargs)

    def carrier(self, attends: Attends, transport: Transport) -> Carrier:
        """What carries the calls of an attention module."""
        return Carrier(self, attends, transport)

    def layout(self, attends: Attends) -> Layout:
        """Whose tokens an attention module is given in the call that is running."""
        try:
            queries, keys = (tuple(self._lengths[name] for name in names) for names in (attends.queries, attends.keys))
        except KeyError as error:
            raise RuntimeError(f"{self.denoiser}: attention was called outside the blocks ({error}).") from None
        return Layout(queries, keys)

    # --- dividing and gathering ---------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._lengths, self._shards, self._arguments = {}, {}, {}

    def _entering(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
        """A stream as this rank has it."""
        length = x.shape[dim]
        if len(streams) == 1:
            whole = self._lengths.setdefault(streams[0], length)
        else:
            whole = sum(self._lengths[name] for name in streams)
        if length == whole:
            return self._shard(x, Along(dim, streams))
        if length == self._share(streams):
            return x
        raise Unsupported(
            "parallel",
            f"{' and '.join(streams)} came with {length} tokens, where all are {whole} and this rank's "
            f"{self._share(streams)}.",
            "parallel without ulysses, ring and attn2d.",
            str(self.denoiser),
        )

    def _share(self, streams: tuple[str, ...]) -> int:
        return sum(shares(self._lengths[name], self.group.size)[self.group.rank] for name in streams)

    def _once(self, name: str, value: Any, where: Any) -> Any:
        """An argument of a block, divided: one object for all blocks that are given one object, by which CUDA graphs
        know that nobody has touched it between them."""
        key = (id(value), name)
        if key not in self._arguments:
            self._arguments[key] = (value, self._divided(value, where))
        return self._arguments[key][1]

    def _divided(self, value: Any, where: Any) -> Any:
        """An argument with this rank's part of every tensor in it that has something for every token."""
        if value is None or where is None:
            return value
        if isinstance(where, tuple):
            return tuple(self._divided(item, place) for item, place in zip(value, where, strict=True))
        if isinstance(value, (list, tuple)):
            return type(value)(self._divided(item, where) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        for place in where if isinstance(where, list) else [where]:
            # One for all tokens is left as it is.
            if place.ndim in (None, value.ndim) and value.shape[place.dim] != 1:
                return self._shard(value, place)
        return value

    def _shard(self, x: torch.Tensor, where: Along) -> torch.Tensor:
        """This rank's part of a tensor that is whole."""
        key = (id(x), where)
        if key not in self._shards:
            # The length of one stream alone may not be known yet.
            streams = where.streams
            lengths = [x.shape[where.dim]] if len(streams) == 1 else [self._lengths[name] for name in streams]
            if sum(lengths) != x.shape[where.dim] or lengths[0] != self._lengths.get(streams[0], lengths[0]):
                raise Unsupported(
                    "parallel",
                    f"{x.shape[where.dim]} values along {' and '.join(streams)}, which have {lengths} tokens.",
                    "parallel without ulysses, ring and attn2d.",
                    str(self.denoiser),
                )
            parts = [self.group.part(item, where.dim) for item in x.split(lengths, where.dim)]
            shard = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, where.dim)
            self._shards[key] = (x, shard)
        return self._shards[key][1]

    def _leaving(self, out: Any, stack: Stack, joined: tuple[str, ...] | None) -> Any:
        """What the last block returns, with the streams that are read afterwards whole."""
        values = list(out) if isinstance(out, tuple) else [out]
        for index, name in enumerate(stack.streams):
            if name in self.plan.gathered and isinstance(values[index], torch.Tensor):
                values[index] = self._gathered(values[index], self.plan.streams[name], joined or (name,))
        return tuple(values) if isinstance(out, tuple) else values[0]

    def _gathered(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
        """A tensor of all tokens, from every rank's shard."""
        counts = [shares(self._lengths[name], self.group.size) for name in streams]
        shards = self.group.gather(x, dim, [sum(each) for each in zip(*counts, strict=True)])
        parts = [shard.split(list(each), dim) for shard, each in zip(shards, zip(*counts, strict=True), strict=True)]
        return torch.cat([part[place] for place in range(len(streams)) for part in parts], dim)


class Carrier:
    """What carries an attention module's calls between ranks: the `transport` of its dispatcher.

    Args:
        division: The division of the denoiser's tokens.
        attends: What the module attends to.
        transport: How a sequence is divided.
    """

    def __init__(self, division: Division, attends: Attends, transport: Transport):
        self._division, self._attends, self._transport = division, attends, transport

    def __call__(self, inputs: Inputs, here: Callable[..., Any]) -> torch.Tensor:
        """One call, by the kernel that is at hand."""
        attends = self._attends
        # Attention among what every rank has whole.
        if not attends.keys or (inputs.is_causal and attends.shared):
            found: torch.Tensor = here(inputs)
            return found
        layout = self._division.layout(attends)
        shared = self._checked(layout, inputs.query.shape[1], inputs.key.shape[1])
        return self._transport.attend(inputs, replace(layout, shared=shared), here)

    def ships(self, heads: tuple[int, int]) -> bool:
        """Whether query, key and value may be sent off by `ship`, given the heads of query and key."""
        return bool(self._attends.keys) and not self._attends.shared and self._transport.ships(heads)

    @property
    def overlaps(self) -> bool:
        """Whether something else may be computed while they are on their way."""
        return self._transport.overlaps

    def ship(self, operands: Mapping[int, Operand], heads: tuple[int, int], aside: bool) -> None:
        """Sends them off, or some of them; see `Transport.ship`."""
        layout, rank = self._division.layout(self._attends), self._division.group.rank
        own = [layout.lengths(streams, self._division.group.size)[rank] for streams in (layout.queries, layout.keys)]
        for which, operand in operands.items():
            self._checked(layout, *((operand.length, own[1]) if which == QUERY else (own[0], operand.length)))
        self._transport.ship(operands, heads, layout, aside)

    def arrived(
        self, heads: int, attn_mask: torch.Tensor | None, scale: float | None, here: Callable[..., Any]
    ) -> torch.Tensor:
        """Attention of what was sent off; see `Transport.arrived`."""
        return self._transport.arrived(heads, self._division.layout(self._attends), attn_mask, scale, here)

    def _checked(self, layout: Layout, queries: int, keys: int) -> int:
        """How many of the keys every rank has in front of its own."""
        group = self._division.group
        own = [layout.lengths(streams, group.size)[group.rank] for streams in (layout.queries, layout.keys)]
        shared = keys - own[1]
        if queries != own[0] or shared < 0 or (shared and not self._attends.shared):
            raise Unsupported(
                "parallel",
                f"an attention call has {queries} queries and {keys} keys where this rank's share is {own[0]} and "
                f"{own[1]}.",
                "parallel without ulysses, ring and attn2d.",
                str(self._division.denoiser),
            )
        return shared
