"""Query and key, normed and rotated in one pass, against complex multiplication in float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from exact import normed_rotated

pytest.importorskip("triton")

from diffusers_accel.kernels.attention import (
    DISPATCHERS,
    KERNELS,
    AttentionDispatcher,
    AttentionKernel,
    Fixed,
    Inputs,
    apply_rope,
    fused_qk_norm_rope_attention,
)
from diffusers_accel.kernels.attention.peer_writes import (
    HeadAddresses,
    TokenAddresses,
    gather_heads,
    scatter_heads,
    scatter_tokens,
)
from diffusers_accel.kernels.attention.qk_norm_rope import qk_norm_rope
from diffusers_accel.kernels.attention.record import QKNorm, Rotary

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def tables(length, heads, dim, rope_style, seed=0):
    """Cosines and sines, (1, length, heads, channels), and the angles."""
    angles = random(1, length, heads, dim // 2, seed=seed)
    wide = angles if rope_style == "half" else angles.repeat_interleave(2, -1)
    return (wide.cos(), wide.sin()), angles


@pytest.mark.parametrize("own_tables", [1, 3], ids=["shared tables", "tables by head"])
@pytest.mark.parametrize("rotation", [None, "interleaved", "half"])
@pytest.mark.parametrize("norm", [None, "head", "all"])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_kernel(dim, norm, rotation, own_tables):
    heads, kv_heads, eps = 3, 3 if norm == "all" or own_tables > 1 else 1, 1e-6
    query, key = random(2, 9, heads * dim + 8), random(2, 5, kv_heads, dim)
    query = query[..., 8:].unflatten(-1, (heads, dim))  # as a slice of a fused projection
    rope_style = rotation or "interleaved"
    weights = None
    if norm is not None:
        weights = tuple(random(dim * (count if norm == "all" else 1), seed=4) for count in (heads, kv_heads))
    (q_tables, q_angles), (k_tables, k_angles) = (
        tables(length, own_tables if count > 1 else 1, dim, rope_style, seed=length)
        for length, count in ((9, heads), (5, kv_heads))
    )
    out = query.new_empty(query.shape), key.new_zeros(2, 7, kv_heads, dim)
    qk_norm = None if weights is None else QKNorm(*weights, eps)
    rotary = None if rotation is None else Rotary(q_tables, k_tables, rope_style)
    qk_norm_rope(query, key, out[0], out[1][:, 1:6], qk_norm, rotary)
    for found, x, which, angles in ((out[0], query, 0, q_angles), (out[1][:, 1:6], key, 1, k_angles)):
        wanted = normed_rotated(x, weights and weights[which], eps, None if rotation is None else angles, rope_style)
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)
    assert not out[1][:, 0].any() and not out[1][:, 6].any(), "nothing is written beside its place"


@pytest.mark.parametrize("rotation", [None, "interleaved", "half"])
@pytest.mark.parametrize("norm", [None, "head", "all"])
@pytest.mark.parametrize(("dim", "dtype"), [(16, torch.float32), (64, torch.bfloat16)])
def test_scattered_heads(dim, dtype, norm, rotation):
    """To memory of three ranks, which have unlike numbers of heads and lie about with unlike strides, from parts, one
    of which has no tokens."""
    counts, length, start, eps = (2, 1, 2), 7, 2, 1e-6
    lengths = (4, 0, 2, 1)
    x = random(2, length, sum(counts) * dim + 8).to(dtype)[..., 8:].unflatten(-1, (sum(counts), dim))
    weight = None if norm is None else random(dim * (sum(counts) if norm == "all" else 1), seed=4)
    tables_of_all, angles = tables(length, 1, dim, rotation or "interleaved")
    # Each rank's memory has tokens of others before and behind, and something else after its heads.
    memory = [torch.full((2, length + 4, count + 1, dim), 7.0, dtype=dtype, device=DEVICE) for count in counts]
    places = [item[:, 1 + start :, :count] for item, count in zip(memory, counts, strict=True)]
    split_tables = [item.split(lengths, 1) for item in tables_of_all]
    parts = [
        (part, weight, None if rotation is None else pair)
        for part, *pair in zip(x.split(lengths, 1), *split_tables, strict=True)
    ]
    scatter_heads([(parts, HeadAddresses.of(places, DEVICE))], eps, rotation or "interleaved")
    wanted = normed_rotated(x, weight, eps, None if rotation is None else angles, rotation or "interleaved")
    bound = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
    found = torch.cat([place[:, :length] for place in places], 2)
    torch.testing.assert_close(found.double(), wanted, **bound)
    for item, place in zip(memory, places, strict=True):
        place[:, :length] = 7.0
        assert bool((item == 7.0).all()), "nothing is written beside its place"


def test_parts_of_two_kinds():
    """One with a norm, one without."""
    x, weight = random(1, 6, 2, 16), random(16, seed=4)
    memory = torch.zeros_like(x)
    scatter_heads([([(x[:, :4], weight, None), (x[:, 4:], None, None)], HeadAddresses.of([memory], DEVICE))], 1e-6)
    torch.testing.assert_close(memory[:, :4].double(), normed_rotated(x[:, :4], weight, 1e-6, None))
    assert torch.equal(memory[:, 4:], x[:, 4:])


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize(("dim", "dtype"), [(24, torch.float32), (64, torch.bfloat16)])
def test_heads_that_are_handed_back(rank, dim, dtype):
    """To memory of other ranks, one of which has no tokens, and to this rank's own."""
    lengths, heads = (3, 0, 5, 2), 3
    x = random(2, sum(lengths), heads + 1, dim).to(dtype)[:, :, 1:]
    memory = [torch.full((2, length + 1, heads + 2, dim), 7.0, dtype=dtype, device=DEVICE) for length in lengths]
    own = torch.full((2, lengths[rank], heads + 2, dim), 7.0, dtype=dtype, device=DEVICE)
    places = [item[:, :length, 1 : 1 + heads] for item, length in zip(memory, lengths, strict=True)]
    scatter_tokens(x, own[:, :, 1 : 1 + heads], TokenAddresses.of(places, DEVICE), rank)
    places[rank] = own[:, :, 1 : 1 + heads]
    for place, part in zip(places, x.split(lengths, 1), strict=True):
        assert torch.equal(place, part)
        place.fill_(7.0)
    assert all(bool((item == 7.0).all()) for item in (*memory, own)), "nothing is written beside its place"


@pytest.mark.parametrize(("first", "count"), [(0, 2), (2, 3), (1, 1), (0, 5)])
def test_collected_heads(first, count):
    """From memory of one rank's after another's, with unlike strides."""
    out, come = (random(2, 7, 5, 24, seed=seed) for seed in (1, 2))
    wanted = come.clone()
    wanted[:, :, first : first + count] = out[:, :, first : first + count]
    counts = [part for part in (first, count, 5 - first - count) if part]
    memory = [torch.cat([part, part], 1) for part in come.split(counts, 2)]
    gather_heads(out, HeadAddresses.of([item[:, :7] for item in memory], DEVICE), first, count)
    assert torch.equal(out, wanted)


@pytest.fixture
def dispatcher():
    """A dispatcher whose kernel is SDPA."""
    made = AttentionDispatcher(lambda: Fixed(KERNELS.get("sdpa")), Counter())
    DISPATCHERS[made.number] = made
    yield made
    del DISPATCHERS[made.number]


@pytest.mark.parametrize("rope_style", ["interleaved", "half"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("norm", ["", "head", "all"])
@pytest.mark.parametrize("by_part", [False, True])
def test_attention(dispatcher, by_part, norm, count, rope_style):
    """One part or two, tables of each or of all, against attention in float64."""
    heads, dim, eps, lengths = 2, 16, 1e-6, [6, 4][:count]
    parts = {name: [random(2, length, heads, dim, seed=len(name)) for length in lengths] for name in ("query", "key")}
    value = random(2, sum(lengths), heads, dim, seed=9)
    width = {"": 0, "head": dim, "all": heads * dim}[norm]
    weights = {name: [random(width, seed=place) for place in lengths] if norm else [] for name in parts}
    made, ready = {}, {}
    for name in parts:
        whole, angles = tables(sum(lengths), 1, dim, rope_style, seed=len(name))
        pieces = [item.split(lengths, 1) for item in whole]
        made[name] = [item for pair in zip(*pieces, strict=True) for item in pair] if by_part else list(whole)
        ready[name] = torch.cat(
            [
                normed_rotated(part, weights[name][place] if norm else None, eps, angle, rope_style)
                for place, (part, angle) in enumerate(zip(parts[name], angles.split(lengths, 1), strict=True))
            ],
            1,
        )
    scores = torch.einsum("bqhd,bkhd->bhqk", ready["query"], ready["key"]) * dim**-0.5
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.double())
    args = (
        parts["query"], parts["key"], value, [*weights["query"], *weights["key"]], eps, made["query"], made["key"],
        rope_style, None, False, None, dispatcher.number,
    )  # fmt: skip
    torch.testing.assert_close(fused_qk_norm_rope_attention(*args).double(), wanted, atol=2e-5, rtol=2e-5)
    assert dispatcher.counts["sdpa"] == 1


def test_apply_rope():
    """With heads before the sequence, behind it, and in the channels."""
    for rope_style in ("interleaved", "half"):
        (cos, sin), angles = tables(5, 3, 16, rope_style)
        x = random(2, 5, 3, 16)
        wanted = normed_rotated(x, None, 0.0, angles, rope_style)
        forms = {
            "by token": (x, cos, sin, 0),
            "by head": (x.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2), 0),
            "in the channels": (x.flatten(2), cos.flatten(2), sin.flatten(2), 3),
        }
        for name, (item, one, other, heads) in forms.items():
            found = apply_rope(item, one, other, rope_style, heads)
            found = found.transpose(1, 2) if name == "by head" else found.reshape(x.shape)
            torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
            torch.library.opcheck(apply_rope, (item, one, other, rope_style, heads))


@pytest.mark.parametrize(
    ("dim", "norm", "kv_heads", "left"),
    [(64, "head", 2, True), (64, "all", 4, True), (64, "all", 2, False), (16, "all", 4, False)],
)
def test_norms_that_a_kernel_applies(dim, norm, kv_heads, left):
    """Norms over a head; and over all heads, if query and key have equally many, of a size that needs no padding."""
    seen = []

    def fusing(inputs):
        seen.append(inputs.norm)
        query, key = inputs.query, inputs.key
        if inputs.norm is not None:
            turn = inputs.rotary
            eps = inputs.norm.eps
            query, key = (
                normed_rotated(x, weight, eps, torch.atan2(table[1], table[0])[..., ::2])
                for x, weight, table in (
                    (query, inputs.norm.query, turn.query), (key, inputs.norm.key, turn.key),
                )
            )  # fmt: skip
        return KERNELS.get("sdpa").load()(Inputs(query.float(), key.float(), inputs.value))

    kernel = AttentionKernel(name="fusing", load=lambda: fusing, fuses_qk_norm_rope=True)
    made = AttentionDispatcher(lambda: Fixed(kernel), Counter())
    DISPATCHERS[made.number] = made
    query, key, value = random(1, 6, 4, dim), random(1, 6, kv_heads, dim, seed=1), random(1, 6, kv_heads, dim, seed=2)
    weights = [random(dim if norm == "head" else heads * dim, seed=heads) for heads in (4, kv_heads)]
    whole, angles = tables(6, 1, dim, "interleaved")
    try:
        found = fused_qk_norm_rope_attention(
            [query],
            [key],
            value,
            weights,
            1e-6,
            list(whole),
            list(whole),
            "interleaved",
            None,
            False,
            None,
            made.number,
        )
    finally:
        del DISPATCHERS[made.number]
    ready = [normed_rotated(x, weight, 1e-6, angles) for x, weight in zip((query, key), weights, strict=True)]
    groups = 4 // kv_heads
    ready[1], wide = ready[1].repeat_interleave(groups, 2), value.double().repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", *ready) * dim**-0.5
    torch.testing.assert_close(
        found.double(), torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), wide), atol=2e-5, rtol=2e-5
    )
    assert (seen[0] is not None) == left
