"""LoRA on quantized layers, through diffusers' loader, loaded before or after, merged or not. The reference is the same
LoRA on stock layers with the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, build, tensors

from diffusers_accel import accelerate, restore
from diffusers_accel.kernels.linear import QuantizedLinear

pytest.importorskip("peft")

# (pipeline, LoRA targets)
MODELS = {"flux": ["to_q", "to_k", "proj_out"], "wan": ["to_q", "to_v", "ffn.net.2"]}
# Relative tolerances: formats with 4-bit weights leave activations unquantized, 8-bit formats quantize them.
ALGOS = {"nvfp4": 1e-4, "int8": 0.12}


def difference(found, expected):
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def lora(name, seed=0):
    from peft import LoraConfig, get_peft_model_state_dict

    donor = build(name)
    torch.manual_seed(seed)
    donor.transformer.add_adapter(LoraConfig(r=2, target_modules=MODELS[name], init_lora_weights=False))
    return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor.transformer).items()}


def dequantized(name, algo):
    """A stock pipeline with the dequantized weights of a quantized one."""
    quantized, pipe = build(name), build(name)
    accelerate(quantized, linear={"algo": algo, "smallest": 0, "keep_original": "drop"})
    modules = dict(pipe.transformer.named_modules())
    with torch.no_grad():
        for path, module in quantized.transformer.named_modules():
            if isinstance(module, QuantizedLinear):
                modules[path].weight.copy_(module.dequantize())
    return pipe


@pytest.fixture(params=[(name, algo) for name in MODELS for algo in ALGOS], ids=lambda item: "-".join(item))
def case(request):
    name, algo = request.param
    entry = TINY[name]
    return name, algo, ALGOS[algo], lambda pipe: entry.run(pipe, steps=2)


def quantize(pipe, algo, keep="cpu"):
    return accelerate(pipe, linear={"algo": algo, "smallest": 0, "keep_original": keep})


def test_loaded_after(case):
    name, algo, bound, run = case
    pipe, reference = quantize(build(name), algo), dequantized(name, algo)
    before = run(pipe)
    for each in (pipe, reference):
        each.load_lora_weights(lora(name), adapter_name="one")
        each.load_lora_weights(lora(name, seed=1), adapter_name="two")
    assert any(isinstance(module, QuantizedLinear) for module in pipe.transformer.modules())
    for names, weights in ((["one"], [1.0]), (["two"], [0.5]), (["one", "two"], [0.7, -0.4])):
        for each in (pipe, reference):
            each.set_adapters(names, weights)
        with_lora = run(reference)
        # The error of quantized activations is far below the effect of the LoRA.
        assert difference(run(pipe), with_lora) < min(bound, difference(before, with_lora) / 2)
    pipe.disable_lora()
    assert difference(run(pipe), before) < 1e-6
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert difference(run(pipe), before) == 0


def test_restored_with_a_lora_on(case):
    """`restore` undoes the quantization and leaves a LoRA that was loaded later."""
    name, algo, _, run = case
    pipe, stock = quantize(build(name), algo), build(name)
    for each in (pipe, stock):
        each.load_lora_weights(lora(name))
    restore(pipe)
    assert not any(isinstance(module, QuantizedLinear) for module in pipe.transformer.modules())
    assert difference(run(pipe), run(stock)) == 0
    pipe.unload_lora_weights()
    assert difference(run(pipe), run(build(name))) == 0


def test_loaded_before(case):
    name, algo, bound, run = case
    pipe, reference, stock = build(name), dequantized(name, algo), build(name)
    for each in (pipe, reference, stock):
        each.load_lora_weights(lora(name))
    quantize(pipe, algo)
    assert difference(run(pipe), run(reference)) < bound
    pipe.set_adapters(["default_0"], [0.5])
    reference.set_adapters(["default_0"], [0.5])
    assert difference(run(pipe), run(reference)) < bound
    restore(pipe)
    pipe.set_adapters(["default_0"], [1.0])
    assert difference(run(pipe), run(stock)) == 0


@pytest.mark.parametrize("keep", ["cpu", "drop"])
def test_merged_after(case, keep):
    """A merge quantizes the merged layers again, from the stock weight where it is kept, and no other layer."""
    name, algo, bound, run = case
    pipe, stock = quantize(build(name), algo, keep), build(name)
    base = run(pipe)
    layers = dict(pipe.transformer.named_modules())
    before = {path: layer.dequantize() for path, layer in layers.items() if isinstance(layer, QuantizedLinear)}
    for each in (pipe, stock):
        each.load_lora_weights(lora(name))
        each.fuse_lora()
        each.unload_lora_weights()
    after = dict(pipe.transformer.named_modules())
    changed = {path for path in before if not torch.equal(after[path].dequantize(), before[path])}
    touched = {path for path in before if any(path.endswith(target) for target in MODELS[name])}
    assert changed == touched
    expected = quantize(stock, algo, "drop")
    for path in touched:
        found, wanted = after[path].dequantize(), dict(expected.transformer.named_modules())[path].dequantize()
        if keep == "cpu":
            torch.testing.assert_close(found, wanted)
        else:  # quantized twice
            assert float((found - wanted).norm() / wanted.norm()) < 0.25
    if keep == "cpu":
        assert difference(run(pipe), run(expected)) < 1e-3
    assert difference(run(pipe), base) > bound / 10


def test_merged_and_unmerged(case):
    name, algo, bound, run = case
    pipe = quantize(build(name), algo)
    before = run(pipe)
    pipe.load_lora_weights(lora(name))
    pipe.fuse_lora()
    assert difference(run(pipe), before) > bound / 10
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert difference(run(pipe), before) < 1e-2
    restore(pipe)
    assert difference(run(pipe), run(build(name))) < 1e-4
