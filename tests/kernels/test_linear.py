"""Quantized linear layers as modules: stored tensors, outputs, and the interface of the replaced `nn.Linear`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffusers_accel.core.platform import Device
from diffusers_accel.kernels.linear import LINEARS, formats
from diffusers_accel.kernels.linear.four_bit import Nvfp4NativeLinear
from diffusers_accel.kernels.linear.weight_view import WeightView

NAMES = ["fp8", "fp8-tensor", "fp8-block", "int8", "nvfp4", "nvfp4-fp8", "svdq-nvfp4"]
# Bounds on the relative error of outputs on Gaussian inputs. 8-bit formats quantize both operands, 4-bit formats the
# weight alone.
ERRORS = {
    "fp8": 0.045,
    "fp8-tensor": 0.045,
    "fp8-block": 0.045,
    "int8": 0.012,
    "nvfp4": 0.12,
    "nvfp4-fp8": 0.13,
    "svdq-nvfp4": 0.11,
}
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def linear(bias=True, dtype=torch.float32, inside=256, outside=384):
    torch.manual_seed(0)
    return nn.Linear(inside, outside, bias=bias).to(DEVICE, dtype).requires_grad_(False)


def quantized(name, stock):
    return LINEARS.get(name).load()(stock)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 256), (2, 7, 256), (300, 256), (0, 256)])
def test_output_against_float64(name, dtype, shape):
    stock = linear(dtype=dtype)
    layer = quantized(name, stock)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    out = layer(x)
    assert out.shape == (*shape[:-1], 384) and out.dtype == dtype
    if x.numel():
        assert relative(out, x.double() @ stock.weight.double().T + stock.bias.double()) < ERRORS[name]


@pytest.mark.parametrize("name", NAMES)
def test_stored_bytes(name):
    stock = linear(bias=False)
    layer = quantized(name, stock)
    expected = torch.uint8 if "nvfp4" in name else torch.int8 if name == "int8" else torch.float8_e4m3fn
    assert layer.weight_data.dtype == expected
    size = 384 * 256
    share = {"nvfp4": 4.5 / 8, "nvfp4-fp8": 4.5 / 8, "svdq-nvfp4": 4.5 / 8 + 32 * 4 * (384 + 256) / size}.get(name, 1)
    assert layer.stored_bytes <= share * size + 4 * 384 + 8
    assert not list(layer.parameters())
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (256, 384)


@pytest.mark.parametrize("name", NAMES)
def test_output_is_that_of_the_dequantized_weight(name):
    """Activations that are exact in the format leave no other error than the weight's."""
    stock = linear(bias=False)
    layer = quantized(name, stock)
    x = torch.zeros(4, 256, device=DEVICE)
    x[0, 3], x[1, 77], x[2, 255] = 1.0, -2.0, 4.0
    expected = x.double() @ layer.dequantize().double().T
    # nvfp4-fp8 rounds the dequantized weight to e4m3: one value in three changes.
    bound = 0.025 if name == "nvfp4-fp8" else 1e-6 if DEVICE == "cpu" else 5e-3
    assert relative(layer(x), expected) < bound


def test_sizes_that_are_no_multiple_of_a_block():
    """The stored weight is padded with zeros to a multiple of 128; `dequantize` and outputs are not."""
    stock = nn.Linear(200, 336, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    layer = quantized("fp8-block", stock)
    assert layer.weight_data.shape == (384, 256) and layer.dequantize().shape == (336, 200)
    assert relative(layer.dequantize(), stock.weight) < 0.03
    x = torch.randn(3, 7, 200, device=DEVICE, dtype=torch.bfloat16)
    assert layer(x).shape == (3, 7, 336)
    assert relative(layer(x), x.double() @ stock.weight.double().T + stock.bias.double()) < 0.045


@pytest.mark.parametrize("name", NAMES)
class TestAsStockLayer:
    def test_casts_leave_the_stored_form(self, name):
        layer = quantized(name, linear())
        before = {key: item.clone() for key, item in layer.named_buffers()}
        layer.to(torch.bfloat16)
        assert layer.bias.dtype == torch.bfloat16 and layer.weight.dtype == torch.bfloat16
        for key, item in layer.named_buffers():
            assert item.dtype == before[key].dtype and torch.equal(item.float(), before[key].float())
        assert layer.half()(torch.randn(3, 256, device=DEVICE).half()).dtype == torch.float16

    def test_to_meta_keeps_dtypes(self, name):
        layer = quantized(name, linear())
        types = {key: item.dtype for key, item in layer.named_buffers()}
        layer.to("meta")
        assert all(item.is_meta for item in layer.buffers()) and layer.weight.device.type == "meta"
        layer.to_empty(device=DEVICE)
        assert {key: item.dtype for key, item in layer.named_buffers()} == types

    def test_the_weight_can_be_read(self, name):
        stock = linear()
        layer = quantized(name, stock)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor) and weight.shape == stock.weight.shape
        assert weight.dtype == stock.weight.dtype and weight.device == stock.weight.device
        assert torch.equal(weight + 0, layer.dequantize())
        assert torch.equal(torch.cat([weight, weight])[384:], layer.dequantize())
        assert torch.equal(weight.T @ weight, layer.dequantize().T @ layer.dequantize())

    def test_the_weight_can_be_written(self, name):
        """PEFT merges a LoRA in place, through `.data`, and by assignment."""
        stock = linear()
        delta = torch.randn(384, 256, device=DEVICE) * 0.1
        error = 2 * ERRORS[name]
        for write in ("add", "data", "assign"):
            layer = quantized(name, stock)
            if write == "add":
                layer.weight.data += delta
            elif write == "data":
                layer.weight.data = stock.weight.data + delta
            else:
                layer.weight = nn.Parameter(stock.weight + delta)
            assert relative(layer.weight + 0, stock.weight + delta) < error, write
            assert "weight" not in layer._parameters
        with pytest.raises(ValueError, match=r"shape \(384, 256\), not \(3, 3\)"):
            layer.weight = torch.zeros(3, 3)

    def test_a_kept_stock_layer_gives_the_weight(self, name):
        stock = linear()
        original = stock.weight.clone()
        layer = quantized(name, stock)
        layer.keep_stock(stock)
        assert torch.equal(layer.weight + 0, original)
        assert torch.equal(layer.state_dict()["weight"], original)
        layer.weight.data += 1
        assert torch.equal(stock.weight, original + 1)
        assert relative(layer.dequantize(), original + 1) < ERRORS[name]

    def test_state_dict_holds_the_stock_weight(self, name):
        stock = linear(dtype=torch.bfloat16)
        layer = quantized(name, stock)
        state = layer.state_dict()
        assert set(state) == {"weight", "bias"} and state["weight"].dtype == torch.bfloat16
        fresh = nn.Linear(256, 384, dtype=torch.bfloat16)
        fresh.load_state_dict({key: item.cpu() for key, item in state.items()})
        assert torch.equal(fresh.weight.to(DEVICE), layer.dequantize().bfloat16())
        other = linear(dtype=torch.bfloat16)
        other.weight += 1
        layer.load_state_dict(other.state_dict())
        assert relative(layer.dequantize(), other.weight) < ERRORS[name]
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict({"bias": other.bias})

    def test_copies_and_repr(self, name):
        layer = quantized(name, linear())
        twin = copy.deepcopy(layer)
        x = torch.randn(3, 256, device=DEVICE)
        assert torch.equal(twin(x), layer(x))
        assert layer.kind in repr(layer) and "WeightView" in repr(layer.weight)
        assert isinstance(layer.weight, WeightView)

    def test_one_graph(self, name):
        layers = nn.ModuleList([quantized(name, linear()) for _ in range(3)])
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        run = torch.compile(lambda layer, x: layer(x), backend=count, fullgraph=True)
        x = torch.randn(5, 256, device=DEVICE)
        for layer in layers:
            torch.testing.assert_close(run(layer, x), layer(x), rtol=2e-2, atol=2e-2)
        assert len(graphs) == 1


@pytest.mark.parametrize("name", NAMES)
def test_awkward_weights(name):
    """Rows of zeros, subnormal and large values: no value becomes NaN, and zeros stay zeros."""
    stock = linear()
    stock.weight[0] = 0
    stock.weight[1] *= 1e-38
    stock.weight[2] *= 1e4
    layer = quantized(name, stock)
    out = layer(torch.randn(4, 256, device=DEVICE))
    assert out.isfinite().all()
    if "svdq" not in name:
        torch.testing.assert_close(out[:, 0], stock.bias[0].expand(4), rtol=1e-2, atol=1e-4)
    assert layer(torch.zeros(2, 256, device=DEVICE)).isfinite().all()


def test_static_scales_are_used():
    layer = quantized("fp8-tensor", linear())
    layer.input_scale = torch.tensor([0.01], device=DEVICE)
    x = torch.randn(64, 256, device=DEVICE)
    x_quantized = formats.dequantize(formats.to_e4m3(x / 0.01), layer.input_scale)
    torch.testing.assert_close(layer(x), x_quantized @ layer.dequantize().T + layer.bias, rtol=2e-2, atol=2e-2)
    assert relative(layer(x), x @ layer.dequantize().T + layer.bias) < 0.045


def unswizzled(flat, rows, columns):
    """Block scales in row order, from the order of Blackwell's matrix units, by the description in cuBLAS's manual."""
    found = torch.empty(rows, columns)
    tiles = -(-columns // 4)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * tiles + c // 4
            found[r, c] = flat[512 * tile + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4]
    return found


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (200, 6), (1, 1)])
def test_scales_in_blackwells_order(rows, columns):
    scale = torch.rand(rows, columns).to(torch.float8_e4m3fn)
    flat = formats.swizzled(scale)
    assert flat.shape == (-(-rows // 128) * -(-columns // 4) * 512,)
    assert torch.equal(unswizzled(flat.float(), rows, columns), scale.float())
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    assert torch.equal(flat.float(), utils.to_blocked(scale).float())


@pytest.mark.parametrize("packed", [False, True])
def test_nvfp4_gemm_of_blackwell(monkeypatch, packed):
    """Without such a GPU: a mock of `F.scaled_mm` computes the product of its arguments in float64."""
    import torch.nn.functional as F

    def operand(packed, scales, recipe, swizzle):
        assert recipe == [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
        assert swizzle == [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
        assert packed.dtype == torch.float4_e2m1fn_x2 and scales[1].shape == (1,) and scales[1].dtype == torch.float32
        codes = packed.view(torch.uint8)
        block = unswizzled(scales[0].float(), len(codes), codes.shape[1] // 8).to(torch.float8_e4m3fn)
        return formats.dequantize_nvfp4(codes, block, scales[1]).double()

    def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a=None, swizzle_b=None, output_dtype=None):
        found = operand(a, scale_a, recipe_a, swizzle_a) @ operand(b.t(), scale_b, recipe_b, swizzle_b).T
        return found.to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    stock = nn.Linear(96, 160, dtype=torch.bfloat16).requires_grad_(False)
    layer = Nvfp4NativeLinear(stock)
    assert layer.kind == "nvfp4"
    if packed:
        layer.weight_scale_2 = layer.weight_scale_2.reshape(1, 1).expand(160, 1).contiguous()
    x = torch.randn(2, 7, 96, dtype=torch.bfloat16)
    expected = layer.forward_native(x.reshape(-1, 96))
    assert relative(layer.forward_cuda(x), expected) < 5e-3
    assert relative(expected, stock(x).reshape(-1, 160)) < 0.2


def test_devices_of_each_format():
    ampere, ada, hopper, blackwell = (Device("cuda", "GPU", arch) for arch in ((8, 0), (8, 9), (9, 0), (10, 0)))
    for name, able in {
        "fp8": (ada, hopper, blackwell),
        "fp8-block": (hopper,),  # `F.scaled_mm` with block scales
        "int8": (ampere, ada, hopper, blackwell),
        "nvfp4": (ampere, ada, hopper, blackwell),
    }.items():
        for device in (ampere, ada, hopper, blackwell):
            assert (LINEARS.get(name).missing(device) is None) == (device in able), (name, device)
    assert "runs on sm_90 only; this is GPU" in LINEARS.get("fp8-block").missing(blackwell)


def test_refused_shapes():
    for name, inside, outside, reason in (
        ("fp8", 24, 32, "24 input features are no multiple of 16"),
        ("fp8-block", 256, 40, "40 output features are no multiple of 16"),
        ("nvfp4", 40, 32, "no multiple of 16"),
    ):
        assert reason in LINEARS.get(name).refuses(nn.Linear(inside, outside))
    layer = nn.Linear(32, 32)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    assert "float8_e4m3fn" in LINEARS.get("fp8").refuses(layer)


class TestActivationCache:
    """Layers that read one tensor quantize it once, and never use a value of an older version."""

    def counted(self):
        from diffusers_accel.kernels.linear.module import ActivationCache

        calls = []

        def make(x):
            calls.append(x.clone())
            return x * 2

        return ActivationCache(), calls, make

    def test_one_tensor_is_quantized_once(self):
        cache, calls, make = self.counted()
        x = torch.ones(3)
        first = cache.get(x, "row", make)
        assert cache.get(x, "row", make) is first and len(calls) == 1
        assert cache.get(x, "block", make) is not first and len(calls) == 2

    def test_in_place_writes(self):
        cache, _, make = self.counted()
        x = torch.ones(4)
        cache.get(x, "row", make)
        x[:2].add_(1)  # through a view
        assert torch.equal(cache.get(x, "row", make), torch.tensor([4.0, 4.0, 2.0, 2.0]))

    def test_another_tensor_at_the_same_address(self):
        cache, calls, make = self.counted()
        base = torch.zeros(8)
        for value in range(5):
            x = base[:4]  # a new tensor over old memory
            base.fill_(value)
            assert torch.equal(cache.get(x, "row", make), torch.full((4,), 2.0 * value))
            del x
        assert len(calls) == 5

    def test_the_value_dies_with_the_tensor(self):
        cache, _, make = self.counted()
        x = torch.ones(3)
        cache.get(x, "row", make)
        del x
        assert cache._entry is None

    def test_inference_tensors_are_not_cached(self):
        cache, calls, make = self.counted()
        with torch.inference_mode():
            x = torch.ones(3)
            cache.get(x, "row", make)
            x.add_(1)
            assert torch.equal(cache.get(x, "row", make), torch.full((3,), 4.0)) and len(calls) == 2
