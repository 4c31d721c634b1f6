"""Adapters to packages that CI does not have: called as their documentation says, by stand-ins with their signatures.

The stand-ins compute in float64, so an argument in the wrong place, a layout or an LSE in the wrong unit shows.
"""

from __future__ import annotations

import contextlib
import math
import sys
import types
from dataclasses import replace

import exact
import pytest
import torch

from diffusers_accel.core.platform import Device
from diffusers_accel.kernels.attention import KERNELS, AttentionKernel, Call, Inputs, packages
from diffusers_accel.kernels.linear import LINEARS


def inputs(dim=64, kv_heads=2, keys=53):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 37, 4, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def install(monkeypatch, name, **members):
    """A module of that name, with its parents."""
    module = types.ModuleType(name)
    for member, value in members.items():
        setattr(module, member, value)
    parts = name.split(".")
    for end in range(1, len(parts)):
        parent = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def check(name, scale=0.4, kv_heads=2, keys=53, lse=True, causal=False, dim=64):
    query, key, value = inputs(kv_heads=kv_heads, keys=keys, dim=dim)
    before = [item.clone() for item in (query, key, value)]
    function = KERNELS.get(name).load()
    expected, expected_lse = exact.attention(query, key, value, None, causal, scale)
    given = Inputs(query, key, value, is_causal=causal, scale=scale)
    torch.testing.assert_close(function(given).double(), expected, atol=1e-4, rtol=1e-4)
    if lse:
        found, found_lse = function(replace(given, return_lse=True))
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found_lse.double(), expected_lse, atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, (query, key, value), before))


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_2(monkeypatch, causal):
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        assert dropout_p == 0
        out, lse = exact.attention(q, k, v, None, causal, softmax_scale)
        return (out.float(), lse.float(), None) if return_attn_probs else out.float()

    install(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_func=flash_attn_func)
    monkeypatch.setattr("diffusers_accel.kernels.attention.torch_native.has_module", lambda name: True)
    check("flash2", causal=causal, keys=37)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_3(monkeypatch, causal):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        out, lse = exact.attention(q, k, v, None, causal, softmax_scale)
        return (out.float(), lse.float()) if return_attn_probs else out.float()

    install(monkeypatch, "fa3_fwd_interface", flash_attn_func=flash_attn_func)
    monkeypatch.setattr("diffusers_accel.kernels.attention.flash.has_module", lambda name: True)
    check("fa3", causal=causal, keys=37)


@pytest.mark.gpu
def test_flash_attention_3_in_fp8(monkeypatch):
    pytest.importorskip("triton")

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None,
        return_attn_probs=False,
    ):  # fmt: skip
        assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn
        assert q_descale.shape == k_descale.shape == v_descale.shape == (2, 2) and q_descale.dtype == torch.float32
        q = q.float() * q_descale.repeat_interleave(2, 1)[:, None, :, None]
        k, v = (x.float() * scale[:, None, :, None] for x, scale in ((k, k_descale), (v, v_descale)))
        out, lse = exact.attention(q, k, v, None, causal, softmax_scale)
        return (out.bfloat16(), lse.float()) if return_attn_probs else out.bfloat16()

    install(monkeypatch, "fa3_fwd_interface", flash_attn_func=flash_attn_func)
    monkeypatch.setattr("diffusers_accel.kernels.attention.flash.has_module", lambda name: True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, value = (item.to(device, torch.float16) for item in inputs())
    # Outlying channels, as the K of trained models has them: without the mean taken away the error would be far larger.
    key += 20 * (torch.arange(64, device=device) % 16 == 0)
    function = KERNELS.get("fa3-fp8").load()
    given = Inputs(query, key, value, scale=0.125)
    found, lse = function(replace(given, return_lse=True))
    expected, expected_lse = exact.attention(query, key, value, None, False, 0.125)
    assert found.dtype == query.dtype and exact.cosine(found, expected) > 0.998
    assert (lse.double() - expected_lse).abs().max() < 0.2
    assert torch.equal(function(given), found)
    # Values with a mean: what is rounded, and summed up by the matrix units, is the rest.
    value = value * 0.05 + 3 * torch.randn(2, 64, generator=torch.Generator().manual_seed(3)).to(device, torch.float16)
    expected, _ = exact.attention(query, key, value, None, False, 0.125)
    found = function(replace(given, value=value))
    assert (found.double() - expected).norm() / expected.norm() < 5e-3  # bf16, truncated by the interpreter


def test_flash_attention_4(monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_lse=False):
        out, lse = exact.attention(q, k, v, None, causal, softmax_scale)
        return out.float(), lse.float() if return_lse else None

    install(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    check("fa4")


@pytest.mark.parametrize("name", ["sageattention", *packages._SAGE_VARIANTS])
def test_sageattention_2(monkeypatch, name):
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
        assert tensor_layout == "NHD"
        out, lse = exact.attention(q, k, v, None, is_causal, sm_scale)
        return (out.float(), lse.float()) if return_lse else out.float()

    functions = {"sageattn", *(function for function, _ in packages._SAGE_VARIANTS.values())}
    install(monkeypatch, "sageattention", **dict.fromkeys(functions, sageattn))
    monkeypatch.setattr(packages, "version", lambda package: "2.2.0")
    check(name)
    record = packages.sageattention_record()
    assert record.lse and record.refuses(Call(keys=77)) is None
    assert KERNELS.get("sageattention-int8-fp8-cuda").refusal() is None


def test_sageattention_1_behind_guards(monkeypatch):
    """The release on the package index subtracts from the caller's K and divides by the largest of a zero block."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
        assert tensor_layout == "NHD" and k.shape[1] % 64 == 0
        if smooth_k:
            k -= k.mean(dim=1, keepdim=True)
        for item in (q, k):
            blocks = item[:, : item.shape[1] // 64 * 64].unflatten(1, (-1, 64))
            assert blocks.abs().amax((2, 4)).gt(0).all(), "a block of zeros"
        return exact.attention(q, k, v, None, is_causal, sm_scale)[0].float()

    install(monkeypatch, "sageattention", sageattn=sageattn)
    monkeypatch.setattr(packages, "version", lambda package: "1.0.6")
    check("sageattention", keys=128, lse=False)
    record = packages.sageattention_record()
    assert "multiple of 64; these are 77" in record.refuses(Call(keys=77)) and record.refuses(Call(keys=128)) is None
    assert record.refuses(Call(lse=True)) == "returns no logsumexp"
    assert "needs SageAttention 2, and 1.0.6 is installed" in KERNELS.get("sageattention-int8-fp8-cuda").refusal()
    zeros = [torch.zeros(1, 128, 2, 64) for _ in range(3)]
    assert KERNELS.get("sageattention").load()(Inputs(*zeros)).eq(0).all()


def test_sageattention_3(monkeypatch):
    def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True):
        q, k, v = (item.transpose(1, 2) for item in (q, k, v))
        return exact.attention(q, k, v, None, is_causal)[0].transpose(1, 2).float()

    install(monkeypatch, "sageattn3", sageattn3_blackwell=sageattn3_blackwell)
    check("sageattention3", lse=False)


@pytest.mark.parametrize("causal", [False, True])
def test_xformers(monkeypatch, causal):
    class LowerTriangularMask:
        pass

    def forward(q, k, v, attn_bias=None, p=0.0, scale=None):
        assert q.shape[2] == k.shape[2]
        out, lse = exact.attention(q, k, v, None, isinstance(attn_bias, LowerTriangularMask), scale)
        return out.float(), torch.nn.functional.pad(lse.float(), (0, 27), value=math.inf)  # rows padded to 64

    module = install(
        monkeypatch,
        "xformers.ops",
        LowerTriangularMask=LowerTriangularMask,
        memory_efficient_attention=lambda *args, **kwargs: forward(*args, **kwargs)[0],
        fmha=types.SimpleNamespace(memory_efficient_attention_forward_requires_grad=forward),
    )
    monkeypatch.setattr(sys.modules["xformers"], "ops", module, raising=False)
    check("xformers", causal=causal, keys=37)


def test_transformer_engine(monkeypatch):
    made = []

    class DotProductAttention:
        def __init__(self, num_attention_heads, kv_channels, num_gqa_groups, attention_dropout, qkv_format,
                     attn_mask_type, softmax_scale):  # fmt: skip
            assert (num_attention_heads, kv_channels, num_gqa_groups) == (4, 64, 2)
            assert attention_dropout == 0 and qkv_format == "bshd"
            self.causal, self.scale = {"causal": True, "no_mask": False}[attn_mask_type], softmax_scale
            made.append(self)

        def __call__(self, query, key, value):
            return exact.attention(query, key, value, None, self.causal, self.scale)[0].float().flatten(2)

    install(monkeypatch, "transformer_engine.pytorch", DotProductAttention=DotProductAttention)
    check("transformer-engine", lse=False)
    function = KERNELS.get("transformer-engine").load()
    made.clear()
    query, key, value = inputs()
    for _ in range(3):
        function(Inputs(query, key, value, scale=0.4))
    assert len(made) == 1  # a module per kind of call, not per call


def test_flashinfer(monkeypatch):
    def single_prefill_with_kv_cache(q, k, v, causal=False, sm_scale=None, return_lse=False):
        assert q.ndim == 3
        out, lse = exact.attention(q[None], k[None], v[None], None, causal, sm_scale)
        out, lse = out[0].float(), lse[0].t().float() / math.log(2)  # (sequence, heads), base 2
        return (out, lse) if return_lse else out

    install(monkeypatch, "flashinfer", single_prefill_with_kv_cache=single_prefill_with_kv_cache)
    check("flashinfer")


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
@pytest.mark.parametrize("causal", [False, True])
def test_flex(mask, causal):
    """torch's own, uncompiled: it runs on the CPU."""
    from diffusers_accel.kernels.attention.torch_native import _flex

    query, key, value = inputs(kv_heads=2, keys=37)
    given = None
    if mask == "boolean":
        given = torch.rand(2, 1, 1, 37, generator=torch.Generator().manual_seed(1)) > 0.3
        given[..., 0] = True
    elif mask == "additive":
        given = torch.randn(2, 1, 1, 37, generator=torch.Generator().manual_seed(1))
    found, lse = _flex(backend=None)(Inputs(query, key, value, given, causal, 0.3, return_lse=True))
    expected, expected_lse = exact.attention(query, key, value, given, causal, 0.3)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_flex_of_many_sizes(monkeypatch, masked):
    """Each size has a graph of its own, up to a limit, and beyond it all have one: none runs uncompiled."""
    from diffusers_accel.kernels.attention import torch_native

    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    torch._dynamo.register_backend(backend, name="flex-graphs")
    monkeypatch.setattr(torch_native, "_SIZES", 3)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            attention = torch_native._flex("flex-graphs")
            for keys in (20, 20, 30, 40, 50, 60, 50, 20):
                query, key, value = inputs(keys=keys)
                mask = torch.arange(keys).expand(2, 1, 1, keys) < keys - 3 if masked else None
                found = attention(Inputs(query, key, value, mask))
                expected, _ = exact.attention(query, key, value, mask)
                torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("flex-graphs")
    assert len(graphs) == 4


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        (None, "any"),
        ((64, 96, 128), "64, 96, 128"),
        (tuple(range(8, 257, 8)), "8 to 256 by 8"),
        ((16, 32, 64, 128, 256), "16, 32, 64, 128, 256"),
    ],
)
def test_head_dimensions_read_well(dims, text):
    assert AttentionKernel(name="x", load=lambda: None, head_dims=dims).dims == text


def test_a_record_says_what_it_lacks():
    record = AttentionKernel(
        name="x", load=lambda: None, at_least=(8, 9), head_dims=(16, 32, 48, 64), key_mask=True, mask=False
    )
    assert record.refuses(Call(mask="keys")) is None
    assert record.refuses(Call(mask="full")) == "takes no attention mask but one over keys alone"
    assert record.refuses(Call(head_dim=128)) == "takes head_dim 16, 32, 48, 64, not 128"
    assert "values of the key's head_dim" in record.refuses(Call(head_dim=64, value_dim=32))
    from diffusers_accel.core.platform import Device

    assert "needs sm_89 and later" in record.missing(Device("cuda", "NVIDIA A100", (8, 0)))
    assert record.missing(Device("cuda", "NVIDIA L40", (8, 9))) is None


@pytest.mark.parametrize("renamed", [True, False])
@pytest.mark.parametrize(
    ("name", "recipe"), [("te-fp8-per-tensor", "Float8CurrentScaling"), ("te-fp8-blockwise", "Float8BlockScaling")]
)
def test_transformer_engine_linear(monkeypatch, name, recipe, renamed):
    """By both of the names its context managers have had."""
    entered = []

    class Recipe:
        pass

    @contextlib.contextmanager
    def context(label, enabled, given):
        assert enabled and isinstance(given, Recipe)
        entered.append(label)
        yield
        entered.append(f"end of {label}")

    class Linear(torch.nn.Linear):
        def __init__(self, in_features, out_features, bias=True, params_dtype=None, device="cuda"):
            assert entered == ["init"]
            super().__init__(in_features, out_features, bias=bias, dtype=params_dtype, device=device)

        def forward(self, inp, is_first_microbatch=None):
            assert entered[-1] == "autocast"
            return super().forward(inp)

    members = (
        {
            "autocast": lambda enabled=True, recipe=None: context("autocast", enabled, recipe),
            "quantized_model_init": lambda enabled=True, recipe=None: context("init", enabled, recipe),
        }
        if renamed
        else {
            "fp8_autocast": lambda enabled=True, fp8_recipe=None: context("autocast", enabled, fp8_recipe),
            "fp8_model_init": lambda enabled=True, recipe=None: context("init", enabled, recipe),
        }
    )
    te = install(monkeypatch, "transformer_engine.pytorch", Linear=Linear, **members)
    recipes = install(monkeypatch, "transformer_engine.common.recipe", **{recipe: Recipe})
    sys.modules["transformer_engine"].pytorch = te
    sys.modules["transformer_engine.common"].recipe = recipes
    stock = torch.nn.Linear(32, 48)
    layer = LINEARS.get(name).load()(stock)
    assert layer.kind == name and not layer.training
    x = torch.randn(5, 32)
    assert torch.equal(layer(x), stock(x))
    assert entered == ["init", "end of init", "autocast", "end of autocast"]
    assert "needs the package" in LINEARS.get(name).missing(Device("cuda", "GPU", (9, 0)))
