"""Tensor parallelism: whole requests on several processes against the stock pipeline in one; what a rank holds; what is
refused."""

from __future__ import annotations

import pytest
from ranks import requests, tensor_parallel

FAMILIES = (
    "flux", "flux-true-cfg", "flux-kontext", "flux-controlnet", "flux2", "flux2-image", "flux2-klein", "wan", "wan22",
    "wan-ti2v-i2v", "wan-i2v", "wan-vace", "ltx2", "ltx2-i2v-stg", "ltx23-stg", "qwen", "qwen-edit-plus", "cosmos",
    "cosmos-predict2", "cosmos-predict25-v2w", "cosmos3", "cosmos3-i2v", "sd3", "sd3-slg", "sd35",
)  # fmt: skip
# One of each kind of denoiser.
KINDS = (
    "flux-true-cfg", "flux2-klein", "wan", "wan-i2v", "wan-vace", "ltx2-i2v-stg", "qwen", "cosmos",
    "cosmos-predict25-v2w", "cosmos3", "sd35",
)  # fmt: skip
ON_4 = {
    "alone": {"tp": 4},
    "and ulysses": {"tp": 2, "ulysses": 2},
    "and ring": {"tp": 2, "ring": 2},
    "and cfg": {"tp": 2, "cfg": 2},
}
TP = {"parallel": {"tp": 2}}


def heads_of(name, most=None):
    """The tiny Cosmos 3 has one key head by itself. Six heads do not divide by four, nor three of them by two."""
    if name.startswith("cosmos3"):
        return 12 if most else 4
    return most


def agrees(pool, name, way, sections=None, steps=2, rest=(), heads=None, bound=1e-4, symm_memory=False):
    """The bound is for float32: sums over ranks are in another order."""
    call = (*rest, *(None, False)[len(rest) :], heads_of(name, heads), symm_memory)
    found = pool.run(requests.request, name, {"parallel": way, **(sections or {})}, steps, *call)
    for error, *_ in found:
        assert error < bound, error
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks(pools, name):
    for _, branches, *_ in agrees(pools[2], name, {"tp": 2}):
        assert all(branch["computed"] > 0 == branch["skipped"] for branch in branches.values())


@pytest.mark.parametrize("way", [way for way in ON_4 if ON_4[way]["tp"] == 2])
def test_sums_over_symmetric_memory(pools, way):
    """And norms across heads. Sums of more than two ranks do not go there."""
    agrees(pools[4], "wan", ON_4[way], heads=6, symm_memory=True)


def test_recorded_sums_over_symmetric_memory(pools):
    sections = {"compile": {"backend": "eager"}, "cuda_graph": True}
    for *_, replays in agrees(pools[2], "flux", {"tp": 2}, sections, 4, (None, True), symm_memory=True):
        assert replays > 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "way"),
    # Every way on one kind, and two of them on each of the others, which have had two ranks.
    [
        (name, way)
        for place, name in enumerate(KINDS)
        for number, way in enumerate(ON_4)
        if name == "wan" or (place + number) % 2 == 0
    ],
)
def test_four_ranks_and_six_heads(pools, name, way):
    agrees(pools[4], name, ON_4[way], heads=6)


@pytest.mark.parametrize("kind", ["split", "interleaved"])
def test_rotary_tables_of_heads(pools, kind):
    """By heads, (batch, heads, sequence, half of a head), or in channels, (batch, sequence, all heads): of each rank's
    heads, and of its tokens where those are divided too."""
    ways = {"parallel": {"tp": 4}}, {"parallel": {"tp": 2, "ulysses": 2}}
    for errors, same in pools[4].run(tensor_parallel.one_after_the_other, "ltx2", *ways, 6, {"rope_type": kind}):
        assert max(errors) < 1e-4 and same


def test_attention_to_a_picture_beside_the_text(pools):
    assert max(pools[4].run(tensor_parallel.attending_to_a_picture, 6, {"parallel": {"tp": 4}})) < 1e-5


@pytest.mark.parametrize("way", [{"tp": 2, "attn2d": (2, 1)}, {"tp": 2, "dp": 2}, {"tp": 4, "vae": 4}])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_other_ways_on_four_ranks(pools, name, way):
    agrees(pools[4], name, way, heads=6)


# Blocks of two kinds, of two streams, and under masks; others are compiled in one process (tests/models).
@pytest.mark.parametrize("name", ["flux-true-cfg", "ltx2", "qwen"])
def test_compiled_and_recorded(pools, name):
    sections = {"compile": {"backend": "eager", "fullgraph": True}, "cuda_graph": True, "attention": "sdpa"}
    found = agrees(pools[2], name, {"tp": 2}, sections=sections, steps=4, rest=(None, True))
    assert all(replays > 0 for *_, replays in found)


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2", "cosmos3"])
def test_quantized_and_fused(pools, name):
    """Scales are by row of a weight and by token. A layer whose inputs are divided has scales of each rank's part,
    finer than the whole's, so that the two differ by as much as either from 16 bits: 0.5% per product, which these
    models of 32 channels multiply. Parts in wrong places make 100%."""
    sections = {"linear": {"algo": "int8", "smallest": 0}, "fuse": True, "attention": "sdpa"}
    agrees(pools[2], name, {"tp": 2}, sections=sections, bound=0.15)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("flux-true-cfg", {"kind": "mask", "mask": (1, 0, 1, 0)}),
        ("wan", {"kind": "teacache", "threshold": 5.0, "coefficients": (1.0, 0.0)}),
        ("qwen", {"kind": "teacache", "threshold": 0.6, "coefficients": (1.0, 0.0)}),
        ("flux", {"kind": "fbcache", "residual_diff_threshold": 4.0}),
        ("wan", {"kind": "seacache", "threshold": 0.6}),
    ],
)
def test_cached(pools, name, cache):
    found = agrees(pools[2], name, {"tp": 2}, sections={"cache": cache, "attention": "sdpa"}, steps=6)
    assert any(branch["skipped"] > 0 for _, branches, *_ in found for branch in branches.values())


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [{}, {"linear": {"algo": "int8", "smallest": 0}, "fuse": True}])
@pytest.mark.parametrize("name", ["flux", "flux2", "wan22", "ltx23-stg", "qwen", "sd35"])
def test_restored_bit_for_bit(pools, name, sections):
    assert pools[2].run(tensor_parallel.restored, name, {**TP, **sections}) == [(True, True, True, 0)] * 2


@pytest.mark.parametrize("sections", [{}, {"linear": {"algo": "int8", "smallest": 0}, "fuse": True}])
def test_a_cast_meanwhile_is_kept(pools, sections):
    assert pools[2].run(tensor_parallel.cast, "flux", {**TP, **sections}) == [{"torch.float64"}] * 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TP, {"parallel": {"ulysses": 2}}),
        ({"parallel": {"cfg": 2}}, TP),
        ({**TP, "fuse": True}, {**TP, "attention": "sdpa"}),
        ({**TP, "fuse": True}, {"parallel": {"cfg": 2}, "fuse": True}),
    ],
)
def test_a_second_accelerate_replaces_the_first(pools, first, second):
    for errors, same in pools[2].run(tensor_parallel.one_after_the_other, "wan", first, second):
        assert max(errors) < 1e-4 and same


def test_a_second_accelerate_sees_stock_layers(pools):
    """Of six heads a rank has three; the check of the next sharding must count six again."""
    first = {**TP, "linear": {"algo": "int8", "smallest": 0}, "fuse": True}
    for (_, error), same in pools[2].run(tensor_parallel.one_after_the_other, "flux", first, TP, 6):
        assert error < 1e-4 and same


# --- what a rank holds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_attention_and_feed_forward_is_divided(pools, name):
    # Modulations, and what is between VACE's blocks, stay whole.
    whole = ("norm1.linear", "norm1_context.linear", "norm.linear", "_mod.1", ".linear_1", ".linear_2", ".proj_in")
    for found, left, _, before, after in pools[2].run(tensor_parallel.held, name, TP, heads_of(name)):
        assert found and not [path for path in left if not path.endswith(whole) and not path.startswith("vace_blocks")]
        for stock, own in found.values():
            share = _size(own) / _size(stock)
            # Parts go in granules: 32 and 16 features of 48.
            assert 1 / 3 - 1e-6 < share < 2 / 3 + 1e-6
        assert after < before


def _size(shape):
    found = 1
    for size in shape:
        found *= size
    return found


def test_uneven_shares(pools):
    """Six heads of 16 channels on four ranks, and 4 x 96 features in granules of 64: ranks 0 and 1 have more."""
    found = pools[4].run(tensor_parallel.held, "flux", {"parallel": {"tp": 4}}, 6)
    prefix = "transformer.single_transformer_blocks.1."
    for rank, (shapes, *_) in enumerate(found):
        heads, features = (32, 128) if rank < 2 else (16, 64)
        assert shapes[prefix + "attn.to_q"] == ((96, 96), (heads, 96))
        assert shapes[prefix + "proj_mlp"] == ((384, 96), (features, 96))
        assert shapes[prefix + "proj_out"] == ((96, 480), (96, heads + features))


def test_what_stays_wide_does_not_depend_on_ranks(pools):
    """Layers of 96 channels: whole, they are wider than 60, and a rank's part is not."""
    sections = {"linear": {"algo": "int8", "smallest": 60, "ignore": ["*.attn.to_k"]}}
    alone, divided = (
        pools[4].run(tensor_parallel.held, "flux", {"parallel": {way: 4}, **sections}, 6)[3][2] for way in ("cfg", "tp")
    )
    assert alone == divided and alone["int8"] > 10


def test_state_dict_speaks_of_stock_weights(pools):
    for sections in ({}, {"linear": {"algo": "int8", "smallest": 0}, "fuse": True}):
        assert pools[2].run(tensor_parallel.shown, "flux", {**TP, **sections}) == [(True, True, 2, 0)] * 2


def test_a_copy_computes_the_same(pools):
    assert pools[2].run(tensor_parallel.copied, "flux", TP) == [True, True]


def test_the_sum_is_an_operator_in_compiled_graphs(pools):
    for first, second, third, untouched, graphs, inside, refused in pools[2].run(
        tensor_parallel.summed_compiled, [1.0, 2.0]
    ):
        assert first.tolist() == [6.0, 12.0] and second.tolist() == third.tolist() == [3.0, 6.0]
        assert untouched and graphs == 1 and inside and "for inference" in refused


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sections", "words"),
    [
        ("pixart", TP, "no adapter says how its weights are sharded"),
        ("cosmos3", TP, "layers.0.self_attn.to_q has 1 key head, and tp=2 ranks. Instead: tp=1 or less"),
        ("wan", {"parallel": {"tp": 4}}, "blocks.0.attn1.to_q has 2 heads, and tp=4 ranks. Instead: tp=2 or less"),
        ("wan", {"parallel": {"tp": 2, "cfg": 2}}, "cfg 2 x tp 2 = 4, and there are 2 processes"),
        ("flux", {**TP, "cache": {"kind": "fbcache", "guard": 0.5}}, "ranks would diverge"),
        ("flux", {"parallel": {"tp": 0}}, "parallel.tp: expected a whole number of at least 1, got 0"),
    ],
)
def test_refused(pools, name, sections, words):
    for kind, text, stock in pools[2].run(requests.refusal, name, sections):
        assert kind in ("Unsupported", "ConfigError") and words in text and stock


def test_too_few_heads_for_ulysses_are_refused(pools):
    for kind, text, stock in pools[4].run(requests.refusal, "wan", {"parallel": {"tp": 2, "ulysses": 2}}):
        assert kind == "Unsupported" and "has 1 head on a rank of tp=2, which ulysses=2 cannot shard" in text and stock


def test_offloaded_weights_are_refused(pools):
    for kind, text, stock in pools[2].run(requests.refusal, "wan", TP, True):
        assert kind == "Unsupported" and "its weights are offloaded" in text and stock


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("lora", "has a LoRA, made for a whole layer. Instead: pipe.fuse_lora() and pipe.unload_lora_weights() first"),
        ("ip-adapter", "attends to an IP-Adapter's pictures too"),
        ("fused", "has diffusers' fused projections. Instead: pipe.transformer.unfuse_qkv_projections()"),
        ("own", "diffusers' own parallelism is on"),
        ("layer", "transformer_blocks.1.attn.to_k: it is a Linear4bit, not a stock linear layer"),
        ("bytes", "transformer_blocks.0.attn.to_v: its weight is float8_e4m3fn"),
        ("quantized", "it is quantized already, and its original weight is gone"),
    ],
)
def test_what_has_been_done_to_layers_is_refused(pools, how, words):
    for kind, text, stock in pools[2].run(tensor_parallel.prepared_refusal, "flux", TP, how):
        assert kind == "Unsupported" and words in text and stock


def test_what_is_made_for_whole_layers_is_refused_meanwhile(pools):
    sections = {"linear": {"algo": "fp8-tensor", "smallest": 0}}
    for found, same, open_again in pools[2].run(tensor_parallel.closed, "flux", {**TP, **sections}):
        assert same and open_again
        for method, text in found.items():
            assert text is not None and text.startswith(f"Unsupported: {method}"), (method, text)


def test_explained(pools):
    one, _ = pools[2].run(requests.explained, "flux", TP)
    assert "tensor parallel" in one and "transformer: 51 layers on 2 ranks" in one
    assert "MiB on a rank instead of" in one and "requests compared" in one
