"""Weights that ranks share, on 2 and 4 processes, against the stock pipeline in one."""

from __future__ import annotations

import pytest
import torch
from ranks import fsdp, requests

from diffusers_accel import Unsupported, launch
from diffusers_accel.cli.common import CommandError
from diffusers_accel.cli.launch import in_workers
from diffusers_accel.config import AccelConfig, ParallelConfig
from diffusers_accel.core.weights import dense, flat

# One of each kind of denoiser.
KINDS = ("flux-true-cfg", "flux2-klein", "wan", "wan-vace", "ltx2-i2v-stg", "qwen", "cosmos", "cosmos3", "sd35")
# float32: weights may lie otherwise in memory than stock ones, nothing else.
ALONE = 1e-6


def agrees(pool, name, way, sections=None, steps=2, bound=ALONE, rest=()):
    found = pool.run(requests.request, name, {"parallel": {"fsdp": True, **way}, **(sections or {})}, steps, *rest)
    for error, *_ in found:
        assert error < bound, error
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_alone(pools, name, ranks):
    agrees(pools[ranks], name, {})


@pytest.mark.parametrize("name", ["pixart", "z-image", "wan22", "flux-controlnet"])
def test_other_models(pools, name):
    """Classes that nobody described, several denoisers, and a ControlNet beside one."""
    agrees(pools[2], name, {})


@pytest.mark.thorough
@pytest.mark.parametrize("way", [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}, {"dp": 2}, {"cfg": 2, "vae": 2}])
@pytest.mark.parametrize("name", KINDS)
def test_beside_a_division(pools, name, way):
    agrees(pools[2], name, way, bound=1e-4)


@pytest.mark.parametrize("way", [{"cfg": 2, "ulysses": 2}, {"cfg": 4}, {"dp": 2, "cfg": 2}])
@pytest.mark.parametrize("name", ["ltx2-i2v-stg", "cosmos", "sd3-slg", "flux-true-cfg"])
def test_beside_divisions_of_four(pools, name, way):
    """Three branches on two ranks, two on four, and one that skips blocks."""
    agrees(pools[4], name, way, bound=1e-4)


@pytest.mark.parametrize(
    ("name", "component"),
    [("flux", "text_encoder"), ("flux", "text_encoder_2"), ("wan", "text_encoder"), ("flux2-klein", "text_encoder"),
     ("sd35", "text_encoder_2"), ("qwen", "text_encoder")],
)  # fmt: skip
def test_text_encoders(pools, name, component):
    for error, held in pools[2].run(fsdp.encoded, name, component):
        assert error < ALONE and held > 0


@pytest.mark.parametrize("way", [{}, {"ulysses": 2}, {"cfg": 2}])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_quantized_and_fused(pools, name, way):
    """See test_requests.py for what sharding does to integers."""
    sections = {"linear": {"algo": "int8", "smallest": 0}, "fuse": True, "attention": "sdpa"}
    agrees(pools[2], name, way, sections, rest=(None, False, None, False, True))


@pytest.mark.parametrize("name", ["flux-true-cfg", "wan"])
def test_compiled(pools, name):
    agrees(pools[2], name, {}, {"compile": {"backend": "eager"}, "fuse": True, "attention": "sdpa"}, bound=1e-5)


@pytest.mark.parametrize("way", [{}, {"ulysses": 2}, {"cfg": 2}])
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("wan", {"kind": "mask", "mask": (1, 0, 1, 0)}),
        # The first block is read where no block runs.
        ("qwen", {"kind": "teacache", "threshold": 0.6, "coefficients": (1.0, 0.0)}),
        ("flux", {"kind": "fbcache", "residual_diff_threshold": 4.0}),
        ("ltx2-i2v-stg", {"kind": "seacache", "threshold": 0.6}),
    ],
)
def test_cached(pools, name, cache, way):
    found = agrees(pools[2], name, way, {"cache": cache, "attention": "sdpa"}, steps=6, bound=1e-4)
    assert any(branch["skipped"] > 0 for _, branches, *_ in found for branch in branches.values())


def test_the_next_block_comes_while_one_computes(pools):
    """Wan's three blocks, twice three steps under guidance: all but the encoder's first are foreseen."""
    for counts, addresses in pools[2].run(fsdp.sends, "wan", fsdp.FSDP):
        assert counts["entered"] == 2 * 3 * 3 + 2 * 2, counts
        assert counts["late"] <= 4, counts
        # Of three, the second one stays where it is, the third comes while it computes, and the first takes the third's
        # half of the memory when that has computed.
        assert counts["beside"] >= 2 * 3, counts
        assert addresses == {1}


def test_a_skipped_block_is_not_sent(pools):
    skipping = {**fsdp.FSDP, "cache": {"kind": "mask", "mask": (1, 0, 0, 1)}}
    ((counts, _), _) = pools[2].run(fsdp.sends, "wan", skipping, 4)
    assert counts["entered"] == 2 * 2 * 3 + 2 * 2 and counts["loaded"] <= counts["entered"] + 2, counts


@pytest.mark.parametrize(
    "sections", [{}, {"linear": {"algo": "int8", "smallest": 0}, "fuse": True}, {"compile": {"backend": "eager"}}]
)
@pytest.mark.parametrize("name", ["flux", "wan-vace", "sd3"])
def test_restored_by_one_rank_alone(pools, name, sections):
    assert pools[2].run(fsdp.restored, name, {**fsdp.FSDP, **sections}) == [True, True]


@pytest.mark.parametrize("sections", [{}, {"linear": {"algo": "int8", "smallest": 0}, "fuse": True}])
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_holds_its_part(pools, ranks, sections):
    """The rest is what tensors are rounded up to, 256 bytes each: much, where blocks are of 32 channels."""
    for whole, mine, left, counted in pools[ranks].run(fsdp.held, "flux", {**fsdp.FSDP, **sections}):
        assert whole / ranks <= mine < 1.35 * whole / ranks
        # Buffers other than quantized weights stay.
        assert left < 0.01 * whole
        assert counted == mine


def test_calls_that_need_whole_weights_are_refused(pools):
    for found in pools[2].run(fsdp.refused_calls, "flux"):
        others = {key: found.pop(key) for key in ("again", "gradients", "cast")}
        for key, said in found.items():
            assert said.startswith("Unsupported: ") and "restore(pipe) first" in said, (key, said)
        found = others
        assert "divided among ranks" in found["again"]
        assert "gradients" in found["gradients"]
        assert "torch.bfloat16" in found["cast"] and "restore(pipe)" in found["cast"]


def test_a_pipeline_that_is_moved(pools):
    """A quantized layer's tensors become others then, which lie where they lay."""
    for error, stock in pools[2].run(fsdp.moved, "flux"):
        assert error < 1e-5 and stock


def test_tensors_of_two_blocks_stay_whole(pools):
    for same, (tied, aliased, own) in pools[2].run(fsdp.tied, "flux"):
        assert same and tied > 0 and aliased > 0 and own == 0


@pytest.mark.parametrize(
    ("name", "sections", "words"),
    [
        ("wan", {"parallel": {"fsdp": True, "cfg": 2, "ulysses": 2}}, "= 4, and there are 2 processes"),
        ("wan", {**fsdp.FSDP, "cuda_graph": True}, "a graph covers many blocks"),
        ("wan", {**fsdp.FSDP, "compile": {"mode": "reduce-overhead"}}, "torch.compile records graphs"),
        ("flux", {**fsdp.FSDP, "cache": {"kind": "fbcache", "guard": 0.5}}, "ranks would diverge"),
    ],
)
def test_refused(pools, name, sections, words):
    for kind, text, stock in pools[2].run(requests.refusal, name, sections):
        assert kind == "Unsupported" and words in text and stock


def test_offloaded_weights_are_refused(pools):
    for kind, text, stock in pools[2].run(requests.refusal, "wan", fsdp.FSDP, True):
        assert kind == "Unsupported" and "offloaded" in text and stock


def test_weights_of_other_packages_are_refused(pools):
    for kind, text in pools[2].run(fsdp.foreign, "wan"):
        assert kind == "Unsupported" and "Foreign" in text


def test_explained(pools):
    (one, _) = pools[2].run(fsdp.explained, "flux", fsdp.FSDP)
    assert "the weights of blocks on 2" in one and "transformer: each of 2 ranks holds" in one
    assert "text_encoder_2: each of 2 ranks holds" in one and "vae: each" not in one


def test_a_preset_leaves_out_what_cannot_be_had(pools):
    for graphs in pools[2].run(fsdp.preset, "wan"):
        assert graphs is None


def test_how_many_ranks_must_be_said():
    with pytest.raises(Unsupported, match="does not say how many"):
        launch("somewhere", parallel={"fsdp": True})
    with pytest.raises(CommandError, match="does not say how many"):
        in_workers(AccelConfig(parallel=ParallelConfig(fsdp=True)), torch.device("cpu"))


def test_dense_tensors():
    x = torch.arange(24.0).view(2, 3, 4)
    assert dense(x) and dense(x.mT) and dense(x.permute(2, 0, 1)) and dense(torch.ones(())) and dense(x[1:])
    assert not dense(x[:, :2]) and not dense(x[..., ::2]) and not dense(torch.ones(1, 4).expand(3, 4))


def test_what_is_parked_holds_nothing_else():
    """A run of values that is moved elsewhere leaves the memory in which it lay to nobody."""
    weight = torch.nn.Parameter(torch.randn(6, 4).t(), requires_grad=False)
    run = flat(weight)
    assert run._base is None and torch.equal(run, weight.t().flatten())
