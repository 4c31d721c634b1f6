"""Deferred QK-norm and rotary embedding: query or key that carries both, not applied yet, to the attention kernel.

Stock processors norm and rotate query and key right before attention, in several passes over memory. A quantizing
kernel reads both tensors once more to round them, and can norm and rotate in that pass. `DeferredQK` is the lazy tensor
that carries norm and rotation there: its values are the stock result, computed by the stock functions. Moving the heads
keeps them deferred. Any other operation runs on the values, so none runs on a tensor without its norm or rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...core.lazy_tensor import LazyTensor, materialized
from .record import QKNorm, Rotary, Tables

Apply = Callable[[torch.Tensor], torch.Tensor]


class DeferredQK(LazyTensor):
    """Query or key without its norm, its rotary embedding or both. Stock code may move its heads to the layout of
    attention, (batch, sequence, heads, head_dim).

    Attributes:
        raw: The tensor before norm and rotation, of the same shape and dtype. Its memory is the projection's output.
        qk_norm: Weight, (head_dim,), and epsilon of an RMS norm over the channels of each head; `None` without a norm.
        tables: Cosines and sines, float32, of as many dimensions as the tensor, each of the tensor's size or 1; half
            as many channels for `rope_style` "half". The rotation follows the norm. `None` without a rotation.
        rope_style: `"interleaved"` or `"half"`, as `Rotary.rope_style` describes it.
        heads: Number of heads that the channels must be split into; 0 for any number.
        apply: The stock norm and rotation, as a function of the raw tensor.
        base: The tensor that this one views, the view and its inverse; `None` for a tensor of its own. A write to one
            of the two is seen in the other.
    """

    raw: torch.Tensor
    qk_norm: tuple[torch.Tensor, float] | None
    tables: Tables | None
    rope_style: str
    heads: int
    apply: Apply
    base: tuple[DeferredQK, Apply, Apply] | None

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
        found = cls.without_values(x.shape, x.dtype, x.device, x.stride(), x.requires_grad)
        found.raw, found.apply, found.base = x, apply, None
        found.qk_norm, found.tables, found.rope_style, found.heads = qk_norm, tables, rope_style, heads
        return found

    def compute(self) -> torch.Tensor:
        return self.apply(self.raw)

    @property
    def held(self) -> torch.Tensor | None:
        if self._held is None and self.base is not None:
            base, view, _ = self.base
            if base.held is not None:
                self._held = view(base.held)
        return self._held

    def hold(self, values: torch.Tensor) -> None:
        super().hold(values)
        if self.base is not None:
            base, _, back = self.base
            base.hold(back(values))

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
        raw, norm = (x.raw, x) if isinstance(x, DeferredQK) else (x, None)
        channels = raw.shape[-1] // 2 if rope_style == "half" else raw.shape[-1]
        fits = cos.shape == sin.shape and cos.ndim == raw.ndim and cos.shape[-1] == channels
        fits = fits and all(one in (1, own) for one, own in zip(cos.shape[:-1], raw.shape[:-1], strict=True))
        fits = fits and cos.device == sin.device == raw.device
        if not fits or (norm is not None and (norm.tables is not None or norm.held is not None)):
            return apply(materialized(x))
        tables = cos.float(), sin.float()
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            tables = tables[0].contiguous(), tables[1].contiguous()
        if norm is None:
            return cls.wrap(raw, apply, None, tables, rope_style, heads)
        normed = norm.apply
        return cls.wrap(raw, lambda item: apply(normed(item)), norm.qk_norm, tables, rope_style, heads)

    def _viewed(self, view: Apply, back: Apply) -> DeferredQK:
        """The same view of the raw tensor and of its tables; `back` inverts the view."""
        apply = self.apply
        tables = self.tables and (view(self.tables[0]), view(self.tables[1]))
        found = DeferredQK.wrap(
            view(self.raw), lambda item: view(apply(back(item))), self.qk_norm, tables, self.rope_style
        )
        found.base = self, view, back
        return found

    def _moved_heads(self, func: Any, args: Any, kwargs: Any) -> DeferredQK | None:
        """The result of a call that only moves heads, still deferred; `None` for any other call."""
        if func is torch.Tensor.transpose and not kwargs and self.ndim == 4 and set(args) == {1, 2}:
            return self._viewed(lambda item: item.transpose(1, 2), lambda item: item.transpose(1, 2))
        if func is torch.Tensor.unflatten and not kwargs and self.ndim == 3 and self.qk_norm is None and args[0] == 2:
            heads, rest = args[1]
            if rest == -1 and self.heads in (0, heads):
                return self._viewed(lambda item: item.unflatten(2, (heads, -1)), lambda item: item.flatten(2))
        if func is torch.Tensor.repeat_interleave and args == (1,) and kwargs.keys() == {"dim"}:
            return DeferredQK.wrap(self.raw, self.apply, self.qk_norm, self.tables, self.rope_style, self.heads)
        return None

    @classmethod
    def handle(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Moves heads, which norm and rotation follow."""
        first: Any = args[0] if args else None
        if isinstance(first, DeferredQK):
            moved = first._moved_heads(func, args[1:], kwargs) if first.held is None else None
            return NotImplemented if moved is None else moved
        if func is torch.Tensor.type_as and len(args) == 2 and args[1].held is None:
            return func(first, args[1].raw)  # reads dtype and device alone
        return NotImplemented


def common_qk_norm_rope(query: Any, key: Any) -> tuple[Rotary | None, QKNorm | None] | None:
    """The deferred rotation and norm of query and key, for one kernel that applies them to both.

    Returns `None` if nothing is deferred, if query and key defer different operations, or if their heads have not been
    moved to (batch, sequence, heads, head_dim). Norm and rotation of held values are not deferred any more.
    """
    if not isinstance(query, DeferredQK) or not isinstance(key, DeferredQK) or not query.ndim == key.ndim == 4:
        return None
    if query.held is not None or key.held is not None:
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
