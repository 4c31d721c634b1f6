"""Reading a configuration from --config, --preset and --set, and choosing a model and a device."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel import AccelConfig, ConfigError, TeaCacheConfig
from diffusers_accel.cli.common import CommandError, RequestedConfig, assign, read_device, read_requested


def test_nothing_is_lossless():
    assert read_requested(None, None, None) == RequestedConfig("lossless")


def test_settings_alone_leave_the_rest_off():
    assert read_requested(None, None, ["attention.backend=sdpa"]).base == AccelConfig(attention="sdpa")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["attention=sdpa"], {"attention": "sdpa"}),
        (["attention.backend=sdpa"], {"attention": "sdpa"}),
        (["compile=true"], {"compile": True}),
        (["compile=true", "compile.fullgraph=false"], {"compile": {"fullgraph": False}}),
        (["compile=true", "compile=null"], {}),
        (["cache=teacache", "cache.threshold=0.2"], {"cache": {"kind": "teacache", "threshold": 0.2}}),
        (["cache.kind=teacache", "cache.coefficients=[1, 0]"], {"cache": TeaCacheConfig(coefficients=(1.0, 0.0))}),
        (["vae.tiling=true", "vae.tiling=false"], {"vae": {"tiling": False}}),
    ],
)
def test_settings(settings, expected):
    assert read_requested(None, None, settings).base == AccelConfig.from_dict(expected)


def test_settings_go_over_a_file(tmp_path):
    file = tmp_path / "accel.yaml"
    file.write_text("attention: sdpa\ncache: {kind: teacache, threshold: 0.4, use_ret_steps: true}\n")
    base = read_requested(file, None, ["cache.threshold=0.2", "attention=null"]).base
    assert base == AccelConfig(cache=TeaCacheConfig(threshold=0.2, use_ret_steps=True))


def test_assign_leaves_the_configuration_alone():
    config = AccelConfig(vae={"tiling": True})
    assert assign(config, [("vae.slicing", True)]).vae.tiling
    assert config == AccelConfig(vae={"tiling": True})


@pytest.mark.parametrize(
    ("preset", "settings", "on_host"),
    [
        (None, None, False),
        (None, ["offload=12GiB"], True),
        (None, ["parallel.fsdp=true"], True),
        (None, ["parallel.cfg=2"], False),
        ("balanced", ["offload.level=3"], True),
        ("balanced", ["offload=12GiB", "offload=null"], False),
    ],
)
def test_weights_that_may_be_too_many_wait_on_the_host(preset, settings, on_host):
    assert read_requested(None, preset, settings).begins_on_host is on_host


def test_a_preset_is_for_the_gpu_that_weights_are_offloaded_from(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "diffusers_accel.api.resolve", lambda pipe, base, **sections: (seen.append(sections), (AccelConfig(), ()))[1]
    )
    found, _ = read_requested(None, "balanced", ["offload.level=3", "vae.tiling=true"]).resolve(None)
    assert found.offload.level == 3 and [each["offload"].level for each in seen] == [3]


def test_settings_go_over_a_preset(monkeypatch):
    from tiny import build

    pipe = build("flux")
    stated, notes = read_requested(None, "lossless", ["vae.tiling=true"]).resolve(pipe)
    assert isinstance(stated, AccelConfig)
    assert stated.vae.tiling
    assert stated.attention.backend == "auto"
    assert notes == ()
    # a note on what a preset leaves off is not lost
    monkeypatch.setattr("diffusers_accel.presets._fits", lambda context, section, value, overrides: section != "cache")
    stated, notes = read_requested(None, "balanced", ["vae.tiling=true"]).resolve(pipe)
    assert stated.cache is None
    assert "caching is off" in notes[0]
    assert read_requested(None, "balanced", None).resolve(pipe) == ("balanced", ())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, None, ["attention"]), CommandError, "expected KEY=VALUE"),
        ((None, None, ["=sdpa"]), CommandError, "expected KEY=VALUE"),
        ((None, None, ["attention=[sdpa"]), CommandError, "not YAML"),
        ((None, None, ["linear.smallest=" + "1" * 5000]), CommandError, r"--set linear.smallest: '1+\.\.\. .*not YAML"),
        ((None, None, ["linear.smallest=2026-13-45"]), CommandError, "not YAML"),
        ((None, None, ["linear={algo: fp8, algo: int8}"]), CommandError, "the key 'algo' is there twice"),
        ((None, None, ["linear={algo: fp8, smallest: 2026-11-30}"]), ConfigError, "linear.smallest: expected a whole"),
        ((None, None, ["atention=sdpa"]), ConfigError, "Did you mean 'attention'"),
        ((None, None, ["atention.backend=sdpa"]), ConfigError, "Did you mean 'attention'"),
        ((None, None, ["attention.backnd=sdpa"]), ConfigError, "Did you mean 'backend'"),
        ((None, "fast", ["atention.backend=sdpa"]), ConfigError, "Did you mean 'attention'"),
        ((None, "lossles", None), ConfigError, "Did you mean 'lossless'"),
        (("nowhere.yaml", None, None), ConfigError, "no configuration file 'nowhere.yaml'"),
        (("nowhere.yaml", "fast", None), CommandError, "exclude each other"),
    ],
)
def test_wrong_options(arguments, error, message):
    with pytest.raises(error, match=message):
        read_requested(*arguments)


def test_device(monkeypatch):
    assert read_device("cpu") == torch.device("cpu")
    with pytest.raises(CommandError, match="knows no such device"):
        read_device("cuda:none")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert read_device("cuda") == torch.device("cuda")
    with pytest.raises(CommandError, match="has 1 CUDA device"):
        read_device("cuda:1")
