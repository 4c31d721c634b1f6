"""Passes over rows between two products: operators against float64, and the Triton kernels beneath (interpreted on the
CPU, compiled on a GPU) against the operators' plain form."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from diffusers_accel.kernels.elementwise import operators, rows
from diffusers_accel.kernels.linear.row_quantization import TYPES, quantize_rows

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(DEVICE, dtype)


def float64(x, y, gate, weight, bias, factor, shift, eps, rms, plus_one):
    """The definition, written out."""
    x, y, weight, bias = (None if item is None else item.double() for item in (x, y, weight, bias))
    gate, factor, shift = (sum(each.double() for each in item) if item else None for item in (gate, factor, shift))
    total = x if y is None else x + (y if gate is None else gate * y)
    centred = total if rms else total - total.mean(-1, keepdim=True)
    out = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    out = out if factor is None else out * (factor + plus_one)
    return total, out if shift is None else out + shift


CASES = {
    "layer norm": {},
    "rms, weight": {"weight": (96,), "rms": True},
    "affine": {"weight": (96,), "bias": (96,)},
    "modulated": {"factor": (2, 1, 96), "shift": (2, 1, 96), "plus_one": True},
    "modulated by row": {"factor": (2, 5, 96), "shift": (1, 5, 96)},
    "residual": {"y": (2, 5, 96), "factor": (1, 1, 96)},
    "modulated by row and table": {
        "y": (2, 5, 96),
        "gate": ((2, 5, 96), (1, 1, 96)),
        "factor": ((1, 5, 96), (2, 1, 96)),
        "shift": ((2, 5, 96), (2, 1, 96)),
        "plus_one": True,
    },
    "gated": {"y": (2, 5, 96), "gate": (2, 1, 96), "factor": (2, 1, 96), "shift": (1, 1, 96), "rms": True},
}


def case(name, dtype=torch.float32):
    given = CASES[name]
    x = random(2, 7, 100, dtype=dtype)[:, 1:6, 2:98]  # rows that do not lie next to each other
    single = ("y", "weight", "bias")
    tensors = {key: random(*given[key], dtype=dtype, seed=len(key)) if key in given else None for key in single}
    for index, key in enumerate(("gate", "factor", "shift")):
        shapes = given.get(key, ())
        shapes = (shapes,) if shapes and isinstance(shapes[0], int) else shapes
        tensors[key] = [random(*one, dtype=dtype, seed=10 * index + place) for place, one in enumerate(shapes)]
    order = ("y", "gate", "weight", "bias", "factor", "shift")
    return [x, *(tensors[key] for key in order)], (1e-6, given.get("rms", False), given.get("plus_one", False))


@pytest.mark.parametrize("name", CASES)
def test_residual_norm(name):
    tensors, constants = case(name)
    total, expected = float64(*tensors, *constants)
    found_total, found, _ = operators.residual_norm(*tensors, *constants, "", torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    if tensors[1] is not None:
        torch.testing.assert_close(found_total.double(), total, atol=1e-6, rtol=1e-6)
    torch.library.opcheck(operators.residual_norm, (*tensors, *constants, "", torch.float32))


@pytest.mark.parametrize("kind", ["", "e4m3", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_residual_norm_kernel(name, dtype, kind):
    tensors, constants = case(name, dtype)
    total, expected = float64(*tensors, *constants)
    if tensors[1] is not None and dtype == torch.float16:  # the stream is rounded before its norm
        rounded = total.to(dtype)
        total, expected = rounded, float64(rounded, None, [], *tensors[3:], *constants)[1]
    made = operators._residual_norm_empty(tensors[0], tensors[1], kind, dtype)
    rows.residual_norm(*tensors, *constants, *made)
    if tensors[1] is not None:
        torch.testing.assert_close(
            made[0].double(), total.double(), atol=1e-6, rtol=1e-3 if dtype.itemsize == 2 else 1e-6
        )
    if not kind:
        step = 2e-3 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(made[1].double(), expected, atol=step, rtol=step)
        return
    largest = 127 if kind == "int8" else 448
    scale = expected.abs().amax(-1).flatten() / largest
    torch.testing.assert_close(made[2][:, 0].double(), scale, rtol=2e-3, atol=0)
    back = made[1].double().flatten(0, 1) * made[2]
    error = (back - expected.flatten(0, 1)).abs()
    # Half a step of INT8; e4m3 has three bits of mantissa.
    bound = scale[:, None] * 0.51 if kind == "int8" else expected.flatten(0, 1).abs() / 15 + scale[:, None] * 2**-9
    assert (error <= bound + 3e-3 * scale[:, None]).all()


def gelu(x, tanh):
    x = x.double()
    inner = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)) if tanh else torch.erf(x / 2**0.5)
    return 0.5 * x * (1 + inner)


def activated(part, gate, kind):
    x = part.double()
    if kind.startswith("gelu"):
        return gelu(x, kind == "gelu_tanh")
    silu = x / (1 + torch.exp(-x))
    return silu * gate.double() if kind == "swiglu" else silu if kind == "silu" else x


@pytest.mark.parametrize("plain", [True, False], ids=["operator", "kernel"])
@pytest.mark.parametrize("kind", ["e4m3", "int8"])
@pytest.mark.parametrize("kinds", [("gelu_tanh",), ("swiglu",), ("", "gelu_tanh"), ("silu", "swiglu"), ("gelu", "")])
def test_concat_quantize(kinds, kind, plain):
    both = [random(2, 5, 2 * width, seed=width) for width in (48, 1280)][: len(kinds)]
    parts = [item[..., : item.shape[-1] // 2] * 3 for item in both]
    gates = [
        item[..., item.shape[-1] // 2 :] if each == "swiglu" else None for item, each in zip(both, kinds, strict=True)
    ]
    whole = torch.cat([activated(*item) for item in zip(parts, gates, kinds, strict=True)], -1).flatten(0, 1)
    if plain:
        values, scale = operators.concat_quantize(parts, gates, ",".join(kinds), kind)
        torch.library.opcheck(operators.concat_quantize, (parts, gates, ",".join(kinds), kind))
    else:
        values, scale = operators._concat_quantize_empty(parts, kind)
        rows.concat_quantize(parts, gates, list(kinds), values, scale)
    assert values.dtype == TYPES[kind]
    expected = whole.abs().amax(-1, keepdim=True) / (127 if kind == "int8" else 448)
    torch.testing.assert_close(scale.double(), expected, rtol=1e-4, atol=0)
    bound = expected * 0.51 if kind == "int8" else whole.abs() / 15.5 + expected * 2**-9
    assert ((values.double() * scale - whole).abs() <= bound).all()


def test_quantize_rows_is_an_operator():
    for kind in TYPES:
        torch.library.opcheck(quantize_rows, (random(3, 16), kind))
