"""The 4-bit layers: NVFP4 weights, and SVDQuant's, where a low-rank branch at 16 bits carries what 4 bits hold worst.

The weight alone is 4-bit here. Before the product it is widened into a scratch tensor by one fused kernel, which costs
a few percent of a product of thousands of rows. Widened to 16 bits, with activations as they are, the gain is memory,
not time; `"nvfp4-fp8"` widens to e4m3 and rounds activations too, for the speed of an FP8 product. On Blackwell, whose
matrix units take NVFP4 as it is, `"nvfp4"` rounds activations to it too and widens nothing.

SVDQuant (https://arxiv.org/abs/2411.05007): weight = left @ right + residual, the residual in NVFP4. The branch is
fitted again to what rounding left over, a few times.
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
from .eight_bit import fp8_product
from .module import QuantizedLinear
from .record import LINEARS, LinearKernel

RANK = 32
_ROUNDS = 3


def _widen_fake(
    packed: torch.Tensor, block_scale: Any, global_scale: Any, dtype: torch.dtype, left: Any, right: Any
) -> Any:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=dtype)


@operator("widen_nvfp4", _widen_fake)
def _widen(
    packed: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    dtype: torch.dtype,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
) -> torch.Tensor:
    from .products import widen_nvfp4

    return widen_nvfp4(packed, block_scale, global_scale, dtype, left, right)


def _nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = formats.tensor_scale(x, formats.E2M1_MAX * formats.E4M3_MAX)
    if x.is_cuda:
        from . import weights

        return weights.quantize_nvfp4(x.contiguous(), scale)
    packed, block_scale = formats.in_slices(lambda part: formats.quantize_nvfp4(part, scale)[:2], x, 2**22)
    return packed, block_scale, scale


def _dense(packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """What is stored, float32."""
    if packed.is_cuda:
        return _widen(packed, block_scale, global_scale, torch.float32, None, None)
    return formats.dequantize_nvfp4(packed, block_scale, global_scale)


class Nvfp4Linear(QuantizedLinear):
    """NVFP4 weights, 16-bit activations."""

    kind = "nvfp4 (weight only)"
    by_weight = ("weight_scale_2",)
    weight_scale_2: torch.Tensor

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, block_scale, global_scale = _nvfp4(weight)
        return {"weight_data": packed, "weight_scale": block_scale, "weight_scale_2": global_scale}

    def dense(self) -> torch.Tensor:
        return _dense(self.weight_data, self.weight_scale, self.weight_scale_2)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight = _widen(self.weight_data, self.weight_scale, self.weight_scale_2, x.dtype, None, None)
        return F.linear(x.reshape(-1, self.in_features), weight, None if self.bias is None else self.bias.to(x.dtype))

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Nvfp4NativeLinear(Nvfp4Linear):
    """NVFP4 weights and activations, multiplied as they are: Blackwell only. Activations have a global scale of their
    own, found at every call."""

    kind = "nvfp4"

    def product(self, x: torch.Tensor) -> torch.Tensor:
        out = _nvfp4_product(x.reshape(-1, self.in_features), self.weight_data, self.weight_scale, self.weight_scale_2)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(formats.dequantize_nvfp4(*_nvfp4(x)), self.dense(), bias).to(x.dtype)


def _nvfp4_product_fake(x: torch.Tensor, packed: torch.Tensor, block_scale: Any, global_scale: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


@operator("nvfp4_product", _nvfp4_product_fake)
def _nvfp4_product(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor
) -> torch.Tensor:
    rounded, x_scale, x_global = _nvfp4(x)
    return native_product(rounded, x_scale, x_global, packed, block_scale, global_scale).to(x.dtype)


def native_product(
    x: torch.Tensor, x_scale: torch.Tensor, x_global: torch.Tensor,
    weight: torch.Tensor, weight_scale: torch.Tensor, weight_global: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """torch's product of two operands in NVFP4 as `formats.quantize_nvfp4` gives them, the second transposed: bf16. The
    weight's global scale may be one for each row."""
    kinds, order = F.ScalingType, F.SwizzleType
    recipe, swizzle = [kinds.BlockWise1x16, kinds.TensorWise], [order.SWIZZLE_32_4_4, order.NO_SWIZZLE]
    # What torch is told is one for all; where several weights are joined, each row's own goes on afterwards.
    several = weight_global.numel() > 1
    one = torch.ones_like(x_global) if several else weight_global
    out = F.scaled_mm(
        x.view(torch.float4_e2m1fn_x2), weight.view(torch.float4_e2m1fn_x2).t(),
        [formats.swizzled(x_scale), x_global], recipe, [formats.swizzled(weight_scale), one], recipe,
        swizzle_a=swizzle, swizzle_b=swizzle, output_dtype=torch.float32 if several else torch.bfloat16,
    )  # fmt: skip
    return (out * weight_global.view(1, -1)).bfloat16() if several else out


class Nvfp4Fp8Linear(Nvfp4Linear):
    """NVFP4 weights, multiplied as e4m3 with one scale per output feature, and per token of the activations."""

    kind = "nvfp4 (as fp8)"
    by_row: ClassVar = {"weight_data": 1, "weight_scale": 1, "row_scale": 1}
    row_scale: torch.Tensor

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().encode(weight)
        # A row's largest possible value becomes e4m3's largest. (A power of two instead, for which half of the values
        # are e4m3 numbers again, puts the others at midpoints, and loses more.)
        largest = found["weight_scale"].float().amax(1, keepdim=True) * found["weight_scale_2"] * formats.E2M1_MAX
        return found | {"row_scale": formats.scale_of(largest, formats.E4M3_MAX)}

    def product(self, x: torch.Tensor) -> torch.Tensor:
        each = self.weight_scale_2.reshape(-1, 1) / self.row_scale
        weight = _widen(self.weight_data, self.weight_scale, each, torch.float8_e4m3fn, None, None)
        return fp8_product(x.reshape(-1, self.in_features), weight, self.row_scale, self.bias)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        weight = formats.dequantize(formats.to_e4m3(self.dense() / self.row_scale), self.row_scale)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(formats.dequantize(*formats.quantize_rows(x)), weight, bias).to(x.dtype)


class SvdNvfp4Linear(Nvfp4Linear):
    """NVFP4 weights beside a low-rank branch at 16 bits."""

    kind = "svdq-nvfp4 (weight only)"
    joined_apart = ("svdquant_lora_a", "svdquant_lora_b")
    svdquant_lora_a: torch.Tensor
    svdquant_lora_b: torch.Tensor

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        wide = weight.float()
        stored = left = right = None
        rest = wide
        for place in range(_ROUNDS):
            # What the branch carried last is where the next search starts; the last one looks beyond it.
            iterations, spare = (3 if place == 0 else 2), (16 if place == _ROUNDS - 1 else 0)
            factors = formats.low_rank(rest, RANK, iterations, right, spare)
            left, right = (item.to(weight.dtype) for item in factors)
            stored = _nvfp4(torch.addmm(wide, left.float(), right.float(), alpha=-1))
            rest = wide - _dense(*stored)
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
    def joined(cls, layers: Sequence[Any]) -> dict[str, torch.Tensor]:
        # Every weight has a branch of its own: left factors lie on the diagonal.
        left, right = ([getattr(layer, f"svdquant_lora_{name}") for layer in layers] for name in "ba")
        return super().joined(layers) | {
            "svdquant_lora_b": torch.block_diag(*left),
            "svdquant_lora_a": torch.cat(right),
        }

    def _branch(self, place: int, bounds: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of one of the layers joined in this one: views."""
        rank = self.svdquant_lora_a.shape[0] // len(bounds)
        columns = slice(place * rank, (place + 1) * rank)
        return self.svdquant_lora_b[slice(*bounds[place]), columns], self.svdquant_lora_a[columns]

    def part(self, place: int, bounds: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        left, right = self._branch(place, bounds)
        return super().part(place, bounds) | {"svdquant_lora_b": left.contiguous(), "svdquant_lora_a": right}

    def write(self, place: int, bounds: Sequence[tuple[int, int]], tensors: Mapping[str, torch.Tensor]) -> None:
        super().write(place, bounds, tensors)
        left, right = self._branch(place, bounds)
        left.copy_(tensors["svdquant_lora_b"])
        right.copy_(tensors["svdquant_lora_a"])

    def dense(self) -> torch.Tensor:
        return super().dense() + self.svdquant_lora_b.float() @ self.svdquant_lora_a.float()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        left, right = (item.to(x.dtype) for item in (self.svdquant_lora_b, self.svdquant_lora_a))
        weight = _widen(self.weight_data, self.weight_scale, self.weight_scale_2, x.dtype, left, right)
        return F.linear(x.reshape(-1, self.in_features), weight, None if self.bias is None else self.bias.to(x.dtype))


def _fitting(linear: nn.Linear) -> QuantizedLinear:
    """The layer for a device: Blackwell multiplies as it is stored, in products whose depth is a multiple of 32."""
    weight = linear.weight
    native = weight.is_cuda and _native(torch.cuda.get_device_capability(weight.device)) and not linear.in_features % 32
    return (Nvfp4NativeLinear if native else Nvfp4Linear)(linear)


def _native(arch: tuple[int, int] | None) -> bool:
    return arch is not None and arch[0] in (10, 12)


def _wide(device: Device) -> str:
    if _native(device.arch):
        return "weights and activations are rounded to 4 bits. No GPU of this kind has run it in this project's tests."
    return "weights alone are 4-bit and are widened for each product: less memory, no more speed."


def _eight(device: Device) -> str:
    return "weights are stored in 4 bits and widened to 8 for each product, which rounds activations to 8 too."


def _branched(device: Device) -> str:
    return "weights alone are 4-bit, beside a low-rank branch, and are widened for each product: less memory only."


_MAKERS: tuple[tuple[str, Any, float, tuple[int, int], Any], ...] = (
    ("nvfp4", _fitting, 4.5, (8, 0), _wide),
    ("nvfp4-fp8", Nvfp4Fp8Linear, 4.5, (8, 9), _eight),
    ("svdq-nvfp4", SvdNvfp4Linear, 4.6, (8, 0), _branched),
)
for _name, _make, _bits, _least, _text in _MAKERS:
    LINEARS.add(
        _name,
        LinearKernel(
            name=_name,
            load=lambda make=_make: make,  # type: ignore[misc]
            modules=("triton",),
            install="pip install triton",
            at_least=_least,
            in_multiple=16,
            out_multiple=16,
            bits=_bits,
            note=_text,
        ),
    )
