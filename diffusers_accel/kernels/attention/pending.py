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

from .record import QKNorm, Rotary, Tables

# What does not depend on the values, and may be answered without them.
_METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.stride, torch.Tensor.is_floating_point}

Apply = Callable[[torch.Tensor], torch.Tensor]


class Pending(torch.Tensor):
    """Query or key before its norm, its rotary embedding or both. Stock code may move its heads to where attention
    wants them: (batch, sequence, heads, head_dim).

    Attributes:
        rms: Weight, (head_dim,), and epsilon of an RMS norm over each head's channels, or `None`.
        tables: Cosines and sines, float32, broadcast to the tensor but for its channels; see `Rotary`. They follow the
            norm. `None` if there is no rotation.
        halves: As in `Rotary`.
        heads: In how many heads the channels must be split, where they are not yet; 0 for any number.
        apply: The stock functions, on the plain tensor.
    """

    rms: tuple[torch.Tensor, float] | None
    tables: Tables | None
    halves: bool
    heads: int
    apply: Apply

    @classmethod
    def _of(
        cls, x: torch.Tensor, apply: Apply, rms: Any, tables: Tables | None = None, halves: bool = False, heads: int = 0
    ) -> Pending:
        found = x.as_subclass(cls)
        found.rms, found.tables, found.halves, found.heads, found.apply = rms, tables, halves, heads, apply
        return found

    @classmethod
    def normed(cls, x: torch.Tensor, weight: torch.Tensor | None, eps: float | None, apply: Apply) -> torch.Tensor:
        """`x` with its norm put off, or normed at once if it is not of the kind kernels take."""
        fits = x.ndim == 4 and weight is not None and weight.shape == x.shape[3:] and weight.is_contiguous()
        if not fits or weight.device != x.device or eps is None or isinstance(x, Pending):  # type: ignore[union-attr]
            return apply(x)
        return cls._of(x, apply, (weight, eps))

    @classmethod
    def rotated(
        cls, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, apply: Apply, halves: bool = False, heads: int = 0
    ) -> torch.Tensor:
        """`x`, which may be pending a norm, with its rotation put off too, or rotated at once if the tables are not of
        the kind kernels take.

        Args:
            x: (batch, sequence, heads, head_dim), (batch, heads, sequence, head_dim), or with the heads in the
                channels, (batch, sequence, heads * head_dim).
            cos: As many dimensions as `x`, of its sizes or 1; half of its channels if `halves`.
            sin: Likewise.
            apply: Rotates a tensor like `x`.
            halves: As in `Rotary`.
            heads: In how many heads a tensor with the heads in the channels will be split.
        """
        channels = x.shape[-1] // 2 if halves else x.shape[-1]
        fits = cos.shape == sin.shape and cos.ndim == x.ndim and cos.shape[-1] == channels
        fits = fits and all(one in (1, own) for one, own in zip(cos.shape[:-1], x.shape[:-1], strict=True))
        if not fits or not cos.device == sin.device == x.device or (isinstance(x, Pending) and x.tables is not None):
            return apply(settled(x))
        tables = cos.float(), sin.float()
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            tables = tables[0].contiguous(), tables[1].contiguous()
        if not isinstance(x, Pending):
            return cls._of(x, apply, None, tables, halves, heads)
        norm = x.apply
        return cls._of(x.plain(), lambda item: apply(norm(item)), x.rms, tables, halves, heads)

    def plain(self) -> torch.Tensor:
        """The tensor without what is pending."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    def _seen(self, view: Apply, back: Apply) -> Pending:
        """The same by a view of all its tensors."""
        apply = self.apply
        tables = self.tables and (view(self.tables[0]), view(self.tables[1]))
        return Pending._of(view(self.plain()), lambda item: view(apply(back(item))), self.rms, tables, self.halves)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Pending | None:
        """The same with its heads where stock code wants them, if that is all that is asked for."""
        if func is torch.Tensor.transpose and not kwargs and self.ndim == 4 and set(args) == {1, 2}:
            return self._seen(lambda item: item.transpose(1, 2), lambda item: item.transpose(1, 2))
        if func is torch.Tensor.unflatten and not kwargs and self.ndim == 3 and self.rms is None and args[0] == 2:
            heads, rest = args[1]
            if rest == -1 and self.heads in (0, heads):
                return self._seen(lambda item: item.unflatten(2, (heads, -1)), lambda item: item.flatten(2))
        if func is torch.Tensor.repeat_interleave and args == (1,) and kwargs.keys() == {"dim"}:
            return self
        return None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.type_as and not isinstance(args[0], Pending):
            return func(args[0], args[1].plain())  # asks for the type alone
        moved = args[0]._moved(func, args[1:], kwargs) if args and isinstance(args[0], Pending) else None
        if moved is not None:
            return moved
        return func(*(settled(item) for item in args), **{name: settled(item) for name, item in kwargs.items()})


def settled(x: Any) -> Any:
    """A tensor as stock code would have it; sequences are looked into, anything else is passed on."""
    if isinstance(x, Pending):
        return x.apply(x.plain())
    if isinstance(x, (list, tuple)) and any(isinstance(item, Pending) for item in x):
        return type(x)(settled(item) for item in x)
    return x


def pending(query: Any, key: Any) -> tuple[Rotary | None, QKNorm | None] | None:
    """What a kernel would have to do to both, or `None` if there is nothing, or not the same kind of thing, to be
    done."""
    if not isinstance(query, Pending) or not isinstance(key, Pending) or not query.ndim == key.ndim == 4:
        return None
    rotary, norm = None, None
    if query.rms is not None and key.rms is not None and query.rms[1] == key.rms[1]:
        norm = QKNorm(query.rms[0], key.rms[0], query.rms[1])
    if query.tables is not None and key.tables is not None and query.halves == key.halves:
        rotary = Rotary(query.tables, key.tables, query.halves)
    # All that either lacks, or nothing.
    if any(item.rms is not None and norm is None for item in (query, key)):
        return None
    if any(item.tables is not None and rotary is None for item in (query, key)):
        return None
    return rotary, norm
