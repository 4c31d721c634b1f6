"""Every model through its real stock pipeline: lossless is stock, restore is bit-equal, files stay the same."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
import torch
from tiny import TINY, build

from diffusers_accel import AccelConfig, CompileConfig, TeaCacheConfig, accelerate, explain, restore, stats
from diffusers_accel.models import ADAPTERS, adapter_for

NAMES = sorted(TINY)
WITH_ADAPTER = [name for name in NAMES if TINY[name].family != "others"]
WITHOUT_ADAPTER = [name for name in NAMES if TINY[name].family == "others"]


def tensors(output):
    return output if isinstance(output, tuple) else (output,)


def assert_equal(found, expected):
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(one, other)


def keys(pipe, names):
    return {name: list(getattr(pipe, name).state_dict()) for name in names}


@pytest.mark.parametrize("name", NAMES)
def test_lossless_then_restored(name, tmp_path):
    """The kernel on the CPU is the one stock diffusers uses, so even the last bit must agree."""
    entry, pipe = TINY[name], build(name)
    present = [denoiser for denoiser in entry.denoisers if getattr(pipe, denoiser) is not None]
    stock, stock_keys = entry.run(pipe), keys(pipe, present)
    assert accelerate(pipe) is pipe
    found = entry.run(pipe)
    assert_equal(found, stock)
    assert stats(pipe).steps_computed == 4 and sum(stats(pipe).attention_kernels.values()) > 0
    assert keys(pipe, present) == stock_keys
    for denoiser in present:
        getattr(pipe, denoiser).save_pretrained(tmp_path / "accelerated" / denoiser)
    restore(pipe)
    assert_equal(entry.run(pipe), stock)
    for denoiser in present:
        getattr(pipe, denoiser).save_pretrained(tmp_path / "stock" / denoiser)
        for path in (tmp_path / "stock" / denoiser).iterdir():
            assert filecmp.cmp(path, tmp_path / "accelerated" / denoiser / path.name, shallow=False), path.name


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_layer_is_reached(name):
    """As many calls enter our kernels as enter SDPA in a stock run: none slips by, none is counted twice."""
    entry, pipe = TINY[name], build(name)
    stock_calls, inside = 0, 0
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        nonlocal stock_calls
        stock_calls += bool(inside)
        return original(*args, **kwargs)

    def enter(*_):
        nonlocal inside
        inside += 1

    def leave(*_):
        nonlocal inside
        inside -= 1

    modules = [getattr(pipe, denoiser) for denoiser in entry.denoisers if getattr(pipe, denoiser) is not None]
    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        entry.run(pipe, steps=2)
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()
    accelerate(pipe, attention="sdpa")
    entry.run(pipe, steps=2)
    assert stats(pipe).attention_kernels == {"sdpa": stock_calls}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_padding_mask_arrives(compiled):
    """Two prompts of different lengths: Qwen-Image pads one and masks the padding; without the mask it would show."""
    entry, pipe = TINY["qwen"], build("qwen")
    prompts = {
        "prompt": ["a red fox in the snow under a very dark sky", "fox"],
        "negative_prompt": ["blurry, low quality, and some more words", "bad"],
    }
    stock = entry.run(pipe, steps=2, **prompts)
    alone = entry.run(pipe, steps=2, prompt=prompts["prompt"][1], negative_prompt=prompts["negative_prompt"][1])
    assert stock.shape[0] == 2 and not torch.equal(stock[1], alone[0])
    accelerate(pipe, attention="sdpa", compile=CompileConfig(backend="eager") if compiled else None)
    assert_equal(entry.run(pipe, steps=2, **prompts), stock)
    masked = []
    from diffusers_accel.kernels.attention import DISPATCHERS

    dispatcher = list(DISPATCHERS.values())[-1]
    run = dispatcher.run
    dispatcher.run = lambda inputs: masked.append(inputs.attn_mask is not None) or run(inputs)
    entry.run(pipe, steps=2, **prompts)
    assert any(masked), "the prompts were meant to need a mask"


# One pipeline per denoiser class and way of calling it; the others differ outside of the blocks.
COMPILED = [
    "flux",
    "flux2",
    "wan",
    "wan-ti2v",
    "wan-i2v",
    "wan-vace",
    "ltx2-stg",
    "ltx23-stg",
    "qwen",
    "qwen-edit-plus",
    "cosmos",
    "cosmos-predict25-v2w",
    "cosmos3",
    "sd3-slg",
    "sd35",
    *WITHOUT_ADAPTER,
]


@pytest.mark.thorough
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_a_graph_break(name):
    """`fullgraph=True` raises on a break; the eager backend computes what stock computes."""
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=2)
    torch._dynamo.utils.counters.clear()
    accelerate(pipe, attention="sdpa", compile=CompileConfig(backend="eager", fullgraph=True))
    assert_equal(entry.run(pipe, steps=2), stock)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    restore(pipe)
    assert_equal(entry.run(pipe, steps=2), stock)


@pytest.mark.parametrize("name", WITH_ADAPTER)
def test_teacache_at_zero_is_stock_and_skips_above(name):
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe)
    accelerate(pipe, cache=TeaCacheConfig(threshold=0.0, coefficients=(1.0, 0.0)))
    assert_equal(entry.run(pipe), stock)
    assert stats(pipe).steps_skipped == 0
    accelerate(pipe, cache=TeaCacheConfig(threshold=1e9, coefficients=(1.0, 0.0)))
    skipping = entry.run(pipe)
    assert stats(pipe).steps_skipped >= 1
    assert any(not torch.equal(one, other) for one, other in zip(tensors(skipping), tensors(stock), strict=True))
    assert_equal(entry.run(pipe), skipping)


@pytest.mark.parametrize("name", WITHOUT_ADAPTER)
def test_without_an_adapter(name):
    """The default adapter gives attention and compilation, and caching is refused by name."""
    pipe = build(name)
    assert adapter_for(pipe.transformer).default
    rows = {row.feature: row for row in explain(pipe, attention="sdpa", compile=True, cache="teacache").rows}
    assert rows["attention"].modules > 0 and rows["compile"].modules > 1
    assert "no adapter" in rows["cache"].refused


def test_every_denoiser_class_of_the_list_has_one_adapter():
    classes = [name for adapter in ADAPTERS for name in adapter.classes]
    assert len(classes) == len(set(classes))
    import diffusers

    for name in classes:
        assert hasattr(diffusers, name), f"{name} is no class of diffusers"


@pytest.mark.parametrize("name", ["flux", "wan22", "sd3"])
def test_the_whole_pipeline_saves_the_same(name, tmp_path):
    pipe = build(name)
    pipe.save_pretrained(tmp_path / "stock")
    accelerate(pipe, AccelConfig(attention="sdpa", cache=TeaCacheConfig(threshold=1.0, coefficients=(1.0, 0.0))))
    pipe.save_pretrained(tmp_path / "accelerated")
    stock = sorted(path.relative_to(tmp_path / "stock") for path in Path(tmp_path / "stock").rglob("*"))
    assert stock == sorted(path.relative_to(tmp_path / "accelerated") for path in (tmp_path / "accelerated").rglob("*"))
    for path in stock:
        if (tmp_path / "stock" / path).is_file():
            assert filecmp.cmp(tmp_path / "stock" / path, tmp_path / "accelerated" / path, shallow=False), path
