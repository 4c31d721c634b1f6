"""The 4-bit layers: NVFP4 weights, and SVDQuant's NVFP4 residual beside a low-rank branch in 16 bits.

Before Blackwell no matrix unit takes 4 bits, so the weight alone is stored in 4 bits. Before each GEMM one fused kernel
dequantizes the weight into a scratch tensor, at a few percent of the cost of a GEMM of thousands of rows.

- `"nvfp4"` dequantizes to 16 bits and leaves activations unquantized: it saves memory, not time.
- `"nvfp4-fp8"` dequantizes to e4m3 and quantizes activations too, for the speed of an FP8 GEMM.
- On Blackwell, `"nvfp4"` quantizes activations to NVFP4 and dequantizes nothing.

SVDQuant (https://arxiv.org/abs/2411.05007): weight = left @ right + residual, the residual in NVFP4. The branch is
refitted a few times to the quantization error of the residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...core.operators import operator
from ...core.platform import Device
from . import formats
from .eight_bit import fp8_linear
from .module import QuantizedLinear
from .record import LINEARS, LinearKernel

# Rank of the low-rank branch, and number of times it is fitted.
RANK = 32
_FITS = 3


def _dequantize_nvfp4_fake(
    packed: torch.Tensor, block_scale: Any, global_scale: Any, dtype: torch.dtype, left: Any, right: Any
) -> Any:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=dtype)


@operator("dequantize_nvfp4", _dequantize_nvfp4_fake)
def _dequantize_nvfp4(
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    dtype: torch.dtype,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
) -> torch.Tensor:
    from .gemm import dequantize_nvfp4

    return dequantize_nvfp4(packed, block_scale, global_scale, dtype, left, right)


def _quantize_nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`formats.quantize_nvfp4` of a weight or of activations, (rows, columns); on CUDA, by a Triton kernel."""
    scale = formats.tensor_scale(x, formats.E2M1_MAX * formats.E4M3_MAX)
    if x.is_cuda:
        from . import quantize_weights

        return quantize_weights.quantize_nvfp4(x.contiguous(), scale)
    packed, block_scale = formats.quantize_in_chunks(lambda chunk: formats.quantize_nvfp4(chunk, scale)[:2], x, 2**22)
    return packed, block_scale, scale


def _dequantized(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """`formats.dequantize_nvfp4`: float32 (rows, columns); on CUDA, by a Triton kernel."""
    if packed.is_cuda:
        return _dequantize_nvfp4(packed, block_scale, global_scale, torch.float32, None, None)
    return formats.dequantize_nvfp4(packed, block_scale, global_scale)


class Nvfp4Linear(QuantizedLinear):
    """NVFP4 weights, 16-bit activations.

    Attributes:
        weight_data: uint8 (out_features, in_features / 2): two e2m1 codes per byte.
        weight_scale: e4m3 (out_features, in_features / 16): block scales.
        weight_scale_2: float32 (1,): global scale; (out_features, 1) in a packed layer.
    """

    kind = "nvfp4 (weight only)"
    per_tensor_scales = ("weight_scale_2",)
    weight_scale_2: torch.Tensor

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, block_scale, global_scale = _quantize_nvfp4(weight)
        return {"weight_data": packed, "weight_scale": block_scale, "weight_scale_2": global_scale}

    def dequantize(self) -> torch.Tensor:
        return _dequantized(self.weight_data, self.weight_scale, self.weight_scale_2)

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        weight = _dequantize_nvfp4(self.weight_data, self.weight_scale, self.weight_scale_2, x.dtype, None, None)
        return F.linear(x.reshape(-1, self.in_features), weight, None if self.bias is None else self.bias.to(x.dtype))

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Nvfp4NativeLinear(Nvfp4Linear):
    """NVFP4 weights and activations, for the NVFP4 matrix units of Blackwell. The activations' global scale is computed
    at every call."""

    kind = "nvfp4"

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        out = _nvfp4_gemm(x.reshape(-1, self.in_features), self.weight_data, self.weight_scale, self.weight_scale_2)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(formats.dequantize_nvfp4(*_quantize_nvfp4(x)), self.dequantize(), bias).to(x.dtype)


def _nvfp4_gemm_fake(x: torch.Tensor, packed: torch.Tensor, block_scale: Any, global_scale: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


@operator("nvfp4_gemm", _nvfp4_gemm_fake)
def _nvfp4_gemm(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor
) -> torch.Tensor:
    x_packed, x_scale, x_global = _quantize_nvfp4(x)
    return scaled_mm_nvfp4(x_packed, x_scale, x_global, packed, block_scale, global_scale).to(x.dtype)


def scaled_mm_nvfp4(
    x: torch.Tensor, x_scale: torch.Tensor, x_global: torch.Tensor,
    weight: torch.Tensor, weight_scale: torch.Tensor, weight_global: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The NVFP4 GEMM x @ weight.T, `F.scaled_mm`, of operands as `formats.quantize_nvfp4` returns them.

    Args:
        x: uint8 (rows, depth / 2).
        x_scale: e4m3 (rows, depth / 16).
        x_global: float32 (1,).
        weight: uint8 (columns, depth / 2).
        weight_scale: e4m3 (columns, depth / 16).
        weight_global: float32 (1,), or (columns, 1) of packed layers.

    Returns:
        bf16 (rows, columns).
    """
    scaling, order = F.ScalingType, F.SwizzleType
    recipe, swizzle = [scaling.BlockWise1x16, scaling.TensorWise], [order.SWIZZLE_32_4_4, order.NO_SWIZZLE]
    # `F.scaled_mm` takes one global scale. Packed layers have several, which multiply the output's columns.
    per_column = weight_global.numel() > 1
    one_scale = torch.ones_like(x_global) if per_column else weight_global
    out = F.scaled_mm(
        x.view(torch.float4_e2m1fn_x2), weight.view(torch.float4_e2m1fn_x2).t(),
        [formats.swizzled(x_scale), x_global], recipe, [formats.swizzled(weight_scale), one_scale], recipe,
        swizzle_a=swizzle, swizzle_b=swizzle, output_dtype=torch.float32 if per_column else torch.bfloat16,
    )  # fmt: skip
    return (out * weight_global.view(1, -1)).bfloat16() if per_column else out


class Nvfp4Fp8Linear(Nvfp4Linear):
    """NVFP4 weights, dequantized to e4m3 for an FP8 GEMM with one scale per output feature and one per token.

    Attributes:
        row_scale: float32 (out_features, 1): scale of a row's e4m3 values.
    """

    kind = "nvfp4 (as fp8)"
    row_tensors: ClassVar = {"weight_data": 1, "weight_scale": 1, "row_scale": 1}
    row_scale: torch.Tensor

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = super().quantize(weight)
        # A row's largest possible value becomes e4m3's largest. A power of two would make half of the values exact in
        # e4m3, put the others at midpoints, and lose more.
        largest = tensors["weight_scale"].float().amax(1, keepdim=True) * tensors["weight_scale_2"] * formats.E2M1_MAX
        return tensors | {"row_scale": formats.scale_of(largest, formats.E4M3_MAX)}

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight_scale_2.reshape(-1, 1) / self.row_scale
        weight = _dequantize_nvfp4(self.weight_data, self.weight_scale, scale, torch.float8_e4m3fn, None, None)
        return fp8_linear(x.reshape(-1, self.in_features), weight, self.row_scale, self.bias)

    def forward_native(self, x: torch.Tensor) -> torch.Tensor:
        weight = formats.dequantize(formats.to_e4m3(self.dequantize() / self.row_scale), self.row_scale)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(formats.dequantize(*formats.quantize_rows(x)), weight, bias).to(x.dtype)


class SvdNvfp4Linear(Nvfp4Linear):
    """NVFP4 weights beside a low-rank branch in 16 bits (SVDQuant).

    Attributes:
        svdquant_lora_b: (out_features, rank), dtype of the stock weight: the left factor.
        svdquant_lora_a: (rank, in_features), dtype of the stock weight: the right factor.
    """

    kind = "svdq-nvfp4 (weight only)"
    custom_packed = ("svdquant_lora_a", "svdquant_lora_b")
    svdquant_lora_a: torch.Tensor
    svdquant_lora_b: torch.Tensor

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        full = weight.float()
        stored = left = right = None
        residual = full
        for fit in range(_FITS):
            # Each search starts from the last factors; the last search takes extra directions for accuracy.
            iterations, oversampling = (3 if fit == 0 else 2), (16 if fit == _FITS - 1 else 0)
            factors = formats.low_rank(residual, RANK, iterations, right, oversampling)
            left, right = (item.to(weight.dtype) for item in factors)
            stored = _quantize_nvfp4(torch.addmm(full, left.float(), right.float(), alpha=-1))
            residual = full - _dequantized(*stored)
        assert stored is not None and left is not None and right is not None
        packed, block_scale, global_scale = stored
        return {
            "weight_data": packed,
            "weight_scale": block_scale,
            "weight_scale_2": global_scale,
            "svdquant_lora_b": left.contiguous(),
            "svdquant_lora_a": right.contiguous(),
        }

    @classmethod
    def pack_layers(cls, layers: Sequence[Any]) -> dict[str, torch.Tensor]:
        # Each layer keeps its own branch: the left factors form a block diagonal.
        left, right = ([getattr(layer, f"svdquant_lora_{factor}") for layer in layers] for factor in "ba")
        return super().pack_layers(layers) | {
            "svdquant_lora_b": torch.block_diag(*left),
            "svdquant_lora_a": torch.cat(right),
        }

    def _branch(self, index: int, row_ranges: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one packed layer's left and right factor."""
        rank = self.svdquant_lora_a.shape[0] // len(row_ranges)
        columns = slice(index * rank, (index + 1) * rank)
        return self.svdquant_lora_b[slice(*row_ranges[index]), columns], self.svdquant_lora_a[columns]

    def slice_tensors(self, index: int, row_ranges: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        left, right = self._branch(index, row_ranges)
        return super().slice_tensors(index, row_ranges) | {
            "svdquant_lora_b": left.contiguous(),
            "svdquant_lora_a": right,
        }

    def write_slice(
        self, index: int, row_ranges: Sequence[tuple[int, int]], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        super().write_slice(index, row_ranges, tensors)
        left, right = self._branch(index, row_ranges)
        left.copy_(tensors["svdquant_lora_b"])
        right.copy_(tensors["svdquant_lora_a"])

    def dequantize(self) -> torch.Tensor:
        return super().dequantize() + self.svdquant_lora_b.float() @ self.svdquant_lora_a.float()

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        left, right = (item.to(x.dtype) for item in (self.svdquant_lora_b, self.svdquant_lora_a))
        weight = _dequantize_nvfp4(self.weight_data, self.weight_scale, self.weight_scale_2, x.dtype, left, right)
        return F.linear(x.reshape(-1, self.in_features), weight, None if self.bias is None else self.bias.to(x.dtype))


def _nvfp4_layer(linear: nn.Linear) -> QuantizedLinear:
    """The NVFP4 layer for the weight's device. Blackwell's matrix units take depths that are a multiple of 32."""
    weight = linear.weight
    native = (
        weight.is_cuda
        and _has_nvfp4_units(torch.cuda.get_device_capability(weight.device))
        and not linear.in_features % 32
    )
    return (Nvfp4NativeLinear if native else Nvfp4Linear)(linear)


def _has_nvfp4_units(arch: tuple[int, int] | None) -> bool:
    return arch is not None and arch[0] in (10, 12)


def _nvfp4_note(device: Device) -> str:
    if _has_nvfp4_units(device.arch):
        return "weights and activations are quantized to 4 bits. This project's tests have not run on such a GPU."
    return "only weights are in 4 bits, and are dequantized before each GEMM: less memory, no more speed."


def _nvfp4_fp8_note(device: Device) -> str:
    return "weights are stored in 4 bits and dequantized to FP8 before each GEMM; activations are quantized to FP8."


def _svdq_note(device: Device) -> str:
    return (
        "only weights are in 4 bits, beside a low-rank branch, and are dequantized before each GEMM: less memory only."
    )


_FORMATS: tuple[tuple[str, Any, float, tuple[int, int], Any], ...] = (
    ("nvfp4", _nvfp4_layer, 4.5, (8, 0), _nvfp4_note),
    ("nvfp4-fp8", Nvfp4Fp8Linear, 4.5, (8, 9), _nvfp4_fp8_note),
    ("svdq-nvfp4", SvdNvfp4Linear, 4.6, (8, 0), _svdq_note),
)
for _name, _make, _bits, _capability, _note in _FORMATS:
    LINEARS.add(
        _name,
        LinearKernel(
            name=_name,
            load=lambda make=_make: make,  # type: ignore[misc]
            modules=("triton",),
            install="pip install triton",
            at_least=_capability,
            in_multiple=16,
            out_multiple=16,
            bits=_bits,
            note=_note,
        ),
    )
