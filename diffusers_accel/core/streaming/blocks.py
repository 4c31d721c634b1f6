"""A block whose weights are streamed: its tensors, their places in the model, and its slab."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...compat.torch_private import is_traceable_wrapper_subclass, version_of
from ..submodules import submodules
from ..weights import Layout, Weight, flat, is_plain
from .transfers import Slab


class StreamedTensor:
    """A parameter or buffer of a streamed block.

    Args:
        weight: The tensor and its places.

    Attributes:
        stock: The stock tensor.
        parts: The plain tensors that hold its values: itself, or the inner tensors of another package's tensor.
        outside: The tensor in its places outside of the forward; `None` before the slab is filled.
        inside: The tensor in its places within the forward, over a slot.
    """

    def __init__(self, weight: Weight):
        self.weight, self.stock = weight, weight.tensor
        self.parts, self._rebuild = parts_of(self.stock)
        self.outside: torch.Tensor | None = None
        self.inside: torch.Tensor | None = None

    def point(self, views: Sequence[torch.Tensor]) -> None:
        """Points the stock tensor, or the tensor that stands for it, to views of its values outside of the forward."""
        for part, view in zip(self.parts, views, strict=True):
            part.data = view
        before = self.stock if self.outside is None else self.outside
        self.outside = self.stock if self.parts[0] is self.stock else self._rebuild(views)
        self._exchange(before, self.outside)

    def over(self, views: Sequence[torch.Tensor]) -> None:
        """Makes the tensor over views of a slot."""
        self.inside = self._rebuild(views)

    def put_back(self) -> None:
        """Puts the stock tensor into its places."""
        if self.outside is not None:
            self._exchange(self.outside, self.stock)
            self.outside = None

    @property
    def is_replaced(self) -> bool:
        """Whether another tensor is in its places outside of the forward."""
        return any(holder.get(name) is not self.outside for holder, name in self.weight.slots)

    def enter(self) -> None:
        """Puts the tensor over the slot into the places, for a forward."""
        for holder, name in self.weight.slots:
            holder[name] = self.inside

    def leave(self) -> None:
        """Puts the tensor over the slab into the places. A value that the user has put there since stays."""
        if self.inside is not None:
            self._exchange(self.inside, self.outside)

    def _exchange(self, old: Any, new: Any) -> None:
        for holder, name in self.weight.slots:
            if holder.get(name) is old:
                holder[name] = new


def parts_of(tensor: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], torch.Tensor]]:
    """The plain tensors that hold a tensor's values, and a function that makes such a tensor of others like them.

    Args:
        tensor: A tensor or parameter, plain or of another package's class (torchao).
    """
    is_parameter, gradient = isinstance(tensor, nn.Parameter), tensor.requires_grad

    def finished(made: torch.Tensor) -> torch.Tensor:
        return nn.Parameter(made, requires_grad=gradient) if is_parameter else made

    if is_plain(tensor):
        return [tensor], lambda views: finished(views[0])
    parts: list[torch.Tensor] = []
    inner = tensor.data if is_parameter else tensor
    build = _flattened(inner, parts)
    return parts, lambda views: finished(build(iter(views)))


def can_stream(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can lie in other memory: it is plain, or made of plain tensors."""
    if tensor.is_meta:
        return False
    inner = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    return is_plain(tensor) or (is_traceable_wrapper_subclass(inner) and all(map(is_plain, parts_of(tensor)[0])))


def _flattened(tensor: Any, parts: list[torch.Tensor]) -> Callable[[Iterator[torch.Tensor]], Any]:
    """Adds a tensor's plain tensors to a list.

    Returns:
        A function that rebuilds the tensor from plain tensors in the order of the list.
    """
    if not is_traceable_wrapper_subclass(tensor):
        parts.append(tensor)
        return next
    names, context = tensor.__tensor_flatten__()
    inner = {name: _flattened(getattr(tensor, name), parts) for name in names}
    kind, size, stride = type(tensor), tensor.size(), tensor.stride()

    def build(views: Iterator[torch.Tensor]) -> Any:
        return kind.__tensor_unflatten__({name: make(views) for name, make in inner.items()}, context, size, stride)

    return build


@dataclass(eq=False)
class StreamedBlock:
    """A block whose weights are streamed.

    Args:
        name: The block's path, for messages.
        module: The block.
        streamed: Its tensors that are copied into the slot.
        read_in_place: Its tensors that are read from the slab over the bus, if at all: they are not copied.

    Attributes:
        slab: The block's slab; `None` before it is filled, and where the weights stay in the memory that they are in.
        sources: (first byte in the slot, uint8 tensor on the host) of each copy into the slot.
        slot: Index of its slot.
        layout: The places of all its tensors in the slab, those that are copied first.
        bytes: Bytes that are copied.
    """

    name: str
    module: nn.Module
    streamed: list[StreamedTensor]
    read_in_place: list[StreamedTensor] = field(default_factory=list)
    slab: Slab | None = field(default=None, init=False)
    sources: list[tuple[int, torch.Tensor]] = field(default_factory=list, init=False)
    slot: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.layout = Layout.of([part for tensor in self.tensors for part in tensor.parts])
        self.bytes = Layout.of([part for tensor in self.streamed for part in tensor.parts]).length

    @property
    def tensors(self) -> list[StreamedTensor]:
        """All its tensors."""
        return [*self.streamed, *self.read_in_place]

    @property
    def locked(self) -> bool:
        """Whether its copies run beside the host."""
        return self.slab is not None and self.slab.locked

    def fill(self, memory: torch.Tensor) -> None:
        """Copies the weights into host memory, uint8 (`layout.length` or more,). Copies from a GPU may still run when
        this returns."""
        for offset, run in self._runs():
            memory[offset : offset + run.numel()].copy_(run, non_blocking=True)

    def use(self, slab: Slab | None) -> None:
        """Takes a slab that holds the weights; `None` leaves them in the memory that they are in."""
        self.slab = slab
        if slab is None:
            self.sources = [(offset, run) for offset, run in self._runs() if offset < self.bytes]
            for tensor in self.tensors:
                tensor.outside = tensor.stock
            return
        self.sources = [(0, slab.host[: self.bytes])]
        self.point(slab.outside)

    def _runs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The values of each part as bytes, with their place in the layout."""
        parts = [part for tensor in self.tensors for part in tensor.parts]
        for part, offset in zip(parts, self.layout.offsets, strict=True):
            yield offset, flat(part.detach()).view(torch.uint8)

    def point(self, memory: torch.Tensor, *, inside: bool = False) -> None:
        """Points the tensors to memory in the slab's layout.

        Args:
            memory: uint8. For tensors within the forward `bytes` or more, otherwise `layout.length` or more.
            inside: Whether the memory is a slot.
        """
        if inside:
            streamed = Layout(self.layout.offsets, self.layout.forms, self.bytes)
            count = sum(len(tensor.parts) for tensor in self.streamed)
            views = Layout(streamed.offsets[:count], streamed.forms[:count], self.bytes).views(memory)
        else:
            views = self.layout.views(memory)
        for tensor in self.streamed if inside else self.tensors:
            own, views = views[: len(tensor.parts)], views[len(tensor.parts) :]
            (tensor.over if inside else tensor.point)(own)

    def leave(self) -> None:
        """Puts the tensors over the slab back into their places."""
        for tensor in self.streamed:
            tensor.leave()

    def changed(self) -> list[StreamedTensor]:
        """Tensors that the user has replaced or moved since: their values are no longer those that are copied."""
        if self.slab is None:
            return [tensor for tensor in self.tensors if tensor.is_replaced]
        first, found = self.slab.outside.data_ptr(), []
        offsets = iter(self.layout.offsets)
        for tensor in self.tensors:
            places = [first + next(offsets) for _ in tensor.parts]
            if tensor.is_replaced or [part.data_ptr() for part in parts_of(tensor.weight.now())[0]] != places:
                found.append(tensor)
        return found

    def state(self) -> Hashable:
        """A value that differs after a write in place or a merge of LoRA layers into the weights."""
        versions = [version_of(tensor.stock) for tensor in self.tensors if not tensor.stock.is_inference()]
        merged = [
            str(vars(part)["merged_adapters"]) for part in submodules(self.module) if "merged_adapters" in vars(part)
        ]
        return (*versions, *merged)
