"""Living with what else wraps a pipeline: offload hooks, layerwise casting, native hooks; before us or after us."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from tiny import TINY, build

from diffusers_accel import CompileConfig, TeaCacheConfig, accelerate, restore, stats

SECTIONS = {"attention": "sdpa", "cache": TeaCacheConfig(threshold=0.6, coefficients=(1.0, 0.0))}
ENTRY = TINY["flux"]


def expected():
    pipe = accelerate(build("flux"), **SECTIONS)
    return ENTRY.run(pipe), stats(pipe)


def group_offload(pipe):
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), num_blocks_per_group=1
    )


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_group_offload(ours_first, compiled):
    """Group offload wraps every block's forward with a hook of diffusers' own."""
    sections = {**SECTIONS, **({"compile": CompileConfig(backend="eager", fullgraph=False)} if compiled else {})}
    pipe = build("flux")
    if ours_first:
        accelerate(pipe, **sections)
        group_offload(pipe)
    else:
        group_offload(pipe)
        accelerate(pipe, **sections)
    picture, found = expected()
    assert torch.equal(ENTRY.run(pipe), picture)
    assert stats(pipe).branches == found.branches and stats(pipe).steps_skipped > 0
    restore(pipe)
    stock = build("flux")
    assert torch.equal(ENTRY.run(pipe), ENTRY.run(stock))


@pytest.mark.parametrize("ours_first", [True, False])
def test_an_offload_hook_that_is_renewed_after_every_request(ours_first):
    """What `enable_model_cpu_offload` does: accelerate's hooks are removed and added again around each request."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe, moves = build("flux"), []

    class Offload(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moves.append(module)
            return args, kwargs

    def renew():
        if hasattr(pipe.transformer, "_hf_hook"):
            remove_hook_from_module(pipe.transformer)
        add_hook_to_module(pipe.transformer, Offload())

    if not ours_first:
        renew()
    accelerate(pipe, **SECTIONS)
    picture, found = expected()
    for _ in range(3):
        renew()
        assert torch.equal(ENTRY.run(pipe), picture)
        assert stats(pipe).branches == found.branches
    assert len(moves) == 12
    restore(pipe)
    assert torch.equal(ENTRY.run(pipe), ENTRY.run(build("flux")))
    assert len(moves) == 16, "the neighbour's hook stays when ours goes"


def test_from_pipe_of_an_accelerated_pipeline():
    pipe = accelerate(build("flux"), attention="sdpa", cache=TeaCacheConfig(threshold=0.0, coefficients=(1.0, 0.0)))
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    plain = FluxImg2ImgPipeline(**build("flux").components)
    entry = TINY["flux-img2img"]
    assert torch.equal(entry.run(other), entry.run(plain))
    restore(pipe)
    assert torch.equal(entry.run(other), entry.run(plain))


def test_fused_projections_before_us():
    pipe, stock = build("flux"), build("flux")
    for each in (pipe, stock):
        each.transformer.fuse_qkv_projections()
    accelerate(pipe, attention="sdpa")
    assert torch.equal(ENTRY.run(pipe), ENTRY.run(stock))
    assert stats(pipe).attention_kernels == {"sdpa": 24}


def test_moved_to_another_type():
    pipe, stock = accelerate(build("flux"), **SECTIONS), accelerate(build("flux"), **SECTIONS)
    restore(stock)
    accelerate(stock.to(torch.bfloat16), **SECTIONS)
    assert torch.equal(ENTRY.run(pipe.to(torch.bfloat16)), ENTRY.run(stock))
