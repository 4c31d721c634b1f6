"""Weights that each rank streams for its own GPU: the same as weights that stay there, bit for bit, and restored."""

from __future__ import annotations

import pytest
from ranks import offload

from diffusers_accel import StepMaskConfig

FAMILIES = ("flux", "wan22", "qwen", "ltx2")
ON_2 = {"tp": {"tp": 2}, "ulysses": {"ulysses": 2}, "ring": {"ring": 2}, "cfg": {"cfg": 2}, "vae": {"cfg": 2, "vae": 2}}
# Each on one family.
ALSO_ON_2 = {
    "rows": ("flux", {"attn2d": (2, 1)}),
    "columns": ("qwen", {"attn2d": (1, 2)}),
    "dp": ("wan22", {"dp": 2}),
    "receive": ("flux", {"ulysses": 2, "vae_idle_ranks": "receive"}),
    "idle": ("wan22", {"ulysses": 2, "vae_idle_ranks": "idle"}),
}
ON_4 = {
    "tp and ring": ("flux", {"tp": 2, "ring": 2}),
    "cfg and ring, vae": ("qwen", {"cfg": 2, "ring": 2, "vae": 2}),
}


def same_as_resident(pool, name, way, sections=None, steps=2):
    """Results of all ranks, each compared with resident weights first."""
    found = pool.run(offload.streamed, name, {"parallel": way, **(sections or {})}, steps)
    for same, copied, _, restored in found:
        assert same == [True, True] and min(copied) > 0 and restored, (same, copied, restored)
    return found


# Tensor parallelism changes the weights that are streamed, other ways the tokens alone.
@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in FAMILIES for way in ON_2 if way == "tp" or name in FAMILIES[:2]]
)
def test_two_ranks(pools, name, way):
    same_as_resident(pools[2], name, ON_2[way])


@pytest.mark.parametrize("way", ALSO_ON_2)
def test_other_ways_on_two_ranks(pools, way):
    same_as_resident(pools[2], *ALSO_ON_2[way])


@pytest.mark.parametrize("way", ON_4)
def test_four_ranks(pools, way):
    same_as_resident(pools[4], *ON_4[way])


@pytest.mark.parametrize(("name", "algo"), [("flux", "int8"), ("wan22", "fp8")])
def test_quantized_shards(pools, name, algo):
    """A rank streams its shards in their few bytes: those of tensor parallelism are tensors of their own."""
    sections = {"linear": {"algo": algo, "smallest": 0}, "fuse": True, "attention": "sdpa"}
    whole = same_as_resident(pools[2], name, {"tp": 2})
    for (_, stock, _, _), (_, quantized, _, _) in zip(
        whole, same_as_resident(pools[2], name, {"tp": 2}, sections), strict=True
    ):
        assert quantized[1] < 0.7 * stock[1]


@pytest.mark.parametrize(("name", "way"), [("flux", "ulysses"), ("wan22", "ulysses"), ("qwen", "cfg"), ("ltx2", "tp")])
def test_skipped_steps(pools, name, way):
    sections = {"cache": StepMaskConfig(mask=(1, 0, 1, 0)), "attention": "sdpa"}
    for *_, skipped, _ in same_as_resident(pools[2], name, ON_2[way], sections, steps=4):
        assert skipped


def test_shards_are_streamed(pools):
    """Each rank copies about half as much."""
    for (_, whole, _, _), (_, shards, _, _) in zip(
        same_as_resident(pools[2], "flux", {"ulysses": 2}), same_as_resident(pools[2], "flux", {"tp": 2}), strict=True
    ):
        assert 0.45 * whole[1] < shards[1] < 0.75 * whole[1]


def test_fsdp_is_refused(pools):
    for kind, text, stock in pools[2].run(offload.refused, "flux", {"parallel": {"fsdp": True}, "offload": 3}):
        assert kind == "Unsupported" and text.startswith("offload: ") and stock
        assert (
            "sharded among ranks already (parallel.fsdp)" in text and "parallel without fsdp, or offload=None" in text
        )


@pytest.mark.parametrize("sections", [{}, {"linear": {"algo": "fp8", "smallest": 0}}])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_the_plan_is_of_shards(pools, name, sections):
    """Also before there are any: otherwise budgets are refused that a rank's shards keep."""

    def planned(way):
        return pools[2].run(offload.planned, name, {"parallel": way, "offload": 3, **sections})

    (whole, _, _, (all_tokens, _)), _ = planned({"cfg": 2})
    for before, then, held, (tokens, _) in planned({"tp": 2}):
        # Scales of small layers are not planned.
        assert abs(before - held) < 0.2 * held and abs(then - held) < 0.01 * held, (before, then, held)
        assert before < 0.75 * whole and tokens < all_tokens
    for *_, activations in planned({"ulysses": 2}):
        assert activations == [pytest.approx(all_tokens / 2, rel=0.01)] * 2


def test_pictures_are_encoded_alike(pools):
    """Whatever each rank has left: they share the denoiser's tokens."""
    (encode, decode), (other, small) = pools[2].run(offload.encoded, "wan-i2v", ("100MB", "46MB"))
    assert (encode, other) == ("tiles", "tiles") and (decode, small) == ("whole", "tiles")
