"""The tensors of models, with the places that hold them, and the layout of several tensors in one buffer of bytes.

FSDP and offloading keep weights elsewhere than in the model. Both need the same three facts: the tensors that belong to
one block alone, every place of such a tensor, and its form, in which it is rebuilt over other memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..compat.torch_private import buffers_of, parameters_of

# Alignment of tensors in bytes: kernels read wide words, and torch's own allocator gives no less.
ALIGNED = 256


@dataclass(eq=False)
class Weight:
    """One parameter or buffer of a model.

    Attributes:
        tensor: The stock tensor.
        slots: (mapping of a module, name) of every place that holds it; `module.to` may replace a buffer there.
    """

    tensor: torch.Tensor
    slots: list[tuple[dict[str, Any], str]]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return bytes_of(self.tensor)

    def now(self) -> torch.Tensor:
        """The tensor that is in its place now."""
        holder, name = self.slots[0]
        found = holder.get(name)
        return found if isinstance(found, torch.Tensor) else self.tensor

    def put(self, data: torch.Tensor) -> None:
        """Changes the data of the tensor in its place; the object stays."""
        for holder, name in self.slots:
            if isinstance(holder.get(name), torch.Tensor):
                holder[name].data = data

    def back(self, data: torch.Tensor) -> None:
        """Puts the stock tensor back with this data, in the dtype that it has been cast to since."""
        self.tensor.data = data.to(self.now().dtype)
        for holder, name in self.slots:
            if isinstance(holder.get(name), torch.Tensor):
                holder[name] = self.tensor


@dataclass
class Entry:
    """A tensor of several models, as `find_weights` sorts it.

    Attributes:
        weight: The tensor and its places.
        owners: The blocks that hold it; `None` for modules outside of blocks.
        stored: Whether it is a weight, to which no forward writes.
        aliased: Whether it shares memory with another tensor, is empty, or is not dense.
    """

    weight: Weight
    owners: dict[Any, None]
    stored: bool
    aliased: bool = False

    @property
    def block(self) -> Any:
        """The block that alone holds this tensor, if its bytes can lie elsewhere; `None` otherwise."""
        (owner, *others) = self.owners
        return owner if not others and self.stored and not self.aliased else None


def find_weights(
    models: Iterable[nn.Module],
    owner: Mapping[int, Any],
    stores: Callable[[nn.Module], bool],
    accepts: Callable[[torch.Tensor], bool],
) -> list[Entry]:
    """All tensors of models, each once.

    Args:
        models: The models.
        owner: `id` of a module -> the block that it belongs to.
        stores: Whether a module's buffers are weights, as those of quantized layers are.
        accepts: Whether a tensor is taken; others are left out.
    """
    modules = {id(module): module for model in models for module in model.modules()}
    found: dict[int, Entry] = {}
    for module in modules.values():
        for holder, stored in ((parameters_of(module), True), (buffers_of(module), stores(module))):
            for name, tensor in holder.items():
                if tensor is None or not accepts(tensor):
                    continue
                entry = found.setdefault(id(tensor), Entry(Weight(tensor, []), {}, True))
                entry.weight.slots.append((holder, name))
                entry.owners[owner.get(id(module))] = None
                entry.stored &= stored
    places = Counter(_address(entry.weight.tensor) for entry in found.values())
    for entry in found.values():
        tensor = entry.weight.tensor
        shared = not tensor.is_meta and places[_address(tensor)] > 1
        entry.aliased = shared or not tensor.numel() or (is_plain(tensor) and not dense(tensor))
    return list(found.values())


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a wrapper subclass (torchao) has no storage
        return id(tensor)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor or parameter holds its values itself, unlike the tensors of quantization packages."""
    return type(tensor) in (nn.Parameter, torch.Tensor) and type(tensor.data) is torch.Tensor


def kind_of_tensor(tensor: torch.Tensor) -> str:
    """The name of a tensor's class; of a parameter, that of its data."""
    kind = type(tensor) if type(tensor) is not nn.Parameter else type(tensor.data)
    return kind.__name__


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a plain tensor's values."""
    return tensor.numel() * tensor.element_size()


def dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values fill contiguous memory, in any order of dimensions."""
    length = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != length:
            return False
        length *= size
    return True


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a dense tensor, flat and in the order of memory.

    The result is no view: a view would keep the memory alive after the tensor's data was replaced.
    """
    found = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return found.set_(tensor.untyped_storage(), tensor.storage_offset(), (tensor.numel(),), (1,))


def round_up(length: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-length // to) * to


@dataclass(frozen=True)
class Layout:
    """The places of dense tensors in one buffer of bytes.

    Attributes:
        offsets: First byte of each tensor.
        forms: Dtype, shape and strides of each tensor.
        length: Bytes of all, with alignment.
    """

    offsets: tuple[int, ...]
    forms: tuple[tuple[torch.dtype, torch.Size, tuple[int, ...]], ...]
    length: int

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Layout:
        """The layout of tensors one after another, each aligned."""
        offsets, length = [], 0
        for tensor in tensors:
            offsets.append(length)
            length = round_up(length + bytes_of(tensor), ALIGNED)
        return cls(tuple(offsets), tuple((item.dtype, item.shape, item.stride()) for item in tensors), length)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors as views of a buffer, uint8 (`length` or more,)."""
        found = []
        for offset, (dtype, shape, stride) in zip(self.offsets, self.forms, strict=True):
            size = shape.numel() * dtype.itemsize
            found.append(memory[offset : offset + size].view(dtype).as_strided(shape, stride))
        return found
