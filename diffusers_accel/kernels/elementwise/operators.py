"""The passes between two products as torch operators: a compiled graph names them, and eager code calls them.

On CUDA they are the kernels of `rows.py`; elsewhere plain torch in float32, which is also their definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...core.operators import operator
from ..linear import formats
from ..linear.row_quantization import TYPES


def _fits(x: torch.Tensor) -> bool:
    return x.is_cuda and x.numel() > 0


def _normed_fake(
    x: torch.Tensor, y: torch.Tensor | None, gate: list[torch.Tensor], weight: torch.Tensor | None,
    bias: torch.Tensor | None, factor: list[torch.Tensor], shift: list[torch.Tensor], eps: float, rms: bool,
    plus_one: bool, kind: str, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _normed_empty(x, y, kind, dtype)


@operator("normed", _normed_fake)
def normed(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: list[torch.Tensor],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    factor: list[torch.Tensor],
    shift: list[torch.Tensor],
    eps: float,
    rms: bool,
    plus_one: bool,
    kind: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A residual stream, its norm over the channels, and an adaptive modulation of it, in one pass:
    `s = x + gate * y`, then `norm(s) * weight + bias`, times `factor`, plus `shift`.

    Args:
        x: (batch, sequence, channels).
        y: Like `x`; nothing is added if `None`.
        gate: Multiplies `y`. Of no tensor; of one, (batch or 1, sequence or 1, channels); or of that and another,
            (batch or 1, 1, channels), whose sum it is: an embedding of every row and a block's own table, say. So are
            `factor` and `shift`.
        weight: (channels,), as is `bias`: the norm's own.
        bias: See there.
        factor: Multiplies the norm.
        shift: Is added to it.
        eps: The norm's.
        rms: Whether it is an RMS norm, not a layer norm.
        plus_one: Whether 1 is added to `factor`.
        kind: `"e4m3"` or `"int8"` to round the result row by row, `""` not to.
        dtype: The result's, where it is not rounded.

    Returns:
        `s` in the type of `x` (empty without `y`); the result, (batch, sequence, channels); and its scales, float32
        (batch * sequence, 1), empty where it is not rounded.
    """
    total, out, scale = _normed_empty(x, y, kind, dtype)
    if _fits(x):
        from . import rows

        rows.normed(x, y, gate, weight, bias, factor, shift, eps, rms, plus_one, total, out, scale)
        return total, out, scale
    s = x.float()
    if y is not None:
        s = s + (y.float() * _summed(gate) if gate else y.float())
        total = s.to(x.dtype)
        s = total.float()
    weight, bias = (None if item is None else item.float() for item in (weight, bias))
    if rms:
        s = s * (s.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        s = s if weight is None else s * weight
        s = s if bias is None else s + bias
    else:
        s = F.layer_norm(s, s.shape[-1:], weight, bias, eps)
    if factor:
        s = s * (1 + _summed(factor) if plus_one else _summed(factor))
    if shift:
        s = s + _summed(shift)
    if not kind:
        return total, s.to(dtype), scale
    values, scale = formats.quantize_rows(s.flatten(0, 1), TYPES[kind])
    return total, values.view(s.shape), scale


def _summed(vectors: list[torch.Tensor]) -> torch.Tensor:
    first, *others = (item.float() for item in vectors)
    return first + others[0] if others else first


def _normed_empty(
    x: torch.Tensor, y: torch.Tensor | None, kind: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.shape[0] * x.shape[1]
    return (
        x.new_empty(0 if y is None else x.shape),
        x.new_empty(x.shape, dtype=TYPES.get(kind, dtype)),
        x.new_empty((rows, 1) if kind else (0, 1), dtype=torch.float32),
    )


ACTIVATIONS = ("", "gelu_tanh", "gelu", "silu", "swiglu")


def _activation(x: torch.Tensor, gate: torch.Tensor | None, kind: str) -> torch.Tensor:
    x = x.float()
    if kind.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind == "swiglu":
        assert gate is not None
        return F.silu(x) * gate.float()
    return F.silu(x) if kind == "silu" else x


def _rounded_parts_fake(
    parts: list[torch.Tensor], gates: list[torch.Tensor | None], activations: str, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _parts_empty(parts, kind)


@operator("rounded_parts", _rounded_parts_fake)
def rounded_parts(
    parts: list[torch.Tensor], gates: list[torch.Tensor | None], activations: str, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors side by side, each with its activation, rounded row by row.

    Args:
        parts: One or two, (batch, sequence, columns of the part).
        gates: As many; what multiplies the activation of a `"swiglu"` part, `None` for others.
        activations: Theirs, of `ACTIVATIONS`, parted by commas.
        kind: `"e4m3"` or `"int8"`.

    Returns:
        Values, (batch * sequence, columns), and scales, float32 (batch * sequence, 1).
    """
    kinds = activations.split(",")
    if _fits(parts[0]):
        from . import rows

        values, scale = _parts_empty(parts, kind)
        rows.rounded_parts(parts, gates, kinds, values, scale)
        return values, scale
    whole = [_activation(part, gate, each) for part, gate, each in zip(parts, gates, kinds, strict=True)]
    return formats.quantize_rows(torch.cat(whole, -1).flatten(0, 1), TYPES[kind])


def _parts_empty(parts: list[torch.Tensor], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    first = parts[0]
    rows, columns = first.shape[0] * first.shape[1], sum(part.shape[2] for part in parts)
    values = first.new_empty((rows, columns), dtype=TYPES[kind])
    return values, first.new_empty((rows, 1), dtype=torch.float32)
