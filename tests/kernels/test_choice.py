"""The fastest kernel by measurement: what is timed, what is remembered, and what happens when it cannot be."""

from __future__ import annotations

import json
import warnings
from collections import Counter

import pytest
import torch

from diffusers_accel.core.platform import Device
from diffusers_accel.kernels.attention import (
    AttentionDispatcher,
    AttentionKernel,
    Call,
    Fastest,
    Inputs,
    Timings,
    choice,
    margin,
)
from diffusers_accel.kernels.attention.record import Rotary
from diffusers_accel.kernels.attention.torch_native import scaled_dot_product

GPU = Device("cuda", "NVIDIA H200", (9, 0))


def kernel(name, **properties):
    return AttentionKernel(name=name, load=lambda: scaled_dot_product, **properties)


@pytest.fixture
def clock(monkeypatch):
    """Seconds by kernel instead of a GPU's; counts what was timed."""
    seconds, timed = {"a": 3e-3, "b": 1e-3, "sdpa": 2e-3}, Counter()

    def fake(functions):
        for name in functions:
            timed[name] += 1
        return {name: [5.0, seconds[name], 0.0] for name in functions}  # the median counts

    monkeypatch.setattr(choice, "_alternate", fake)
    return seconds, timed


def pick(fastest, call=None, shape="bfloat16 24x128 q4096 k4096"):
    def run(kernel):
        if kernel.name == "broken":
            raise RuntimeError("no such tile")

    return fastest.pick(call or Call(), run, shape).name


def test_the_fastest_is_taken_and_remembered(clock, tmp_path):
    seconds, timed = clock
    kernels = (kernel("a"), kernel("b"), kernel("sdpa"))
    fastest = Fastest(kernels, Timings(GPU, tmp_path))
    assert pick(fastest) == "b" and pick(fastest) == "b"
    assert timed == {"a": 1, "b": 1, "sdpa": 1}
    assert fastest.measured == {"bfloat16 24x128 q4096 k4096": seconds}
    # Another process finds the answer on disk, with the facts it holds for.
    assert pick(Fastest(kernels, Timings(GPU, tmp_path))) == "b" and timed["b"] == 1
    (file,) = tmp_path.iterdir()
    assert torch.__version__.startswith(json.loads(file.read_text())["facts"]["torch"])
    # Another shape is timed anew, and another GPU has another file.
    assert pick(fastest, shape="other") == "b" and timed["b"] == 2
    assert pick(Fastest(kernels, Timings(Device("cuda", "NVIDIA A100", (8, 0)), tmp_path))) == "b" and timed["b"] == 3


def test_two_sites_agree(clock, tmp_path):
    """Both were made before either met the shape: the second finds what the first measured."""
    seconds, timed = clock
    kernels = (kernel("a"), kernel("b"))
    first, second = (Fastest(kernels, Timings(GPU, tmp_path)) for _ in range(2))
    assert pick(first) == "b"
    seconds["b"] = 1.0
    assert pick(second) == "b" and timed == {"a": 1, "b": 1}


def test_a_new_kernel_is_timed_beside_the_old(clock, tmp_path):
    assert pick(Fastest((kernel("a"), kernel("sdpa")), Timings(GPU, tmp_path))) == "sdpa"
    assert pick(Fastest((kernel("a"), kernel("b"), kernel("sdpa")), Timings(GPU, tmp_path))) == "b"


def test_only_what_takes_the_call_is_asked(clock, tmp_path):
    _, timed = clock
    fastest = Fastest((kernel("a"), kernel("b", mask=False), kernel("sdpa")), Timings(GPU, tmp_path))
    assert pick(fastest, Call(mask="full"), "masked") == "sdpa" and timed["b"] == 0
    alone = Fastest((kernel("b", mask=False), kernel("sdpa")), Timings(GPU, tmp_path))
    assert pick(alone, Call(mask="full"), "alone") == "sdpa" and timed["sdpa"] == 1  # nothing to choose


def test_a_kernel_that_fails_is_left_out_and_named(clock, tmp_path):
    seconds, _ = clock
    seconds["broken"] = 1e-9
    fastest = Fastest((kernel("a"), kernel("broken"), kernel("sdpa")), Timings(GPU, tmp_path))
    with pytest.warns(UserWarning, match="leaves out 'broken' .*no such tile"):
        assert pick(fastest) == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(fastest) == "sdpa"
    # The next process tries again: the cause may be gone.
    with pytest.warns(UserWarning, match="leaves out 'broken'"):
        pick(Fastest(fastest.kernels, Timings(GPU, tmp_path)))


def test_nothing_is_timed_while_a_graph_is_captured(clock, tmp_path, monkeypatch):
    _, timed = clock
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    fastest = Fastest((kernel("a"), kernel("sdpa")), Timings(GPU, tmp_path))
    assert pick(fastest) == "a" and not timed  # the preferred one comes first
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert pick(fastest) == "sdpa"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick(fastest) == "sdpa"  # known by now


@pytest.mark.parametrize("content", ["", "no json", "[]", '{"seconds": 3}', '{"seconds": {"x": 1}}'])
def test_a_broken_file_is_written_anew(clock, tmp_path, content):
    timings = Timings(GPU, tmp_path)
    timings.path.write_text(content)
    assert pick(Fastest((kernel("a"), kernel("b")), Timings(GPU, tmp_path))) == "b"
    assert "b" in json.loads(timings.path.read_text())["seconds"]["bfloat16 24x128 q4096 k4096"]


def test_a_folder_that_cannot_be_written_is_said(clock, tmp_path):
    (tmp_path / "file").write_text("")
    fastest = Fastest((kernel("a"), kernel("b")), Timings(GPU, tmp_path / "file"))
    with pytest.warns(UserWarning, match=choice.CACHE_VARIABLE):
        assert pick(fastest) == "b"


def test_classes_of_shapes():
    def name(length, keys=None, heads=24, kv_heads=None, **options):
        query = torch.empty(1, length, heads, 128, dtype=torch.bfloat16, device="meta")
        key = torch.empty(1, keys or length, kv_heads or heads, 128, dtype=torch.bfloat16, device="meta")
        given = Inputs(query, key, key, **options)
        return choice.shape_class(given, Call.of(given))

    assert name(4608) == name(4300) != name(5600)
    assert name(4608) != name(4608, keys=512)
    assert name(4608) != name(4608, kv_heads=8) != name(4608, is_causal=True)
    table = torch.ones(1, 300, 1, 128)
    assert name(300, rotary=Rotary((table, table), (table, table))) == name(300) + " rotary"
    assert name(300, attn_mask=torch.ones(1, 1, 1, 300)).endswith("mask-keys")
    assert name(300, attn_mask=torch.ones(1, 1, 300, 300)).endswith("mask-full")


def test_a_site_asks_and_counts(clock, tmp_path):
    fastest = Fastest((kernel("a"), kernel("b")), Timings(GPU, tmp_path))
    dispatcher = AttentionDispatcher(lambda: fastest, Counter())
    query = torch.randn(1, 8, 2, 16)
    torch.testing.assert_close(dispatcher(query, query, query), scaled_dot_product(Inputs(query, query, query)))
    assert dispatcher.counts == {"b": 1}


def test_what_is_remembered_is_told(clock, tmp_path):
    fastest = Fastest((kernel("a"), kernel("b")), Timings(GPU, tmp_path))
    pick(fastest)
    pick(fastest, shape="bfloat16 24x64 q4096 k4096")
    again = Fastest((kernel("a"), kernel("b")), Timings(GPU, tmp_path))
    assert again.remembered(128) == {"bfloat16 24x128 q4096 k4096": {"a": 3e-3, "b": 1e-3}}
    assert len(again.remembered(None)) == 2
    alone = Fastest((kernel("a"),), Timings(GPU, tmp_path))
    assert alone.remembered(64) == {"bfloat16 24x64 q4096 k4096": {"a": 3e-3}}


def test_the_margin_reads_well():
    assert margin({}) == margin({"x": float("inf")}) == "not measured"
    assert margin({"fa3": 1e-3, "cudnn": 1.1e-3, "x": float("inf")}) == "fa3 1 ms, 10% before cudnn"
