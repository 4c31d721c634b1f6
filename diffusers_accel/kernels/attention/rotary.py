"""A tensor whose rotary embedding is still to be applied: a quantizing kernel does it in passing, anything else sees
the rotated values.

Stock processors rotate query and key right before attention, at the cost of several passes over both. Where a kernel
reads them once more anyway, to round them, the rotation belongs there. `Rotated` carries it from the one place to the
other: whatever else touches such a tensor on the way finds the stock result, computed by the stock function, so nothing
can come out unrotated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# What does not depend on the values, and may be answered without them.
_METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.stride, torch.Tensor.is_floating_point}


class Rotated(torch.Tensor):
    """Query or key, (batch, sequence, heads, head_dim), before its rotary embedding.

    Attributes:
        tables: Cosines and sines, float32 (sequence, head_dim); channels 2i and 2i + 1 are one complex number.
        apply: The stock rotation of a plain tensor.
    """

    tables: tuple[torch.Tensor, torch.Tensor]
    apply: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        apply: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """`x` with its rotation put off, or rotated at once if the tables are not of the kind kernels take."""
        wanted = (x.shape[1], x.shape[3])
        size = wanted[0] * wanted[1]
        fits = x.ndim == 4 and cos.numel() == sin.numel() == size and cos.shape[-1] == x.shape[3]
        if not fits or not cos.device == sin.device == x.device:
            return apply(x)
        found = x.as_subclass(cls)
        found.tables = (cos.float().reshape(wanted).contiguous(), sin.float().reshape(wanted).contiguous())
        found.apply = apply
        return found

    def turns_with(self, other: Rotated) -> bool:
        """Whether both are turned by the very same tables; told by where they lie, nothing is read."""
        pairs = zip(self.tables, other.tables, strict=True)
        return all(one.data_ptr() == two.data_ptr() and one.shape == two.shape for one, two in pairs)

    def plain(self) -> torch.Tensor:
        """The tensor without its rotation."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.type_as and not isinstance(args[0], Rotated):
            return func(args[0], args[1].plain())  # asks for the type alone
        return func(*(rotated(item) for item in args), **{name: rotated(item) for name, item in kwargs.items()})


def rotated(x: Any) -> Any:
    """A tensor as stock code would have it; sequences are looked into, anything else is passed on."""
    if isinstance(x, Rotated):
        return x.apply(x.plain())
    if isinstance(x, (list, tuple)) and any(isinstance(item, Rotated) for item in x):
        return type(x)(rotated(item) for item in x)
    return x
