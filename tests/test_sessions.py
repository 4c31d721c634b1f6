"""Who owns what is in force: pipelines that share components, requests that overlap, copies, and pipelines that are
dropped. Every output is compared with stock diffusers', or with the same request on a pipeline that nobody shares."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import warnings
import weakref

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from tape import TapeBackend
from test_api import SKIP_ALL, fingerprint
from tiny import ALL, build, same

from diffusers_accel import (
    Busy,
    CompileConfig,
    NotAccelerated,
    TeaCacheConfig,
    Unsupported,
    accelerate,
    restore,
    stats,
)
from diffusers_accel.core.graphs import GRAPH_BACKENDS

HALF = TeaCacheConfig(threshold=0.6, coefficients=(1.0, 0.0))
NOTHING = TeaCacheConfig(threshold=0.0, coefficients=(1.0, 0.0))


def run(pipe, name="flux", seed=None, **overrides):
    if seed is not None:
        overrides["generator"] = torch.Generator().manual_seed(seed)
    return ALL[name].run(pipe, **overrides)


def twin_of(pipe):
    """A pipeline on the same components with a scheduler of its own, as a server makes one for each request."""
    return type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})


def shape(pipe):
    """What modules a pipeline is made of, and what their instances have."""
    return {key: (kind, slots) for key, (kind, slots, *_) in fingerprint(pipe).items() if isinstance(key, tuple)}


class TestDropped:
    """A pipeline that nobody has any more is freed, whatever is in force on it."""

    @pytest.mark.parametrize(
        "sections",
        [
            {"attention": "sdpa"},
            {"attention": "sdpa", "compile": CompileConfig(backend="eager")},
            {"linear": {"algo": "int8", "smallest": 0}, "fuse": True},
            {"cache": HALF, "vae": {"slicing": True}, "cuda_graph": True},
        ],
        ids=["attention", "compiled", "linear", "cache"],
    )
    # FLUX reaches attention through diffusers' dispatcher, SD3 through a processor of ours.
    @pytest.mark.parametrize("name", ["flux", "sd3"])
    def test_freed(self, name, sections, monkeypatch, collected):
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        from diffusers_accel.kernels.attention import DISPATCHERS

        monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
        tables = [dict(_AttentionBackendRegistry._backends), dict(DISPATCHERS)]
        pipe = accelerate(build(name), **sections)
        run(pipe, name, steps=2)
        refs = [weakref.ref(item) for item in (pipe, pipe.transformer, pipe.vae)]
        del pipe
        gc.collect()
        assert [ref() for ref in refs] == [None] * 3
        assert [dict(_AttentionBackendRegistry._backends), dict(DISPATCHERS)] == tables


class TestShared:
    """Components that several pipelines have."""

    def test_a_vae_is_given_back_by_the_last(self):
        one, other = build("flux"), build("flux", seed=1)
        other.vae = one.vae
        stock = run(one), run(other)
        before = fingerprint(one)
        for first, second in ((one, other), (other, one)):
            accelerate(one, vae={"slicing": True})
            accelerate(other, vae={"slicing": True})
            with pytest.warns(UserWarning, match="vae stays accelerated for FluxPipeline"):
                restore(first)
            assert one.vae.use_slicing
            restore(second)
            assert not one.vae.use_slicing and fingerprint(one) == before
        assert same((run(one), run(other)), stock)

    @pytest.mark.parametrize("algo", ["int8", "torchao:int8_weight_only"])
    def test_a_text_encoder(self, algo):
        one, other = build("flux"), build("flux", seed=1)
        other.text_encoder_2 = one.text_encoder_2
        stock, weights = run(one), copy.deepcopy(one.text_encoder_2.state_dict())
        linear = {"algo": algo, "smallest": 0, "targets": ("text_encoder_2",)}
        accelerate(one, linear=linear)
        quantized = run(one)
        assert not torch.equal(quantized, stock)
        accelerate(other, linear=linear)
        with pytest.warns(UserWarning, match="text_encoder_2 stays"):
            restore(one)
        assert torch.equal(run(one), quantized), "the other one still wants it"
        restore(other)
        assert torch.equal(run(one), stock)
        found = one.text_encoder_2.state_dict()
        assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)

    @pytest.mark.parametrize(
        "sections",
        [
            {"vae": {"slicing": True}},
            {"linear": {"algo": "int8", "smallest": 0, "targets": ("text_encoder_2",)}},
            {"cuda_graph": {"text_encoders": True, "vae": True}},
        ],
        ids=["vae", "linear", "graphs"],
    )
    def test_one_is_dropped(self, sections, monkeypatch, collected):
        """A component that others have does not keep the denoiser of a pipeline that nobody has any more."""
        monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
        kept, dropped = build("flux"), build("flux", seed=1)
        dropped.vae, dropped.text_encoder_2 = kept.vae, kept.text_encoder_2
        stock, before = run(kept), fingerprint(kept)
        for shared in (True, False):
            accelerate(dropped, **sections)
            if shared:
                accelerate(kept, **sections)
            run(dropped)
            gone = weakref.ref(dropped.transformer)
            del dropped
            gc.collect()
            assert gone() is None
            # The only one that wants it now; and, where none does, the one that has it.
            assert restore(kept) is kept
            assert fingerprint(kept) == before and torch.equal(run(kept), stock)
            with pytest.raises(NotAccelerated):
                restore(kept)
            dropped = build("flux", seed=1)
            dropped.vae, dropped.text_encoder_2 = kept.vae, kept.text_encoder_2

    def test_interrupted_while_a_component_is_given_back(self, monkeypatch):
        from diffusers_accel.sessions.shared_components import SharedComponent

        pipe, stock = build("flux"), SharedComponent.undo

        def interrupted(held):
            monkeypatch.setattr(SharedComponent, "undo", stock)
            raise KeyboardInterrupt

        accelerate(pipe, vae={"slicing": True})
        monkeypatch.setattr(SharedComponent, "undo", interrupted)
        with pytest.raises(KeyboardInterrupt):
            restore(pipe)
        assert not pipe.vae.use_slicing and not [key for key in vars(pipe.vae) if "diffusers_accel" in key]

    def test_something_that_is_no_pipeline(self):
        with pytest.raises(NotAccelerated, match="restore: this Linear is not accelerated"):
            restore(torch.nn.Linear(1, 1))

    def test_after_one_that_was_dropped(self):
        """Settings of a pipeline that is gone are joined where they are the same, and make way where they are not."""
        kept = build("flux")
        stock, before = run(kept), fingerprint(kept)
        for later in ({"slicing": True}, {"tiling": True}):
            gone = build("flux", seed=1)
            gone.vae = kept.vae
            accelerate(gone, vae={"slicing": True})
            del gone
            gc.collect()
            accelerate(kept, vae=later)
            assert (kept.vae.use_slicing, kept.vae.use_tiling) == ("slicing" in later, "tiling" in later)
            restore(kept)
            assert fingerprint(kept) == before and torch.equal(run(kept), stock)

    def test_weights_dropped_with_their_pipeline(self):
        """Dropped weights cannot be taken back: `restore` refuses by name, and the encoder stays as it was."""
        kept, gone = build("flux"), build("flux", seed=1)
        gone.text_encoder_2 = kept.text_encoder_2
        linear = {"algo": "int8", "smallest": 0, "targets": ("text_encoder_2",), "keep_original": "drop"}
        accelerate(gone, linear=linear)
        quantized = run(kept)
        del gone
        gc.collect()
        with pytest.raises(Unsupported, match="weights were dropped"):
            restore(kept)
        with pytest.raises(Unsupported, match="original weight is gone"):
            accelerate(kept, linear=linear)
        assert torch.equal(run(kept), quantized)

    def test_another_setting_is_refused(self):
        one, other = build("flux"), build("flux", seed=1)
        other.vae = one.vae
        accelerate(one, vae={"slicing": True})
        before = fingerprint(other)
        with pytest.raises(Unsupported, match="vae is shared with FluxPipeline"):
            accelerate(other, attention="sdpa", vae={"tiling": True})
        assert fingerprint(other) == before
        accelerate(one, vae={"tiling": True})
        assert one.vae.use_tiling and not one.vae.use_slicing, "the only one that has it may change its mind"

    def test_from_pipe(self):
        pipe = build("flux")
        entry, stock = ALL["flux-img2img"], run(build("flux"))
        other = FluxImg2ImgPipeline.from_pipe(pipe)
        expected = entry.run(other)
        accelerate(pipe, cache=SKIP_ALL)
        later = FluxImg2ImgPipeline.from_pipe(pipe)
        assert not torch.equal(entry.run(later), expected)
        assert stats(later).steps_skipped > 0
        with pytest.raises(NotAccelerated):
            restore(build("flux"))
        assert restore(later) is later
        assert torch.equal(entry.run(later), expected) and torch.equal(run(pipe), stock)
        assert restore(pipe) is pipe, "it was taken back through the other one"
        with pytest.raises(NotAccelerated):
            restore(pipe)

    def test_joins(self):
        pipe = build("flux")
        accelerate(pipe, attention="sdpa", cache=SKIP_ALL)
        forward, other = pipe.transformer.forward, FluxImg2ImgPipeline.from_pipe(pipe)
        assert accelerate(other, attention="sdpa", cache=SKIP_ALL) is other
        assert pipe.transformer.forward is forward, "nothing is done again"
        with pytest.raises(Unsupported, match=r"FluxPipeline\) is accelerated otherwise.*restore\(pipe\)"):
            accelerate(other, attention="sdpa")
        restore(other)
        accelerate(other, attention="sdpa")
        restore(pipe)
        assert "forward" not in vars(pipe.transformer) and torch.equal(run(pipe), run(build("flux")))

    def test_the_first_one_may_be_gone(self):
        pipe = build("flux")
        accelerate(pipe, cache=SKIP_ALL)
        other = FluxImg2ImgPipeline.from_pipe(pipe)
        gone = weakref.ref(pipe)
        del pipe
        accelerate(other, attention="sdpa")
        assert stats(other).requests == 0
        restore(other)
        entry = ALL["flux-img2img"]
        assert torch.equal(entry.run(other), entry.run(FluxImg2ImgPipeline(**build("flux").components)))
        gc.collect()
        assert gone() is None

    def test_some_denoisers(self):
        pipe = accelerate(build("wan22"), attention="sdpa")
        other = build("wan22", seed=1)
        other.transformer_2 = pipe.transformer_2
        with pytest.raises(Unsupported, match="some of its denoisers"):
            accelerate(other, attention="sdpa")
        restore(pipe)
        accelerate(other, attention="sdpa")


class TestRequests:
    """One request at a time on a denoiser, each with a state of its own."""

    WAYS = pytest.mark.parametrize("sections", [{"cache": HALF}, {"cuda_graph": True}], ids=["cache", "graphs"])

    @pytest.fixture(autouse=True)
    def _graphs(self, monkeypatch):
        monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)

    @WAYS
    def test_after_one_that_was_cancelled(self, sections):
        expected = run(accelerate(build("flux"), **sections), steps=6)
        pipe = accelerate(build("flux"), **sections)

        class Cancelled(Exception):
            pass

        def cancel(pipe, step, timestep, tensors):
            if step == 2:
                raise Cancelled
            return tensors

        with pytest.raises(Cancelled):
            run(pipe, steps=6, seed=3, callback_on_step_end=cancel)
        assert torch.equal(run(twin_of(pipe), steps=6), expected)
        assert torch.equal(run(pipe, steps=6), expected)

    @WAYS
    @pytest.mark.parametrize("own", [True, False], ids=["twin", "same"])
    def test_inside_a_callback(self, sections, own):
        """The stock pipeline's own scheduler loses its place where it is used twice, so only a twin compares there."""
        expected = run(accelerate(build("flux"), **sections), steps=6)
        pipe = accelerate(build("flux"), **sections)
        found = []

        def nest(pipe, step, timestep, tensors):
            if step == 2 and not found:
                found.append(None)
                found.append(run(twin_of(pipe), steps=6))
            return tensors

        outer = run(pipe if own else twin_of(pipe), steps=6, callback_on_step_end=nest)
        assert torch.equal(outer, expected) and torch.equal(found[1], expected)
        assert torch.equal(run(pipe, steps=6), expected)

    def test_in_the_middle_of_a_step(self):
        pipe = accelerate(build("flux"), cache=HALF)
        seen = []

        def nest(module, args):
            if not seen:
                seen.append(None)
                with pytest.raises(Busy, match="in the middle of a step"):
                    run(twin_of(pipe))
                seen.append("refused")

        handle = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(nest)
        run(pipe)
        handle.remove()
        assert seen == [None, "refused"]
        assert torch.equal(run(pipe), run(accelerate(build("flux"), cache=HALF)))

    @pytest.mark.parametrize("name", ["flux", "wan"])
    @pytest.mark.parametrize("whose", ["one", "joined", "twins"])
    def test_threads_wait(self, name, whose, monkeypatch):
        """Requests of one pipeline, whose scheduler all use, or of one for each thread, which has joined or not."""
        pipe = accelerate(build(name), attention="sdpa", cache=NOTHING)
        expected = {seed: run(build(name), name, steps=3, seed=seed) for seed in range(3)}
        found, errors = {}, []
        if whose == "twins":
            # Their prompts are encoded before they reach the denoiser. A tokenizer keeps the padding of the call it is
            # at, so stock pipelines cannot encode side by side either.
            encode, one_at_a_time = type(pipe).encode_prompt, threading.Lock()

            def encode_prompt(self, *args, **kwargs):
                with one_at_a_time:
                    return encode(self, *args, **kwargs)

            monkeypatch.setattr(type(pipe), "encode_prompt", encode_prompt)

        def work(number):
            torch.set_num_threads(1)  # each thread has a number of its own, and sums depend on it
            try:
                with warnings.catch_warnings():
                    for seed in range(3):
                        mine = pipe if whose == "one" else twin_of(pipe)
                        if whose == "joined":
                            accelerate(mine, attention="sdpa", cache=NOTHING)
                        mine.set_progress_bar_config(disable=True)
                        found[number, seed] = run(mine, name, steps=3, seed=seed)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not errors and len(found) == 9
        for (_, seed), item in found.items():
            assert same(item, expected[seed])

    def test_a_generator_that_has_yielded(self, monkeypatch):
        """Its frame has no caller any more. A thread that is looked at from another one at that moment still runs."""
        from diffusers_accel.core.request_queue import PipelineCall

        def numbers():
            yield sys._getframe()

        generator = numbers()
        call = PipelineCall(build("flux"), sys._getframe())
        assert call.running
        monkeypatch.setattr(sys, "_current_frames", lambda: {threading.get_ident(): next(generator)})
        assert call.running
        monkeypatch.setattr(sys, "_current_frames", dict)
        assert not call.running, "its thread has ended"

    def test_busy(self):
        """Refused at once where that was asked for, and free again once the request has ended, however it did."""
        pipe = accelerate(build("flux"), cache=HALF, request="raise")
        expected = run(accelerate(build("flux"), cache=HALF), steps=3)
        began, end, found = threading.Event(), threading.Event(), []

        def hold(pipe, step, timestep, tensors):
            began.set()
            end.wait(60)
            if step == 1:
                raise KeyboardInterrupt
            return tensors

        def work():
            with pytest.raises(KeyboardInterrupt):
                run(pipe, steps=3, callback_on_step_end=hold)
            found.append(None)

        thread = threading.Thread(target=work)
        thread.start()
        assert began.wait(60)
        with pytest.raises(Busy, match="in another thread"):
            run(twin_of(pipe), steps=3)
        end.set()
        thread.join(60)
        assert found and torch.equal(run(twin_of(pipe), steps=3), expected)

    def test_what_is_kept_goes_with_the_request(self):
        """Memory of a cache, whether a request ended, was interrupted or raised."""
        pipe = accelerate(build("flux"), cache=HALF)

        def kept():
            gc.collect()
            inside = {id(item) for module in pipe.components.values() if isinstance(module, torch.nn.Module)
                      for item in (*module.parameters(), *module.buffers())}  # fmt: skip
            return [
                item for item in gc.get_objects()
                if type(item) is torch.Tensor and id(item) not in inside and item.ndim == 3 and item.shape[-1] > 16
            ]  # fmt: skip

        run(pipe, steps=6)
        before = len(kept())

        def interrupt(pipe, step, timestep, tensors):
            pipe._interrupt = step >= 2
            return tensors

        def broken(pipe, step, timestep, tensors):
            if step == 2:
                raise KeyboardInterrupt
            return tensors

        run(pipe, steps=6, callback_on_step_end=interrupt)
        assert len(kept()) <= before
        with pytest.raises(KeyboardInterrupt):
            run(pipe, steps=6, callback_on_step_end=broken)
        assert len(kept()) <= before


class TestCopies:
    """Copies are stock and whole, and the original stays as it was."""

    SECTIONS = (
        {"attention": "sdpa", "cache": SKIP_ALL, "vae": {"slicing": True}},
        {"linear": {"algo": "int8", "smallest": 0}, "fuse": True, "compile": CompileConfig(backend="eager")},
        {"linear": {"algo": "torchao:int8_weight_only", "smallest": 0}},
    )
    WAYS = pytest.mark.parametrize("sections", SECTIONS, ids=["attention", "int8", "torchao"])

    @WAYS
    @pytest.mark.parametrize("name", ["flux", "sd3"])
    def test_deepcopy_of_a_pipeline(self, name, sections):
        stock, pipe = build(name), build(name)
        expected, before = run(stock, name), shape(stock)
        accelerate(pipe, **sections)
        changed = run(pipe, name)
        twin = copy.deepcopy(pipe)
        assert shape(twin) == before
        assert torch.equal(run(twin, name), expected)
        with pytest.raises(NotAccelerated):
            stats(twin)
        assert torch.equal(run(pipe, name), changed)
        accelerate(twin, **sections)
        assert torch.equal(run(twin, name), changed)
        restore(twin)
        restore(pipe)
        assert torch.equal(run(twin, name), expected) and torch.equal(run(pipe, name), expected)

    @WAYS
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    def test_of_a_transformer(self, sections, way):
        pipe = build("flux")
        expected = run(pipe)
        accelerate(pipe, **sections)
        changed = run(pipe)
        if way == "deepcopy":
            twin = copy.deepcopy(pipe.transformer)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(pipe.transformer))
        else:
            file = io.BytesIO()
            torch.save(pipe.transformer, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert torch.equal(run(pipe), changed)
        restore(pipe)
        pipe.transformer = twin
        assert torch.equal(run(pipe), expected)
        accelerate(pipe, **sections)
        assert torch.equal(run(pipe), changed)

    def test_what_was_dropped_cannot_be_copied(self):
        pipe = accelerate(build("flux"), linear={"algo": "int8", "smallest": 0, "keep_original": "drop"})
        with pytest.raises(Unsupported, match=r"copy.deepcopy.*keep_original='drop'.*save_quantized"):
            copy.deepcopy(pipe.transformer)
        assert isinstance(pipe, FluxPipeline) and stats(pipe).linear_layers["int8"] > 0
