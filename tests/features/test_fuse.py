"""Packed projections: stock outputs, quantized or not, beside other features and packages, and undone by restore."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, build

from diffusers_accel import (
    CompileConfig,
    ConfigError,
    FuseConfig,
    Unsupported,
    accelerate,
    explain,
    from_pretrained,
    restore,
    save_quantized,
    stats,
)
from diffusers_accel.features import context
from diffusers_accel.kernels.linear import LinearSlice

# Number of layers of a tiny denoiser that are packed.
FAMILIES = {
    "flux": 3 * 6 + 3 * 4,  # both streams of a double block; a single block's feed-forward too
    "flux2": 18,
    "wan": 3 * 3 + 3 * 2,
    "wan22": 2 * 15,
    "wan-i2v": 21,
    "wan-vace": None,
    "ltx2": 42,
    "ltx2-stg": 3 * (2 + 2 + 4 * 2),  # values may be computed without queries
    "qwen": 18,
    "cosmos": 15,
    "cosmos-predict25-v2w": 15,
    "cosmos3": 18,
    "sd3": None,
}


def tensors(output):
    return output if isinstance(output, tuple) else (output,)


def denoisers(pipe):
    return [getattr(pipe, name) for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is not None]


def state(pipe):
    return {key: item.clone() for model in denoisers(pipe) for key, item in model.state_dict().items()}


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, tensors(found), tensors(expected)))


def close(found, expected):
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def products(pipe, run):
    """Calls of `F.linear` in a run, and its output."""
    counts = Counter()
    original = torch.nn.functional.linear

    def counted(*args, **kwargs):
        counts["linear"] += 1
        return original(*args, **kwargs)

    torch.nn.functional.linear = counted
    try:
        return run(pipe), counts["linear"]
    finally:
        torch.nn.functional.linear = original


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    entry, pipe = TINY[name], build(name)
    weights = state(pipe)
    parameters = [item for model in denoisers(pipe) for item in model.parameters()]
    stock, before = products(pipe, lambda pipe: entry.run(pipe, steps=2))
    accelerate(pipe, fuse=True)
    found, after = products(pipe, lambda pipe: entry.run(pipe, steps=2))
    close(found, stock)
    assert after < before
    slices = [module for model in denoisers(pipe) for module in model.modules() if isinstance(module, LinearSlice)]
    assert FAMILIES[name] in (None, len(slices)) and slices
    assert stats(pipe).weight_bytes_after == stats(pipe).weight_bytes_before
    seen = state(pipe)
    assert list(seen) == list(weights) and all(torch.equal(seen[key], weights[key]) for key in seen)
    restore(pipe)
    assert same(entry.run(pipe, steps=2), stock)
    seen = state(pipe)
    assert all(torch.equal(seen[key], weights[key]) for key in seen)
    again = [item for model in denoisers(pipe) for item in model.parameters()]
    assert all(one is other for one, other in zip(again, parameters, strict=True))


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2-stg", "cosmos3"])
def test_quantized(name):
    """Packing concatenates the stored tensors and quantizes nothing again."""
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=2)
    for algo in ("fp8", "fp8-tensor", "int8", "nvfp4", "svdq-nvfp4"):
        accelerate(pipe, linear={"algo": algo, "smallest": 0})
        apart = entry.run(pipe, steps=2)
        kinds = stats(pipe).linear_layers
        accelerate(pipe, linear={"algo": algo, "smallest": 0}, fuse=True)
        assert any(isinstance(module, LinearSlice) for module in pipe.transformer.modules())
        close(entry.run(pipe, steps=2), apart)
        assert stats(pipe).linear_layers == kinds
    restore(pipe)
    assert same(entry.run(pipe, steps=2), stock)


def test_different_formats_are_not_packed():
    pipe = build("flux")
    stock = TINY["flux"].run(pipe, steps=2)
    linear = {"algo": "int8", "smallest": 0, "plan": {"transformer_blocks.*.attn.to_v": "none"}}
    with pytest.warns(UserWarning, match=r"fuse: transformer: transformer_blocks\.0\.attn\.to_q.*formats differ"):
        accelerate(pipe, linear=linear, fuse=True)
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.add_q_proj, LinearSlice)
    assert not isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, LinearSlice)
    restore(pipe)
    assert same(TINY["flux"].run(pipe, steps=2), stock)


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2", "sd3"])
def test_compiled(name):
    """As many graphs as without packing, and no more GEMMs in them than in eager."""
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=2)
    graphs, linears = [], []

    def backend(graph, examples):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        graphs[-1] += 1
        linears[-1] += sum("linear" in target for target in targets)
        return graph.forward

    torch._dynamo.register_backend(name=f"counting_{name}", compiler_fn=backend)
    for sections in ({}, {"fuse": True}):
        torch.compiler.reset()
        graphs.append(0)
        linears.append(0)
        accelerate(pipe, compile=CompileConfig(backend=f"counting_{name}"), **sections)
        close(entry.run(pipe, steps=2), stock)
    assert graphs[0] == graphs[1] and linears[1] < linears[0]
    packed = {id(item._packed): item._packed for item in pipe.transformer.modules() if isinstance(item, LinearSlice)}
    assert all(item._traced_input is None and item._traced_output is None for item in packed.values())


LORA = {"flux": ["to_q", "to_k", "proj_mlp"], "wan": ["to_q", "to_v", "ffn.net.2"]}


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("linear", [None, {"algo": "int8", "smallest": 0}])
def test_lora(name, linear):
    """A LoRA loaded before or after, merged, unmerged and unloaded, against the same LoRA on separate layers."""
    peft = pytest.importorskip("peft")
    entry, donor = TINY[name], build(name)
    torch.manual_seed(0)
    donor.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=LORA[name], init_lora_weights=False))
    weights = {f"transformer.{key}": item for key, item in peft.get_peft_model_state_dict(donor.transformer).items()}
    fused, apart = build(name), build(name)
    plain = entry.run(apart, steps=2)
    accelerate(fused, linear=linear, fuse=True)
    accelerate(apart, linear=linear, attention="sdpa")

    def alike():
        found, expected = entry.run(fused, steps=2), entry.run(apart, steps=2)
        close(found, expected)
        return expected

    without = alike()
    for pipe in (fused, apart):
        pipe.load_lora_weights(dict(weights), adapter_name="one")
    with_lora = alike()
    assert not same(with_lora, without)
    for safe in (False, True):
        for pipe in (fused, apart):
            pipe.fuse_lora(safe_fusing=safe)
        alike()
        for pipe in (fused, apart):
            pipe.unfuse_lora()
        alike()
    for pipe in (fused, apart):
        pipe.unload_lora_weights()
    close(alike(), without)
    # A LoRA that is loaded already wraps the slices, and stays after restore.
    for pipe in (fused, apart):
        restore(pipe)
        pipe.load_lora_weights(dict(weights), adapter_name="one")
    stock = entry.run(apart, steps=2)
    accelerate(fused, fuse=True)
    close(entry.run(fused, steps=2), stock)
    restore(fused)
    close(entry.run(fused, steps=2), stock)
    fused.unload_lora_weights()
    if linear is None:
        close(entry.run(fused, steps=2), plain)


def test_saved_files_are_the_stock_ones(tmp_path):
    pipe = build("flux")
    pipe.transformer.save_pretrained(tmp_path / "stock")
    accelerate(pipe, fuse=True)
    pipe.transformer.save_pretrained(tmp_path / "fused")
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "stock" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes()


@pytest.mark.parametrize("algo", ["fp8-tensor", "nvfp4", "svdq-nvfp4"])
def test_quantized_checkpoints(algo, tmp_path):
    """Files of packed layers equal those of separate layers; loaded, packed and restored bit for bit."""
    pipe = build("wan")
    accelerate(pipe, linear={"algo": algo, "smallest": 0})
    save_quantized(pipe, tmp_path / "apart")
    accelerate(pipe, linear={"algo": algo, "smallest": 0}, fuse=True)
    save_quantized(pipe, tmp_path / "fused")
    file = "transformer/diffusion_pytorch_model.safetensors"
    apart, fused = (load_file(tmp_path / name / file) for name in ("apart", "fused"))
    assert apart.keys() == fused.keys()
    for key, item in apart.items():
        assert torch.equal(fused[key].view(-1).view(torch.uint8), item.view(-1).view(torch.uint8)), key
    loaded = from_pretrained(tmp_path / "fused", dtype=torch.float32)
    buffers = {name: item.clone() for name, item in loaded.transformer.named_buffers()}
    expected = TINY["wan"].run(loaded, steps=2)
    accelerate(loaded, fuse=True)
    close(TINY["wan"].run(loaded, steps=2), expected)
    restore(loaded)
    found = dict(loaded.transformer.named_buffers())
    assert found.keys() == buffers.keys()
    assert all(torch.equal(found[key].view(torch.uint8), item.view(torch.uint8)) for key, item in buffers.items())


def test_explain_and_ignore():
    pipe = build("wan")
    text = str(explain(pipe, fuse=True))
    assert "6 GEMMs instead of 15" in text
    accelerate(pipe, fuse={"ignore": ["blocks.0.*"]})
    assert not any(isinstance(module, LinearSlice) for module in pipe.transformer.blocks[0].modules())
    assert isinstance(pipe.transformer.blocks[1].attn1.to_v, LinearSlice)
    assert str(explain(pipe, fuse=True)) == text  # explain sees the stock layers behind the session in force
    with pytest.raises(Unsupported, match=r"fuse\.ignore: 'nowhere'"):
        accelerate(pipe, fuse=FuseConfig(ignore=("nowhere",)))
    with pytest.raises(ConfigError, match="fuse"):
        accelerate(pipe, fuse="all")
    restore(pipe)
    pipe.transformer.blocks[0].attn1.fuse_projections()
    accelerate(pipe, fuse=True)  # diffusers has fused the other block
    assert not isinstance(pipe.transformer.blocks[0].attn1.to_q, LinearSlice)
    restore(pipe)


def test_layers_that_are_not_packed(monkeypatch):
    """A layer in `fuse.ignore`; and in a rewritten graph the layer whose activation is fused into its GEMM, unless its
    output is quantized."""

    def packed(**sections):
        pipe = build("flux")
        accelerate(pipe, **sections)
        block = pipe.transformer.single_transformer_blocks[0]
        return [isinstance(layer, LinearSlice) for layer in (block.proj_mlp, block.attn.to_q, block.attn.to_v)]

    assert packed(fuse=True) == [True, True, True]
    assert packed(fuse={"ignore": ["*.proj_mlp"]}) == [False, True, True]
    monkeypatch.setattr(context, "REWRITTEN_ON", ("cpu",))
    assert packed(fuse=True) == [True, True, True]
    assert packed(fuse=True, compile=True) == [False, True, True]
    said = "proj_mlp are not packed: the activation is fused into their own GEMM"
    assert said in str(explain(build("flux"), fuse=True, compile=True))
    assert said not in str(explain(build("flux"), fuse=True))
    assert packed(fuse=True, compile={"rewrites": False}) == [True, True, True]
    assert packed(fuse=True, compile=True, linear={"algo": "int8", "smallest": 0}) == [True, True, True]


def test_a_failure_changes_nothing(monkeypatch):
    from diffusers_accel.features import attention

    pipe = build("flux")
    weights = state(pipe)

    def fails(*_):
        raise RuntimeError("no")
        yield

    monkeypatch.setattr(attention, "edits", fails)
    with pytest.raises(Unsupported, match=r"attention on transformer .*RuntimeError: no"):
        accelerate(pipe, linear={"algo": "int8", "smallest": 0}, fuse=True, attention="sdpa")
    assert not any(isinstance(module, LinearSlice) for module in pipe.transformer.modules())
    seen = state(pipe)
    assert all(torch.equal(seen[key], weights[key]) for key in weights)


@pytest.mark.gpu
@pytest.mark.parametrize("linear", [None, {"algo": "fp8", "smallest": 0}])
@pytest.mark.parametrize("kind", ["model", "block_level", "leaf_level"])
def test_offloading(kind, linear):
    """Offloading that is enabled afterwards: every slice finds its weight on the device, in any order of calls."""
    gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if gpu.type == "cpu" and kind == "model":
        pytest.skip("needs an accelerator")
    pipe, entry = build("flux"), TINY["flux"]
    pipe.to(gpu)
    accelerate(pipe, linear=linear, fuse=True)
    expected = tensors(entry.run(pipe, steps=2))
    pipe.to("cpu")
    if kind == "model":
        pipe.enable_model_cpu_offload()
    else:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.transformer.enable_group_offload(
            onload_device=gpu, offload_device=torch.device("cpu"), offload_type=kind, **blocks
        )
        for name, component in pipe.components.items():
            if name != "transformer" and isinstance(component, torch.nn.Module):
                component.to(gpu)
    for _ in range(2):
        found = tensors(entry.run(pipe, steps=2))
        assert all(map(torch.equal, [item.cpu() for item in found], [item.cpu() for item in expected]))
