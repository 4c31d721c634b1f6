"""Layers that change a denoiser's tokens where they enter the blocks, and change them back where they leave.

`SequenceShardingPlan`, data of the adapter, says which arguments of a denoiser and its blocks have a token dimension.
`TokenStreams` walks over them: once a call for arguments that all blocks share, at each block for streams. A subclass
says how a tensor changes: sharded among ranks (`parallel`), or in another order (`attention`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..core.edits import AddLayer, Edit
from ..errors import Unsupported
from ..models import Stack
from ..models.adapter import by_name, parameter_names
from ..models.sequence import SequenceShardingPlan, TokenDim, map_token_dims
from .context import Denoiser, PipelineContext


class TokenStreams(ABC):
    """The walk over one denoiser's tensors with a token dimension.

    Args:
        denoiser: The denoiser.
        plan: The arguments of the denoiser and its blocks with a token dimension.

    Attributes:
        feature: The feature in error messages.
        instead: The way out in error messages.
    """

    feature: str
    instead: str

    def __init__(self, denoiser: Denoiser, plan: SequenceShardingPlan):
        self.denoiser, self.plan = denoiser, plan
        self._names = parameter_names(denoiser.module)
        # Stream -> its length over all ranks, in the running call.
        self._lengths: dict[str, int] = {}
        # (id of the original, dims or name) -> (the original, the changed object). The original is kept so that its id
        # stays unique.
        self._changed: dict[tuple[int, Any], tuple[torch.Tensor, torch.Tensor]] = {}
        self._arguments: dict[tuple[int, str], tuple[Any, Any]] = {}

    @abstractmethod
    def _enter_stream(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
        """A stream at the entry of a block, changed unless it is already.

        Args:
            x: The stream, or several joined ones.
            dim: The dimension of its tokens.
            streams: Names of the streams in it, in order.
        """

    @abstractmethod
    def _change(self, x: torch.Tensor, dims: TokenDim) -> torch.Tensor:
        """A tensor with a token dimension, changed."""

    @abstractmethod
    def _leave_stream(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
        """A stream behind the last block, changed back.

        Args:
            x: The stream, or several joined ones.
            dim: The dimension of its tokens.
            streams: Names of the streams in it, in order.
        """

    # --- the layers ---------------------------------------------------------------------------------------------------

    def edits(self, context: PipelineContext, layer: str, block_layer: str) -> Iterator[Edit]:
        """The layers around the denoiser and its blocks.

        Args:
            context: The pipeline.
            layer: Name of the layer around the denoiser in the order of layers.
            block_layer: Name of the layers around blocks, and around the module `gathered_before`.
        """
        adapter, module = self.denoiser.adapter, self.denoiser.module
        yield AddLayer(module, context.rank(layer), self.around_denoiser)
        for stack in (*adapter.side_stacks, *adapter.stacks):
            blocks = stack.blocks(module)
            for block in blocks:
                last = stack is adapter.stacks[-1] and block is blocks[-1]
                yield AddLayer(block, context.rank(block_layer), self.around_block(stack, block, last))
        if self.plan.gathered_before is not None:
            gathering = module.get_submodule(self.plan.gathered_before)
            yield AddLayer(gathering, context.rank(block_layer), self.before_module)

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward: changes the arguments that are added between blocks."""
        self.forget()
        arguments = by_name(self._names, args, kwargs)
        for name, reason in self.plan.refused.items():
            if arguments.get(name) is not None:
                raise Unsupported(self.feature, f"{reason} ({name}).", self.instead, str(self.denoiser))
        changed = {
            name: map_token_dims(arguments[name], dims, self._change)
            for name, dims in self.plan.inputs.items()
            if arguments.get(name) is not None
        }
        args = tuple(changed.pop(name, value) for name, value in zip(self._names, args, strict=False))
        try:
            return inner(*args, **{**kwargs, **changed})
        finally:
            self.forget()

    def around_block(self, stack: Stack, block: nn.Module, last: bool) -> Callable[..., Any]:
        """The layer around one block: changes its arguments, and changes the output of the last one back.

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
                    changed[name] = self._enter_stream(given[name], dim, streams)
            for name, dims in plan.arguments.items():
                if given.get(name) is not None:
                    changed[name] = self._change_argument(name, given[name], dims)
            # Each argument by position or by name, as it came.
            args = tuple(changed.get(name, value) for name, value in zip(names, args, strict=False))
            out = inner(*args, **{name: changed.get(name, value) for name, value in kwargs.items()})
            return self._leave_streams(out, stack, joined) if last and plan.gathered_before is None else out

        return forward

    def before_module(self, inner: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer around the module `gathered_before`: changes the stream that it is given back."""
        (name,) = self.plan.gathered
        return inner(self._leave_stream(x, self.plan.streams[name], (name,)), *args, **kwargs)

    # --- within a call ------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Forgets the tensors of a call."""
        self._lengths, self._changed, self._arguments = {}, {}, {}

    def _change_argument(self, name: str, value: Any, dims: Any) -> Any:
        """A block's argument, changed.

        Blocks that are given one object get one object: so CUDA graphs know that it did not change between them.
        """
        key = (id(value), name)
        if key not in self._arguments:
            self._arguments[key] = (value, map_token_dims(value, dims, self._change))
        return self._arguments[key][1]

    def _leave_streams(self, out: Any, stack: Stack, joined: tuple[str, ...] | None) -> Any:
        """The last block's output, with the streams changed back that are read afterwards."""
        values = list(out) if isinstance(out, tuple) else [out]
        for index, name in enumerate(stack.streams):
            if name in self.plan.gathered and isinstance(values[index], torch.Tensor):
                values[index] = self._leave_stream(values[index], self.plan.streams[name], joined or (name,))
        return tuple(values) if isinstance(out, tuple) else values[0]
