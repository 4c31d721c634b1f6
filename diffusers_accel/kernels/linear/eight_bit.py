"""The 8-bit layers: e4m3 with scales per row, per tensor or per block, and INT8 with scales per row.

Activations are rounded as they come, row by row (`activations.py`; in a compiled graph an operator, which a rewrite
joins with what stands before it). e4m3 products are torch's own (`F.scaled_mm`), INT8's is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...core.operators import operator
from . import formats
from .module import Apart, QuantizedLinear
from .record import LINEARS, LinearKernel
from .rounding import TYPES, quantize_rows


def _scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    form: str,
) -> torch.Tensor:
    """e4m3 (rows, depth) times e4m3 (columns, depth) transposed: bf16."""
    form, x_scale = _by_rows(x, x_scale, weight_scale, form)
    kinds = F.ScalingType
    x_kind, weight_kind = {
        "rows": (kinds.RowWise, kinds.RowWise),
        "tensor": (kinds.TensorWise, kinds.TensorWise),
        "groups": (kinds.BlockWise1x128, kinds.BlockWise128x128),
    }[form]
    return F.scaled_mm(
        x, weight.t(), x_scale, x_kind, weight_scale.t() if form != "tensor" else weight_scale, weight_kind,
        bias=bias, output_dtype=torch.bfloat16, use_fast_accum=form != "groups",
    )  # fmt: skip


def _by_rows(x: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor, form: str) -> tuple[str, torch.Tensor]:
    """The form of a product and the scale of its activations: where several weights with a scale each are joined, the
    scale of all activations is one for every row too."""
    if form != "tensor" or weight_scale.numel() == 1:
        return form, x_scale
    return "rows", x_scale.reshape(1, 1).expand(x.shape[0], 1).contiguous()


def _scaled_mm_traced(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    form: str,
) -> torch.Tensor:
    """The same under a compiler, which cannot trace torch's function yet, but the operator beneath it."""
    form, x_scale = _by_rows(x, x_scale, weight_scale, form)
    if form == "groups":
        return _scaled_mm_opaque(x, x_scale, weight, weight_scale, bias, form)
    return torch._scaled_mm(
        x, weight.t(), x_scale, weight_scale.t() if form == "rows" else weight_scale, bias=bias,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def _scaled_mm_fake(
    x: torch.Tensor, x_scale: Any, weight: torch.Tensor, weight_scale: Any, bias: Any, form: str
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.bfloat16)


# The layout of a block's scales is told by a name in torch's function and guessed by the operator: that one is opaque.
_scaled_mm_opaque = operator("scaled_mm", _scaled_mm_fake)(_scaled_mm)


def fp8_product(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(rows, depth), rounded to e4m3 row by row, times e4m3 (columns, depth) with a scale per row, transposed; plus a
    bias: (rows, columns) of the input's type."""
    if torch.compiler.is_compiling():
        data, scale = quantize_rows(x, "e4m3")
    else:
        from . import activations

        data, scale = activations.quantize_rows(x)
    return _with_bias(data, scale, weight, weight_scale, bias, x.dtype, "rows")


def _with_bias(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype, form: str,
) -> torch.Tensor:  # fmt: skip
    # bf16 is what torch's product writes with scales per row; a bias of another type is added outside.
    inside = bias if bias is not None and bias.dtype == dtype == torch.bfloat16 else None
    multiply = _scaled_mm_traced if torch.compiler.is_compiling() else _scaled_mm
    out = multiply(data, scale, weight, weight_scale, inside, form).to(dtype)
    return out if bias is None or inside is not None else out + bias.to(dtype)


class _EightBit(QuantizedLinear):
    form: str
    rounding: ClassVar[str] = "e4m3"

    def dense(self) -> torch.Tensor:
        return formats.dequantize(self.weight_data, self.weight_scale)

    def rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations as the format stores them, in plain torch, or as an operator of a compiled graph."""
        if torch.compiler.is_compiling():
            return quantize_rows(x, self.rounding)
        return formats.quantize_rows(x, TYPES[self.rounding])

    def fused(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in one Triton kernel."""
        from . import activations

        return activations.quantize_rows(x)

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of (..., in_features). A compiler fuses what several layers do to one tensor by itself."""
        if torch.compiler.is_compiling():
            return self.rounded(x.reshape(-1, self.in_features))
        return self.rounded_once.of(x, self.form, lambda item: self.fused(item.reshape(-1, item.shape[-1])))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiplied(x, self.bias)

    def multiplied(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """torch's product of what is stored, plus a bias."""
        data, scale = self.activations(x)
        return _with_bias(data, scale, self.weight_data, self.weight_scale, bias, x.dtype, self.form)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(formats.dequantize(*self.rounded(x)), self.dense(), bias).to(x.dtype)


class Fp8Linear(_EightBit):
    """e4m3, one scale per output feature and one per token."""

    kind = "fp8"
    form = "rows"

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        data, scale = formats.in_slices(formats.quantize_rows, weight)
        return {"weight_data": data, "weight_scale": scale}


class Fp8TensorLinear(_EightBit):
    """e4m3, one scale for the weight and one for all activations: found at every call, or fixed by calibration."""

    kind = "fp8-tensor"
    form = "tensor"
    by_row: ClassVar = {"weight_data": 1}
    by_weight = ("weight_scale",)
    input_scale: torch.Tensor | None

    def _begin(self, linear: nn.Linear) -> None:
        super()._begin(linear)
        self.register_buffer("input_scale", None, persistent=False)

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = formats.tensor_scale(weight)
        data, *_ = formats.in_slices(lambda part: (formats.to_e4m3(part.float() / scale),), weight)
        return {"weight_data": data, "weight_scale": scale}

    def rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.input_scale is not None:
            return formats.to_e4m3(x.float() / self.input_scale), self.input_scale
        return formats.quantize_tensor(x)

    def fused(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from . import activations

        return activations.quantize_tensor(x, self.input_scale)

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.input_scale is None or torch.compiler.is_compiling():
            return super().activations(x)
        # Layers may have scales of their own: nothing is shared.
        return self.fused(x.reshape(-1, self.in_features))


class Fp8BlockLinear(_EightBit):
    """e4m3, one scale per 128 x 128 weights and per 128 activations of a token. A weight of other sizes is stored with
    zeros up to the next multiple: torch's product takes whole blocks only."""

    kind = "fp8-block"
    form = "groups"
    by_row: ClassVar = {"weight_data": 1, "weight_scale": formats.BLOCK}

    @classmethod
    def joined(cls, layers: Sequence[Any]) -> dict[str, torch.Tensor]:
        if any(layer.out_features % formats.BLOCK for layer in layers):
            raise Apart("a block of weights would belong to two of them")
        return super().joined(layers)

    @staticmethod
    def stored(data: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored form of a weight, e4m3 (out_features, in_features), and its scales, float32, one per block."""
        rows, columns = data.shape
        data = F.pad(data.view(torch.uint8), (0, -columns % formats.BLOCK, 0, -rows % formats.BLOCK))
        # Scales are read four at a time along the input features.
        return {"weight_data": data.view(torch.float8_e4m3fn), "weight_scale": F.pad(scale, (0, -scale.shape[1] % 4))}

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.stored(*formats.in_slices(formats.quantize_blocks, weight))

    def dense(self) -> torch.Tensor:
        return super().dense()[: self.out_features, : self.in_features]

    def rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return formats.quantize_groups(x)

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        missing = self.weight_data.shape[1] - self.in_features
        if not torch.compiler.is_compiling():
            return super().activations(F.pad(x, (0, missing)) if missing else x)
        # As the matrix units' library reads them: a multiple of four rows, scales column by column.
        rows = x.reshape(-1, self.in_features)
        data, scale = formats.quantize_groups(F.pad(rows, (0, missing, 0, -rows.shape[0] % 4)))
        return data, scale.t().contiguous().t()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        missing = self.weight_data.shape[0] - self.out_features
        out = self.multiplied(
            x, None if self.bias is None else F.pad(self.bias, (0, missing)) if missing else self.bias
        )
        return out[: x.numel() // self.in_features, : self.out_features]

    def fused(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from . import activations

        return activations.quantize_groups(x)


class Int8Linear(_EightBit):
    """INT8, one scale per output feature and one per token."""

    kind = "int8"
    form = "int8 rows"
    rounding = "int8"

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        data, scale = formats.in_slices(lambda part: formats.quantize_rows(part, torch.int8), weight)
        return {"weight_data": data, "weight_scale": scale}

    def fused(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from . import activations

        return activations.quantize_rows(x, torch.int8)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        data, scale = self.activations(x)
        return _int8_product(data, scale, self.weight_data, self.weight_scale, self.bias, x.dtype)


def _int8_product_fake(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: Any, bias: Any, dtype: Any
) -> Any:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


@operator("int8_product", _int8_product_fake)
def _int8_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    from .products import int8_product

    return int8_product(x, x_scale, weight, weight_scale, bias, dtype)


def _record(
    module: type[QuantizedLinear],
    multiple: int,
    at_least: tuple[int, int] | None = None,
    architectures: tuple[tuple[int, int], ...] = (),
) -> None:
    LINEARS.add(
        module.kind,
        LinearKernel(
            name=module.kind,
            load=lambda: module,
            modules=("triton",),
            install="pip install triton",
            at_least=at_least,
            architectures=architectures,
            in_multiple=multiple,
            out_multiple=multiple,
            bits=8.0,
        ),
    )


# Matrix units for e4m3 came with sm_89; torch's product with blocks of scales is for Hopper alone.
_record(Fp8Linear, 16, (8, 9))
_record(Fp8TensorLinear, 16, (8, 9))
_record(Fp8BlockLinear, 16, architectures=((9, 0),))
_record(Int8Linear, 16, (8, 0))
