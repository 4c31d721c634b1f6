"""Sequence sharding: a denoiser's tokens are sharded where they enter the blocks, and gathered where they leave them.

The layers are those of `token_streams.py`. Whole streams are sharded. Streams that a block has returned are shards
already, and are recognized by their length; a stream of any other length raises `Unsupported`. `ShardedAttention` is
handed to the attention dispatchers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...core.comm import Group, shard_sizes
from ...errors import Unsupported
from ...kernels.attention import ContextParallelAttention, Inputs, Layout, Operand
from ...kernels.attention.ulysses import QUERY
from ...models.sequence import AttentionStreams, SequenceShardingPlan, TokenDim
from ..context import Denoiser
from ..token_streams import TokenStreams


class SequenceSharding(TokenStreams):
    """Shards the tokens of one denoiser.

    Args:
        denoiser: The denoiser.
        plan: The sharded arguments of the denoiser and its blocks.
        group: The ranks that share a sequence, in the order of shards.
    """

    feature = "parallel"
    instead = "parallel without ulysses, ring and attn2d."

    def __init__(self, denoiser: Denoiser, plan: SequenceShardingPlan, group: Group):
        super().__init__(denoiser, plan)
        self.group = group

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

    def _enter_stream(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
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
            return self._change(x, TokenDim(dim, streams))
        if length == self._shard_size(streams):
            return x
        raise Unsupported(
            "parallel",
            f"{' and '.join(streams)} came with {length} tokens, where all are {whole} and this rank's "
            f"{self._shard_size(streams)}.",
            self.instead,
            str(self.denoiser),
        )

    def _shard_size(self, streams: tuple[str, ...]) -> int:
        return sum(shard_sizes(self._lengths[name], self.group.size)[self.group.rank] for name in streams)

    def _change(self, x: torch.Tensor, dims: TokenDim) -> torch.Tensor:
        """This rank's shard of a whole tensor."""
        key = (id(x), dims)
        if key not in self._changed:
            # The length of a single stream may not be known yet.
            streams = dims.streams
            lengths = [x.shape[dims.dim]] if len(streams) == 1 else [self._lengths[name] for name in streams]
            if sum(lengths) != x.shape[dims.dim] or lengths[0] != self._lengths.get(streams[0], lengths[0]):
                raise Unsupported(
                    "parallel",
                    f"{x.shape[dims.dim]} values along {' and '.join(streams)}, which have {lengths} tokens.",
                    self.instead,
                    str(self.denoiser),
                )
            parts = [self.group.shard(item, dims.dim) for item in x.split(lengths, dims.dim)]
            shard = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dims.dim)
            self._changed[key] = (x, shard)
        return self._changed[key][1]

    def _leave_stream(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
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
