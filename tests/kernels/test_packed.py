"""Packed linear layers: each slice returns its layer's output, and its surroundings see the stock layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffusers_accel.kernels.linear import (
    LINEARS,
    CannotPack,
    LinearSlice,
    PackedLinear,
    QuantizedLinear,
    release_tensors,
    restore_tensors,
    stock_modules,
)
from diffusers_accel.kernels.linear.eight_bit import Fp8TensorLinear

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ["plain", "fp8", "fp8-tensor", "fp8-block", "int8", "nvfp4", "svdq-nvfp4"]
SIZES = (256, 128, 384)


def layer(out_features, algo, seed=0, bias=True, in_features=256):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        # Weights of very different magnitudes: another layer's scale would show in the output.
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * 0.02 * 7.0**seed)
        if bias:
            linear.bias.copy_(torch.randn(out_features, generator=generator))
    linear.requires_grad_(False)
    return linear if algo == "plain" else LINEARS.get(algo).load()(linear)


def packed_model(layers):
    model = nn.ModuleDict({f"layer{place}": item for place, item in enumerate(layers)})
    packed = PackedLinear(layers)
    for place, item in enumerate(layers):
        model[f"layer{place}"] = LinearSlice(packed, place, item)
        release_tensors(item)
    return model, packed


def inputs(seed=5, rows=(3, 7), in_features=256):
    x = torch.randn(*rows, in_features, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, torch.bfloat16)


def close(found, expected, algo):
    # One product or several: the order of summation may differ; the stored values are the same.
    tolerance = {} if algo == "svdq-nvfp4" or DEVICE == "cuda" or algo == "plain" else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("algo", FORMATS)
@pytest.mark.parametrize("biases", [(True, True, True), (True, False, True)])
def test_slices_return_the_outputs_of_their_layers(algo, biases):
    layers = [layer(size, algo, seed, bias) for seed, (size, bias) in enumerate(zip(SIZES, biases, strict=True))]
    x = inputs()
    expected = [item(x) for item in layers]
    buffers = [{name: item.clone() for name, item in layer.named_buffers()} for layer in layers]
    parameters = [{name: item.clone() for name, item in layer.named_parameters()} for layer in layers]
    weights = [item.weight + 0 for item in layers]
    model, _ = packed_model(layers)
    for place in (0, 1, 2, 2, 1, 0):  # in any order
        close(model[f"layer{place}"](x), expected[place], algo)
    for place in range(3):
        item = model[f"layer{place}"]
        assert torch.equal(item.weight + 0, weights[place]) and item.weight.dtype == torch.bfloat16
        assert (item.bias is None) == (not biases[place])
        close(item.standalone()(x), expected[place], algo)
    # Tensors are held once; svdq-nvfp4's block-diagonal branches hold zeros too.
    held = sum(item.numel() * item.element_size() for item in [*model.parameters(), *model.buffers()])
    once = sum(item.numel() * item.element_size() for own in (*buffers, *parameters) for item in own.values())
    assert held <= once * (1.6 if algo == "svdq-nvfp4" else 1.1)
    for place, item in enumerate(layers):
        restore_tensors(model[f"layer{place}"])
        assert {name: item.shape for name, item in item.named_buffers()} == {
            name: item.shape for name, item in buffers[place].items()
        }
        for name, tensor in item.named_buffers():
            assert torch.equal(tensor.view(torch.uint8), buffers[place][name].view(torch.uint8)), name
        for name, tensor in item.named_parameters():
            assert torch.equal(tensor, parameters[place][name])
        assert torch.equal(item(x), expected[place])


@pytest.mark.parametrize("algo", FORMATS)
def test_a_write_to_a_slice_changes_its_rows_alone(algo):
    layers = [layer(size, algo, seed) for seed, size in enumerate(SIZES)]
    x = inputs()
    expected = [item(x) for item in layers]
    model, _ = packed_model(layers)
    other = layer(SIZES[1], "plain", 9).weight * 0.001
    model["layer1"].weight.data += other - model["layer1"].weight
    model["layer1"].weight.data = other + 0
    fresh = nn.Linear(256, SIZES[1], device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    fresh.weight.copy_(other)
    fresh.bias.copy_(model["layer1"].bias)
    fresh = fresh if algo == "plain" else LINEARS.get(algo).load()(fresh)
    close(model["layer1"](x), fresh(x), algo)
    for place in (0, 2):
        close(model[f"layer{place}"](x), expected[place], algo)
    with pytest.raises(ValueError, match="shape"):
        model["layer1"].weight = torch.zeros(3, 3)


class TestSharedProduct:
    """One product serves all slices while its input is unchanged."""

    @pytest.fixture
    def counted(self, monkeypatch):
        layers = [layer(size, "plain", seed) for seed, size in enumerate(SIZES)]
        alone = [copy.deepcopy(item) for item in layers]
        model, packed = packed_model(layers)
        calls = []
        forward = packed.layer.forward
        monkeypatch.setattr(packed.layer, "forward", lambda x: calls.append(1) or forward(x))
        return model, alone, calls

    def test_one_product_for_all(self, counted):
        model, _, calls = counted
        x = inputs()
        for name in model:
            model[name](x)
        assert len(calls) == 1
        model["layer1"](x)  # after the last slice nothing is cached
        assert len(calls) == 2

    def test_a_changed_input_is_computed_again(self, counted):
        model, alone, _ = counted
        x = inputs()
        model["layer0"](x)
        x.mul_(3)
        close(model["layer1"](x), alone[1](x), "plain")
        close(model["layer2"](inputs(6)), alone[2](inputs(6)), "plain")

    def test_inference_mode(self, counted):
        model, alone, calls = counted
        with torch.inference_mode():
            x = inputs() * 1
            model["layer0"](x)
            x.mul_(3)
            close(model["layer1"](x), alone[1](x), "plain")
        assert not calls  # tensors of inference mode have no version counter

    def test_the_output_dies_with_its_input(self, counted):
        model, _, _ = counted
        x = inputs()
        model["layer0"](x)
        cache = model["layer0"]._packed._output
        assert cache._entry is not None
        del x
        assert cache._entry is None

    def test_a_graph_computes_once_and_keeps_no_tensor(self):
        layers = [layer(size, "plain", seed) for seed, size in enumerate(SIZES)]
        alone = [copy.deepcopy(item) for item in layers]
        model, packed = packed_model(layers)
        seen = []

        def backend(graph, examples):
            seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
            return graph.forward

        @torch.compile(backend=backend, fullgraph=True)
        def forward(x):
            return [model[name](x) for name in model]

        for seed in (1, 2):
            x = inputs(seed)
            for found, item in zip(forward(x), alone, strict=True):
                close(found, item(x), "plain")
        assert len(seen) == 1 and sum("linear" in name for name in seen[0]) == 1
        assert packed._traced_input is None and packed._traced_output is None


def test_state_dicts_copies_and_casts_are_those_of_stock_layers(tmp_path):
    layers = [layer(size, "plain", seed, bias=seed != 1) for seed, size in enumerate(SIZES)]
    stock = nn.ModuleDict({f"layer{place}": copy.deepcopy(item) for place, item in enumerate(layers)})
    model, _ = packed_model(layers)
    expected = stock.state_dict()
    found = model.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in found)
    assert [name for name, _ in stock_modules(model)] == [name for name, _ in stock.named_modules()]
    other = {key: torch.randn_like(item) for key, item in expected.items()}
    model.load_state_dict(other)
    assert all(torch.equal(item, other[key]) for key, item in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"layer1\.weight"):
        model.load_state_dict({key: item for key, item in other.items() if key != "layer1.weight"})
    with pytest.raises(RuntimeError, match=r"layer2\.bias"):
        model.load_state_dict({key: item for key, item in other.items() if key != "layer2.bias"})
    twin = copy.deepcopy(model)
    twin["layer0"].weight.data += 1
    assert torch.equal(model["layer0"].weight + 0, other["layer0.weight"])
    model.float()
    assert model["layer2"].weight.dtype == torch.float32 and model["layer2"](inputs().float()).dtype == torch.float32


def test_layers_that_cannot_be_packed():
    with pytest.raises(CannotPack, match=r"formats differ \(Linear, fp8\)"):
        PackedLinear([layer(128, "plain"), layer(128, "fp8")])
    with pytest.raises(CannotPack, match="input features"):
        PackedLinear([layer(128, "plain"), layer(128, "plain", in_features=128)])
    with pytest.raises(CannotPack, match="input features"):
        PackedLinear([layer(128, "plain"), layer(128, "plain").float()])
    block = LINEARS.get("fp8-block").load()
    odd = block(nn.Linear(256, 100, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(CannotPack, match="one block of 128 x 128 weights would span two"):
        PackedLinear([odd, layer(128, "fp8-block")])
    one, two = layer(128, "fp8-tensor"), layer(128, "fp8-tensor")
    assert isinstance(one, Fp8TensorLinear) and isinstance(two, QuantizedLinear)
    one.input_scale = torch.ones(1, device=DEVICE)
    with pytest.raises(CannotPack, match="input_scale differ"):
        PackedLinear([one, two])
    two.input_scale = torch.ones(1, device=DEVICE)
    PackedLinear([one, two])
    two.pre_quant_scale = torch.full((256,), 2.0, device=DEVICE)
    with pytest.raises(CannotPack, match="pre_quant_scale differ"):
        PackedLinear([one, two])


def test_slices_share_their_pre_quant_scale():
    layers = [layer(128, "nvfp4", seed) for seed in range(2)]
    for item in layers:
        item.pre_quant_scale = torch.linspace(0.5, 2, 256, device=DEVICE)
    x = inputs()
    expected = [item(x) for item in layers]
    model, _ = packed_model(layers)
    for place in range(2):
        close(model[f"layer{place}"](x), expected[place], "nvfp4")
    weight = model["layer1"].weight + 0
    model["layer1"].weight = weight
    torch.testing.assert_close(model["layer1"].weight + 0, weight, atol=0.02, rtol=0.3)
