"""`explain`: the plan on standard output, and an exit status of 1 for refused sections."""

from __future__ import annotations

import torch
from safetensors.torch import save


def test_nothing_refused(cli, folders):
    result = cli("explain", folders / "flux-shapes", "--device", "cpu", "--set", "attention=sdpa")
    assert result.exit_code == 0
    assert "FluxPipeline on cpu" in result.stdout
    assert "sdpa" in result.stdout
    assert "refused" not in result.stdout


def test_refused(cli, folders):
    result = cli("explain", folders / "flux-shapes", "--device", "cpu", "--set", "attention=cudnn")
    assert result.exit_code == 1
    assert "refused" in result.stdout
    assert "needs a CUDA device" in result.stdout


def test_config_file_and_demo_name(cli, shapes):
    result = cli("explain", "wan-shapes", "--device", "cpu", "--config", shapes / "wan-shapes" / "accel.yaml")
    assert result.exit_code == 0
    assert "WanPipeline" in result.stdout


def test_notes_of_a_preset(cli, folders, monkeypatch):
    monkeypatch.setattr("diffusers_accel.presets._fits", lambda context, section, value, overrides: section != "cache")
    for settings in ([], ["--set", "vae.slicing=true"]):
        result = cli("explain", folders / "flux-shapes", "--device", "cpu", "--preset", "balanced", *settings)
        assert result.exit_code == 0
        assert result.stdout.count("caching is off") == 1


def test_errors_are_one_line(refused, folders, tmp_path):
    model = folders / "flux-shapes"
    bad = tmp_path / "bad.yaml"
    bad.write_text("attention: {backend: [sdpa\n")
    assert "is not YAML" in refused("explain", model, "--config", bad)
    assert "no configuration file" in refused("explain", model, "--config", tmp_path / "none.yaml")
    assert "Did you mean 'balanced'" in refused("explain", model, "--preset", "balancd")
    assert "Did you mean 'threshold'" in refused(
        "explain", model, "--set", "cache=teacache", "--set", "cache.treshold=1"
    )
    assert "exclude each other" in refused("explain", model, "--config", bad, "--preset", "fast")


def test_no_such_model(refused, tmp_path):
    assert "There is no model folder" in refused("explain", tmp_path / "nothing", "--device", "cpu")
    assert "Did you mean 'flux-shapes'" in refused("explain", "flux-shape", "--device", "cpu")
    assert "no model_index.json" in refused("explain", tmp_path, "--device", "cpu")
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    assert "Could not load" in refused("explain", tmp_path, "--device", "cpu")
    for name, message in (("x.gguf", "is a GGUF file"), ("x.safetensors", "is one model's file")):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(60) if name == "x.gguf" else save({"x": torch.zeros(1)}))
        assert message in refused("explain", tmp_path / name, "--device", "cpu")


def test_debug_shows_the_traceback(cli, tmp_path):
    result = cli("--debug", "explain", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
