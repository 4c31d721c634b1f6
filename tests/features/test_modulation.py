"""Precomputed modulations: lookups find the products of all steps, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import TINY, build, tensors

from diffusers_accel import CompileConfig, StepMaskConfig, accelerate, explain, restore, stats
from diffusers_accel.kernels.linear import precomputed, skinny


@pytest.fixture
def asked(monkeypatch, on_cpu):
    """Rewritten graphs on the CPU; how often they asked for a product, and how often something was known of it."""
    found: Counter[str] = Counter()

    def precomputed_for(weight):
        answer = precomputed.precomputed_for(weight)
        found["asked"] += 1
        found["known"] += answer is not None
        return answer

    monkeypatch.setattr(skinny, "precomputed_for", precomputed_for)
    return found


REWRITTEN = CompileConfig(backend="eager", rewrites=True)


def close(found, expected, tolerance=1e-4):
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["flux", "flux-schnell", "flux-img2img", "qwen", "sd3"])
def test_every_product_is_known(name, asked):
    """In two requests of one length, with different prompts, and in a longer one."""
    entry, pipe, other = TINY[name], build(name), build(name)
    assert "modulations of all steps" in str(explain(pipe, compile=REWRITTEN))
    assert "modulations" not in str(explain(pipe, compile=CompileConfig(backend="eager")))
    accelerate(pipe, compile=REWRITTEN)
    for steps, prompt in ((4, {}), (4, {"prompt": "another"}), (40, {})):
        asked.clear()
        close(entry.run(pipe, steps=steps, **prompt), entry.run(other, steps=steps, **prompt))
        found = stats(pipe)
        assert found.modulations_precomputed and not found.modulations_recomputed
        assert asked["known"] == asked["asked"] >= found.modulations_precomputed
    assert "modulations" in str(stats(pipe))
    restore(pipe)
    asked.clear()
    assert all(map(torch.equal, tensors(entry.run(pipe, steps=4)), tensors(entry.run(other, steps=4)))) and not asked


def test_weights_that_change_between_requests(asked):
    entry, pipe, other = TINY["flux"], build("flux"), build("flux")
    accelerate(pipe, compile=REWRITTEN)
    entry.run(pipe, steps=3)
    with torch.no_grad():
        for each in (pipe, other):
            each.transformer.transformer_blocks[0].norm1.linear.weight.mul_(1.5)
    close(entry.run(pipe, steps=3), entry.run(other, steps=3))
    assert not stats(pipe).modulations_recomputed


def test_prompts_that_differ_by_branch(asked):
    """FLUX.1 embeds the prompt: what is known is the first branch's, and the second's is multiplied."""
    entry, pipe, other = TINY["flux-true-cfg"], build("flux-true-cfg"), build("flux-true-cfg")
    accelerate(pipe, compile=REWRITTEN)
    close(entry.run(pipe, steps=3), entry.run(other, steps=3))
    found = stats(pipe)
    assert found.modulations_recomputed == 3 * found.modulations_precomputed


def test_embeddings_that_somebody_changes(asked):
    """What is known is found by the input itself, not by the step."""
    entry, pipe, other = TINY["flux"], build("flux"), build("flux")
    accelerate(pipe, compile=REWRITTEN)

    for each in (pipe, other):
        inner = each.transformer.forward

        def forward(*args, inner=inner, each=each, **kwargs):
            timestep = kwargs["timestep"] * (1.0 if float(kwargs["timestep"]) > 0.9 else 0.9)
            return inner(*args, **{**kwargs, "timestep": timestep})

        each.transformer.forward = forward
    close(entry.run(pipe, steps=3), entry.run(other, steps=3))
    found = stats(pipe)
    assert found.modulations_recomputed == 2 * found.modulations_precomputed


def test_with_a_cache_and_quantized_layers(asked):
    """Steps that are skipped ask for nothing; weights of 8 bits are widened, as they are for a few rows."""
    entry, pipe = TINY["flux"], build("flux")
    mask = StepMaskConfig(mask=(1, 1, 0, 1, 0, 1))
    accelerate(pipe, linear="fp8", cache=mask)
    eager = entry.run(pipe, steps=6)
    accelerate(pipe, linear="fp8", cache=mask, compile=REWRITTEN)
    found = entry.run(pipe, steps=6)
    assert (found - eager).norm() < 0.05 * eager.norm()
    # On the CPU, quantized layers are multiplied as their reference says, in no product of a few rows.
    assert stats(pipe).modulations_precomputed and not stats(pipe).modulations_recomputed
