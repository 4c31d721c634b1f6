"""How weights are divided among ranks: the arithmetic, and what plans say of real shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from diffusers_accel.models import ADAPTERS, adapter_for
from diffusers_accel.models.tensor_parallel import (
    FEATURES,
    HEADS,
    KEY_HEADS,
    Heads,
    TooFewUnits,
    feature_shard_sizes,
    ranges,
    sharded_layers,
)


def widths(parts):
    return [[last - first for first, last in own] for own in parts]


@pytest.mark.parametrize(
    ("features", "ranks", "expected"),
    [
        (12288, 8, [1536] * 8),  # FLUX.1's
        (8960, 8, [1152] * 4 + [1088] * 4),  # Wan 1.3B's: 140 granules of 64
        (13824, 4, [3456] * 4),  # Wan 14B's
        (48, 2, [32, 16]),  # no multiple of 64: three granules of 16
        (64, 4, [16] * 4),  # one granule of 64 would leave ranks without any
        (7, 3, [3, 2, 2]),
    ],
)
def test_features_go_in_granules(features, ranks, expected):
    assert feature_shard_sizes(features, ranks) == expected and sum(expected) == features


def test_heads_go_whole_and_queries_with_their_key_head():
    assert Heads(6, 6).shard_sizes(4) == [(2, 2), (2, 2), (1, 1), (1, 1)]
    assert Heads(32, 8).shard_sizes(4) == [(8, 2)] * 4
    assert Heads(12, 6).shard_sizes(4) == [(4, 2), (4, 2), (2, 1), (2, 1)]
    with pytest.raises(TooFewUnits, match="2 key heads, and tp=4 ranks"):
        Heads(8, 2).shard_sizes(4)
    with pytest.raises(TooFewUnits, match="3 features, and tp=4 ranks"):
        feature_shard_sizes(3, 4)


def test_segments_are_divided_each():
    """A layer of three projections of 3 heads of 4 channels, and two parts of a gated feed-forward of 6 features."""
    parts = ranges((HEADS, HEADS, HEADS, FEATURES, FEATURES), 48, Heads(3, 3, 4), 2)
    assert parts[0] == [(0, 8), (12, 20), (24, 32), (36, 40), (42, 46)]
    assert parts[1] == [(8, 12), (20, 24), (32, 36), (40, 42), (46, 48)]
    # One value a head, and key heads.
    assert widths(ranges((HEADS,), 3, Heads(3, 3, 4), 2)) == [[2], [1]]
    assert widths(ranges((KEY_HEADS,), 8, Heads(6, 2, 4), 2)) == [[4], [4]]
    with pytest.raises(ValueError, match="10 values do not consist of heads"):
        ranges((HEADS,), 10, Heads(3, 3), 2)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_output_and_input_is_some_ranks_once(ranks):
    for segments, size, heads in (
        ((HEADS,), 3072, Heads(24, 24)),
        ((HEADS, FEATURES), 3072 + 12288, Heads(24, 24, 128)),
        ((HEADS, HEADS, HEADS, FEATURES, FEATURES), 3 * 6144 + 2 * 18432, Heads(48, 48, 128)),
        ((FEATURES, FEATURES), 36864, None),
    ):
        taken = sorted(item for parts in ranges(segments, size, heads, ranks) for item in parts)
        assert taken[0][0] == 0 and taken[-1][1] == size
        assert all(one[1] == other[0] for one, other in itertools.pairwise(taken))


def real(name, **options):
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, name)(**options)


@pytest.mark.parametrize(
    ("model", "options", "ranks"),
    [
        ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}, 8),
        ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}, 8),
        ("WanTransformer3DModel", {"num_layers": 1}, 8),
        ("WanTransformer3DModel", {"num_layers": 1, "num_attention_heads": 12, "ffn_dim": 8960}, 8),
        ("QwenImageTransformer2DModel", {"num_layers": 1}, 8),
        ("LTX2VideoTransformer3DModel", {"num_layers": 1}, 8),
        ("SD3Transformer2DModel", {"num_layers": 2, "num_attention_heads": 24, "caption_projection_dim": 1536}, 8),
        ("CosmosTransformer3DModel", {"num_layers": 1}, 8),
        ("Cosmos3OmniTransformer", {"num_hidden_layers": 1, "vocab_size": 64}, 8),
    ],
)
def test_shares_of_published_shapes_suit_low_bit_formats(model, options, ranks):
    """Every rank's part of every layer is a multiple of 16 both ways, as the formats of 4 and 8 bits want it, but for
    gates by head."""
    denoiser = real(model, **options)
    adapter = adapter_for(denoiser)
    found = list(sharded_layers(adapter.named_blocks(denoiser), adapter.tensor))
    assert len(found) > 5
    for place in found:
        layer = place.parent._modules[place.name]
        assert type(layer) is nn.Linear
        size = layer.in_features if place.rows else layer.out_features
        heads = Heads.of(place.attention) if place.attention is not None else None
        for own in widths(ranges(place.segments, size, heads, ranks)):
            assert sum(own) % 16 == 0 or "gate" in place.path


def test_all_adapters_have_a_plan():
    assert all(adapter.tensor is not None for adapter in ADAPTERS)
