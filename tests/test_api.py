"""The API on real stock pipelines: in place, replaced by a second call, undone, and refusing without a trace."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from tiny import TINY, build

import diffusers_accel as accel
from diffusers_accel import (
    AccelConfig,
    CompileConfig,
    ConfigError,
    NotAccelerated,
    TeaCacheConfig,
    Unsupported,
    accelerate,
    api,
    explain,
    presets,
    register_attention,
    restore,
    stats,
    warmup,
)
from diffusers_accel.core.platform import Device
from diffusers_accel.kernels.attention import KERNELS
from diffusers_accel.policies.mask import named_mask, scale_mask

SKIP_ALL = TeaCacheConfig(threshold=1e9, coefficients=(1.0, 0.0))


def fingerprint(pipe):
    """Everything of a pipeline that an edit could leave behind: instance attributes of all modules and processors."""
    found = {"pipe": sorted(vars(pipe))}
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for path, child in module.named_modules():
                processor = getattr(child, "processor", None)
                found[name, path] = (
                    type(child),
                    sorted(vars(child)),
                    id(processor),
                    dict(vars(processor)) if hasattr(processor, "__dict__") else None,
                )
        elif hasattr(module, "__dict__"):
            found[name] = sorted(vars(module))
    return found


@pytest.fixture
def flux():
    return build("flux")


def run(pipe, name="flux", **overrides):
    return TINY[name].run(pipe, **overrides)


def test_in_place_and_returned(flux):
    assert accelerate(flux) is flux
    assert restore(flux) is flux


def test_everything_is_taken_back(flux):
    # A first run leaves attributes of diffusers' own (hooks, the scheduler's timesteps).
    stock, before = run(flux), fingerprint(flux)
    accelerate(flux, attention="sdpa", cache=SKIP_ALL, vae={"tiling": True}, compile=CompileConfig(backend="eager"))
    changed = run(flux)
    assert fingerprint(flux) != before
    assert not torch.equal(changed, stock), "skipping half of the steps must show, or this test proves nothing"
    restore(flux)
    assert fingerprint(flux) == before
    assert torch.equal(run(flux), stock)


def test_a_second_call_replaces_the_first(flux):
    stock = run(flux)
    accelerate(flux, cache=SKIP_ALL)
    accelerate(flux, attention="sdpa")
    assert torch.equal(run(flux), stock)
    assert stats(flux).steps_skipped == 0
    restore(flux)
    with pytest.raises(NotAccelerated):
        restore(flux)


def test_a_refused_second_call_keeps_the_first(flux):
    accelerate(flux, cache=SKIP_ALL)
    expected = run(flux)
    with pytest.raises(Unsupported):
        accelerate(flux, attention="fa3")
    assert torch.equal(run(flux), expected)
    assert stats(flux).steps_skipped == 2


def test_failure_midway_leaves_the_stock_pipeline(flux, monkeypatch):
    before = fingerprint(flux)

    def broken(context, config):
        yield from ()
        raise RuntimeError("midway")

    monkeypatch.setattr(accel.api.vae, "edits", broken)
    with pytest.raises(Unsupported, match=r"vae.*RuntimeError: midway"):
        accelerate(flux, attention="sdpa", cache=SKIP_ALL, vae={"tiling": True})
    assert fingerprint(flux) == before
    with pytest.raises(NotAccelerated):
        stats(flux)


def test_two_pipelines_of_one_class_do_not_see_each_other():
    first, second = build("flux"), build("flux")
    stock = run(second)
    accelerate(first, attention="sdpa", cache=SKIP_ALL)
    skipped = run(first)
    assert torch.equal(run(second), stock)
    accelerate(second, attention="sdpa")
    assert torch.equal(run(second), stock)
    assert torch.equal(run(first), skipped), "state must not pass from one to the other"
    assert (stats(first).steps_skipped, stats(second).steps_skipped) == (2, 0)
    restore(first)
    assert torch.equal(run(second), stock)
    assert sum(stats(second).attention_kernels.values()) > 0


def test_a_pipeline_sharing_an_accelerated_denoiser_is_never_wrong(flux):
    """A second pipeline made of the same components runs through the first one's layers."""
    other = FluxImg2ImgPipeline(**flux.components)
    stock = run(other, "flux-img2img")
    accelerate(flux, attention="sdpa", cache=TeaCacheConfig(threshold=0.0, coefficients=(1.0, 0.0)))
    assert torch.equal(run(other, "flux-img2img"), stock)


def test_a_copy_is_stock(flux):
    stock = run(flux)
    accelerate(flux, cache=SKIP_ALL)
    twin = copy.deepcopy(flux.transformer)
    restore(flux)
    flux.transformer = twin
    assert torch.equal(run(flux), stock)


def test_no_dispatcher_is_kept_after_restore(flux, collected):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    from diffusers_accel.kernels.attention import DISPATCHERS

    dispatchers, backends = set(DISPATCHERS), set(_AttentionBackendRegistry._backends)
    accelerate(flux, attention="sdpa")
    assert set(DISPATCHERS) != dispatchers and set(_AttentionBackendRegistry._backends) != backends
    restore(flux)
    assert set(DISPATCHERS) == dispatchers and set(_AttentionBackendRegistry._backends) == backends


def test_explain_is_pure_and_prints_a_table(flux):
    before = fingerprint(flux)
    explanation = explain(flux, "fast")
    refused = explain(flux, attention="fa3", cache="teacache")
    assert fingerprint(flux) == before
    assert explanation.ok and not refused.ok
    text = str(refused)
    assert "fa3" in text and "coefficients" in text and "refused" in text
    assert "<table>" in refused._repr_html_()
    rows = {row.feature: row for row in explain(flux, attention="sdpa", compile=True).rows}
    assert rows["attention"].modules == 6 and rows["compile"].modules == 6
    assert rows["cache"].action == "off"


def test_stats_tells_what_ran(flux):
    accelerate(flux, attention="sdpa", cache=SKIP_ALL)
    for _ in range(2):
        run(flux)
    found = stats(flux)
    assert found.requests == 2
    assert (found.steps_computed, found.steps_skipped) == (2, 2)
    assert found.branches == {"transformer/cond": {"computed": 2, "skipped": 2}}
    # Six attention layers, two computed steps.
    assert found.attention_kernels == {"sdpa": 12}
    weights = sum(item.numel() * 4 for item in flux.transformer.parameters())
    assert found.weight_bytes_before == found.weight_bytes_after >= weights
    assert found.linear_layers["Linear"] > 10
    assert "steps skipped" in str(found) and "<table>" in found._repr_html_()


def test_time_is_told(flux):
    """Seconds are anybody's; what they are of is not."""
    accelerate(flux, attention="sdpa")
    assert stats(flux).seconds_per_step is None
    run(flux)
    found = stats(flux)
    assert found.seconds_per_step > 0 and found.speed_up is None, "nothing was skipped"
    assert "seconds per step" in str(found)
    accelerate(flux, cache=SKIP_ALL)
    run(flux)
    assert stats(flux).speed_up > 0 and "x as fast" in str(stats(flux))


def test_one_line_in_a_notebook(flux):
    accelerate(flux, attention="sdpa", cache=SKIP_ALL)
    (text,) = flux._repr_mimebundle_(include=None, exclude=None).values()
    assert "\n" not in text and text.startswith("FluxPipeline on cpu") and "attention, cache" in text
    restore(flux)
    assert not hasattr(flux, "_repr_mimebundle_")


def test_presets_and_overrides(flux, tmp_path):
    assert explain(flux).rows[0].feature == "attention"
    accelerate(flux, "lossless", cache=SKIP_ALL)
    run(flux)
    assert stats(flux).steps_skipped == 2 and stats(flux).attention_kernels
    AccelConfig(attention="sdpa").to_yaml(tmp_path / "accel.yaml")
    for config in (str(tmp_path / "accel.yaml"), tmp_path / "accel.yaml", {"attention": "sdpa"}):
        accelerate(flux, config)
        run(flux)
        assert stats(flux).attention_kernels == {"sdpa": 24}


@pytest.mark.parametrize(("preset", "share"), [("balanced", 0.4), ("fast", 0.6)])
def test_presets_skip_what_they_say(flux, preset, share):
    """Without a GPU: exact attention, and steps skipped, whatever their number."""
    context = api._context(flux)
    config, notes = presets.resolve(preset, context)
    assert config.attention.backend == "auto" and config.linear is None and config.cuda_graph is None and not notes
    for steps in (24, 28, 50):
        mask = named_mask(config.cache.mask) if isinstance(config.cache.mask, str) else config.cache.mask
        assert 1 - sum(scale_mask(mask, steps)) / steps >= share
    assert explain(flux, preset).ok
    accelerate(flux, preset)
    run(flux, steps=28)
    assert stats(flux).steps_skipped / 28 >= share


@pytest.mark.parametrize(("arch", "linear"), [((9, 0), "fp8"), ((8, 9), "fp8"), ((8, 0), "int8"), ((7, 5), None)])
def test_presets_by_gpu(monkeypatch, arch, linear):
    """The first of a preset's candidates that a GPU and the installed packages can have."""
    context = api._context(build("flux").to(torch.bfloat16))
    device = Device("cuda", "a GPU", arch)
    context = replace(context, denoisers=tuple(replace(item, device=device) for item in context.denoisers))
    for name in ("fa3-fp8", "sage-fp8", "sage"):
        config, _ = presets.resolve("balanced", context)
        found = config.attention.backend
        usable = [item for item in ("fa3-fp8", "sage-fp8", "sage") if KERNELS.get(item).missing(device) is None]
        assert found == (usable[0] if usable else "auto")
        assert (config.linear and config.linear.algo) == linear and config.cuda_graph is not None
        # The next round has the one after it.
        record = replace(KERNELS.get(name), refusal=lambda: "is not wanted here.")
        monkeypatch.setitem(KERNELS._records, name, record)


def test_presets_of_guided_models():
    """INT8 where guidance multiplies errors."""
    device = Device("cuda", "a GPU", (9, 0))
    for name, linear in (("flux", "fp8"), ("qwen", "int8"), ("wan", "int8"), ("ltx2", "int8")):
        context = api._context(build(name).to(torch.bfloat16))
        context = replace(context, denoisers=tuple(replace(item, device=device) for item in context.denoisers))
        config, _ = presets.resolve("balanced", context)
        assert config.linear.algo == linear
        assert linear == "fp8" or config.attention.backend != "fa3-fp8"


@pytest.mark.parametrize(
    ("overrides", "left_off"),
    [({"cache": "pab"}, {"compile", "cuda_graph"}), ({"compile": "reduce-overhead"}, {"cuda_graph"}), ({}, set())],
)
def test_presets_give_way_to_the_user(overrides, left_off):
    """What a section of the user's excludes is left off, not refused."""
    context = api._context(build("flux"))
    device = Device("cuda", "a GPU", (9, 0))
    context = replace(context, denoisers=tuple(replace(item, device=device) for item in context.denoisers))
    config, _ = presets.resolve("lossless", context, overrides)
    on = {name for name in ("attention", "compile", "cuda_graph") if getattr(config, name) is not None}
    assert on == {"attention", "compile", "cuda_graph"} - left_off
    assert all(getattr(config, name) is not None for name in overrides)


def test_presets_leave_off_what_cannot_be_had(flux, monkeypatch):
    monkeypatch.setattr(presets, "_fits", lambda context, section, value, overrides: section != "cache")
    explanation = explain(flux, "fast")
    assert explanation.ok and any("caching is off" in note for note in explanation.notes)
    with pytest.warns(UserWarning, match="caching is off"):
        accelerate(flux, "fast")


def test_warmup_runs_every_size(flux):
    accelerate(flux, attention="sdpa")
    given = {"max_sequence_length": 16, "output_type": "latent"}
    warmup(flux, resolutions=[(32, 32), (32, 48)], prompt="a fox", **given)
    assert stats(flux).requests == 2
    # Without a prompt, a long one too.
    warmup(flux, resolutions=[(32, 32), (32, 48)], **given)
    assert stats(flux).requests == 5
    # What the configuration says.
    accelerate(flux, attention="sdpa", warmup={"resolutions": ["32x32", "32x48", "48x32"], "num_inference_steps": 1})
    warmup(flux, prompt="a fox", **given)
    assert stats(flux).requests == 3 and stats(flux).steps_computed == 1


class TestBadInput:
    """Each is a clear error, and nothing was changed."""

    @pytest.mark.parametrize("thing", [None, 3, "flux", torch.nn.Linear(1, 1)])
    def test_not_a_pipeline(self, thing):
        for function in (accelerate, explain):
            with pytest.raises(TypeError, match="Expected a diffusers pipeline"):
                function(thing)

    @pytest.mark.parametrize(
        ("arguments", "sections", "error", "message"),
        [
            (("fsat",), {}, ConfigError, "no preset 'fsat'. Did you mean 'fast'"),
            (("missing.yaml",), {}, ConfigError, "no configuration file 'missing.yaml'"),
            ((3,), {}, ConfigError, "got int"),
            ((), {"atention": "sdpa"}, ConfigError, "Did you mean 'attention'"),
            ((), {"attention": "sdp"}, Unsupported, "Did you mean 'sdpa'"),
            ((), {"attention": "fa3"}, Unsupported, "fa3 needs"),
            ((), {"attention": "cudnn"}, Unsupported, "needs a CUDA device"),
            ((), {"cache": "teacache"}, Unsupported, "no coefficients are published"),
            ((), {"cache": {"kind": "teacache", "coefficients": "flux.1-de"}}, Unsupported, "'flux.1-dev'"),
            ((), {"cache": {"kind": "teacache", "coefficients": [1, 0]}}, Unsupported, "threshold"),
        ],
    )
    def test_refused_without_a_trace(self, flux, arguments, sections, error, message):
        before = fingerprint(flux)
        with pytest.raises(error, match=message):
            accelerate(flux, *arguments, **sections)
        assert fingerprint(flux) == before

    def test_no_denoiser(self, flux):
        """A pipeline for prompts alone: what changes denoisers is left off, and done once there is one."""
        stock, transformer = run(flux), flux.transformer
        flux.transformer = None
        before = fingerprint(flux)
        linear = {"algo": "int8", "smallest": 0, "targets": ("text_encoder_2",)}
        assert explain(flux, attention="sdpa", fuse=True, linear=linear).ok
        with pytest.warns(UserWarning, match="no denoiser is loaded, so fuse, attention are left off"):
            accelerate(flux, attention="sdpa", fuse=True, linear=linear)
        assert "accelerated: linear" in flux._repr_mimebundle_()["text/plain"] and not stats(flux).requests
        flux.encode_prompt("a red fox", "a red fox")
        assert fingerprint(restore(flux)) == before
        with pytest.warns(UserWarning, match="no denoiser is loaded"):
            accelerate(flux, attention="sdpa")
        flux.transformer = transformer
        with pytest.warns(UserWarning, match="a denoiser was loaded since"):
            run(flux)
        assert stats(flux).attention_kernels["sdpa"] > 0
        assert torch.equal(run(restore(flux)), stock)

    def test_no_denoiser_known(self, flux):
        from diffusers import DiffusionPipeline

        class Bare(DiffusionPipeline):
            def __init__(self, vae):
                super().__init__()
                self.register_modules(vae=vae)

        with pytest.raises(Unsupported, match="has none of transformer"):
            accelerate(Bare(flux.vae))

    def test_compiled_already(self, flux):
        flux.transformer.compile_repeated_blocks(backend="eager")
        with pytest.raises(Unsupported, match="compiled already"):
            accelerate(flux)

    def test_native_cache_on(self, flux):
        from diffusers import FirstBlockCacheConfig

        flux.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(Unsupported, match="diffusers' own caches"):
            accelerate(flux, cache=SKIP_ALL)

    @pytest.mark.parametrize("function", [restore, stats, warmup])
    def test_never_accelerated(self, flux, function):
        with pytest.raises(NotAccelerated, match="not accelerated"):
            function(flux)

    def test_no_vae(self, flux):
        flux.vae = None
        with pytest.raises(Unsupported, match="no VAE"):
            accelerate(flux, vae={"tiling": True})


class TestUserAttention:
    """`register_attention` lets a user's function in, and its mistakes do not pass in silence."""

    @pytest.fixture(autouse=True)
    def _clean(self):
        from diffusers_accel.kernels.attention import KERNELS

        before = dict(KERNELS._records)
        yield
        KERNELS._records.clear()
        KERNELS._records.update(before)

    @pytest.mark.parametrize(
        ("name", "compiled"),
        # FLUX goes through diffusers' dispatcher, SD3 through a processor of ours.
        [*((name, False) for name in ("flux", "sd3", "cosmos", "cosmos3")), ("flux", True), ("sd3", True)],
    )
    def test_a_users_function_runs(self, name, compiled):
        @register_attention("mine")
        def attention(query, key, value, attn_mask=None, is_causal=False, scale=None):
            # Plain float64 softmax attention: an independent reference of what the stock kernels compute.
            q, k, v = (item.transpose(1, 2).double() for item in (query, key, value))
            scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
            if is_causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
            if attn_mask is not None:
                mask = attn_mask if attn_mask.dtype == torch.bool else None
                scores = scores.masked_fill(~mask, float("-inf")) if mask is not None else scores + attn_mask
            return (scores.softmax(-1) @ v).transpose(1, 2).to(query.dtype)

        pipe = build(name)
        stock = run(pipe, name)
        accelerate(pipe, attention="mine", compile=CompileConfig(backend="eager") if compiled else None)
        found = run(pipe, name)
        assert set(stats(pipe).attention_kernels) == {"mine"}
        # float32 attention against float64, through four steps of a random model.
        torch.testing.assert_close(found, stock, atol=2e-4, rtol=1e-3)

    @pytest.mark.parametrize("name", ["flux", "cosmos"])
    def test_context_parallelism_switched_on_afterwards_is_refused(self, name):
        from diffusers.models import attention_dispatch
        from diffusers.models.transformers import transformer_cosmos

        pipe = build(name)
        accelerate(pipe, attention="sdpa")
        processors = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
        tensors = [torch.randn(1, 4, 2, 16) for _ in range(3)]
        if name == "flux":
            backend = processors[0]._attention_backend
            dispatch = attention_dispatch.dispatch_attention_fn
        else:
            backend, dispatch = None, type(processors[0]).__call__.__globals__["dispatch_attention_fn"]
            assert dispatch is not transformer_cosmos.dispatch_attention_fn
        dispatch(*tensors, backend=backend)
        with pytest.raises(Unsupported, match="context parallelism"):
            dispatch(*tensors, backend=backend, parallel_config=object())

    def test_a_wrong_shape_is_caught(self, flux):
        register_attention("flat", lambda query, *_, **__: query.flatten(2))
        accelerate(flux, attention="flat")
        with pytest.raises(ValueError, match="'flat' returned"):
            run(flux)

    def test_names_are_taken_once(self):
        with pytest.raises(ValueError, match="already"):
            register_attention("sdpa", lambda *_: None)

    def test_calls_it_cannot_take_are_warned_of_and_counted(self):
        @register_attention("unmasked", mask=False, causal=False)
        def attention(query, key, value, attn_mask=None, is_causal=False, scale=None):
            assert attn_mask is None and not is_causal
            out = torch.nn.functional.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=scale
            )
            return out.transpose(1, 2)

        pipe = build("cosmos3")
        stock = run(pipe, "cosmos3")
        accelerate(pipe, attention="unmasked")
        with pytest.warns(UserWarning, match="takes no causal mask"):
            found = run(pipe, "cosmos3")
        torch.testing.assert_close(found, stock, atol=2e-4, rtol=1e-3)
        assert stats(pipe).attention_kernels == {"sdpa": 24, "unmasked": 24}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(pipe, "cosmos3")
