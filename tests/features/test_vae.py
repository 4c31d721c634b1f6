"""The VAE's switches are set, work, and come back; a compiled decoder decodes the same."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, build

from diffusers_accel import Unsupported, accelerate, restore
from diffusers_accel.features import vae


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2", "qwen", "cosmos", "sd3"])
def test_switches(name):
    pipe = build(name)
    before = (pipe.vae.use_tiling, pipe.vae.use_slicing)
    accelerate(pipe, vae={"tiling": True, "slicing": True})
    assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == (True, True)
    accelerate(pipe, vae={"slicing": True})
    assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == (before[0], True)
    restore(pipe)
    assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == before


def test_slicing_really_slices():
    pipe = build("flux")
    calls = []
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: calls.append(output.shape[0]))
    latents = torch.randn(2, pipe.vae.config.latent_channels, 4, 4)
    with torch.no_grad():
        pipe.vae.decode(latents)
        accelerate(pipe, vae={"slicing": True})
        pipe.vae.decode(latents)
    assert calls == [2, 1, 1]


def test_a_decoder_of_many_graphs(monkeypatch):
    """Beyond the eight of Dynamo's own limit, which lets further calls run uncompiled."""
    graphs, stock = [], torch.compile

    def backend(module, _):
        graphs.append(module)
        return module

    monkeypatch.setattr(torch, "compile", lambda function: stock(function, backend=backend))
    decode = vae._compiled()
    x = torch.ones(2)
    for number in range(12):
        assert torch.equal(decode(lambda x, name: x + len(name), x, "a" * number), x + number)
    assert len(graphs) == 12


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2", "qwen"])
def test_compiled_decoder(name, monkeypatch):
    entry, pipe = TINY[name], build(name)
    overrides = {"output_type": "pt"}
    stock = entry.run(pipe, steps=1, **overrides)
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="eager", **options))
    torch._dynamo.utils.counters.clear()
    accelerate(pipe, vae={"compile": True})
    found = entry.run(pipe, steps=1, **overrides)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for one, other in zip(*(item if isinstance(item, tuple) else (item,) for item in (found, stock)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_switch_the_vae_does_not_have():
    pipe = build("flux")
    del pipe.vae.use_slicing
    with pytest.raises(Unsupported, match="no such switch"):
        accelerate(pipe, vae={"slicing": True})
