"""How a denoiser's tokens may be divided among ranks: data beside each model, in its adapter.

Tokens are divided where they enter the blocks and put together again where they leave them. Whatever else a block is
given for every token (rotary tables, modulations of a token's own) is divided with them; everything else stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Along:
    """A tensor that has something for every token.

    Attributes:
        dim: The dimension its tokens lie along.
        streams: The streams whose tokens lie there, in their order.
        ndim: Number of dimensions of tensors that have it so; `None` for all.
    """

    dim: int
    streams: tuple[str, ...]
    ndim: int | None = None


@dataclass(frozen=True)
class Attends:
    """An attention module of a block.

    Attributes:
        queries: The streams its queries are of, in their order.
        keys: Likewise. None of them are divided if this is empty: every rank has all keys.
        shared: Whether keys that every rank has stand in front of those.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    shared: bool = False


# A tensor's place by its position in a tuple, alternatives by its number of dimensions, or one for all.
Where = Along | tuple["Along | None", ...] | list[Along]


@dataclass(frozen=True)
class SequencePlan:
    """What of a denoiser is divided, and how.

    Attributes:
        streams: Arguments of the blocks whose tokens are divided -> the dimension they lie along.
        attention: The last part of an attention module's name -> what it attends to.
        arguments: Other arguments of the blocks that have something for every token.
        inputs: Such arguments of the denoiser, which reach the tokens between blocks.
        joined: Stacks whose one stream holds several -> which, in their order.
        gathered: Streams that are put together after the last block.
        gathered_before: A module that is given the only stream to be gathered, where it is still changed between the
            last block and that module.
        refused: Arguments of the denoiser that cannot be divided -> why.
    """

    streams: Mapping[str, int]
    attention: Mapping[str, Attends]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Along] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gathered: tuple[str, ...] = ("hidden_states",)
    gathered_before: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
