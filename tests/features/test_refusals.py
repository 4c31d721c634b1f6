"""Refusals: each names what is in the way, and what it tells to write instead is accepted."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import warnings

import pytest
import torch
from drawn import BESIDE, SECTIONS, legal
from tape import TapeBackend
from tiny import TINY, build, same
from torch import nn

from diffusers_accel import (
    CompileConfig,
    ConfigError,
    PolicyFailed,
    Unsupported,
    accelerate,
    explain,
    register_attention,
    register_linear,
    register_policy,
    restore,
    stats,
)
from diffusers_accel.config import POLICY_NAMES
from diffusers_accel.core.graphs import GRAPH_BACKENDS
from diffusers_accel.kernels.attention import KERNELS
from diffusers_accel.kernels.linear import LINEARS
from diffusers_accel.policies import POLICIES


@pytest.fixture
def registries():
    """Whatever a test registers is gone after it."""
    kept = [(registry, dict(registry._records)) for registry in (KERNELS, LINEARS, POLICIES)]
    yield
    for registry, records in kept:
        registry._records.clear()
        registry._records.update(records)
    POLICY_NAMES.clear()


# Small pipelines by name: a check changes nothing, so that all tests may share them.
_BUILT = {}


def built(name):
    if name not in _BUILT:
        _BUILT[name] = build(name)
    return _BUILT[name]


def one_block_first():
    """FLUX.1 with one block in the first of its two stacks."""
    pipe = build("flux")
    del pipe.transformer.transformer_blocks[1:]
    return pipe


def refusal(pipe, **sections):
    with pytest.raises((Unsupported, ConfigError)) as caught:
        accelerate(pipe, **sections)
    assert "forward" not in vars(pipe.transformer)
    return str(caught.value)


# --- what a linear layer is refused for ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "linear", "reason", "instead", "written"),
    [
        ("flux", {"algo": "fp8", "ignore": ["*"]}, "70 are named by linear.ignore", "fewer globs in linear.ignore",
         {"algo": "fp8", "ignore": ["*.norm*"]}),
        ("flux", {"algo": "fp8", "smallest": 5000}, "60 are no larger than linear.smallest=5000", "linear.smallest=0",
         {"algo": "fp8", "smallest": 0}),
        ("pixart", "fp8", "30 are no larger than linear.smallest=512, the model's own", "linear.smallest=0",
         {"algo": "fp8", "smallest": 0}),
        ("pixart", {"algo": "fp8", "ignore": ["*"]}, "36 are named by linear.ignore", "linear.plan={'*': 'fp8'}",
         {"algo": "fp8", "ignore": ["*"], "plan": {"*": "fp8"}}),
        ("flux", {"algo": "fp8", "plan": {"*": "none"}}, "70 are 'none' in linear.plan", "linear.plan without 'none'",
         "fp8"),
        ("flux", {"plan": {"*.to_q": "none"}}, "54 are not named by linear.plan", "linear='fp8'", "fp8"),
    ],
)  # fmt: skip
def test_linear(name, linear, reason, instead, written):
    text = refusal(built(name), linear=linear)
    assert "no linear layer is left to quantize" in text and reason in text and "format" not in text
    assert text.endswith(f"Instead: {instead}.")
    assert explain(built(name), linear=written).ok


def test_linear_names_another_format_only_where_it_is_the_cause(registries):
    register_linear("of-7", lambda linear: nn.Linear(1, 1), in_multiple=7)
    text = refusal(built("flux"), linear="of-7")
    # The commonest reason comes first: most layers of the tiny model have 32 input features.
    assert re.search(r"of 70, \d+ cannot be: 32 input features are no multiple of 7 \(", text)
    (name,) = re.findall(r"Instead: linear='([^']+)'\.", text)
    assert explain(built("flux"), linear=name).ok


# --- blocks that are always computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fbcache", "dbcache"])
def test_no_block_is_left_to_decide_at(kind):
    pipe = one_block_first()
    text = refusal(pipe, cache=kind)
    assert "leaves no block of the first stack, where skipping is decided: its stacks have 1, 3" in text
    assert "FBCacheConfig" not in text and text.endswith(
        "Instead: cache='mask' or 'easycache', which measure no block."
    )
    for cache in ("mask", "easycache"):
        assert explain(pipe, cache=cache).ok


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_fewer_blocks_as_it_says(name):
    for first, last in ((8, 0), (8, 8), (1, 4), (3, 3)):
        text = refusal(built(name), cache={"kind": "dbcache", "Fn_compute_blocks": first, "Bn_compute_blocks": last})
        first, last = map(int, re.findall(r"Instead: Fn_compute_blocks=(\d+) and Bn_compute_blocks=(\d+) or", text)[0])
        fits = {"kind": "dbcache", "Fn_compute_blocks": first, "Bn_compute_blocks": last}
        assert explain(built(name), cache=fits).ok


def test_a_policy_that_measures_a_missing_block(registries):
    register_policy("measuring", lambda: StepOf("full"), signal="residual")
    assert "the block that it measures leaves no other" in refusal(one_block_first(), cache="measuring")


@pytest.mark.parametrize("emptied", ["last stack computed", "no last stack", "no first stack"])
def test_what_is_left_is_skipped(emptied):
    """The blocks of one stack alone: the rest is computed, and a threshold of 0 is exact."""
    pipe, entry = build("flux"), TINY["flux"]
    stacks = {"no last stack": "single_transformer_blocks", "no first stack": "transformer_blocks"}
    if emptied in stacks:
        setattr(pipe.transformer, stacks[emptied], nn.ModuleList())
    stock = entry.run(pipe)
    cache = {"kind": "fbcache", "Bn_compute_blocks": 3 if emptied == "last stack computed" else 0}
    accelerate(pipe, cache={**cache, "residual_diff_threshold": 0})
    assert same(entry.run(pipe), stock) and stats(pipe).steps_skipped == 0
    accelerate(pipe, cache={**cache, "residual_diff_threshold": 1e9})
    assert not same(entry.run(pipe), stock) and stats(pipe).steps_skipped == 3
    restore(pipe)
    assert same(entry.run(pipe), stock)


# --- fuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
def test_fuse_after_diffusers_own(name):
    pipe = build(name)
    pipe.transformer.fuse_qkv_projections()
    text = refusal(pipe, fuse=True)
    assert "diffusers' own fuse_qkv_projections() has fused" in text
    assert "pipe.transformer.unfuse_qkv_projections() first" in text
    pipe.transformer.unfuse_qkv_projections()
    stock = TINY[name].run(pipe, steps=2)
    accelerate(pipe, fuse=True)
    torch.testing.assert_close(TINY[name].run(pipe, steps=2), stock, atol=2e-5, rtol=1e-4)


def test_fuse_that_leaves_nothing():
    text = refusal(built("wan"), fuse={"ignore": ["*"]})
    assert "fuse.ignore excludes all but one layer" in text and "fewer globs in fuse.ignore" in text


# --- what is not there, and what does nothing ------------------------------------------------------------------------


def test_broadcast_beside_a_compilation_that_compiles_nothing():
    pipe, entry = build("wan"), TINY["wan"]
    stock = entry.run(pipe, steps=2)
    pab = {"kind": "pab", "self_attention": 2, "window": [0, 1000]}
    accelerate(pipe, compile="auto", cache=pab)
    assert not same(entry.run(pipe, steps=2), stock) and stats(pipe).attention_broadcasts["reused"] > 0
    restore(pipe)
    assert "compiled whole" in refusal(pipe, compile=CompileConfig(backend="eager"), cache=pab)


@pytest.mark.parametrize(
    ("sections", "field", "close"),
    [
        ({"attention": {"self_attention": "sdp"}}, "attention.self_attention='sdp'", "sdpa"),
        # FLUX.1 has no cross-attention, no dense steps are asked for, and layers are named by what comes first.
        ({"attention": {"backend": "sdpa", "cross_attention": "spda"}}, "attention.cross_attention='spda'", "sdpa"),
        ({"attention": {"backend": "sdpa", "dense_backend": "sdpaa"}}, "attention.dense_backend='sdpaa'", "sdpa"),
        ({"attention": {"layers": {"*": "sdpa", "x": "sdpb"}}}, "attention.layers['x']='sdpb'", "sdpa"),
        ({"linear": {"algo": "fp8", "plan": {"*": "int9"}}}, "linear.plan['*']='int9'", "int8"),
        ({"cache": {"kind": "teacache", "coefficients_2": "flux.1-de", "coefficients": [1, 0], "threshold": 1}},
         "cache.coefficients_2='flux.1-de'", "flux.1-dev"),
        ({"compile": {"backend": "inducto"}}, "compile.backend='inducto'", "inductor"),
        ({"compile": "max-autotun"}, "compile.mode='max-autotun'", "max-autotune"),
    ],
)  # fmt: skip
def test_names_that_nobody_knows(sections, field, close):
    """Also in fields that the model makes no use of; by `explain` too."""
    for act in (accelerate, explain):
        for error in (ConfigError, Unsupported):
            with pytest.raises(error, match=rf"{re.escape(field)}: There is no .*Did you mean '{re.escape(close)}'\?"):
                act(built("flux"), **sections)


@pytest.mark.parametrize(
    ("name", "attention", "field"),
    [
        ("wan", "fa3", ""),
        ("wan", {"backend": "sdpa", "cross_attention": "fa3"}, ".cross_attention"),
        ("wan", {"backend": "sdpa", "self_attention": "fa3"}, ".self_attention"),
        ("wan", {"backend": "sdpa", "layers": {"*.attn2": "fa3"}}, ".layers['*.attn2']"),
        ("wan", {"backend": "sdpa", "dense_steps": 0.5, "dense_backend": "fa3"}, ".dense_backend"),
    ],
)
def test_the_field_that_names_a_kernel(name, attention, field):
    text = refusal(built(name), attention=attention)
    assert text.startswith(f"attention{field}='fa3' on transformer")
    assert text.endswith(f"Instead: attention{field}='auto' or 'sdpa'.")


def test_a_cache_where_no_adapter_knows_the_blocks():
    assert "Instead: cache='pab'," in refusal(built("pixart"), cache="mask")
    assert explain(built("pixart"), cache="pab").ok
    assert "Instead: cache=None" in refusal(built("pixart"), cache="mask", compile=CompileConfig(backend="eager"))


def test_globs_that_match_nothing():
    """Each is answered with a name that there is."""
    for sections in (
        {"attention": {"layers": {"nowhere": "sdpa"}}},
        {"cache": {"kind": "pab", "layers": {"nowhere": 2}}},
        {"linear": {"algo": "fp8", "ignore": ["nowhere"]}},
        {"fuse": {"ignore": ["nowhere"]}},
    ):
        (path,) = re.findall(r"names like '([^']+)'", refusal(built("wan"), **sections))
        assert path in dict(built("wan").transformer.named_modules())
    text = refusal(built("wan"), linear={"algo": "fp8", "ignore": ["*"], "targets": ["vae"]})
    assert "the model has no linear layer" in text and "linear.targets with a model" in text
    text = refusal(built("wan"), linear={"algo": "fp8", "targets": ["tokenizer"]})
    assert text.endswith("Instead: linear.targets with names of vae, text_encoder, transformer.")


def test_a_recipe_that_no_layer_uses():
    own = {"self_attention": "sdpa", "cross_attention": "sdpa"}
    assert "no recipes" in refusal(built("flux"), attention={"recipe": "int8-1-16-1", **own})


def test_no_policy_is_registered(registries):
    POLICIES._records.clear()
    text = refusal(built("flux"), cache={"kind": "policy", "name": "mine"})
    assert "cache.name='mine'" in text and "None is registered; diffusers_accel.register_policy adds one." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "eager", "options": {"max_autotune": True}}, "compile.options: backend='eager' ignores them"),
        ({"options": {"max_autotun": True}}, "unknown option 'max_autotun'. Did you mean 'max_autotune'?"),
        ({"options": {"max_autotune": "yes"}}, r"compile.options\['max_autotune'\]: expected bool, got 'yes'"),
        ({"options": {"max_autotune_gemm_search_space": 1}}, "expected Literal.*got 1"),
        ({"options": {"max_autotune": None}}, "expected bool, got None"),
        ({"options": {"pre_grad_custom_pass": None}}, "the rewrites of this package are that pass"),
    ],
)
def test_options_of_compile(options, message):
    with pytest.raises(ConfigError, match=message):
        accelerate(built("flux"), compile=options)
    assert explain(built("flux"), compile={"options": {"max_autotune": True, "coordinate-descent-tuning": True}}).ok


@pytest.mark.parametrize(
    ("compile", "instead"),
    [
        ("reduce-overhead", ["default"]),
        ("max-autotune", ["default", "max-autotune-no-cudagraphs"]),
        ({"options": {"triton.cudagraphs": True}}, []),
    ],
)
def test_two_kinds_of_graphs(compile, instead, monkeypatch):
    monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
    text = refusal(built("wan"), compile=compile, cuda_graph=True)
    assert "torch.compile captures graphs itself" in text
    assert re.findall(r"'([^']+)'", text.partition("Instead: ")[2]) == instead
    assert all(explain(built("wan"), compile=mode, cuda_graph=True).ok for mode in instead)


def test_own_backends_may_take_options():
    from torch._dynamo import register_backend
    from torch._dynamo.backends import registry

    seen = []

    def counting(graph, inputs, *, options=None):
        seen.append(options)
        return graph.forward

    register_backend(counting, name="counting options")
    try:
        pipe, entry = build("wan"), TINY["wan"]
        stock = entry.run(pipe, steps=1)
        accelerate(pipe, compile={"backend": "counting options", "options": {"a": [1, 2]}})
        assert same(entry.run(pipe, steps=1), stock) and seen[0] == {"a": [1, 2]}
        restore(pipe)
    finally:
        registry._COMPILER_FNS.pop("counting options", None)
        registry._BACKENDS.pop("counting options", None)


@pytest.mark.parametrize("name", ["", " ", "a\nb", None, 3, ["x"], "x" * 5000])
def test_names_that_are_none(name, registries):
    for register in (register_attention, register_linear, register_policy):
        with pytest.raises(ValueError, match="one line of text"):
            register(name, lambda *_: None)


def test_names_that_mean_something_else(registries):
    for register, name in ((register_attention, "auto"), (register_linear, "none"), (register_linear, "torchao:mine")):
        with pytest.raises(ValueError, match="has another meaning"):
            register(name, lambda *_: None)
    with pytest.raises(ValueError, match="factory"):
        register_policy("mine", "no function")


# --- policies of users -----------------------------------------------------------------------------------------------


class StepOf:
    """A policy that answers every step with one thing; an exception is raised."""

    def __init__(self, answer):
        self.answer = answer

    def decide(self, step, change):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("answer", [None, True, 0, "ful", "", [], KeyError("oh"), ValueError("no")])
def test_a_policy_that_answers_nonsense(answer, registries):
    register_policy("odd", lambda: StepOf(answer))
    pipe, entry = build("wan"), TINY["wan"]
    stock = entry.run(pipe, steps=2)
    accelerate(pipe, cache="odd")
    with pytest.raises(PolicyFailed, match=r"The caching policy 'odd' (raised|returned) .*at step 0"):
        entry.run(pipe, steps=2)
    restore(pipe)
    assert same(entry.run(pipe, steps=2), stock)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: 3, "its factory made 3, which has no decide"),
        (lambda: 1 / 0, "cannot be made with no options: ZeroDivisionError"),
        (lambda start: StepOf("full"), "cannot be made with no options: TypeError"),
    ],
)
def test_a_policy_that_cannot_be_made(factory, words, registries):
    register_policy("odd", factory)
    text = refusal(built("wan"), cache="odd")
    assert text.startswith("cache='odd': ") and words in text


# --- random configurations -------------------------------------------------------------------------------------------

# Names that the declarations leave open.
_NAMES = {
    "attention.backend": ["auto", "sdpa", "fa3", "sage-fp8"],
    "attention.self_attention": ["sdpa", "flex"],
    "attention.cross_attention": ["sdpa", "flash2"],
    "attention.dense_backend": ["auto", "sdpa", "fa4"],
    "attention.layers": [{"*attn*": "sdpa"}, {"nowhere": "sdpa"}],
    "attention.recipe": [None, "int8-1-16-1"],
    "attention.sparse": [None],  # no kernel that takes lists of blocks runs here
    "linear.algo": ["fp8", "int8", "nvfp4", "fp8-block"],
    "linear.plan": [{"*": "fp8"}, {"*.to_q": "int8"}, {"*": "none"}],
    "linear.ignore": [["*"], ["*.to_q"], ["nowhere"]],
    "linear.targets": [["transformer"], ["text_encoder"], ["vae"], ["tokenizer"]],
    "linear.smallest": [0, 16, 10**6],
    "linear.keep_original": ["cpu"],  # what is dropped cannot be restored
    "fuse.ignore": [["*"], ["*.to_q"]],
    "cache.layers": [{"*attn*": 2}, {"nowhere": 3}],
    "cache.coefficients": [[1.0, 0.0], None],
    "cache.coefficients_2": [None],
    "cache.mag_ratios": [[1.0, 0.9], None],
    "cache.mag_ratios_2": [None],
    "compile.backend": ["eager", "inductor"],
    "compile.mode": ["auto", "default"],
    "compile.options": [None],
}


@pytest.mark.parametrize("name", ["flux", "wan", "pixart"])
def test_explain_says_what_accelerate_does(name):
    """Random sections: what is refused is refused by both, for the same reason, and leaves nothing behind."""
    draw, pipe, entry = random.Random(name), build(name), TINY[name]
    stock = entry.run(pipe, steps=2)
    kinds = [kind for kind in SECTIONS if kind.__name__ not in ("PolicyConfig", "WarmupConfig", "ParallelConfig")]
    applied = 0
    for _ in range(90):
        sections = {}
        for kind in draw.sample(kinds, draw.randint(1, 3)):
            fields = dataclasses.fields(kind)
            written = dict(BESIDE.get(kind.__name__, {}))
            for field in draw.sample(fields, draw.randint(0, min(3, len(fields)))):
                names = _NAMES.get(f"{kind.section}.{field.name}")
                written[field.name] = legal(kind, field, draw) if names is None else draw.choice(names)
            with contextlib.suppress(ConfigError):  # fields that exclude each other
                sections[kind.section] = kind(**written)
        explained = explain(pipe, **sections)
        reasons = [row.refused for row in explained.rows if row.refused]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                accelerate(pipe, **{"attention": None, **sections})
                refused = None
            except Unsupported as error:
                refused = f"{error.reason} Instead: {error.instead}"
        assert refused in (reasons or [None]), sections
        if refused is not None:
            continue
        applied += 1
        restore(pipe)
    assert applied > 10
    assert same(entry.run(pipe, steps=2), stock)
