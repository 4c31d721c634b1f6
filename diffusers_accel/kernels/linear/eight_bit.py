"""The 8-bit layers: e4m3 with scales per row, per tensor or per block, and INT8 with scales per row.

Activations are quantized dynamically, at every call. Eager code runs the Triton kernels of `quantize_activations.py`. A
compiled graph holds an operator instead, which a rewrite fuses with the norm or activation before it. The e4m3 GEMM is
torch's `F.scaled_mm`; the INT8 GEMM is a Triton kernel of `gemm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...compat.torch_private import scaled_mm
from ...core.operators import operator
from . import formats
from .module import CannotPack, QuantizedLinear
from .record import LINEARS, LinearKernel
from .row_quantization import TYPES, quantize_rows


def _scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    granularity: str,
) -> torch.Tensor:
    """The e4m3 GEMM x @ weight.T + bias.

    Args:
        x: e4m3 (rows, depth).
        x_scale: float32, as `granularity` says: (rows, 1), (1,) or (rows, depth / 128).
        weight: e4m3 (columns, depth).
        weight_scale: float32, as `granularity` says: (columns, 1), (1,) or (columns / 128, depth / 128), the last
            padded to a multiple of 4 columns. Packed layers have (columns, 1) with `"tensor"` too.
        bias: bf16 (columns,), or `None`.
        granularity: `"row"`, `"tensor"` or `"block"`.

    Returns:
        bf16 (rows, columns).
    """
    granularity, x_scale = _as_rowwise(x, x_scale, weight_scale, granularity)
    scaling = F.ScalingType
    x_scaling, weight_scaling = {
        "row": (scaling.RowWise, scaling.RowWise),
        "tensor": (scaling.TensorWise, scaling.TensorWise),
        "block": (scaling.BlockWise1x128, scaling.BlockWise128x128),
    }[granularity]
    return F.scaled_mm(
        x, weight.t(), x_scale, x_scaling,
        weight_scale.t() if granularity != "tensor" else weight_scale, weight_scaling,
        bias=bias, output_dtype=torch.bfloat16, use_fast_accum=granularity != "block",
    )  # fmt: skip


def _as_rowwise(
    x: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor, granularity: str
) -> tuple[str, torch.Tensor]:
    """The granularity and activation scale that `F.scaled_mm` takes. Packed layers keep one weight scale each, which
    only the row-wise form can express; the scale of all activations is repeated for every row."""
    if granularity != "tensor" or weight_scale.numel() == 1:
        return granularity, x_scale
    return "row", x_scale.reshape(1, 1).expand(x.shape[0], 1).contiguous()


def _scaled_mm_traced(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    granularity: str,
) -> torch.Tensor:
    """`_scaled_mm` under a compiler, which cannot trace `F.scaled_mm` yet and traces the operator beneath it."""
    granularity, x_scale = _as_rowwise(x, x_scale, weight_scale, granularity)
    if granularity == "block":
        return _scaled_mm_opaque(x, x_scale, weight, weight_scale, bias, granularity)
    return scaled_mm(
        x, weight.t(), x_scale, weight_scale.t() if granularity == "row" else weight_scale, bias=bias,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def _scaled_mm_fake(
    x: torch.Tensor, x_scale: Any, weight: torch.Tensor, weight_scale: Any, bias: Any, granularity: str
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.bfloat16)


# `F.scaled_mm` is told the layout of block scales, and the operator beneath it guesses: block scales stay opaque.
_scaled_mm_opaque = operator("scaled_mm", _scaled_mm_fake)(_scaled_mm)


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x @ (weight * weight_scale).T + bias, with `x` quantized to e4m3 row by row.

    Args:
        x: (rows, depth), bf16, fp16 or float32, on CUDA.
        weight: e4m3 (columns, depth).
        weight_scale: float32 (columns, 1).
        bias: (columns,), or `None`.

    Returns:
        (rows, columns), dtype of `x`.
    """
    if torch.compiler.is_compiling():
        data, scale = quantize_rows(x, "e4m3")
    else:
        from . import quantize_activations

        data, scale = quantize_activations.quantize_rows(x)
    return _scaled_mm_with_bias(data, scale, weight, weight_scale, bias, x.dtype, "row")


def _scaled_mm_with_bias(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype, granularity: str,
) -> torch.Tensor:  # fmt: skip
    # With row-wise scales the GEMM writes bf16 only: a bias of another dtype is added afterwards.
    fused_bias = bias if bias is not None and bias.dtype == dtype == torch.bfloat16 else None
    gemm = _scaled_mm_traced if torch.compiler.is_compiling() else _scaled_mm
    out = gemm(data, scale, weight, weight_scale, fused_bias, granularity).to(dtype)
    return out if bias is None or fused_bias is not None else out + bias.to(dtype)


class _EightBitLinear(QuantizedLinear):
    """Base of the 8-bit layers.

    Attributes:
        granularity: Granularity of the scales: argument of `_scaled_mm`, and key of the activation cache.
        input_dtype: Dtype of quantized activations, a key of `TYPES`.
    """

    granularity: str
    input_dtype: ClassVar[str] = "e4m3"

    def dequantize(self) -> torch.Tensor:
        return formats.dequantize(self.weight_data, self.weight_scale)

    def quantize_input_native(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantizes activations, (rows, in_features), in plain torch; under a compiler, as an operator of the graph.

        Returns:
            Values (rows, in_features) and scales.
        """
        if torch.compiler.is_compiling():
            return quantize_rows(x, self.input_dtype)
        return formats.quantize_rows(x, TYPES[self.input_dtype])

    def quantize_input_triton(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantizes activations, (rows, in_features), in one Triton kernel.

        Returns:
            Values (rows, in_features) and scales.
        """
        from . import quantize_activations

        return quantize_activations.quantize_rows(x)

    def quantize_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantizes activations, (..., in_features), once for all layers that read the tensor. A compiler removes the
        repetition itself, so the cache is not used there.

        Returns:
            Values (rows, in_features) and scales.
        """
        if torch.compiler.is_compiling():
            return self.quantize_input_native(x.reshape(-1, self.in_features))
        return self.activation_cache.get(
            x, self.granularity, lambda item: self.quantize_input_triton(item.reshape(-1, item.shape[-1]))
        )

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled_mm_linear(x, self.bias)

    def scaled_mm_linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`F.scaled_mm` of the quantized activations and the stored weight, plus a bias."""
        data, scale = self.quantize_input(x)
        return _scaled_mm_with_bias(data, scale, self.weight_data, self.weight_scale, bias, x.dtype, self.granularity)

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(formats.dequantize(*self.quantize_input_native(x)), self.dequantize(), bias).to(x.dtype)


class Fp8Linear(_EightBitLinear):
    """e4m3 weights and activations: one scale per output feature, and one per token."""

    kind = "fp8"
    granularity = "row"

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        data, scale = formats.quantize_in_chunks(formats.quantize_rows, weight)
        return {"weight_data": data, "weight_scale": scale}


class Fp8TensorLinear(_EightBitLinear):
    """e4m3 weights and activations: one scale for the weight, and one for all activations.

    Attributes:
        input_scale: float32 (1,): the activations' scale from a calibration; `None` computes one at every call.
    """

    kind = "fp8-tensor"
    granularity = "tensor"
    row_tensors: ClassVar = {"weight_data": 1}
    per_tensor_scales = ("weight_scale",)
    input_scale: torch.Tensor | None

    def _init_from(self, linear: nn.Linear) -> None:
        super()._init_from(linear)
        self.register_buffer("input_scale", None, persistent=False)

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = formats.tensor_scale(weight)
        data, *_ = formats.quantize_in_chunks(lambda chunk: (formats.to_e4m3(chunk.float() / scale),), weight)
        return {"weight_data": data, "weight_scale": scale}

    def quantize_input_native(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.input_scale is not None:
            return formats.to_e4m3(x.float() / self.input_scale), self.input_scale
        return formats.quantize_tensor(x)

    def quantize_input_triton(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from . import quantize_activations

        return quantize_activations.quantize_tensor(x, self.input_scale)

    def quantize_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.input_scale is None or torch.compiler.is_compiling():
            return super().quantize_input(x)
        # Each layer has its own calibrated scale, so quantized activations are not shared.
        return self.quantize_input_triton(x.reshape(-1, self.in_features))


class Fp8BlockLinear(_EightBitLinear):
    """e4m3 weights and activations: one scale per block of 128 x 128 weights, and per 128 activations of a token.

    A weight of other sizes is padded with zeros to whole blocks, which is all that `F.scaled_mm` takes.
    """

    kind = "fp8-block"
    granularity = "block"
    row_tensors: ClassVar = {"weight_data": 1, "weight_scale": formats.BLOCK}

    @classmethod
    def pack_layers(cls, layers: Sequence[Any]) -> dict[str, torch.Tensor]:
        if any(layer.out_features % formats.BLOCK for layer in layers):
            raise CannotPack("one block of 128 x 128 weights would span two of them")
        return super().pack_layers(layers)

    @staticmethod
    def padded(data: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of a quantized weight, padded with zeros to whole blocks.

        Args:
            data: e4m3 (out_features, in_features).
            scale: float32 (out_features / 128, in_features / 128), rounded up.
        """
        rows, columns = data.shape
        data = F.pad(data.view(torch.uint8), (0, -columns % formats.BLOCK, 0, -rows % formats.BLOCK))
        # cuBLASLt reads scales four at a time along the input features.
        return {"weight_data": data.view(torch.float8_e4m3fn), "weight_scale": F.pad(scale, (0, -scale.shape[1] % 4))}

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.padded(*formats.quantize_in_chunks(formats.quantize_blocks, weight))

    def dequantize(self) -> torch.Tensor:
        return super().dequantize()[: self.out_features, : self.in_features]

    def quantize_input_native(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return formats.quantize_groups(x)

    def quantize_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padding = self.weight_data.shape[1] - self.in_features
        if not torch.compiler.is_compiling():
            return super().quantize_input(F.pad(x, (0, padding)) if padding else x)
        # cuBLASLt wants a multiple of four rows, and scales in column-major order.
        rows = x.reshape(-1, self.in_features)
        data, scale = formats.quantize_groups(F.pad(rows, (0, padding, 0, -rows.shape[0] % 4)))
        return data, scale.t().contiguous().t()

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        padding = self.weight_data.shape[0] - self.out_features
        out = self.scaled_mm_linear(
            x, None if self.bias is None else F.pad(self.bias, (0, padding)) if padding else self.bias
        )
        return out[: x.numel() // self.in_features, : self.out_features]

    def quantize_input_triton(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from . import quantize_activations

        return quantize_activations.quantize_groups(x)


class Int8Linear(_EightBitLinear):
    """INT8 weights and activations: one scale per output feature, and one per token."""

    kind = "int8"
    granularity = "int8 row"
    input_dtype = "int8"

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        data, scale = formats.quantize_in_chunks(lambda chunk: formats.quantize_rows(chunk, torch.int8), weight)
        return {"weight_data": data, "weight_scale": scale}

    def quantize_input_triton(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from . import quantize_activations

        return quantize_activations.quantize_rows(x, torch.int8)

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        data, scale = self.quantize_input(x)
        return _int8_linear(data, scale, self.weight_data, self.weight_scale, self.bias, x.dtype)


def _int8_linear_fake(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: Any, bias: Any, dtype: Any
) -> Any:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


@operator("int8_linear", _int8_linear_fake)
def _int8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    from .gemm import int8_linear

    return int8_linear(x, x_scale, weight, weight_scale, bias, dtype)


def _add(
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


# sm_89 is the first with e4m3 matrix units. `F.scaled_mm` supports block scales on Hopper only.
_add(Fp8Linear, 16, (8, 9))
_add(Fp8TensorLinear, 16, (8, 9))
_add(Fp8BlockLinear, 16, architectures=((9, 0),))
_add(Int8Linear, 16, (8, 0))
