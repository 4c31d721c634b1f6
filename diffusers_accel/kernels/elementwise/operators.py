"""The passes between two matrix products as torch operators, for compiled graphs and eager code.

On CUDA they run the kernels of `rows.py`; elsewhere plain torch in float32, which is also their definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...core.operators import operator
from ..linear import formats
from ..linear.row_quantization import TYPES


def _runs_triton(x: torch.Tensor) -> bool:
    return x.is_cuda and x.numel() > 0


def _residual_norm_fake(
    x: torch.Tensor, y: torch.Tensor | None, gate: list[torch.Tensor], weight: torch.Tensor | None,
    bias: torch.Tensor | None, factor: list[torch.Tensor], shift: list[torch.Tensor], eps: float, rms: bool,
    plus_one: bool, kind: str, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _residual_norm_empty(x, y, kind, dtype)


@operator("residual_norm", _residual_norm_fake)
def residual_norm(
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
    """A gated residual sum, its norm over the channels, and an adaptive modulation of the norm, in one pass:
    `s = x + gate * y`, then `(norm(s) * weight + bias) * factor + shift`.

    `gate`, `factor` and `shift` are lists. An empty list stands for no such operand. A single tensor is (batch or 1,
    sequence or 1, channels). Two tensors stand for their sum, e.g. each row's embedding and a block's table; the second
    is (batch or 1, 1, channels).

    Args:
        x: The residual stream, (batch, sequence, channels).
        y: The addend, (batch, sequence, channels); `None` for a norm of `x` alone.
        gate: Factor of `y`.
        weight: Weight of the norm, (channels,), or `None`.
        bias: Bias of the norm, (channels,), or `None`.
        factor: Factor of the norm.
        shift: Addend of the norm.
        eps: Epsilon of the norm.
        rms: Whether the norm is an RMS norm instead of a layer norm.
        plus_one: Whether 1 is added to `factor`.
        kind: `"e4m3"` or `"int8"` to round the result row by row, `""` not to round it.
        dtype: Dtype of a result that is not rounded.

    Returns:
        `s` in the dtype of `x`, empty without `y`; the result, (batch, sequence, channels); and its scales, float32
        (batch * sequence, 1), empty without rounding.
    """
    total, out, scale = _residual_norm_empty(x, y, kind, dtype)
    if _runs_triton(x):
        from . import rows

        rows.residual_norm(x, y, gate, weight, bias, factor, shift, eps, rms, plus_one, total, out, scale)
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


def _residual_norm_empty(
    x: torch.Tensor, y: torch.Tensor | None, kind: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.shape[0] * x.shape[1]
    return (
        x.new_empty(0 if y is None else x.shape),
        x.new_empty(x.shape, dtype=TYPES.get(kind, dtype)),
        x.new_empty((rows, 1) if kind else (0, 1), dtype=torch.float32),
    )


def _activation(x: torch.Tensor, gate: torch.Tensor | None, kind: str) -> torch.Tensor:
    x = x.float()
    if kind.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind == "swiglu":
        assert gate is not None
        return F.silu(x) * gate.float()
    return F.silu(x) if kind == "silu" else x


def _concat_quantize_fake(
    parts: list[torch.Tensor], gates: list[torch.Tensor | None], activations: str, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _concat_quantize_empty(parts, kind)


@operator("concat_quantize", _concat_quantize_fake)
def concat_quantize(
    parts: list[torch.Tensor], gates: list[torch.Tensor | None], activations: str, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors, each with its activation, concatenated along the columns and rounded row by row.

    Args:
        parts: One or two tensors, (batch, sequence, columns of the part).
        gates: For each part the factor of its `"swiglu"`, of the part's shape; `None` for other activations.
        activations: For each part its activation, separated by commas: `""`, `"gelu_tanh"`, `"gelu"`, `"silu"` or
            `"swiglu"`.
        kind: `"e4m3"` or `"int8"`.

    Returns:
        Values, (batch * sequence, columns), and scales, float32 (batch * sequence, 1).
    """
    kinds = activations.split(",")
    if _runs_triton(parts[0]):
        from . import rows

        values, scale = _concat_quantize_empty(parts, kind)
        rows.concat_quantize(parts, gates, kinds, values, scale)
        return values, scale
    whole = [_activation(part, gate, each) for part, gate, each in zip(parts, gates, kinds, strict=True)]
    return formats.quantize_rows(torch.cat(whole, -1).flatten(0, 1), TYPES[kind])


def _concat_quantize_empty(parts: list[torch.Tensor], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    first = parts[0]
    rows, columns = first.shape[0] * first.shape[1], sum(part.shape[2] for part in parts)
    values = first.new_empty((rows, columns), dtype=TYPES[kind])
    return values, first.new_empty((rows, 1), dtype=torch.float32)
