"""The configuration: round trips, shorthands, and errors that name the nearest key."""

from __future__ import annotations

import dataclasses

import pytest

from diffusers_accel import AccelConfig, AttentionConfig, CompileConfig, ConfigError, TeaCacheConfig, VAEConfig

FULL = AccelConfig(
    attention=AttentionConfig(backend="sdpa"),
    compile=CompileConfig(mode="max-autotune", dynamic=True),
    cache=TeaCacheConfig(threshold=0.25, coefficients=(1.0, -2.5e-3, 0.0), coefficients_2="wan2.1-t2v-14b"),
    vae=VAEConfig(tiling=True, slicing=False),
)


@pytest.mark.parametrize("config", [AccelConfig(), FULL, AccelConfig(cache="teacache")], ids=["empty", "full", "cache"])
def test_round_trips(config, tmp_path):
    assert AccelConfig.from_dict(config.to_dict()) == config
    config.to_yaml(tmp_path / "accel.yaml")
    assert AccelConfig.from_yaml(tmp_path / "accel.yaml") == config


def test_shorthands_mean_their_sections():
    assert AccelConfig(attention="fa3").attention == AttentionConfig(backend="fa3")
    assert AccelConfig(compile=True).compile == CompileConfig()
    assert AccelConfig(compile="max-autotune").compile == CompileConfig(mode="max-autotune")
    assert AccelConfig(compile=False).compile is None
    assert AccelConfig(cache="teacache").cache == TeaCacheConfig()
    assert AccelConfig(cache={"kind": "teacache", "threshold": 1}).cache == TeaCacheConfig(threshold=1.0)
    assert AccelConfig(vae={"tiling": True}).vae == VAEConfig(tiling=True)


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.attention = None
    with pytest.raises(TypeError):
        AttentionConfig("sdpa")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"atention": "auto"}, "Did you mean 'attention'"),
        ({"cache": {"kind": "teacache", "treshold": 1}}, "Did you mean 'threshold'"),
        ({"cache": "teacach"}, "Did you mean 'teacache'"),
        ({"compile": {"mod": "x"}}, "Did you mean 'mode'"),
        ({"attention": 3}, "attention: expected AttentionConfig"),
        ({"cache": {"kind": "teacache", "threshold": "much"}}, "cache.threshold"),
        ({"cache": {"kind": "teacache", "coefficients": [1, "a"]}}, "cache.coefficients"),
        ({"compile": {"fullgraph": 1}}, "compile.fullgraph"),
        ({"warmup": {"resolutions": ["480 by 832"]}}, "'<height>x<width>'"),
        ({"warmup": {"num_frames": [81.5]}}, "warmup.num_frames"),
        ({"warmup": {"num_inference_steps": 0}}, "1 or more"),
        ({"cuda_graph": {"limit": 0}}, "cuda_graph.limit: 1 or more"),
        ([1], "mapping"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        AccelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no configuration file"), ("a: [", "not YAML"), ("just words", "no mapping"), ("wat: 1", "'wat'")],
)
def test_bad_files_are_named(text, message, tmp_path):
    path = tmp_path / "accel.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        AccelConfig.from_yaml(path)
