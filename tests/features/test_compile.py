"""Regional compilation: how often blocks are compiled."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, build
from torch._dynamo.utils import counters

from diffusers_accel import CompileConfig, StepMaskConfig, accelerate, restore, warmup


@pytest.fixture
def compiled(collected):
    """Counts compiled graphs."""
    torch.compiler.reset()
    counters["stats"].clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def test_many_sizes_in_one_process(compiled):
    """Ten sizes, each compiled for itself: more than Dynamo's own limit."""
    entry, pipe = TINY["flux"], build("flux")
    sizes = [(height, width) for height in (32, 80) for width in (32, 48, 64, 80, 96)]
    stock = [entry.run(pipe, steps=1, height=height, width=width) for height, width in sizes]
    limit = torch._dynamo.config.recompile_limit
    accelerate(pipe, compile=CompileConfig(backend="eager", dynamic=False))
    for (height, width), expected in zip(sizes, stock, strict=True):
        torch.testing.assert_close(entry.run(pipe, steps=1, height=height, width=width), expected)
    assert compiled() > 2 * limit, "two classes of blocks, each more often than that"
    assert torch._dynamo.config.recompile_limit == limit
    restore(pipe)


@pytest.mark.parametrize("name", ["flux", "wan", "qwen"])
def test_what_was_warmed_up_is_not_compiled_again(name, compiled):
    entry, pipe = TINY[name], build(name)
    frames = {"num_frames": [5]} if name == "wan" else {}
    # FLUX and Wan fill prompts up to this length; Qwen-Image takes them as they are.
    length = 64 if name == "qwen" else 16
    accelerate(pipe, compile=CompileConfig(backend="eager"), cache=StepMaskConfig(mask=(1, 0)))
    sizes = [(32, 32), (48, 32)]
    warmup(pipe, resolutions=sizes, **frames, max_sequence_length=length, output_type="latent")
    count = compiled()
    assert count
    for height, width in sizes:
        for prompt in ("a fox", "a red fox in the snow, under a tree, with a small blue ring and a large green cube"):
            entry.run(pipe, steps=4, height=height, width=width, prompt=prompt)
    assert compiled() == count
