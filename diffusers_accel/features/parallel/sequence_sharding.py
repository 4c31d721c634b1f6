"""Sequence sharding: a denoiser's tokens are sharded where they enter the blocks, and gathered where they leave them.

Owns one layer around each block, outside all other layers. The layer shards whole streams. Streams that a block has
returned are shards already, and are recognized by their length; a stream of any other length raises `Unsupported`.
Arguments that all blocks share (e.g. rotary tables) are sharded once in a call, so that every block gets one object.
`ShardedAttention` is handed to the attention dispatchers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...core.comm import Group, shard_sizes
from ...errors import Unsupported
from ...kernels.attention import ContextParallelAttention, Inputs, Layout, Operand
from ...kernels.attention.ulysses import QUERY
from ...models import Stack
from ...models.adapter import by_name, parameter_names
from ...models.sequence import AttentionStreams, SequenceShardingPlan, TokenDim
from ..context import Denoiser


class SequenceSharding:
    """Shards the tokens of one denoiser.

    Args:
        denoiser: The denoiser.
        plan: The sharded arguments of the denoiser and its blocks.
        group: The ranks that share a sequence, in the order of shards.
    """

    def __init__(self, denoiser: Denoiser, plan: SequenceShardingPlan, group: Group):
        self.denoiser, self.plan, self.group = denoiser, plan, group
        self._names = parameter_names(denoiser.module)
        # Stream -> its length over all ranks, in the running call.
        self._lengths: dict[str, int] = {}
        # (id of the whole object, dims or name) -> (the object, its shard). The object is kept so that its id stays
        # unique.
        self._shards: dict[tuple[int, Any], tuple[torch.Tensor, torch.Tensor]] = {}
        self._arguments: dict[tuple[int, str], tuple[Any, Any]] = {}

    # --- the layers ---------------------------------------------------------------------------------------------------

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: shards the arguments that are added between blocks."""
        self._forget()
        arguments = by_name(self._names, args, kwargs)
        for name, reason in self.plan.refused.items():
            if arguments.get(name) is not None:
                raise Unsupported("parallel", f"{reason} ({name}).", "parallel without ulysses, ring and attn2d.",
                                  str(self.denoiser))  # fmt: skip
        sharded = {
            name: self._shard_nested(arguments[name], dims)
            for name, dims in self.plan.inputs.items()
            if arguments.get(name) is not None
        }
        args = tuple(sharded.pop(name, value) for name, value in zip(self._names, args, strict=False))
        try:
            return inner(*args, **{**kwargs, **sharded})
        finally:
            self._forget()

    def around_block(self, stack: Stack, block: nn.Module, last: bool) -> Callable[..., Any]:
        """The layer around one block: shards its arguments, and gathers the output of the last one.

        Args:
            stack: The block's stack.
            block: The block.
            last: Whether it is the denoiser's last block.
        """
        names, plan = parameter_names(block), self.plan
        joined = plan.joined.get(stack.path)

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = by_name(names, args, kwargs)
            changed: dict[str, Any] = {}
            for name, dim in plan.streams.items():
                if isinstance(given.get(name), torch.Tensor):
                    streams = joined if joined is not None and name in stack.streams else (name,)
                    changed[name] = self._shard_stream(given[name], dim, streams)
            for name, dims in plan.arguments.items():
                if given.get(name) is not None:
                    changed[name] = self._shard_argument(name, given[name], dims)
            # Each argument by position or by name, as it came.
            args = tuple(changed.get(name, value) for name, value in zip(names, args, strict=False))
            out = inner(*args, **{name: changed.get(name, value) for name, value in kwargs.items()})
            return self._gather_streams(out, stack, joined) if last and plan.gathered_before is None else out

        return forward

    def before_module(self, inner: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer around the module `gathered_before`: gathers the stream that it is given."""
        (name,) = self.plan.gathered
        return inner(self._all_gather(x, self.plan.streams[name], (name,)), *args, **kwargs)

    def layout(self, attends: AttentionStreams) -> Layout:
        """The layout of an attention module's tokens in the running call.

        Raises:
            RuntimeError: The module runs outside the blocks.
        """
        try:
            queries, keys = (tuple(self._lengths[name] for name in names) for names in (attends.queries, attends.keys))
        except KeyError as error:
            raise RuntimeError(f"{self.denoiser}: attention was called outside the blocks ({error}).") from None
        return Layout(queries, keys)

    # --- sharding and gathering ---------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._lengths, self._shards, self._arguments = {}, {}, {}

    def _shard_stream(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
        """This rank's shard of a stream, which may be whole or a shard already.

        Args:
            x: The stream, or several joined ones.
            dim: The dimension of its tokens.
            streams: Names of the streams in it, in order.
        """
        length = x.shape[dim]
        if len(streams) == 1:
            whole = self._lengths.setdefault(streams[0], length)
        else:
            whole = sum(self._lengths[name] for name in streams)
        if length == whole:
            return self._shard(x, TokenDim(dim, streams))
        if length == self._shard_size(streams):
            return x
        raise Unsupported(
            "parallel",
            f"{' and '.join(streams)} came with {length} tokens, where all are {whole} and this rank's "
            f"{self._shard_size(streams)}.",
            "parallel without ulysses, ring and attn2d.",
            str(self.denoiser),
        )

    def _shard_size(self, streams: tuple[str, ...]) -> int:
        return sum(shard_sizes(self._lengths[name], self.group.size)[self.group.rank] for name in streams)

    def _shard_argument(self, name: str, value: Any, dims: Any) -> Any:
        """A block's argument, sharded.

        Blocks that are given one object get one object: so CUDA graphs know that it did not change between them.
        """
        key = (id(value), name)
        if key not in self._arguments:
            self._arguments[key] = (value, self._shard_nested(value, dims))
        return self._arguments[key][1]

    def _shard_nested(self, value: Any, dims: Any) -> Any:
        """An argument in which every tensor with a token dimension is this rank's shard."""
        if value is None or dims is None:
            return value
        if isinstance(dims, tuple):
            return tuple(self._shard_nested(item, place) for item, place in zip(value, dims, strict=True))
        if isinstance(value, (list, tuple)):
            return type(value)(self._shard_nested(item, dims) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        for place in dims if isinstance(dims, list) else [dims]:
            # A tensor that broadcasts over tokens stays whole.
            if place.ndim in (None, value.ndim) and value.shape[place.dim] != 1:
                return self._shard(value, place)
        return value

    def _shard(self, x: torch.Tensor, dims: TokenDim) -> torch.Tensor:
        """This rank's shard of a whole tensor."""
        key = (id(x), dims)
        if key not in self._shards:
            # The length of a single stream may not be known yet.
            streams = dims.streams
            lengths = [x.shape[dims.dim]] if len(streams) == 1 else [self._lengths[name] for name in streams]
            if sum(lengths) != x.shape[dims.dim] or lengths[0] != self._lengths.get(streams[0], lengths[0]):
                raise Unsupported(
                    "parallel",
                    f"{x.shape[dims.dim]} values along {' and '.join(streams)}, which have {lengths} tokens.",
                    "parallel without ulysses, ring and attn2d.",
                    str(self.denoiser),
                )
            parts = [self.group.shard(item, dims.dim) for item in x.split(lengths, dims.dim)]
            shard = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dims.dim)
            self._shards[key] = (x, shard)
        return self._shards[key][1]

    def _gather_streams(self, out: Any, stack: Stack, joined: tuple[str, ...] | None) -> Any:
        """The last block's output, with the streams gathered that are read afterwards."""
        values = list(out) if isinstance(out, tuple) else [out]
        for index, name in enumerate(stack.streams):
            if name in self.plan.gathered and isinstance(values[index], torch.Tensor):
                values[index] = self._all_gather(values[index], self.plan.streams[name], joined or (name,))
        return tuple(values) if isinstance(out, tuple) else values[0]

    def _all_gather(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
        """A stream, or several joined ones, gathered from all ranks' shards."""
        counts = [shard_sizes(self._lengths[name], self.group.size) for name in streams]
        shards = self.group.all_gather(x, dim, [sum(each) for each in zip(*counts, strict=True)])
        parts = [shard.split(list(each), dim) for shard, each in zip(shards, zip(*counts, strict=True), strict=True)]
        return torch.cat([part[place] for place in range(len(streams)) for part in parts], dim)


class ShardedAttention:
    """One attention module's context parallelism, for its dispatcher.

    Args:
        sharding: The sharding of the denoiser's tokens.
        attends: The streams that the module attends to.
        context_parallel: Attention over the sharded sequence.
    """

    def __init__(
        self, sharding: SequenceSharding, attends: AttentionStreams, context_parallel: ContextParallelAttention
    ):
        self._sharding, self._attends, self._context_parallel = sharding, attends, context_parallel

    def __call__(self, inputs: Inputs, kernel: Callable[..., Any]) -> torch.Tensor:
        """One attention call.

        Args:
            inputs: This rank's query, key and value.
            kernel: The kernel chosen for the call.
        """
        attends = self._attends
        # Every rank has all keys that its queries attend to, so the attention is local.
        if not attends.keys or (inputs.is_causal and attends.replicated_keys):
            found: torch.Tensor = kernel(inputs)
            return found
        layout = self._sharding.layout(attends)
        replicated = self._replicated_keys(layout, inputs.query.shape[1], inputs.key.shape[1])
        return self._context_parallel.attend(inputs, replace(layout, replicated_keys=replicated), kernel)

    def can_send(self, heads: tuple[int, int]) -> bool:
        """Whether `send` takes operands with these numbers of query heads and key heads."""
        return bool(self._attends.keys) and not self._attends.replicated_keys and self._context_parallel.can_send(heads)

    @property
    def overlaps(self) -> bool:
        """Whether other computation may run during an exchange."""
        return self._context_parallel.overlaps

    def send(self, operands: Mapping[int, Operand], heads: tuple[int, int], async_op: bool) -> None:
        """Sends query, key and value to the ranks that have their heads (`ContextParallelAttention.send`).

        Args:
            operands: This rank's tokens by `ulysses.VALUE`, `QUERY` and `KEY`; the value is in the first call.
            heads: Numbers of query heads and key heads.
            async_op: Whether other computation runs during the exchange.
        """
        layout, rank = self._sharding.layout(self._attends), self._sharding.group.rank
        own = [layout.lengths(streams, self._sharding.group.size)[rank] for streams in (layout.queries, layout.keys)]
        for which, operand in operands.items():
            self._replicated_keys(layout, *((operand.length, own[1]) if which == QUERY else (own[0], operand.length)))
        self._context_parallel.send(operands, heads, layout, async_op)

    def wait_and_attend(
        self, heads: int, attn_mask: torch.Tensor | None, scale: float | None, kernel: Callable[..., Any]
    ) -> torch.Tensor:
        """Attention over the tokens that `send` was given (`ContextParallelAttention.wait_and_attend`).

        Args:
            heads: Number of query heads.
            attn_mask: The mask; `None` for none.
            scale: Factor of the logits; `None` for 1 / sqrt(head_dim).
            kernel: The kernel chosen for the call.
        """
        return self._context_parallel.wait_and_attend(
            heads, self._sharding.layout(self._attends), attn_mask, scale, kernel
        )

    def _replicated_keys(self, layout: Layout, queries: int, keys: int) -> int:
        """Number of replicated keys, which precede this rank's own.

        Args:
            layout: The layout of the running call.
            queries: Queries that this rank is given.
            keys: Keys that this rank is given, with replicated ones.

        Raises:
            Unsupported: The numbers do not fit this rank's shard.
        """
        group = self._sharding.group
        own = [layout.lengths(streams, group.size)[group.rank] for streams in (layout.queries, layout.keys)]
        shared = keys - own[1]
        if queries != own[0] or shared < 0 or (shared and not self._attends.replicated_keys):
            raise Unsupported(
                "parallel",
                f"an attention call has {queries} queries and {keys} keys where this rank's share is {own[0]} and "
                f"{own[1]}.",
                "parallel without ulysses, ring and attn2d.",
                str(self._sharding.denoiser),
            )
        return shared
