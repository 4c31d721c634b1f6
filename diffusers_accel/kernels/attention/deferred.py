"""Deferred QK-norm and rotary embedding: query or key that carries both, not applied yet, to the attention kernel.

Stock processors norm and rotate query and key right before attention, in several passes over memory. A quantizing
kernel reads both tensors once more to round them, and can norm and rotate in that pass. `DeferredQK` carries the norm
and the rotation there. Any other operation on such a tensor sees the stock result, computed by the stock functions, so
an operation never runs on a tensor without its norm or rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .record import QKNorm, Rotary, Tables

# Attributes that do not depend on the values: they are answered without applying anything.
_METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.stride, torch.Tensor.is_floating_point}

Apply = Callable[[torch.Tensor], torch.Tensor]


class DeferredQK(torch.Tensor):
    """Query or key without its norm, its rotary embedding or both. Stock code may move its heads to the layout of
    attention, (batch, sequence, heads, head_dim).

    Attributes:
        qk_norm: Weight, (head_dim,), and epsilon of an RMS norm over the channels of each head; `None` without a norm.
        tables: Cosines and sines, float32, of as many dimensions as the tensor, each of the tensor's size or 1; half
            as many channels for `rope_style` "half". The rotation follows the norm. `None` without a rotation.
        rope_style: `"interleaved"` or `"half"`, as `Rotary.rope_style` describes it.
        heads: Number of heads that the channels must be split into; 0 for any number.
        apply: The stock norm and rotation, as a function of the raw tensor.
    """

    qk_norm: tuple[torch.Tensor, float] | None
    tables: Tables | None
    rope_style: str
    heads: int
    apply: Apply

    @classmethod
    def wrap(
        cls,
        x: torch.Tensor,
        apply: Apply,
        qk_norm: tuple[torch.Tensor, float] | None,
        tables: Tables | None = None,
        rope_style: str = "interleaved",
        heads: int = 0,
    ) -> DeferredQK:
        """The raw tensor `x` with the attributes of the class."""
        found = x.as_subclass(cls)
        found.qk_norm, found.tables, found.apply = qk_norm, tables, apply
        found.rope_style, found.heads = rope_style, heads
        return found

    @classmethod
    def rms_norm(cls, x: torch.Tensor, weight: torch.Tensor | None, eps: float | None, apply: Apply) -> torch.Tensor:
        """`x` with a deferred RMS norm, or `apply(x)` if kernels do not support such a norm."""
        if weight is None or eps is None or isinstance(x, DeferredQK):
            return apply(x)
        fits = x.ndim == 4 and weight.shape == x.shape[3:] and weight.is_contiguous()
        if not fits or weight.device != x.device:
            return apply(x)
        return cls.wrap(x, apply, (weight, eps))

    @classmethod
    def rope(
        cls,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        apply: Apply,
        rope_style: str = "interleaved",
        heads: int = 0,
    ) -> torch.Tensor:
        """`x` with a deferred rotation, or `apply(x)` if kernels do not support such tables.

        Args:
            x: (batch, sequence, heads, head_dim), (batch, heads, sequence, head_dim), or with the heads in the
                channels, (batch, sequence, heads * head_dim). It may be a `DeferredQK` with a norm.
            cos: Cosines, of as many dimensions as `x`, each of the size of `x` or 1; half as many channels for
                `rope_style` "half".
            sin: Sines, of the shape of `cos`.
            apply: Rotates a tensor of the shape of `x`.
            rope_style: `"interleaved"` or `"half"`, as `Rotary.rope_style` describes it.
            heads: Number of heads that a tensor with the heads in the channels will be split into; 0 for any number.
        """
        channels = x.shape[-1] // 2 if rope_style == "half" else x.shape[-1]
        fits = cos.shape == sin.shape and cos.ndim == x.ndim and cos.shape[-1] == channels
        fits = fits and all(one in (1, own) for one, own in zip(cos.shape[:-1], x.shape[:-1], strict=True))
        if not fits or not cos.device == sin.device == x.device or (isinstance(x, DeferredQK) and x.tables is not None):
            return apply(materialize(x))
        tables = cos.float(), sin.float()
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            tables = tables[0].contiguous(), tables[1].contiguous()
        if not isinstance(x, DeferredQK):
            return cls.wrap(x, apply, None, tables, rope_style, heads)
        norm = x.apply
        return cls.wrap(x.raw(), lambda item: apply(norm(item)), x.qk_norm, tables, rope_style, heads)

    def raw(self) -> torch.Tensor:
        """The tensor before norm and rotation."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    def _viewed(self, view: Apply, back: Apply) -> DeferredQK:
        """The same view of the raw tensor and of its tables; `back` inverts the view."""
        apply = self.apply
        tables = self.tables and (view(self.tables[0]), view(self.tables[1]))
        return DeferredQK.wrap(
            view(self.raw()), lambda item: view(apply(back(item))), self.qk_norm, tables, self.rope_style
        )

    def _moved_heads(self, func: Any, args: Any, kwargs: Any) -> DeferredQK | None:
        """The result of a call that only moves heads, still deferred; `None` for any other call."""
        if func is torch.Tensor.transpose and not kwargs and self.ndim == 4 and set(args) == {1, 2}:
            return self._viewed(lambda item: item.transpose(1, 2), lambda item: item.transpose(1, 2))
        if func is torch.Tensor.unflatten and not kwargs and self.ndim == 3 and self.qk_norm is None and args[0] == 2:
            heads, rest = args[1]
            if rest == -1 and self.heads in (0, heads):
                return self._viewed(lambda item: item.unflatten(2, (heads, -1)), lambda item: item.flatten(2))
        if func is torch.Tensor.repeat_interleave and args == (1,) and kwargs.keys() == {"dim"}:
            return self
        return None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.type_as and not isinstance(args[0], DeferredQK):
            return func(args[0], args[1].raw())  # reads the dtype alone
        moved = args[0]._moved_heads(func, args[1:], kwargs) if args and isinstance(args[0], DeferredQK) else None
        if moved is not None:
            return moved
        return func(*(materialize(item) for item in args), **{name: materialize(item) for name, item in kwargs.items()})


def materialize(x: Any) -> Any:
    """Applies deferred norm and rotation: to a tensor, or to the tensors of a list or tuple. Any other value is
    returned unchanged."""
    if isinstance(x, DeferredQK):
        return x.apply(x.raw())
    if isinstance(x, (list, tuple)) and any(isinstance(item, DeferredQK) for item in x):
        return type(x)(materialize(item) for item in x)
    return x


def common_qk_norm_rope(query: Any, key: Any) -> tuple[Rotary | None, QKNorm | None] | None:
    """The deferred rotation and norm of query and key, for one kernel that applies them to both.

    Returns `None` if nothing is deferred, if query and key defer different operations, or if their heads have not been
    moved to (batch, sequence, heads, head_dim).
    """
    if not isinstance(query, DeferredQK) or not isinstance(key, DeferredQK) or not query.ndim == key.ndim == 4:
        return None
    rotary, norm = None, None
    if query.qk_norm is not None and key.qk_norm is not None and query.qk_norm[1] == key.qk_norm[1]:
        norm = QKNorm(query.qk_norm[0], key.qk_norm[0], query.qk_norm[1])
    if query.tables is not None and key.tables is not None and query.rope_style == key.rope_style:
        rotary = Rotary(query.tables, key.tables, query.rope_style)
    # A kernel applies all deferred operations of both tensors, or none.
    if any(item.qk_norm is not None and norm is None for item in (query, key)):
        return None
    if any(item.tables is not None and rotary is None for item in (query, key)):
        return None
    return rotary, norm
