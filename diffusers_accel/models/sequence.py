"""Sequence-sharding plans: the arguments of a denoiser and its blocks that are sharded by tokens, as data in its
adapter.

Tokens are sharded where they enter the blocks and gathered where they leave them. Other arguments of a block with a
token dimension (rotary tables, modulations of each token) are sharded too; all others stay whole. Such a plan
corresponds to diffusers' context-parallel plan, and covers joint streams and uneven shards too.
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
        streams: The streams of the tokens, in order.
        ndim: The described tensors' number of dimensions; `None` for any.
    """

    dim: int
    streams: tuple[str, ...]
    ndim: int | None = None


@dataclass(frozen=True)
class AttentionStreams:
    """The streams of an attention module.

    Attributes:
        queries: The streams of the queries, in order.
        keys: The streams of the sharded keys, in order; empty if every rank has all keys.
        replicated_keys: Whether replicated keys, which every rank has, precede the sharded keys.
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
        arguments: Other arguments of the blocks with a token dimension -> its `TokenDim`. For a tuple, a tuple with a
            `TokenDim` or `None` for each item. For tensors of several forms, a list of `TokenDim`s by `ndim`.
        inputs: Arguments of the denoiser that are added to the tokens between blocks -> their token dimension.
        joined: Paths of stacks whose only stream is a concatenation -> names of the concatenated streams, in order.
        gathered: Streams that are gathered after the last block.
        gathered_before: Path of a module. The only gathered stream is gathered in front of this module instead, because
            stock code changes the stream after the last block. `None` to gather after the last block.
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
