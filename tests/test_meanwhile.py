"""What users do between `accelerate` and `restore`: LoRAs, casts, hooks, setters, weights, Ctrl-C. Each works as on the
stock pipeline, or is refused or said by name, and `restore` gives a stock pipeline that runs as if it had never been
accelerated. The reference is stock diffusers to which the user has done the same."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FasterCacheConfig, FirstBlockCacheConfig, PNDMScheduler
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from test_api import SKIP_ALL, fingerprint
from tiny import ALL, build

import diffusers_accel
from diffusers_accel import CompileConfig, TeaCacheConfig, Unsupported, accelerate, explain, restore, stats

INT8 = {"linear": {"algo": "int8", "smallest": 0}}
NVFP4 = {"linear": {"algo": "nvfp4", "smallest": 0}}
TORCHAO = {"linear": {"algo": "torchao:int8_weight_only", "smallest": 0}}
FUSE = {"fuse": True}
COMPILE = {"compile": CompileConfig(backend="eager")}
LAYERS = pytest.mark.parametrize(
    "sections", [INT8, NVFP4, TORCHAO, FUSE, {**INT8, **FUSE}], ids=["int8", "nvfp4", "torchao", "fuse", "int8-fuse"]
)


def run(pipe, name="flux", **overrides):
    return ALL[name].run(pipe, **{"steps": 2, **overrides})


def add_lora(pipe, dora=False):
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v"]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets, use_dora=dora)
    pipe.transformer.add_adapter(config, adapter_name="a")


def heard(pipe, **overrides):
    """What a request says."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run(pipe, **overrides)
    return " ".join(str(item.message) for item in found)


class TestWeights:
    """Layers that others have put around ours, taken away, cast or filled."""

    @LAYERS
    def test_a_lora_that_goes_before_restore(self, sections):
        pipe = build("flux")
        stock = run(pipe)
        add_lora(pipe)
        adapted = run(pipe)
        accelerate(pipe, **sections)
        # The adapter moves the picture by more than rounding the weights under it does.
        assert (run(pipe) - adapted).abs().mean() < 0.9 * (adapted - stock).abs().mean()
        pipe.unload_lora_weights()
        run(pipe)
        restore(pipe)
        assert torch.equal(run(pipe), stock)
        assert {type(module) for module in pipe.transformer.modules()} == {
            type(module) for module in build("flux").transformer.modules()
        }
        accelerate(pipe, **sections)
        restore(pipe)
        assert torch.equal(run(pipe), stock)

    @LAYERS
    def test_a_lora_that_stays(self, sections):
        pipe, stock = accelerate(build("flux"), **sections), build("flux")
        for each in (pipe, stock):
            add_lora(each)
        run(pipe)
        restore(pipe)
        assert torch.equal(run(pipe), run(stock))
        pipe.unload_lora_weights()
        assert torch.equal(run(pipe), run(build("flux")))

    @pytest.mark.parametrize("sections", [FUSE, {**INT8, **FUSE, **COMPILE}], ids=["fuse", "all"])
    def test_a_dora(self, sections):
        pipe, stock = accelerate(build("flux"), **sections), build("flux")
        for each in (pipe, stock):
            add_lora(each, dora=True)
        expected = run(stock)
        torch.testing.assert_close(run(pipe), expected, atol=0.02 if "linear" in sections else 0, rtol=0)
        restore(pipe)
        assert torch.equal(run(pipe), expected)

    @LAYERS
    def test_a_cast(self, sections):
        pipe, stock = accelerate(build("flux"), **sections), build("flux").to(torch.bfloat16)
        run(pipe.to(torch.bfloat16))
        restore(pipe)
        assert {item.dtype for item in pipe.transformer.parameters()} == {torch.bfloat16}
        assert torch.equal(run(pipe), run(stock))

    @LAYERS
    @pytest.mark.parametrize("assign", [True, False])
    def test_weights_that_are_loaded(self, sections, assign):
        other = build("flux", seed=3).transformer.state_dict()
        pipe, stock = accelerate(build("flux"), **sections), build("flux")
        if sections is TORCHAO and not assign:
            pytest.skip("torchao's weights refuse to be copied to, by name")
        for each in (pipe, stock):
            each.transformer.load_state_dict({key: item.clone() for key, item in other.items()}, assign=assign)
        expected = run(stock)
        limit = {"linear": 0.3}.get(next(iter(sections)), 0.0)  # 4 bits of random weights
        assert (run(pipe) - expected).abs().max() <= limit
        restore(pipe)
        assert torch.equal(run(pipe), expected)

    @pytest.mark.parametrize("sections", [INT8, TORCHAO, FUSE, COMPILE], ids=["int8", "torchao", "fuse", "compile"])
    def test_layerwise_casting_afterwards(self, sections):
        pipe, stock = accelerate(build("flux"), **sections), build("flux")
        for each in (pipe, stock):
            each.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        expected = run(stock)
        torch.testing.assert_close(run(pipe), expected, atol=0.05 if "linear" in sections else 0, rtol=0)
        restore(pipe)
        assert torch.equal(run(pipe), expected)

    def test_layerwise_casting_before(self):
        pipe = build("flux")
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        stock = run(pipe)
        with pytest.raises(Unsupported, match="enable_layerwise_casting"):
            accelerate(pipe, fuse=True)
        for sections in (INT8, COMPILE):
            accelerate(pipe, **sections)
            run(pipe)
            restore(pipe)
            assert torch.equal(run(pipe), stock)

    @pytest.mark.parametrize("algo", ["int8", "fp8", "fp8-block", "nvfp4", "nvfp4-fp8"])
    @pytest.mark.parametrize("fuse", [None, True])
    def test_gradients(self, algo, fuse):
        """Against the product with the stored weight, in float64."""
        pipe = build("flux")
        accelerate(pipe, linear={"algo": algo, "smallest": 0}, fuse=fuse)
        layer = pipe.transformer.single_transformer_blocks[0].attn.to_q
        # Layers with 128 x 128 blocks are not packed where one block would span two of them.
        stored = (layer.standalone() if hasattr(layer, "standalone") else layer).dequantize()
        x = torch.randn(5, layer.in_features, requires_grad=True)
        gradient = torch.randn(5, layer.out_features)
        layer(x).backward(gradient)
        expected = gradient.double() @ stored.double()
        torch.testing.assert_close(x.grad.double(), expected, atol=1e-5, rtol=1e-5)


class TestHooks:
    """Hooks on layers whose place ours take, hung there before or after."""

    @pytest.mark.parametrize("sections", [INT8, TORCHAO, FUSE, COMPILE], ids=["int8", "torchao", "fuse", "compile"])
    @pytest.mark.parametrize("first", [True, False])
    def test_a_forward_hook(self, sections, first):
        pipe, calls = build("flux"), []

        def hang():
            layer = pipe.transformer.transformer_blocks[0].attn.to_q
            return layer.register_forward_hook(lambda *_: calls.append(None))

        handle = hang() if first else None
        accelerate(pipe, **sections)
        handle = handle or hang()
        run(pipe)
        assert len(calls) == 2, "once a step"
        restore(pipe)
        run(pipe)
        assert len(calls) == 4
        handle.remove()
        run(pipe)
        assert len(calls) == 4

    def test_blocks_with_hooks_are_not_compiled(self):
        pipe = accelerate(build("flux"), **COMPILE)
        stock = run(pipe)
        handle = pipe.transformer.transformer_blocks[1].attn.to_k.register_forward_hook(lambda *_: print(end=""))
        assert "1 blocks of transformer" in heard(pipe)
        assert torch.equal(run(pipe), stock)
        handle.remove()
        assert "run without compilation" not in heard(pipe)

    def test_a_block_with_hooks_inside_and_a_wrapper_around(self):
        """The hook is called, though the wrapper has the block compiled by itself."""
        pipe, calls = build("flux"), []
        block = pipe.transformer.transformer_blocks[1]
        own = block.forward
        block.forward = lambda *args, **kwargs: own(*args, **kwargs)
        accelerate(pipe, **COMPILE)
        run(pipe)
        block.attn.to_k.register_forward_hook(lambda *_: calls.append(None))
        assert "1 blocks of transformer" in heard(pipe)
        assert len(calls) == 2
        restore(pipe)

    @pytest.mark.parametrize("first", [True, False])
    def test_a_cache_that_hooks_attention(self, first):
        """diffusers' FasterCache, within blocks that are to be compiled."""

        def enable(pipe):
            pipe.transformer.enable_cache(
                FasterCacheConfig(
                    spatial_attention_block_skip_range=2,
                    spatial_attention_timestep_skip_range=(-1, 901),
                    unconditional_batch_skip_range=2,
                    attention_weight_callback=lambda _: 0.5,
                    is_guidance_distilled=True,
                    current_timestep_callback=lambda: pipe.current_timestep,
                )
            )

        stock, pipe = build("flux"), build("flux")
        enable(stock)
        expected = run(stock, steps=4)
        if first:
            enable(pipe)
        accelerate(pipe, attention="sdpa", **COMPILE)
        if not first:
            enable(pipe)
        assert torch.equal(run(pipe, steps=4), expected)
        restore(pipe)
        assert torch.equal(run(pipe, steps=4), expected)


class TestSetters:
    """What diffusers' own setters do to an accelerated pipeline is said at the next request, and stays."""

    def test_set_attn_processor(self):
        pipe, mine = accelerate(build("flux"), attention="sdpa"), FluxAttnProcessor()
        pipe.transformer.set_attn_processor(mine)
        assert "processor of FluxAttention was set by somebody else" in heard(pipe)
        assert "was set" not in heard(pipe), "once is enough"
        restore(pipe)
        assert all(each is mine for each in pipe.transformer.attn_processors.values())
        assert torch.equal(run(pipe), run(build("flux")))

    def test_set_attention_backend(self):
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        before = _AttentionBackendRegistry._active_backend
        pipe = accelerate(build("flux"), attention="sdpa")
        try:
            pipe.transformer.set_attention_backend("native")
            assert "_attention_backend" in heard(pipe)
            restore(pipe)
            backends = {each._attention_backend for each in pipe.transformer.attn_processors.values()}
            assert backends == {"native"}
            assert torch.equal(run(pipe), run(build("flux")))
        finally:
            _AttentionBackendRegistry._active_backend = before

    def test_one_processor_that_is_a_module(self):
        """It takes the attribute's place among the children."""

        class Own(torch.nn.Module):
            _attention_backend = _parallel_config = None
            __call__ = FluxAttnProcessor.__call__

        pipe, shared = build("flux"), Own()
        shared.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        for block in pipe.transformer.transformer_blocks:
            block.attn.processor = shared
        stock = run(pipe)
        before, keys = fingerprint(pipe), list(pipe.transformer.state_dict())
        for _ in range(2):
            accelerate(pipe, attention="sdpa")
            assert torch.equal(run(pipe), stock)
        restore(pipe)
        assert fingerprint(pipe) == before and list(pipe.transformer.state_dict()) == keys
        assert torch.equal(run(pipe), stock)

    @pytest.mark.parametrize("name", ["sd15", "sdxl"])
    def test_an_ip_adapter(self, name):
        """`load_ip_adapter` puts modules in the processors' places."""
        pipe, stock = accelerate(build(name), attention="sdpa"), build(name)
        run(pipe, name)
        weights = _ip_adapter(stock.unet)
        for each in (pipe, stock):
            each.unet._load_ip_adapter_weights([weights])
        embeds = [torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(0))]
        expected = run(stock, name, ip_adapter_image_embeds=embeds)
        for _ in range(2):
            accelerate(pipe, attention="sdpa")
            torch.testing.assert_close(run(pipe, name, ip_adapter_image_embeds=embeds), expected, atol=1e-4, rtol=1e-4)
        restore(pipe)
        assert torch.equal(run(pipe, name, ip_adapter_image_embeds=embeds), expected)

    @pytest.mark.parametrize("switch", ["tiling", "slicing"])
    @pytest.mark.parametrize("on", [True, False])
    def test_a_vaes_own_switch(self, switch, on):
        pipe = accelerate(build("flux"), vae={switch: True})
        getattr(pipe.vae, f"{'enable' if on else 'disable'}_{switch}")()
        restore(pipe)
        assert getattr(pipe.vae, f"use_{switch}") is on

    def test_a_cache_of_diffusers(self):
        pipe = accelerate(build("flux"), cache=SKIP_ALL)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(Unsupported, match=r"enabled since.*disable_cache"):
            run(pipe)
        pipe.transformer.disable_cache()
        run(pipe)
        restore(pipe)
        assert torch.equal(run(pipe), run(build("flux")))


def _ip_adapter(unet):
    """Weights of an IP-Adapter with four image tokens, as its files have them."""
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    found = {
        "image_proj": {
            "proj.weight": torch.randn(4 * width, 32, generator=generator) * 0.1,
            "proj.bias": torch.zeros(4 * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {},
    }
    number = 1
    for path in unet.attn_processors:
        if "attn2" in path:
            hidden = unet.get_submodule(path.removesuffix(".processor")).to_q.out_features
            for part in ("k", "v"):
                weight = torch.randn(hidden, width, generator=generator) * 0.1
                found["ip_adapter"][f"{number}.to_{part}_ip.weight"] = weight
            number += 2
    return found


class TestPlace:
    """Where a request stands, by schedulers that keep no index, and where a pipeline does."""

    @pytest.mark.parametrize("scheduler", [PNDMScheduler, DDIMScheduler, DDPMScheduler])
    def test_steps_of_a_unet(self, scheduler):
        pipe = build("sd15")
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        stock = run(pipe, "sd15", steps=6)
        accelerate(pipe, attention={"backend": "sdpa", "dense_steps": 0.5}, cache="pab")
        found = run(pipe, "sd15", steps=6)
        steps = len(pipe.scheduler.timesteps)
        assert stats(pipe).steps_computed == steps, "every step is known, PNDM's repeated one too"
        assert stats(pipe).attention_broadcasts["reused"] > 0
        assert not torch.equal(found, stock)

    def test_a_scheduler_that_does_not_tell(self):
        class Mute(DDIMScheduler):
            def __getattribute__(self, name):
                return (
                    None
                    if name == "timesteps" and sys._getframe(1).f_code.co_filename.endswith("step.py")
                    else (super().__getattribute__(name))
                )

        pipe = build("sd15")
        pipe.scheduler = Mute.from_config(pipe.scheduler.config)
        accelerate(pipe, attention={"backend": "sdpa", "dense_steps": 0.5})
        with pytest.warns(UserWarning, match="Mute does not tell which step"):
            run(pipe, "sd15")

    def test_chosen_for_a_device_that_it_leaves(self, monkeypatch):
        """A pipeline that is accelerated before it goes to a GPU. The device `meta` stands in for one."""
        import dataclasses

        from diffusers_accel import api
        from diffusers_accel.sessions import changes

        pipe = build("flux")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.warns(UserWarning, match="on the CPU, for which all was chosen"):
            accelerate(pipe, cache=SKIP_ALL)
        monkeypatch.undo()
        session = api.session_of(pipe)
        first = session.context.denoisers[0]
        elsewhere = dataclasses.replace(first, device=dataclasses.replace(first.device, type="xpu"))
        session.context = dataclasses.replace(session.context, denoisers=(elsewhere,))
        assert "has moved" not in heard(pipe), "weights that wait on the host are on their way"
        monkeypatch.setattr(changes, "_OFFLOADED", ("meta",))
        assert "has moved from xpu to cpu: everything is chosen again" in heard(pipe)
        assert api.session_of(pipe) is not session and stats(pipe).requests == 1
        assert "has moved" not in heard(pipe)

    def test_a_controlnet_stays_stock(self):
        with pytest.warns(UserWarning, match="controlnet .FluxControlNetModel. stays stock"):
            accelerate(build("flux-controlnet"), attention="sdpa")


class TestFailing:
    """What fails while it is applied, or is interrupted there, leaves what was in force before."""

    def test_an_unsupported_layer_is_found_beforehand(self):
        pipe = accelerate(build("flux"), cache="interval")
        expected = run(pipe, steps=4)
        assert not explain(pipe, linear="torchao:int4_weight_only").ok
        with pytest.raises(Unsupported, match="torchao:int4_weight_only"):
            accelerate(pipe, linear={"algo": "torchao:int4_weight_only", "smallest": 0})
        assert torch.equal(run(pipe, steps=4), expected) and stats(pipe).requests == 2

    def test_an_error_while_it_is_applied(self, monkeypatch):
        pipe = accelerate(build("flux"), **INT8, cache=SKIP_ALL)
        expected = run(pipe, steps=4)

        def broken(target, config):
            yield from ()
            raise ZeroDivisionError("no room")

        monkeypatch.setattr(diffusers_accel.api.vae, "edits", broken)
        with pytest.raises(Unsupported, match=r"vae on transformer.*ZeroDivisionError: no room") as caught:
            accelerate(pipe, fuse=True, vae={"slicing": True})
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert torch.equal(run(pipe, steps=4), expected)
        assert stats(pipe).linear_layers["int8"] > 0 and stats(pipe).steps_skipped == 2
        restore(pipe)
        assert torch.equal(run(pipe), run(build("flux")))

    @pytest.mark.parametrize(
        "sections",
        [INT8, FUSE, TORCHAO, {**INT8, **FUSE, **COMPILE, "attention": "sdpa", "cache": SKIP_ALL}],
        ids=["int8", "fuse", "torchao", "all"],
    )
    @pytest.mark.parametrize("earlier", [False, True])
    def test_interrupted_anywhere(self, sections, earlier):
        """Ctrl-C at random lines of ours: nothing stays half done, whatever was in force before is again."""
        pipe = build("flux")
        first = {"cache": TeaCacheConfig(threshold=0.6, coefficients=(1.0, 0.0)), "fuse": True}
        run(pipe, steps=1)
        if earlier:
            accelerate(pipe, **first)
        expected, before = run(pipe, steps=1), fingerprint(pipe)
        weights = {key: item.clone() for key, item in pipe.transformer.state_dict().items()}
        probe = _CtrlC(None)
        with probe:
            accelerate(pipe, **sections)
        accelerate(pipe, **first) if earlier else restore(pipe)
        draw = random.Random(0)
        for _ in range(6):
            # The last lines say what was left off: all is in force by then.
            ctrl_c = _CtrlC(draw.randrange(probe.lines - 50))
            with pytest.raises(KeyboardInterrupt), ctrl_c:
                accelerate(pipe, **sections)
            if not earlier:
                assert fingerprint(pipe) == before, ctrl_c.where
            found = pipe.transformer.state_dict()
            assert found.keys() == weights.keys(), ctrl_c.where
            assert all(torch.equal(found[key], item) for key, item in weights.items()), ctrl_c.where
            assert torch.equal(run(pipe, steps=1), expected), ctrl_c.where


class _CtrlC:
    """Raises KeyboardInterrupt at the n-th line of this package that is run, or counts lines."""

    def __init__(self, at):
        self.at, self.lines, self.where = at, 0, None
        self._root = str(Path(diffusers_accel.__file__).parent)

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _call(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.startswith(self._root) else None

    def _line(self, frame, event, argument):
        if event == "line":
            if self.lines == self.at:
                self.where = (frame.f_code.co_filename, frame.f_lineno)
                sys.settrace(None)
                raise KeyboardInterrupt
            self.lines += 1
        return self._line
