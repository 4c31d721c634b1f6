"""Random configurations and sequences of calls on small stock pipelines, seeded and bounded.

Beside the pipeline stands its mirror: a stock pipeline to which its user does the same (LoRAs, switches, casts) and
which is never accelerated. After every step of a sequence three things hold. A request gives what the mirror gives,
within the class of the setting: bit for bit where nothing is rounded otherwise, near it where weights are, and whatever
a cache makes of it is a picture. A refusal names itself and changes nothing. `restore` gives the mirror's output, bit
for bit.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings

import pytest
import torch
from peft import LoraConfig
from tape import TapeBackend
from test_api import fingerprint
from tiny import ALL, build, tensors

from diffusers_accel import AccelError, CompileConfig, NotAccelerated, accelerate, explain, restore, stats
from diffusers_accel.core.graphs import GRAPH_BACKENDS

EXACT, ROUNDED, CACHED = range(3)
# Settings by section, with the class of what they do to a picture. Some are refused on some models, some on all.
SETTINGS = {
    "attention": [
        ("sdpa", EXACT),
        ("auto", EXACT),
        ("flex", EXACT),
        ({"backend": "sdpa", "dense_steps": 0.5, "dense_layers": 0.3}, EXACT),
        ({"backend": "sdpa", "layers": {"*": "sdpa"}}, EXACT),
        ("fa3", EXACT),
    ],
    "linear": [
        ({"algo": "int8", "smallest": 0}, ROUNDED),
        ({"algo": "fp8", "smallest": 0}, ROUNDED),
        ({"algo": "nvfp4", "smallest": 0, "ignore": ("*to_out*",)}, ROUNDED),
        ({"algo": "torchao:int8_weight_only", "smallest": 0}, ROUNDED),
        ({"algo": "int8", "smallest": 0, "plan": {"*": "none"}}, EXACT),
        ("torchao:int4_weight_only", ROUNDED),
    ],
    "fuse": [(True, EXACT)],
    "compile": [(CompileConfig(backend="eager"), EXACT), ("auto", EXACT)],
    "cuda_graph": [(True, EXACT), ({"limit": 1}, EXACT)],
    "cache": [
        ({"kind": "teacache", "threshold": 0.0, "coefficients": (1.0, 0.0)}, EXACT),
        ({"kind": "teacache", "threshold": 0.5, "coefficients": (1.0, 0.0)}, CACHED),
        ({"kind": "interval", "interval": 2, "warmup": 1}, CACHED),
        ("easycache", CACHED),
        ("taylorseer", CACHED),
        ("fbcache", CACHED),
        ("pab", CACHED),
        ("magcache", CACHED),
    ],
    "vae": [({"slicing": True}, EXACT), ({"tiling": True}, EXACT)],
}
PIPELINES = ("flux", "wan", "qwen", "sd3", "flux2", "cosmos", "ltx2", "sd15")
STEPS = 3


def run(pipe, name, **overrides):
    return tensors(ALL[name].run(pipe, **{"steps": STEPS, **overrides}))


def draw(rng):
    """A configuration of one to three sections, and its class."""
    sections, found = {}, EXACT
    for section in rng.sample(sorted(SETTINGS), rng.choice((1, 1, 2, 3))):
        sections[section], kind = rng.choice(SETTINGS[section])
        found = max(found, kind)
    return sections, found


class Sequence:
    """A pipeline, its mirror, and calls drawn for both."""

    def __init__(self, name, seed):
        self.name, self.rng = name, random.Random(f"{name} {seed}")
        self.pipe, self.mirror = build(name), build(name)
        self.kind = EXACT
        self.log = []
        run(self.pipe, name)
        self.stock = run(self.mirror, name)

    @property
    def denoiser(self):
        return ALL[self.name].denoisers[0]

    def on_both(self, function):
        for pipe in (self.pipe, self.mirror):
            torch.manual_seed(0)
            function(pipe)
        self.stock = run(self.mirror, self.name)

    def accelerate(self):
        sections, kind = draw(self.rng)
        self.log.append(sections)
        before, forms = fingerprint(self.pipe), explain(self.pipe, **sections)
        assert fingerprint(self.pipe) == before
        refused = None
        try:
            accelerate(self.pipe, **sections)
            self.kind = kind
            assert forms.ok
        except AccelError as error:
            refused = str(error)
        if refused is not None:
            self.log.append(refused)
            assert "Instead" in refused
            assert fingerprint(self.pipe) == before
        self.request()

    def request(self):
        self.compare(run(self.pipe, self.name), self.stock)

    def compare(self, found, expected):
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            assert torch.isfinite(one.float()).all(), self.log
            distance = (one.float() - other.float()).abs()
            if self.kind == EXACT:
                # Attention in another kernel rounds otherwise; so does a fused product. A picture of 8 bits may differ
                # by one level of 255.
                assert distance.max() <= 1.01 / 255, self.log
            elif self.kind == ROUNDED:
                assert distance.mean() <= 0.25 * other.float().abs().mean() + 0.05, self.log

    def broken_off(self):
        class BrokenOff(Exception):
            pass

        def stop(pipe, step, timestep, kept):
            if step == 1:
                raise BrokenOff
            return kept

        with contextlib.suppress(BrokenOff):
            run(self.pipe, self.name, callback_on_step_end=stop)
        self.request()

    def lora(self):
        def add(pipe):
            model = getattr(pipe, self.denoiser)
            if not hasattr(model, "add_adapter") or getattr(model, "peft_config", None):
                return
            targets = ["to_q", "to_v"]
            model.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets), "mine")

        self.on_both(add)
        self.request()

    def no_lora(self):
        def remove(pipe):
            model = getattr(pipe, self.denoiser)
            if getattr(model, "peft_config", None):
                model.unload_lora()

        self.on_both(remove)
        self.request()

    def switch(self):
        on = self.rng.choice(("enable", "disable"))

        def turn(pipe):
            if hasattr(pipe.vae, f"{on}_slicing"):
                getattr(pipe.vae, f"{on}_slicing")()

        self.on_both(turn)

    def copied(self):
        twin = copy.deepcopy(self.pipe)
        twin.set_progress_bar_config(disable=True)
        for one, other in zip(run(twin, self.name), self.stock, strict=True):
            assert torch.equal(one, other), self.log
        with pytest.raises(NotAccelerated):
            stats(twin)

    def restored(self):
        with contextlib.suppress(NotAccelerated):
            restore(self.pipe)
        self.kind = EXACT
        for one, other in zip(run(self.pipe, self.name), self.stock, strict=True):
            assert torch.equal(one, other), self.log

    def go(self, length):
        calls = [self.accelerate] * 5 + [self.broken_off, self.lora, self.no_lora, self.switch, self.copied]
        calls += [self.restored]
        for _ in range(length):
            call = self.rng.choice(calls)
            self.log.append(call.__name__)
            call()
        self.restored()
        assert self.kinds(self.pipe) == self.kinds(self.mirror)

    def kinds(self, pipe):
        """The classes that a denoiser is made of; of LoRA layers, which peft chooses by the weights, those beneath."""
        parts = getattr(pipe, self.denoiser).modules()
        return {type(part) for part in parts if not type(part).__module__.startswith("peft.")}


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", PIPELINES)
def test_sequences(name, seed, monkeypatch):
    monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Sequence(name, seed).go(7)
