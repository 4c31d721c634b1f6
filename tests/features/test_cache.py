"""TeaCache on stock pipelines: the published rule, right in every request.

The reference is independent of the package: the published algorithm, run over a stock transformer with torch hooks that
record its inputs.
"""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, build, tensors

from diffusers_accel import AccelConfig, CompileConfig, TeaCacheConfig, accelerate, restore, stats
from diffusers_accel.models import MAGCACHE_ROWS, TEACACHE_ROWS, Checkpoint, adapter_for

COEFFICIENTS = (2.0, 0.5, 0.001)


def teacache(threshold, coefficients=COEFFICIENTS, **fields):
    return AccelConfig(cache=TeaCacheConfig(threshold=threshold, coefficients=coefficients, **fields))


class PublishedFlux:
    """FLUX's published TeaCache forward, driven by torch hooks on a stock transformer: the independent reference."""

    def __init__(self, transformer, threshold, steps):
        self.transformer, self.threshold, self.steps = transformer, threshold, steps
        self.count, self.accumulated, self.previous, self.residual = 0, 0.0, None, None
        self.skipped = []
        transformer.forward = self.forward

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
                joint_attention_kwargs=None, return_dict=False):  # fmt: skip
        model = self.transformer
        hidden_states = model.x_embedder(hidden_states)
        temb = model.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        encoder_hidden_states = model.context_embedder(encoder_hidden_states)
        rotary = model.pos_embed(torch.cat((txt_ids, img_ids)))
        signal = model.transformer_blocks[0].norm1(hidden_states, emb=temb)[0]
        if self.count in (0, self.steps - 1):
            compute, self.accumulated = True, 0.0
        else:
            change = ((signal - self.previous).abs().mean() / self.previous.abs().mean()).item()
            a, b, c = COEFFICIENTS
            self.accumulated += abs(a * change**2 + b * change + c)
            compute = self.accumulated >= self.threshold
            if compute:
                self.accumulated = 0.0
        self.previous = signal
        self.skipped.append(not compute)
        self.count += 1
        if compute:
            before = hidden_states
            for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
                encoder_hidden_states, hidden_states = block(
                    hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb,
                    image_rotary_emb=rotary,
                )  # fmt: skip
            self.residual = hidden_states - before
        else:
            hidden_states = hidden_states + self.residual
        return (model.proj_out(model.norm_out(hidden_states, temb)),)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 1.0])
def test_the_published_rule_on_flux(threshold):
    steps = 12
    pipe = build("flux")
    reference = PublishedFlux(pipe.transformer, threshold, steps)
    expected = TINY["flux"].run(pipe, steps=steps)
    del pipe.transformer.forward
    accelerate(pipe, teacache(threshold))
    found = TINY["flux"].run(pipe, steps=steps)
    assert stats(pipe).steps_skipped == sum(reference.skipped)
    assert 0 < sum(reference.skipped) < steps - 2, "a threshold that decides nothing proves nothing"
    # Two stacks add their residuals one after the other: the same sum, rounded twice.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projected", [False, True])
def test_wans_signal_is_its_time_embedding(projected):
    """The adapter's signals of all timesteps equal the stock embedder's outputs during the run."""
    pipe = build("wan")
    recorded = []
    handle = pipe.transformer.condition_embedder.register_forward_hook(
        lambda module, args, output: recorded.append(output[1 if projected else 0][0].clone())
    )
    TINY["wan"].run(pipe)
    handle.remove()
    signal = adapter_for(pipe.transformer).timestep_signal(pipe.transformer, pipe.scheduler.timesteps, projected)
    # cond and uncond of each step see the same timestep
    torch.testing.assert_close(signal, torch.stack(recorded[::2]), atol=1e-6, rtol=1e-5)


def test_wan_first_steps_are_kept_with_ret_steps():
    pipe = build("wan")
    accelerate(pipe, teacache(1e9, (1.0, 0.0), use_ret_steps=True))
    TINY["wan"].run(pipe, steps=8)
    branch = stats(pipe).branches["transformer/cond"]
    # Five kept at the start, none at the end.
    assert branch == {"computed": 5, "skipped": 3}


@pytest.mark.parametrize("name", ["sd3", "ltx2"])
def test_batched_guidance_measures_the_conditional_half(name):
    """The signal is the conditional half alone, so another negative prompt does not change the skipped steps."""
    entry, pipe = TINY[name], build(name)
    seen = []
    signal = adapter_for(pipe.transformer).block_signal
    block = pipe.transformer.transformer_blocks[0]
    accelerate(pipe, teacache(0.0))
    from diffusers_accel.features.cache import signals

    original = signals.relative

    def recorded(one, other):
        seen.append(one.clone())
        return original(one, other)

    signals.relative = recorded
    try:
        full = []
        handle = block.register_forward_pre_hook(
            lambda module, args, kwargs: full.append(signal(module, kwargs).clone()), with_kwargs=True
        )
        entry.run(pipe)
        handle.remove()
    finally:
        signals.relative = original
    assert len(seen) == 3 and len(full) == 4
    for one, both in zip(seen, full[1:], strict=True):
        assert torch.equal(one, both.chunk(2)[1])


# Consecutive requests on one pipeline. Each has the result of a newly accelerated pipeline.
REQUESTS = {
    "flux": [{}, {"height": 48, "width": 32}, {"num_inference_steps": 7}, {"num_images_per_prompt": 2}],
    "flux-true-cfg": [{}, {"true_cfg_scale": 1.0}, {}],
    "flux-img2img": [{}, {"strength": 0.5}, {"strength": 1.0}],
    "wan": [{}, {"guidance_scale": 1.0}, {"num_frames": 9}, {}],
    "wan22": [{}, {"num_inference_steps": 6}, {}],
    "sd3": [{}, {"guidance_scale": 1.0}, {}],
    "sd3-slg": [{}, {"skip_guidance_layers": None}, {}],
    "cosmos": [{}, {"guidance_scale": 1.0}, {}],
    "ltx2-stg": [{}, {"stg_scale": 0.0}, {}],
    "qwen": [{}, {"true_cfg_scale": 1.0}, {}],
    "cosmos3": [{}, {"guidance_scale": 1.0}, {}],
    "flux2-klein": [{}, {"guidance_scale": 1.0}, {}],
}
# Small enough that the signal's change decides, so that a wrong previous signal shows.
EAGER = teacache(0.6, (1.0, 0.0))
# The signal of the random time embedder changes by about 1 per step.
EAGER_WAN = teacache(1.6, (1.0, 0.0))


def assert_same(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(tensors(found), tensors(expected), strict=True))


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_requests_do_not_leak_into_each_other(name):
    entry, used = TINY[name], build(name)
    config = EAGER_WAN if entry.family == "wan" else EAGER
    accelerate(used, config)
    skipped = 0
    for request in REQUESTS[name]:
        fresh = accelerate(build(name), config)
        expected = entry.run(fresh, **request)
        assert_same(entry.run(used, **request), expected)
        assert stats(used).branches == stats(fresh).branches
        skipped += stats(used).steps_skipped
    assert skipped > 0


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["flux", "flux-true-cfg", "wan", "wan22", "sd3", "cosmos", "ltx2-stg", "qwen"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_generation_that_breaks_off_leaves_nothing(name, error):
    entry, pipe = TINY[name], build(name)
    accelerate(pipe, EAGER)
    expected = entry.run(pipe)
    denoiser = getattr(pipe, entry.denoisers[0])
    block = adapter_for(denoiser).blocks(denoiser)[-1]
    calls = 0

    def explode(*_):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error

    handle = block.register_forward_pre_hook(explode)
    with pytest.raises(error):
        entry.run(pipe)
    handle.remove()
    assert_same(entry.run(pipe), expected)
    restore(pipe)
    assert_same(entry.run(pipe), entry.run(build(name)))


def test_an_interrupt_and_a_callback_that_replaces_latents():
    entry = TINY["flux"]

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 1
        return tensors

    def replace(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5}

    used = accelerate(build("flux"), EAGER)
    expected = entry.run(accelerate(build("flux"), EAGER))
    entry.run(used, callback_on_step_end=interrupt)
    assert stats(used).steps_computed + stats(used).steps_skipped == 2
    assert_same(entry.run(used), expected)
    replaced = entry.run(used, callback_on_step_end=replace)
    assert_same(replaced, entry.run(accelerate(build("flux"), EAGER), callback_on_step_end=replace))
    assert_same(entry.run(used), expected)


def test_an_interrupt_within_the_second_expert():
    """The second expert's first step of a request is not the request's first: nothing may be left there for it."""
    entry = TINY["wan22"]

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 2
        return tensors

    used = accelerate(build("wan22"), EAGER_WAN)
    entry.run(used, callback_on_step_end=interrupt)
    assert stats(used).branches["transformer_2/cond"]["computed"] == 1
    fresh = accelerate(build("wan22"), EAGER_WAN)
    assert_same(entry.run(used, num_inference_steps=6), entry.run(fresh, num_inference_steps=6))
    assert stats(used).branches == stats(fresh).branches


def test_a_context_that_broke_off_names_no_later_call():
    pipe = accelerate(build("flux-kontext"), EAGER)
    with pytest.raises(Stop), pipe.transformer.cache_context("odd"):
        raise Stop
    TINY["flux-kontext"].run(pipe)
    assert set(stats(pipe).branches) == {"transformer/cond"}


def test_two_pipelines_interleaved_within_a_generation():
    entry = TINY["flux"]
    first, second = (accelerate(build("flux", seed=seed), EAGER) for seed in (0, 1))
    alone = [entry.run(pipe) for pipe in (first, second)]
    inner = []

    def other(pipe, step, timestep, tensors):
        if step == 1:
            inner.append(entry.run(second))
        return tensors

    outer = entry.run(first, callback_on_step_end=other)
    assert_same(outer, alone[0])
    assert_same(inner[0], alone[1])


def test_controlnet_is_honoured_on_skipped_steps():
    """ControlNet's additions behind the last block are fresh on every step, also on a skipped one."""
    entry, pipe = TINY["flux-controlnet"], build("flux-controlnet")
    accelerate(pipe, teacache(1e9, (1.0, 0.0)))
    seen = []
    norm_inputs = []
    pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: norm_inputs.append(args[0].clone()))
    pipe.transformer.single_transformer_blocks[-1].register_forward_hook(
        lambda module, args, output: seen.append(output[1].clone())
    )
    controls = []
    pipe.controlnet.register_forward_hook(lambda module, args, output: controls.append(output))
    entry.run(pipe)
    assert stats(pipe).steps_skipped == 2
    checked = 0
    for after_block, at_norm, control in zip(seen, norm_inputs, controls, strict=True):
        single = control[1] if isinstance(control, tuple) else control.controlnet_single_block_samples
        if single is not None:
            torch.testing.assert_close(at_norm, after_block + single[-1], atol=1e-6, rtol=1e-6)
            checked += 1
    assert checked == 4, "the ControlNet was meant to add something behind the last block"


def test_a_scheduler_replaced_between_requests():
    from diffusers import FlowMatchEulerDiscreteScheduler

    entry, used, fresh = TINY["wan"], build("wan"), build("wan")
    accelerate(used, EAGER_WAN)
    entry.run(used)
    for pipe in (used, fresh):
        assert not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    accelerate(fresh, EAGER_WAN)
    assert_same(entry.run(used), entry.run(fresh))
    assert stats(used).branches == stats(fresh).branches and stats(used).steps_skipped > 0


def test_the_cache_layer_is_outside_compiled_blocks():
    entry, pipe = TINY["flux"], build("flux")
    plain = accelerate(build("flux"), EAGER)
    expected = entry.run(plain)
    for sections in ({"cache": EAGER.cache, "compile": CompileConfig(backend="eager")},):
        accelerate(pipe, attention="sdpa", **sections)
        assert_same(entry.run(pipe), expected)
        assert stats(pipe).steps_skipped == stats(plain).steps_skipped > 0


def test_lora_loaded_before_or_after(tmp_path):
    """diffusers' own loader, on an accelerated pipeline and on a stock one: the same picture."""
    from peft import LoraConfig, get_peft_model_state_dict

    entry = TINY["flux"]
    donor = build("flux")
    donor.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    weights = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor.transformer).items()}
    stock = build("flux")
    plain = entry.run(stock)
    stock.load_lora_weights(dict(weights))
    expected = entry.run(stock)
    assert not torch.equal(expected, plain)
    pipe = accelerate(build("flux"), attention="sdpa", cache=teacache(0.0).cache)
    pipe.load_lora_weights(dict(weights))
    assert torch.equal(entry.run(pipe), expected)
    pipe.unload_lora_weights()
    assert torch.equal(entry.run(pipe), plain)
    accelerate(stock, attention="sdpa", cache=teacache(0.0).cache)
    assert torch.equal(entry.run(stock), expected)


# Facts of the published checkpoints' configurations.
FLUX_DEV = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "guidance_embeds": True}
FLUX2_DEV = {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48}
WAN_SMALL = {"in_channels": 16, "num_layers": 30, "num_attention_heads": 12}
WAN_LARGE = {"in_channels": 16, "num_layers": 40, "num_attention_heads": 40}
WAN_I2V = {**WAN_LARGE, "in_channels": 36}
WAN_TI2V = {"in_channels": 48, "num_layers": 30, "num_attention_heads": 24}


@pytest.mark.parametrize(
    ("name", "config", "pipeline", "pipeline_config", "row"),
    [
        ("flux", FLUX_DEV, "FluxPipeline", {}, "flux.1-dev"),
        ("flux", {**FLUX_DEV, "guidance_embeds": False}, "FluxPipeline", {}, "flux.1-schnell"),
        ("flux", FLUX_DEV, "FluxKontextPipeline", {}, "flux.1-kontext"),
        ("flux", {**FLUX_DEV, "num_layers": 2}, "FluxPipeline", {}, None),
        ("flux2", FLUX2_DEV, "Flux2Pipeline", {}, "flux.2-dev"),
        ("flux2", {**FLUX2_DEV, "num_layers": 5}, "Flux2KleinPipeline", {}, None),
        ("wan", WAN_SMALL, "WanPipeline", {}, "wan2.1-t2v-1.3b"),
        ("wan", WAN_LARGE, "WanPipeline", {}, "wan2.1-t2v-14b"),
        ("wan", WAN_LARGE, "WanPipeline", {"boundary_ratio": 0.875}, "wan2.2-t2v-a14b"),
        (
            "wan",
            {**WAN_LARGE, "in_channels": 36},
            "WanImageToVideoPipeline",
            {"boundary_ratio": 0.9},
            "wan2.2-i2v-a14b",
        ),
        ("wan", WAN_SMALL, "WanPipeline", {"boundary_ratio": 0.875}, None),
        ("wan", WAN_I2V, "WanImageToVideoPipeline", {}, None),
        ("wan", WAN_TI2V, "WanPipeline", {"expand_timesteps": True}, "wan2.2-ti2v-5b"),
        ("qwen", {"num_layers": 60}, "QwenImagePipeline", {}, "qwen-image"),
        ("qwen", {"num_layers": 60}, "QwenImageEditPipeline", {}, "qwen-image-edit"),
        ("qwen", {"num_layers": 60}, "QwenImageEditPlusPipeline", {}, None),
        ("cosmos", {"num_layers": 28}, "CosmosTextToWorldPipeline", {}, "cosmos-1.0"),
        ("cosmos", {"num_layers": 28}, "Cosmos2TextToImagePipeline", {}, None),
        ("sd3", {"num_layers": 24}, "StableDiffusion3Pipeline", {}, None),
    ],
)
def test_a_row_is_found_by_configuration_only(name, config, pipeline, pipeline_config, row):
    adapter = adapter_for(build(name).transformer)
    assert adapter.published_row(Checkpoint(config, pipeline, pipeline_config)) == row
    assert row is None or row in TEACACHE_ROWS or row in MAGCACHE_ROWS
