"""A model with streamed blocks: the layers around its forward and its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...errors import Unsupported
from .blocks import StreamedBlock, StreamedTensor, parts_of
from .slots import WeightStream


class StreamedModel:
    """A model with streamed blocks: the layers around its forward and its blocks.

    Args:
        stream: The slots, to which the blocks are added.
        name: The model's name, for messages.
        blocks: Its streamed blocks, in the order in which their modules are called.
        repeats: Whether it is called again and again, so that its first block follows its last. Of another model, the
            slots exist while it runs, and no longer.
    """

    def __init__(self, stream: WeightStream, name: str, blocks: Sequence[StreamedBlock], *, repeats: bool):
        self.stream, self.name, self.blocks, self._repeats = stream, name, tuple(blocks), repeats
        stream.add(self.blocks, repeats=repeats)
        self._order = list(blocks)
        self._place = {id(block): index for index, block in enumerate(blocks)}
        self._called: list[StreamedBlock] = []
        self._inside = 0
        self._begins = True

    def begin_request(self) -> None:
        """Lets the next call look for moved weights, and copy every block anew. Not every write leaves a trace."""
        self._begins = True

    def around_model(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the model's forward: the slots' views are in the model until it returns."""
        if torch.is_grad_enabled() and any(
            tensor.stock.requires_grad for block in self.blocks for tensor in block.tensors
        ):
            raise Unsupported(
                "offload", "its weights are overwritten before gradients are computed.",
                "`with torch.no_grad():` around the call, as pipelines have it.", self.name,
            )  # fmt: skip
        if self._inside:
            return inner(*args, **kwargs)
        if self._begins or any(tensor.is_replaced for block in self.blocks for tensor in block.streamed):
            self._take_changes()
        if self._repeats:
            self.stream.forget(all=self._begins)
            self._begins = False
        else:
            self.stream.open()
        self._inside = 1
        try:
            for block in self.blocks:
                for tensor in block.streamed:
                    tensor.enter()
            self._called = []
            self.stream.prefetch(self._order)
            return inner(*args, **kwargs)
        finally:
            try:
                self._leave()
            except KeyboardInterrupt:
                # A tensor over a slot must not be taken for the model's weight.
                self._leave()
                raise
            self._learn()
            if self._repeats:
                self.stream.prefetch(self._order)
            else:
                self.stream.close()

    def _leave(self) -> None:
        """Puts the tensors over the slabs back into the model."""
        for block in self.blocks:
            block.leave()
        self._inside = 0

    def around_block(self, block: StreamedBlock) -> Callable[..., Any]:
        """The layer around one block's forward."""

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._inside:
                return inner(*args, **kwargs)  # called by itself, it reads its slab over the bus
            stream = self.stream
            stream.before(block)
            self._called.append(block)
            try:
                stream.prefetch(self._following(block), after=block)
                return inner(*args, **kwargs)
            finally:
                stream.after(block)
                # A block of the same slot could not be copied before.
                stream.prefetch(self._following(block), after=block)

        return forward

    def _following(self, block: StreamedBlock) -> Iterator[StreamedBlock]:
        """The blocks after this one; after the last one the first, if the model is called again and again."""
        here, count = self._place[id(block)], len(self._order)
        last = here + count if self._repeats else count
        return (self._order[index % count] for index in range(here + 1, last))

    def _learn(self) -> None:
        """Takes the order of a forward that called every block once. Skipped steps call some of them, and text encoders
        have blocks for pictures too: there, blocks that were not called come last."""
        called = list(dict.fromkeys(self._called))
        if self._repeats and not len(called) == len(self._called) == len(self.blocks):
            return
        order = [*called, *(block for block in self._order if block not in called)]
        if called and order != self._order:
            self._order, self._place = order, {id(block): index for index, block in enumerate(order)}

    def _take_changes(self) -> None:
        """Takes weights that were replaced or moved since into the slabs.

        Raises:
            Unsupported: A weight has another shape or dtype now.
        """
        for block in self.blocks:
            for tensor in block.changed():
                self._take(block, tensor)

    def _take(self, block: StreamedBlock, tensor: StreamedTensor) -> None:
        now = tensor.weight.now()
        parts, _ = parts_of(now)
        place = sum(len(each.parts) for each in block.tensors[: block.tensors.index(tensor)])
        expected = [(dtype, shape) for dtype, shape, _ in block.layout.forms[place : place + len(tensor.parts)]]
        if [(item.dtype, item.shape) for item in parts] != expected:
            dtype, shape = expected[0]
            raise Unsupported(
                "offload",
                f"a weight of {block.name} is {now.dtype} {tuple(now.shape)}, and was {dtype} {tuple(shape)} at first.",
                "restore(pipe) before weights are cast or replaced by others, and accelerate it again.",
                self.name,
            )
        with torch.no_grad(), torch.inference_mode(False):
            if block.slab is None:
                views = [part.detach().to("cpu") for part in parts]
            else:
                views = block.layout.views(block.slab.outside)[place : place + len(parts)]
                for view, part in zip(views, parts, strict=True):
                    view.copy_(part)
            for holder, name in tensor.weight.slots:
                holder[name] = tensor.outside
            tensor.point(views)
            if block.slab is None:
                block.use(None)
