"""Attention kernels against float64: the contract of layout, masks, grouped heads and refusals.

Kernels that need a GPU are run by `benchmarks/check_gpu.py`; here their records are asked why they cannot run.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import exact
import pytest
import torch

from diffusers_accel.core.platform import Device
from diffusers_accel.kernels.attention import (
    DISPATCHERS,
    KERNELS,
    AttentionDispatcher,
    AttentionKernel,
    Call,
    Fixed,
    Inputs,
    candidates,
)

HOPPER = Device("cuda", "NVIDIA H200", (9, 0))
CPU = Device("cpu", "x86_64")


def reference(query, key, value, mask=None, causal=False, scale=None):
    return exact.attention(query, key, value, mask, causal, scale)[0]


def inputs(batch=2, length=37, kv_length=53, heads=4, kv_heads=4, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, dim), (batch, kv_length, kv_heads, dim), (batch, kv_length, kv_heads, dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture
def dispatcher():
    choice = Fixed(KERNELS.get("sdpa"))
    dispatcher = AttentionDispatcher(lambda: choice, Counter())
    DISPATCHERS[dispatcher.number] = dispatcher
    yield dispatcher
    del DISPATCHERS[dispatcher.number]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", ["plain", "scaled", "boolean mask", "additive mask", "causal", "grouped"])
def test_sdpa_through_a_dispatcher(dispatcher, case, compiled):
    options = {}
    query, key, value = inputs(kv_heads=2 if case == "grouped" else 4, kv_length=37 if case == "causal" else 53)
    if case == "scaled":
        options["scale"] = 0.3
    if case == "boolean mask":
        options["attn_mask"] = torch.rand(2, 1, 37, 53, generator=torch.Generator().manual_seed(1)) > 0.3
    if case == "additive mask":
        options["attn_mask"] = torch.randn(2, 1, 1, 53, generator=torch.Generator().manual_seed(1))
    if case == "causal":
        options["is_causal"] = True
    call = torch.compile(lambda *args, **kwargs: dispatcher(*args, **kwargs), backend="aot_eager", fullgraph=True)
    found = (call if compiled else dispatcher)(query, key, value, **options)
    expected = reference(query, key, value, options.get("attn_mask"), case == "causal", options.get("scale"))
    # float32 against float64: sums of 53 terms.
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert dispatcher.counts == {"sdpa": 1}


@pytest.mark.parametrize("value_dim", [32, 16])
def test_the_operator_is_well_formed(dispatcher, value_dim):
    """Schema, fake implementation and strides, as torch itself checks them; a value of another head_dim takes SDPA's
    plain path, whose output lies otherwise in memory."""
    from diffusers_accel.kernels.attention.dispatch import _attention

    query, key, value = inputs()
    value = value[..., :value_dim].contiguous()
    arguments = (query, key, value, None, False, None, dispatcher.number)
    assert _attention(*arguments).is_contiguous()
    torch.library.opcheck(_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_inputs_are_not_changed(dispatcher):
    tensors = inputs()
    copies = [item.clone() for item in tensors]
    dispatcher(*tensors)
    assert all(map(torch.equal, tensors, copies))


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "sdpa"])
def test_gpu_kernels_say_why_they_cannot_run_here(name):
    reason = KERNELS.get(name).missing(CPU)
    assert reason and ("needs a CUDA device" in reason or "needs the package" in reason)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dtype": torch.float32}, "takes torch.bfloat16, not torch.float32"),
        ({"head_dim": 80}, "not 80"),
        ({"mask": "keys"}, "no attention mask"),
        ({"causal": True, "square": False}, "for equal lengths only"),
        ({"causal": True, "square": True}, None),
        ({"device": "cpu"}, "runs on CUDA"),
        ({"dtype": torch.bfloat16, "head_dim": 128}, None),
    ],
)
def test_a_record_judges_a_call(call, reason):
    found = KERNELS.get("fa3").refuses(Call(**call))
    assert found is None if reason is None else reason in found


def test_short_sequences_are_refused_where_they_fail():
    one = torch.empty(1, 1, 2, 64, dtype=torch.bfloat16, device="meta")
    two = torch.empty(1, 2, 2, 64, dtype=torch.bfloat16, device="meta")
    cudnn = KERNELS.get("cudnn")
    assert "takes 2 queries and keys or more, not 1" in cudnn.refuses(
        replace(Call.of(Inputs(two, one, one)), device=None)
    )
    assert cudnn.refuses(replace(Call.of(Inputs(two, two, two)), device=None)) is None


def test_candidates_are_what_can_run(monkeypatch):
    def names(device, exact=True):
        return [kernel.name for kernel in candidates(device, exact)]

    assert names(CPU) == ["sdpa"]
    installed = {"fa3_fwd_interface", "triton"}
    monkeypatch.setattr("diffusers_accel.kernels.attention.record.has_module", lambda name: name in installed)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)  # as if its import failed
    # Found but broken: passed over, and named as such.
    assert set(names(HOPPER)) == {"sdpa", "cudnn", "flash2"}
    assert "does not load: ModuleNotFoundError" in KERNELS.get("fa3").missing(HOPPER)
    monkeypatch.setattr(AttentionKernel, "_broken", lambda kernel: None)
    assert set(names(HOPPER)) == {"fa3", "sdpa", "cudnn", "flash2"}
    assert names(HOPPER)[0] == "fa3"  # what runs where nothing can be measured
    eight_bit = {"fa3-fp8", "sage", "sage-fp8", "qk16pv8"}
    assert set(names(HOPPER, exact=False)) == {"fa3", "sdpa", "cudnn", "flash2", *eight_bit}
    # e4m3 units came with sm_89.
    assert set(names(Device("cuda", "NVIDIA A100", (8, 0)), exact=False)) == {"sdpa", "cudnn", "flash2", "sage"}


def test_a_wrong_architecture_is_named():
    kernel = AttentionKernel(name="x", load=lambda: None, architectures=((10, 0),))
    assert "built for sm_100; this is NVIDIA H200 (sm_90)" in kernel.missing(HOPPER)


@pytest.mark.parametrize(
    ("name", "module", "attribute"), [("fa3", "fa3_fwd_interface", ""), ("fa4", "flash_attn.cute", "flash_attn")]
)
def test_flash_packages_are_called_as_they_are_documented(name, module, attribute, monkeypatch):
    """A stand-in with the packages' signature, computing in float64: the arguments must arrive where they belong."""
    import sys
    import types

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        return reference(q, k, v, None, causal, softmax_scale).to(q.dtype), None

    stand_in = types.ModuleType(module)
    stand_in.flash_attn_func = flash_attn_func
    if attribute:
        monkeypatch.setitem(sys.modules, attribute, types.ModuleType(attribute))
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr("diffusers_accel.kernels.attention.flash.has_module", lambda found: found == module)
    function = KERNELS.get(name).load()
    query, key, value = inputs(kv_heads=2, kv_length=37)
    found = function(Inputs(query, key, value, is_causal=True, scale=0.4))
    torch.testing.assert_close(found.double(), reference(query, key, value, None, True, 0.4), atol=1e-5, rtol=1e-5)
