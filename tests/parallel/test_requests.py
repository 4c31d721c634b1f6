"""Whole requests of every family on 2 and 4 processes, against the stock pipeline in one."""

from __future__ import annotations

import pytest
from ranks import requests

from diffusers_accel import AccelConfig, ConfigError

FAMILIES = (
    "flux", "flux-true-cfg", "flux-kontext", "flux-controlnet", "flux2", "flux2-klein", "wan", "wan22", "wan-ti2v-i2v",
    "wan-i2v", "wan-vace", "ltx2", "ltx2-i2v-stg", "ltx23-stg", "qwen", "qwen-edit-plus", "cosmos", "cosmos-predict2",
    "cosmos-predict25-v2w", "cosmos3", "cosmos3-i2v", "sd3", "sd3-slg", "sd35",
)  # fmt: skip
# Arguments of `request` for a pipeline in float64.
DOUBLE = (None, False, None, False, True)
# One of each kind of denoiser.
KINDS = ("flux-true-cfg", "flux2-klein", "wan", "wan-vace", "ltx2-i2v-stg", "qwen", "cosmos", "cosmos3", "sd35")
ON_2 = {"ulysses": {"ulysses": 2}, "ring": {"ring": 2}, "cfg": {"cfg": 2}}
ALSO_ON_2 = {"rows": {"attn2d": (2, 1)}, "columns": {"attn2d": (1, 2)}, "dp": {"dp": 2}, "vae": {"cfg": 2, "vae": 2}}
ON_4 = {
    "ring": {"ring": 4},
    "grid": {"attn2d": (2, 2)},
    "ulysses and ring": {"ulysses": 2, "ring": 2},
    "cfg and ulysses": {"cfg": 2, "ulysses": 2},
    "cfg, more than branches": {"cfg": 4},
    "dp and cfg": {"dp": 2, "cfg": 2},
    "vae in pairs": {"ulysses": 2, "cfg": 2, "vae": 2, "vae_dim": "width"},
}


def agrees(pool, name, way, sections=None, steps=2, rest=(), bound=1e-4):
    """The bound is for float32: sums in another order, which a request multiplies to 1e-5."""
    found = pool.run(requests.request, name, {"parallel": way, **(sections or {})}, steps, *rest)
    for error, *_ in found:
        assert error < bound, error
    return found


@pytest.mark.parametrize("way", ON_2)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks(pools, name, way):
    for _, branches, *_ in agrees(pools[2], name, ON_2[way]):
        assert all(branch["computed"] > 0 == branch["skipped"] for branch in branches.values())


@pytest.mark.parametrize("way", ALSO_ON_2)
@pytest.mark.parametrize("name", KINDS)
def test_other_ways_on_two_ranks(pools, name, way):
    agrees(pools[2], name, ALSO_ON_2[way])


@pytest.mark.parametrize("name", ["pixart", "cogvideox", "z-image"])
def test_models_that_nobody_described(pools, name):
    agrees(pools[2], name, ON_2["cfg"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for place, name in enumerate(KINDS)
        for number, way in enumerate(ON_4)
        # Every way on one kind, and three or four of them on each of the others, which have had all ways of two ranks.
        if name == "ltx2-i2v-stg" or (place + number) % 2 == 0
    ],
)
def test_four_ranks(pools, name, way):
    agrees(pools[4], name, ON_4[way])


@pytest.mark.parametrize("way", ["ulysses", "ring", "columns"])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("flux", {"height": 20, "width": 28}),
        ("wan", {"height": 48, "width": 80}),
        ("sd3", {"height": 24, "width": 40}),
        ("cosmos", {"num_frames": 17}),
    ],
)
def test_lengths_that_do_not_divide(pools, name, size, way):
    agrees(pools[2], name, {**ON_2, **ALSO_ON_2}[way], rest=(size,))


@pytest.mark.parametrize("way", ["ulysses", "ring", "cfg", "dp"])
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("flux", {"num_images_per_prompt": 3}),
        # Prompts of two lengths, one of them under a mask.
        ("qwen", {"prompt": ["a red fox", "a red fox in the snow, blurry"], "negative_prompt": ["blurry", "low"]}),
        ("sd3", {"num_images_per_prompt": 2}),
        ("ltx2", {"num_videos_per_prompt": 2}),
        ("wan", {"num_videos_per_prompt": 2}),
    ],
)
def test_batches_and_masks(pools, name, calls, way):
    agrees(pools[2], name, {**ON_2, **ALSO_ON_2}[way], rest=(calls,))


@pytest.mark.parametrize(
    ("name", "first", "branches", "alone"),
    [
        ("wan", [2], 2, 1),
        ("cosmos-predict2", [1, 1], 2, 1),
        ("cosmos-predict25-v2w", [1, 1], 2, 1),
        # Its other guidances stay on.
        ("ltx2-i2v-stg", [1, 1, 1], 3, 3),
    ],
)
def test_branches_are_computed_at_once(pools, name, first, branches, alone):
    """Cosmos and LTX-2 work on a branch before they call the next one. That there is one is not known in the very first
    step."""
    for found, errors in pools[2].run(requests.rounds, name, {"parallel": {"cfg": 2}}):
        assert found == [[*first, branches, branches], [branches] * 3, [alone]] and max(errors) < 1e-4


@pytest.mark.parametrize("name", ["wan", "sd3", "cosmos", "ltx2"])
def test_requests_without_guidance(pools, name):
    agrees(pools[2], name, ON_2["cfg"], rest=({"guidance_scale": 1.0},))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "way"),
    # Each way twice, on families of several kinds.
    [("flux-true-cfg", "ulysses"), ("flux-true-cfg", "cfg"), ("wan", "ring"), ("ltx2", "ulysses"), ("cosmos3", "cfg")],
)
def test_compiled_and_recorded(pools, name, way):
    sections = {"compile": {"backend": "eager"}, "cuda_graph": True, "attention": "sdpa"}
    found = agrees(pools[2], name, ON_2[way], sections=sections, steps=4, rest=(None, True))
    assert all(replays > 0 for *_, replays in found)


@pytest.mark.parametrize("way", ["ulysses", "ring", "cfg", "dp"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_quantized_and_fused(pools, name, way):
    """Scales of weights are by row and those of activations by token, so that sharding changes none. In float64, so
    that what attention sums up in another order is rounded to the same integers: one that is not makes 4% in these
    small models, of 32 channels."""
    sections = {"linear": {"algo": "int8", "smallest": 0}, "fuse": True, "attention": "sdpa"}
    agrees(pools[2], name, {**ON_2, **ALSO_ON_2}[way], sections=sections, rest=DOUBLE)


@pytest.mark.parametrize("way", ["ulysses", "cfg"])
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("flux-true-cfg", {"kind": "mask", "mask": (1, 0, 1, 0)}),
        ("wan", {"kind": "mask", "mask": (1, 0, 1, 0)}),
        ("wan", {"kind": "teacache", "threshold": 5.0, "coefficients": (1.0, 0.0)}),
        ("qwen", {"kind": "mask", "mask": (1, 0, 0, 1)}),
        # Thresholds that skip some of the steps: ranks see one half of the tokens each.
        ("qwen", {"kind": "teacache", "threshold": 0.6, "coefficients": (1.0, 0.0)}),
        ("flux", {"kind": "fbcache", "residual_diff_threshold": 4.0}),
        ("cosmos3", {"kind": "dbcache", "Fn_compute_blocks": 1, "residual_diff_threshold": 0.5, "max_warmup_steps": 2}),
        ("sd35", {"kind": "teacache", "threshold": 5.0, "coefficients": (1.0, 0.0)}),
        ("wan", {"kind": "seacache", "threshold": 0.6}),
    ],
)
def test_cached(pools, name, cache, way):
    found = agrees(pools[2], name, ON_2[way], sections={"cache": cache, "attention": "sdpa"}, steps=6)
    # A branch that another rank computes is counted as computed.
    assert any(branch["skipped"] > 0 for _, branches, *_ in found for branch in branches.values())


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["flux-true-cfg", "ltx2-i2v-stg"])
def test_over_symmetric_memory(pools, name):
    """Recorded too, and one of them compiled: a graph knows buffers by their address."""
    recorded = {"cuda_graph": True, "attention": "sdpa"}
    compiled = {"compile": {"backend": "eager"}} if name == "flux-true-cfg" else {}
    both = ((pools[4], ON_4["ulysses and ring"], recorded), (pools[4], ON_4["grid"], recorded))
    for pool, way, sections in (
        (pools[2], ON_2["ulysses"], {**recorded, **compiled}),
        *(both if compiled else both[:1]),
    ):
        found = agrees(pool, name, way, sections=sections, steps=4, rest=(None, True, None, True))
        assert all(replays > 0 for *_, replays in found)


def test_a_request_after_one_that_was_broken_off(pools):
    """In an exchange, on one rank after it had taken a window: all agree again which is next."""
    for broken, error in pools[2].run(requests.broken_off, "flux", ON_2["ulysses"]):
        assert broken == "no more" and error < 1e-4


@pytest.mark.parametrize(("name", "fuse"), [("flux", False), ("flux", True), ("wan", False), ("ltx2", False)])
def test_products_beside_exchanges(pools, name, fuse):
    """Query, key and value are sent off before something that they do not wait for, those at once that one layer makes,
    and no exchange begins before the last one has ended."""
    for (error, *_), graphs in pools[2].run(requests.overlapped, name, fuse):
        assert error < 1e-4
        beside = 0
        for graph in graphs:
            underway = 0
            for node in graph:
                if node == "ulysses_send":
                    underway += 1
                elif node == "ulysses_attention":
                    assert underway == (1 if fuse else 3)
                    underway = 0
                elif node == "*":
                    beside += underway > 0
                else:
                    assert not underway, graph
            assert not underway
        assert beside, graphs


def test_rounded_on_their_way(pools):
    # e4m3 moves a value by 3% or so; of that 0.14% is left at the end of this request.
    found = agrees(pools[2], "flux", {"ulysses": 2, "comm_dtype": "fp8"}, bound=5e-3)
    assert all(error > 1e-4 for error, *_ in found)


@pytest.mark.parametrize("wrong", [{"comm": "pigeons"}, {"comm_dtype": "int2"}, {"vae_idle_ranks": "sleep"}])
def test_words_that_nobody_knows(wrong):
    with pytest.raises(ConfigError, match=r"parallel\.(comm|comm_dtype|vae_idle_ranks): expected"):
        AccelConfig.from_dict({"parallel": {"ulysses": 2, **wrong}})


@pytest.mark.parametrize("name", ["flux", "wan-vace", "ltx2", "sd3"])
def test_restored_and_repeated(pools, name):
    for way in ({"ulysses": 2}, {"cfg": 2}):
        assert pools[2].run(requests.twice, name, {"parallel": way}) == [(True, True)] * 2


def test_random_numbers_are_rank_0s(pools):
    one, two = pools[2].run(requests.without_generator, "flux", {"parallel": {"ulysses": 2}})
    assert all(map(lambda a, b: bool((a == b).all()), one, two))


def test_ranks_that_differ_are_told(pools):
    for kind, text in pools[2].run(requests.different, "wan", {"parallel": {"cfg": 2}}):
        assert kind == "RanksDiffer"
        assert "hidden_states of transformer (WanTransformer3DModel) is not the same on ranks 0 and 1" in text


@pytest.mark.parametrize(
    ("name", "sections", "words"),
    [
        ("wan", {"parallel": {"cfg": 2, "ulysses": 2}}, "cfg 2 x ulysses 2 = 4, and there are 2 processes"),
        ("wan", {"parallel": {}}, "everything 1 = 1, and there are 2 processes"),
        ("pixart", {"parallel": {"ulysses": 2}}, "no adapter says how its tokens are sharded"),
        ("flux", {"parallel": {"ulysses": 2}, "cache": {"kind": "fbcache", "guard": 0.5}}, "ranks would diverge"),
        ("flux", {"parallel": {"ring": 2}, "attention": "plain"}, "attention.backend='plain' on transformer"),
        # Its streams attend to each other, keys divided: `explain` knows of that too.
        (
            "ltx2",
            {"parallel": {"ring": 2}, "attention": {"backend": "sdpa", "cross_attention": "plain"}},
            "attention.cross_attention='plain'",
        ),
        (
            "ltx2",
            {"parallel": {"ring": 2}, "attention": {"backend": "sdpa", "layers": {"*.video_to_audio_attn": "plain"}}},
            "attention.layers['*.video_to_audio_attn']='plain'",
        ),
        ("flux", {"parallel": {"ulysses": 2, "comm": "symm_mem"}}, "there is no symmetric memory on cpu"),
    ],
)
def test_refused(pools, name, sections, words):
    for kind, text, stock in pools[2].run(requests.refusal, name, sections):
        assert kind == "Unsupported" and words in text and stock


def test_a_kernel_where_every_rank_has_all_keys(pools):
    """It merges nothing there, so it needs no logsumexp."""
    attention = {"backend": "sdpa", "layers": {"*.attn2": "plain"}}
    assert pools[2].run(requests.refusal, "wan", {"parallel": {"ring": 2}, "attention": attention}) == [None] * 2


@pytest.mark.parametrize("name", ["flux-img2img", "wan-i2v", "ltx2"])
def test_pictures_that_are_received(pools, name):
    """Those that are encoded too."""
    agrees(pools[2], name, {"ulysses": 2, "vae_idle_ranks": "receive"})
    agrees(pools[4], name, {"ulysses": 2, "cfg": 2, "vae": 2, "vae_idle_ranks": "receive"})


def test_pictures_on_one_rank(pools):
    """The others have zeros, which a VAE's pictures are not."""
    first, second = pools[2].run(requests.request, "flux", {"parallel": {"ulysses": 2, "vae_idle_ranks": "idle"}})
    assert first[0] < 1e-4 and second[0] > 0.1


OFFLOADED = {
    "ulysses": ("flux", {"ulysses": 2}),
    "ring": ("ltx2", {"ring": 2}),
    "cfg and vae": ("wan", {"cfg": 2, "vae": 2}),
    "tp": ("qwen", {"tp": 2}),
}


@pytest.mark.parametrize("way", OFFLOADED)
@pytest.mark.parametrize(
    ("kind", "ours_first"),
    [("models", False), ("models", True), ("block_level", True), ("leaf_level", True)],
)
def test_offloading(pools, way, kind, ours_first):
    """Models, or blocks, that wait on the host, enabled before and after."""
    offloaded(pools, way, kind, ours_first)


@pytest.mark.parametrize("way", ["ulysses", "ring", "cfg and vae"])  # tp changes weights: test_tensor_parallel.py
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_that_are_offloaded_already(pools, way, kind):
    offloaded(pools, way, kind, False)


def offloaded(pools, way, kind, ours_first):
    name, sharding = OFFLOADED[way]
    for errors in pools[2].run(requests.offloaded_request, name, {"parallel": sharding}, kind, ours_first):
        assert max(errors) < 1e-4 and errors[-1] == 0


def test_heads_that_do_not_divide_are_refused(pools):
    for kind, text, stock in pools[4].run(requests.refusal, "wan", {"parallel": {"ulysses": 4}}):
        assert kind == "Unsupported" and "has 2 heads, which ulysses=4 cannot shard" in text and stock


def test_without_a_launcher_it_is_refused():
    kind, text, stock = requests.refusal("flux", {"parallel": {"ulysses": 2}})
    assert kind == "Unsupported" and "torchrun" in text and stock


def test_explained(pools):
    (one, _) = pools[2].run(requests.explained, "flux", {"parallel": {"ulysses": 2}})
    assert "a sequence on 2 (ulysses 2)" in one and "attention='sdpa'" in one


def test_a_pipeline_on_the_host_of_gpus(pools):
    """The note names collectives, since a pipeline that was moved first would get symmetric memory."""
    for way, said in (({"ulysses": 2}, True), ({"ulysses": 2, "comm": "collectives"}, False), ({"cfg": 2}, False)):
        one, _ = pools[2].run(requests.explained, "flux", {"parallel": way}, True)
        assert ("will communicate by collectives" in one) is said


def test_sums_that_do_not_go_as_asked(pools):
    for tp, said in ((4, True), (2, False)):
        way = {"tp": tp, "ulysses": 4 // tp, "comm": "symm_mem"}
        one, *_ = pools[4].run(requests.explained, "flux", {"parallel": way}, False, 4)
        assert ("more than two ranks of tp use collectives" in one) is said
