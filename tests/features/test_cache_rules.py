"""Every caching rule on every family, and the block rules against references of their own on stock transformers."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, build, same
from tiny.flux import load_ip_adapter

from diffusers_accel import (
    CompileConfig,
    ConfigError,
    DBCacheConfig,
    EasyCacheConfig,
    FBCacheConfig,
    IntervalConfig,
    MagCacheConfig,
    PABConfig,
    PolicyConfig,
    SeaCacheConfig,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
    Unsupported,
    accelerate,
    explain,
    register_policy,
    restore,
    stats,
)

FAMILIES = ["flux", "flux-true-cfg", "flux2", "wan", "wan22", "wan-vace", "ltx2", "ltx2-stg", "qwen", "cosmos",
            "cosmos-predict25", "cosmos3", "sd3"]  # fmt: skip
TEACACHE = {"coefficients": (1.0, 0.0)}
# Rules that compute every step, and rules that skip some.
ALL_COMPUTED = {
    "dbcache": DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=1, max_warmup_steps=0, residual_diff_threshold=0.0),
    "fbcache": FBCacheConfig(residual_diff_threshold=0.0),
    "mask": StepMaskConfig(mask=(1, 1)),
    "taylorseer": TaylorSeerConfig(interval=1, order=2),
    "teacache": TeaCacheConfig(threshold=0.0, taylorseer_order=1, **TEACACHE),
    "magcache": MagCacheConfig(threshold=0.0, mag_ratios=(1.0, 1.0)),
    "easycache": EasyCacheConfig(threshold=0.0, warmup=2),
    "seacache": SeaCacheConfig(threshold=0.0),
    "interval": IntervalConfig(interval=1),
    "guard of everything": StepMaskConfig(mask=(1, 0), guard=1.0, guard_bound=1e9),
    "pab": PABConfig(window=(0, 0)),
}
SKIPPING = {
    "dbcache": DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=9.0),
    "fbcache": FBCacheConfig(residual_diff_threshold=9.0, max_continuous_cached_steps=1, taylorseer_order=1),
    "dbcache, static": DBCacheConfig(
        Fn_compute_blocks=1, steps_computation_mask="fast", steps_computation_policy="static"
    ),
    "mask": StepMaskConfig(mask=(1, 1, 0, 0, 1, 0)),
    "taylorseer": TaylorSeerConfig(interval=2, order=2, warmup=2),
    "teacache": TeaCacheConfig(threshold=9.0, taylorseer_order=1, **TEACACHE),
    "magcache": MagCacheConfig(threshold=9.0, mag_ratios=(1.0, 1.1, 0.9)),
    "easycache": EasyCacheConfig(threshold=1e9, warmup=2),
    "seacache": SeaCacheConfig(threshold=9.0),
    "interval": IntervalConfig(interval=2),
}
STEPS = 6


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """A rule that computes all steps equals stock bit for bit. Skipping leaves no trace in the next request, and
    `restore` leaves none at all. The first family has every rule, and each other one half of them."""
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=STEPS)

    def half(rules):
        family = FAMILIES.index(name)
        return [each for place, each in enumerate(rules.items()) if family == 0 or (family + place) % 2]

    for rule, config in half(ALL_COMPUTED):
        accelerate(pipe, cache=config)
        assert same(entry.run(pipe, steps=STEPS), stock), rule
        assert stats(pipe).steps_skipped == 0, rule
    for place, (rule, config) in enumerate(half(SKIPPING)):
        accelerate(pipe, cache=config)
        first = entry.run(pipe, steps=STEPS)
        found = stats(pipe)
        assert found.steps_skipped > 0 and found.steps_computed + found.steps_skipped == STEPS, rule
        assert found.cache_bytes > 0 and not same(first, stock), rule
        if name == FAMILIES[0] or (FAMILIES.index(name) + place) % 3 == 0:
            entry.run(pipe, steps=STEPS - 1)
            assert same(entry.run(pipe, steps=STEPS), first), rule
    restore(pipe)
    assert same(entry.run(pipe, steps=STEPS), stock)


class Reference:
    """A FLUX transformer's forward that skips blocks by a list of computed steps.

    The blocks from `first` on are skipped, without the `last` ones. They have one residual, extrapolated linearly if
    `line`. The residual of the first blocks is measured."""

    def __init__(self, transformer, first, last, decide, line=False):
        self.transformer, self.first, self.last, self.decide, self.line = transformer, first, last, decide, line
        self.place, self.measured, self.kept, self.computed = 0, None, [], []
        transformer.forward = self.forward

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
                joint_attention_kwargs=None, return_dict=False):  # fmt: skip
        model = self.transformer
        hidden_states = model.x_embedder(hidden_states)
        temb = model.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        text = model.context_embedder(encoder_hidden_states)
        rotary = model.pos_embed(torch.cat((txt_ids, img_ids)))
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        middle = blocks[self.first : len(blocks) - self.last]

        def run(some, text, hidden_states):
            for block in some:
                text, hidden_states = block(
                    hidden_states=hidden_states, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary
                )
            return text, hidden_states

        begin = hidden_states
        text, hidden_states = run(blocks[: self.first], text, hidden_states)
        added = hidden_states - begin
        change = None
        if self.measured is not None:
            change = ((added - self.measured).abs().mean() / self.measured.abs().mean()).item()
        compute = not self.kept or self.decide(self.place, change)
        before = torch.cat([text, hidden_states], 1)
        if compute:
            self.measured = added
            text_out, hidden_out = run(middle, text, hidden_states)
            self.kept = [*self.kept[-1:], (self.place, torch.cat([text_out, hidden_out], 1) - before)]
        residual = self.kept[-1][1]
        if not compute:
            if self.line and len(self.kept) == 2 and self.kept[1][0] > 1:
                (one, earlier), (two, later) = self.kept
                residual = later + (later - earlier) / (two - one) * (self.place - two)
            text_out, hidden_out = (before + residual).split([text.shape[1], hidden_states.shape[1]], 1)
        self.computed.append(compute)
        self.place += 1
        _, hidden_states = run(blocks[len(blocks) - self.last :], text_out, hidden_out)
        return (model.proj_out(model.norm_out(hidden_states, temb)),)


CASES = {
    "fbcache": (FBCacheConfig(residual_diff_threshold=0.7), 1, 0, lambda place, change: change >= 0.7, False),
    "dbcache": (
        DBCacheConfig(Fn_compute_blocks=2, Bn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.6,
                      max_continuous_cached_steps=2, taylorseer_order=1),
        2, 1, None, True,
    ),
    "mask": (
        StepMaskConfig(mask=(1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1), taylorseer_order=1),
        0, 0, lambda place, change: place in (0, 1, 4, 7, 9, 11), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_block_rules_on_flux(case):
    config, first, last, decide, line = CASES[case]
    steps, run = 12, []

    def dbcache(place, change):
        compute = place < 3 or not change < 0.6 or run[-2:] == [False, False]
        run.append(compute)
        return compute

    pipe = build("flux")
    reference = Reference(pipe.transformer, first, last, decide or dbcache, line)
    if decide is None:
        run.append(True)  # its first step, which is not asked about
    expected = TINY["flux"].run(pipe, steps=steps)
    del pipe.transformer.forward
    accelerate(pipe, cache=config)
    found = TINY["flux"].run(pipe, steps=steps)
    skipped = reference.computed.count(False)
    assert 0 < skipped < steps - 2, "a rule that decides nothing proves nothing"
    assert stats(pipe).steps_skipped == skipped
    # Two stacks add their residuals one after the other: the same sum, rounded twice.
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_compiled_blocks_are_inside_the_cache_layers(collected):
    """Skipping compiles nothing anew."""
    pipe = build("flux")
    stock = TINY["flux"].run(pipe, steps=STEPS)
    for config in (SKIPPING["dbcache"], SKIPPING["taylorseer"]):
        accelerate(pipe, cache=config)
        eager = TINY["flux"].run(pipe, steps=STEPS)
        torch.compiler.reset()
        accelerate(pipe, cache=config, compile=CompileConfig(backend="eager"))
        torch._dynamo.utils.counters.clear()
        assert same(TINY["flux"].run(pipe, steps=STEPS), eager) and not same(eager, stock)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        TINY["flux"].run(pipe, steps=STEPS)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_what_is_refused():
    pipe = build("flux")
    with pytest.raises(
        Unsupported, match="leaves no block of the first stack, where skipping is decided: its stacks have 3, 3"
    ):
        accelerate(pipe, cache="dbcache")
    with pytest.raises(Unsupported, match="Bn_compute_blocks=4 leave no block to skip"):
        accelerate(pipe, cache=DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=4))
    with pytest.raises(Unsupported, match="one state for both would mix them"):
        accelerate(build("wan"), cache=FBCacheConfig(enable_separate_cfg=False))
    accelerate(build("sd3"), cache=FBCacheConfig(enable_separate_cfg=False))
    with pytest.raises(Unsupported, match="no adapter"):
        accelerate(build("pixart"), cache="mask")
    assert "one step of 3 computed after 3" in str(explain(pipe, cache="taylorseer"))
    assert "step mask 'medium'" in str(explain(pipe, cache="mask"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"kind": "mask", "mask": "slowly"}, "got 'slowly'.*Did you mean 'slow'"),
        (lambda: {"kind": "mask", "mask": (0, 1)}, "the first one computed"),
        (lambda: {"kind": "mask", "mask": (1, 0.5)}, "ones for computed"),
        (lambda: {"kind": "taylorseer", "order": 5}, "between 0 and 4, got 5"),
        (lambda: {"kind": "taylorseer", "interval": 0}, "at least 1"),
        (lambda: {"kind": "dbcache", "Fn_compute_blocks": 0}, "at least 1"),
        (lambda: {"kind": "dbcache", "force_refresh_step_policy": "often"}, "'once' or 'repeat'"),
        (lambda: {"kind": "dbcache", "steps_computation_policy": "fixed"}, "'dynamic' or 'static'"),
        (lambda: {"kind": "fbcache", "force_refresh_step_hint": 0}, "at least 1"),
        (lambda: {"kind": "teacache", "taylorseer_order": -1}, "between 0 and 4"),
    ],
)
def test_values_out_of_range(make, message):
    from diffusers_accel import AccelConfig

    with pytest.raises(ConfigError, match=message):
        AccelConfig(cache=make())


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_broadcast(name):
    """PAB reuses outputs for each guidance branch by itself, leaves no trace in the next request, and goes."""
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=STEPS)
    accelerate(pipe, cache=PABConfig(self_attention=2, cross_attention=3, window=(0, 1000)))
    first = entry.run(pipe, steps=STEPS)
    found = stats(pipe).attention_broadcasts
    assert found["reused"] > 0 and found["computed"] > 0 and not same(first, stock)
    entry.run(pipe, steps=STEPS - 1)
    assert same(entry.run(pipe, steps=STEPS), first)
    restore(pipe)
    assert same(entry.run(pipe, steps=STEPS), stock)


def test_broadcast_keeps_guidance_branches_apart():
    """A branch is given its own outputs, not those of the branch before it."""
    pipe = build("wan")
    accelerate(pipe, cache=PABConfig(self_attention=100, cross_attention=None, window=(0, 1000)))
    seen = {}
    attention = pipe.transformer.blocks[-1].attn1

    def hook(module, args, output):
        seen.setdefault(len(seen), output.clone())

    handle = attention.register_forward_hook(hook)
    TINY["wan"].run(pipe, steps=4)
    handle.remove()
    calls = list(seen.values())
    cond, uncond = calls[::2], calls[1::2]
    assert all(torch.equal(item, cond[0]) for item in cond)
    assert all(torch.equal(item, uncond[0]) for item in uncond)
    assert not torch.equal(cond[0], uncond[0])


def test_broadcast_is_refused_within_compiled_blocks():
    with pytest.raises(Unsupported, match="compiled whole"):
        accelerate(build("flux"), cache="pab", compile=CompileConfig(backend="eager"))


def test_magcache_is_diffusers_own():
    """The peer: diffusers' MagCache on the same stock transformer, at the same settings."""
    from diffusers import MagCacheConfig as Own

    ratios, steps = [1.0, 1.2, 1.1, 1.05, 1.0, 0.98, 0.95, 0.9, 0.85, 0.8], 10
    settings = {"threshold": 0.12, "max_skip_steps": 3, "retention_ratio": 0.2}
    pipe = build("wan")
    pipe.transformer.enable_cache(Own(num_inference_steps=steps, mag_ratios=ratios, **settings))
    expected = TINY["wan"].run(pipe, steps=steps)
    pipe.transformer.disable_cache()
    accelerate(pipe, cache=MagCacheConfig(mag_ratios=tuple(ratios), **settings))
    found = TINY["wan"].run(pipe, steps=steps)
    assert 0 < stats(pipe).steps_skipped < steps - 2, "a rule that decides nothing proves nothing"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_seacache_is_diffusers_own():
    """The peer: diffusers' SeaCache on the same stock video transformer."""
    from diffusers import SeaCacheConfig as Own

    steps = 10
    for threshold in (0.25, 0.8):
        pipe = build("wan")
        pipe.transformer.enable_cache(Own(threshold=threshold, power_exp=3.0))
        expected = TINY["wan"].run(pipe, steps=steps)
        pipe.transformer.disable_cache()
        accelerate(pipe, cache=SeaCacheConfig(threshold=threshold, power_exp=3.0))
        found = TINY["wan"].run(pipe, steps=steps)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert stats(pipe).steps_skipped > 0


def test_easycache_against_the_published_loop():
    """The reference: the published rule, run by hand around a stock FLUX transformer."""
    steps, threshold, warmup = 10, 0.5, 3
    pipe = build("flux")
    inner, kept, skipped = pipe.transformer.forward, {"error": 0.0}, []

    def forward(*args, **kwargs):
        x = kwargs["hidden_states"].clone()
        place = len(skipped)
        compute = True
        if place < warmup or place == steps - 1:
            kept["error"] = 0.0
        elif "k" in kept:
            kept["error"] += float(kept["k"] * (x - kept["last"]).abs().mean() / kept["y"].abs().mean())
            compute = not kept["error"] < threshold
            if compute:
                kept["error"] = 0.0
        kept["last"] = x
        skipped.append(not compute)
        if not compute:
            return (x + kept["difference"],)
        y = inner(*args, **kwargs)[0]
        if "y" in kept:
            kept["k"] = (y - kept["y"]).abs().mean() / (x - kept["x"]).abs().mean()
        kept.update(x=x, y=y.clone(), difference=y - x)
        return (y,)

    pipe.transformer.forward = forward
    expected = TINY["flux"].run(pipe, steps=steps)
    del pipe.transformer.forward
    accelerate(pipe, cache=EasyCacheConfig(threshold=threshold, warmup=warmup))
    found = TINY["flux"].run(pipe, steps=steps)
    assert stats(pipe).steps_skipped == sum(skipped) and 0 < sum(skipped) < steps - warmup - 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_guard_stops_what_drifts():
    pipe = build("flux")
    stock = TINY["flux"].run(pipe, steps=8)
    accelerate(pipe, cache=StepMaskConfig(mask=(1, 1, 0, 0, 0, 0, 0, 0), guard=0.25, guard_bound=0.0))
    found = TINY["flux"].run(pipe, steps=8)
    [guarded] = stats(pipe).cache_guarded.values()
    # The first step that might be skipped is looked at, and nothing is skipped after it.
    assert guarded["checked"] == 1 and guarded["stopped"] == 2 and guarded["worst"] > 0
    assert stats(pipe).steps_skipped == 0 and same(found, stock)
    assert "skipping stopped at step 2" in str(stats(pipe))
    accelerate(pipe, cache=StepMaskConfig(mask=(1, 1, 0, 0, 0, 0, 0, 0), guard=0.25, guard_bound=1e9))
    TINY["flux"].run(pipe, steps=8)
    [guarded] = stats(pipe).cache_guarded.values()
    assert guarded["checked"] == 2 and guarded["stopped"] is None and stats(pipe).steps_skipped == 4


def test_controlnets_residuals_between_blocks_are_fresh():
    """A ControlNet that adds other values on a skipped step changes the result by just these values' difference."""
    pipe = build("flux-controlnet")
    accelerate(pipe, cache=StepMaskConfig(mask=(1, 0)))
    model = pipe.transformer
    blocks = []
    model.single_transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: blocks.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    factors = iter((1.0, 1.0))
    controls = []

    def control(module, args, output):
        factor = next(factors)
        samples = [factor * item for item in output[0]]
        controls.append(samples)
        return samples, output[1]

    handle = pipe.controlnet.register_forward_hook(control)
    before = len(blocks)
    TINY["flux-controlnet"].run(pipe, steps=2)
    plain, factors = blocks[before + 1], iter((1.0, 3.0))
    first = controls[-1]
    TINY["flux-controlnet"].run(pipe, steps=2)
    handle.remove()
    count = len(model.transformer_blocks)
    interval = -(-count // len(first))
    added = sum(2.0 * first[index // interval] for index in range(count))
    torch.testing.assert_close(blocks[-1], plain + added, atol=1e-4, rtol=1e-4)


def test_the_second_expert_takes_over():
    """Wan2.2's experts work one after another: only one of them keeps residuals, one for each guidance branch."""
    pipe, sizes = build("wan22"), []
    pipe.transformer_2.blocks[-1].register_forward_hook(
        lambda module, args, output: sizes.append(output.numel() * output.element_size())
    )
    accelerate(pipe, cache=StepMaskConfig(mask=(1, 0)))
    TINY["wan22"].run(pipe, steps=6)
    assert stats(pipe).cache_bytes == 2 * sizes[0]


def test_ip_adapter():
    """FLUX's IP-Adapter attends to a picture within the blocks: stock when all is computed. On a skipped step its
    effect is part of the residual, with the picture of this request."""
    torch.manual_seed(0)
    pipe = build("flux")
    load_ip_adapter(pipe)
    pictures = [[torch.randn(1, 1, 24)] for _ in range(2)]

    def run(picture):
        given = {"ip_adapter_image_embeds": picture, "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 24)]}
        return TINY["flux"].run(pipe, steps=STEPS, **given)

    stock = [run(picture) for picture in pictures]
    assert not torch.equal(*stock)
    accelerate(pipe, attention="sdpa", cache=StepMaskConfig(mask=(1,)))
    assert all(torch.equal(run(picture), expected) for picture, expected in zip(pictures, stock, strict=True))
    mask = (1, 1, 0, 1, 0, 0)
    accelerate(pipe, cache=StepMaskConfig(mask=mask))
    found = [run(picture) for picture in pictures]
    assert stats(pipe).steps_skipped == 3
    assert torch.equal(run(pictures[0]), found[0])
    restore(pipe)
    for picture, one in zip(pictures, found, strict=True):
        assert torch.equal(reused(pipe, mask, lambda picture=picture: run(picture)), one)


def reused(pipe, mask, run):
    """A request on a stock FLUX whose stacks reuse their last residual on steps that the mask skips."""
    model, kept, handles, step = pipe.transformer, {}, [], iter(range(len(mask)))
    now = [0]
    handles.append(model.register_forward_pre_hook(lambda *_: now.__setitem__(0, next(step))))
    for stack in (model.transformer_blocks, model.single_transformer_blocks):

        def enter(module, args, kwargs, stack=stack):
            kept[stack, "in"] = kwargs["encoder_hidden_states"], kwargs["hidden_states"]

        def leave(module, args, output, stack=stack):
            if mask[now[0]]:
                kept[stack] = [out - given for out, given in zip(output, kept[stack, "in"], strict=True)]
                return output
            return tuple(given + added for given, added in zip(kept[stack, "in"], kept[stack], strict=True))

        handles.append(stack[0].register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(stack[-1].register_forward_hook(leave))
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def test_a_policy_of_a_users_own():
    from diffusers_accel import AccelConfig
    from diffusers_accel.config import POLICY_NAMES
    from diffusers_accel.policies import POLICIES

    seen = []

    @register_policy("every-other", signal="residual")
    class EveryOther:
        def __init__(self, start=1):
            self.start = start

        def decide(self, step, change):
            seen.append(change)
            return "skip" if step.step > self.start and step.step % 2 else "full"

    try:
        pipe = build("wan")
        accelerate(pipe, cache="every-other")
        TINY["wan"].run(pipe, steps=8)
        assert stats(pipe).steps_skipped == 3 and any(change for change in seen)
        config = AccelConfig(cache={"kind": "every-other", "start": 4, "taylorseer_order": 1})
        assert config.cache == PolicyConfig(name="every-other", options={"start": 4}, taylorseer_order=1)
        assert AccelConfig.from_dict(config.to_dict()) == config
        accelerate(pipe, config)
        TINY["wan"].run(pipe, steps=8)
        assert stats(pipe).steps_skipped == 2
        with pytest.raises(Unsupported, match="cannot be made with"):
            accelerate(pipe, cache={"kind": "every-other", "stop": 4})
        with pytest.raises(ValueError, match="already"):
            register_policy("every-other", EveryOther)
    finally:
        POLICIES._records.pop("every-other")
        POLICY_NAMES.discard("every-other")
    with pytest.raises(ValueError, match="of our own"):
        register_policy("teacache", EveryOther)
