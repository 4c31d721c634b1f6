"""Sequence-sharding plans: the arguments of a denoiser and its blocks that are sharded by tokens, as data in its
adapter.

Tokens are sharded where they enter the blocks and gathered where they leave them. Other arguments of a block with a
token dimension (rotary tables, modulations of each token) are sharded too; all others stay whole. Such a plan
corresponds to diffusers' context-parallel plan, and covers joint streams and uneven shards too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


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
class VisualTokens:
    """Tokens of pictures or frames, each of which may attend to a part of the others.

    Attributes:
        attention: Names of the self-attention modules that they take part in, alone or with other streams.
        grid: Their frames, rows and columns, from the denoiser and its arguments. Called once in a request for each
            shape, because a read from the device is allowed.
        stream: The argument of the blocks that begins with them. Tokens behind them belong to other pictures.
        beside: Other streams whose tokens are at the same places.
    """

    attention: tuple[str, ...]
    grid: Callable[[Any, Mapping[str, Any]], tuple[int, int, int]]
    stream: str = "hidden_states"
    beside: tuple[str, ...] = ()


def patches(denoiser: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """The grid of a denoiser that cuts its latents, (batch, channels, *space), into patches."""
    patch = denoiser.config.patch_size
    space = tuple(arguments["hidden_states"].shape[2:])
    sides = (patch,) * len(space) if isinstance(patch, int) else tuple(patch)
    counts = tuple(size // side for size, side in zip(space, sides, strict=True))
    return counts if len(counts) == 3 else (1, *counts)  # type: ignore[return-value]


def map_token_dims(value: Any, dims: Any, function: Callable[[torch.Tensor, TokenDim], torch.Tensor]) -> Any:
    """An argument, with a function applied to every tensor in it that has a token dimension.

    Args:
        value: The argument.
        dims: Its entry in `SequenceShardingPlan.arguments`.
        function: Returns the new tensor, from a tensor and its token dimension.
    """
    if value is None or dims is None:
        return value
    if isinstance(dims, tuple):
        return tuple(map_token_dims(item, place, function) for item, place in zip(value, dims, strict=True))
    if isinstance(value, (list, tuple)):
        return type(value)(map_token_dims(item, dims, function) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    for place in dims if isinstance(dims, list) else [dims]:
        # A tensor that broadcasts over tokens stays whole.
        if place.ndim in (None, value.ndim) and value.shape[place.dim] != 1:
            return function(value, place)
    return value


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
