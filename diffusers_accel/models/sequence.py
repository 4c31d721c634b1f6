"""Sequence-sharding plans: the arguments of a denoiser and its blocks that are sharded by tokens, as data in its
adapter.

Tokens are sharded where they enter the blocks and gathered where they leave them. Other arguments of a block with a
token dimension (rotary tables, modulations of each token) are sharded with them; all others stay whole. It is the
counterpart of diffusers' context-parallel plans, and covers joint streams and uneven shards too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenDim:
    """The token dimension of a tensor.

    Attributes:
        dim: The dimension of the tokens.
        streams: The streams whose tokens it holds, in order.
        ndim: The number of dimensions of the tensors that this describes; `None` for any.
    """

    dim: int
    streams: tuple[str, ...]
    ndim: int | None = None


@dataclass(frozen=True)
class AttentionStreams:
    """The streams of an attention module.

    Attributes:
        queries: The streams of its queries, in order.
        keys: The streams of its keys, in order; empty if every rank has all keys.
        replicated_keys: Whether keys that every rank has precede those of `keys`.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    replicated_keys: bool = False


@dataclass(frozen=True)
class SequenceShardingPlan:
    """The sharded arguments of a denoiser and its blocks.

    Attributes:
        streams: Arguments of the blocks that are streams of tokens -> their token dimension.
        attention: Last part of an attention module's name -> its streams.
        arguments: Other arguments of the blocks with a token dimension -> one `TokenDim`; a tuple with one, or `None`,
            for each item of a tuple; or a list of alternatives by number of dimensions.
        inputs: Arguments of the denoiser that are added to the tokens between blocks -> their token dimension.
        joined: Stacks whose only stream holds several joined ones -> their names, in order.
        gathered: Streams that are gathered after the last block.
        gathered_before: Path of a module in front of which the only gathered stream is gathered instead, where stock
            code changes it after the last block; `None` otherwise.
        refused: Arguments of the denoiser that cannot be sharded -> the reason.
    """

    streams: Mapping[str, int]
    attention: Mapping[str, AttentionStreams]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, TokenDim] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gathered: tuple[str, ...] = ("hidden_states",)
    gathered_before: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
