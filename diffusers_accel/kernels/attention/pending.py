"""A tensor whose QK-norm or rotary embedding is still to be done: a quantizing kernel does it in passing, anything else
sees the stock values.

Stock processors norm and rotate query and key right before attention, at the cost of several passes over both. Where a
kernel reads them once more anyway, to round them, that work belongs there. `Pending` carries it from the one place to
the other: whatever else touches such a tensor on the way finds the stock result, computed by the stock functions, so
nothing can come out undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .record import QKNorm, Rotary

# What does not depend on the values, and may be answered without them.
_METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.stride, torch.Tensor.is_floating_point}

Apply = Callable[[torch.Tensor], torch.Tensor]


class Pending(torch.Tensor):
    """Query or key, (batch, sequence, heads, head_dim), before its norm, its rotary embedding or both.

    Attributes:
        rms: Weight, (head_dim,), and epsilon of an RMS norm over each head's channels, or `None`.
        tables: Cosines and sines, float32 (sequence, head_dim), or `None`; channels 2i and 2i + 1 are one complex
            number. They follow the norm.
        apply: The stock functions, on the plain tensor.
    """

    rms: tuple[torch.Tensor, float] | None
    tables: Rotary | None
    apply: Apply

    @classmethod
    def _of(cls, x: torch.Tensor, norm: Any, tables: Any, apply: Apply) -> Pending:
        found = x.as_subclass(cls)
        found.rms, found.tables, found.apply = norm, tables, apply
        return found

    @classmethod
    def normed(cls, x: torch.Tensor, weight: torch.Tensor | None, eps: float | None, apply: Apply) -> torch.Tensor:
        """`x` with its norm put off, or normed at once if it is not of the kind kernels take."""
        fits = x.ndim == 4 and weight is not None and weight.shape == x.shape[3:] and weight.is_contiguous()
        if not fits or weight.device != x.device or eps is None or isinstance(x, Pending):  # type: ignore[union-attr]
            return apply(x)
        return cls._of(x, (weight, eps), None, apply)

    @classmethod
    def rotated(cls, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, apply: Apply) -> torch.Tensor:
        """`x`, which may be pending a norm, with its rotation put off too, or rotated at once if the tables are not of
        the kind kernels take."""
        wanted = (x.shape[1], x.shape[3])
        size = wanted[0] * wanted[1]
        fits = x.ndim == 4 and cos.numel() == sin.numel() == size and cos.shape[-1] == x.shape[3]
        if not fits or not cos.device == sin.device == x.device:
            return apply(settled(x))
        tables = (cos.float().reshape(wanted).contiguous(), sin.float().reshape(wanted).contiguous())
        if not isinstance(x, Pending):
            return cls._of(x, None, tables, apply)
        norm = x.apply
        return cls._of(x.plain(), x.rms, tables, lambda item: apply(norm(item)))

    def plain(self) -> torch.Tensor:
        """The tensor without what is pending."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.type_as and not isinstance(args[0], Pending):
            return func(args[0], args[1].plain())  # asks for the type alone
        return func(*(settled(item) for item in args), **{name: settled(item) for name, item in kwargs.items()})


def settled(x: Any) -> Any:
    """A tensor as stock code would have it; sequences are looked into, anything else is passed on."""
    if isinstance(x, Pending):
        return x.apply(x.plain())
    if isinstance(x, (list, tuple)) and any(isinstance(item, Pending) for item in x):
        return type(x)(settled(item) for item in x)
    return x


def pending(query: Any, key: Any) -> tuple[Rotary | None, QKNorm | None] | None:
    """What a kernel would have to do to both, or `None` if there is nothing, or not the same thing, to be done.

    Whether both are turned by the very same tables is told by where they lie: nothing is read."""
    if not isinstance(query, Pending) or not isinstance(key, Pending):
        return None
    if (query.rms is None) != (key.rms is None) or (query.tables is None) != (key.tables is None):
        return None
    norm = None
    if query.rms is not None and key.rms is not None:
        if query.rms[1] != key.rms[1]:
            return None
        norm = QKNorm(query.rms[0], key.rms[0], query.rms[1])
    if query.tables is not None and key.tables is not None:
        pairs = zip(query.tables, key.tables, strict=True)
        if not all(one.data_ptr() == two.data_ptr() and one.shape == two.shape for one, two in pairs):
            return None
    return query.tables, norm
