"""`calibrate`: its file works with `run`, and bad arguments are refused."""

from __future__ import annotations

import pytest
import yaml

from diffusers_accel import AccelConfig
from diffusers_accel.quality import calibrate as calibration

CALL = ("--height", 32, "--width", 32, "--steps", 8, "--call", "max_sequence_length=16", "--device", "cpu")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox\n\nsnow\na fox in snow\n")
    return file


@pytest.mark.parametrize(("kind", "constants"), [("teacache", "coefficients"), ("magcache", "mag_ratios")])
def test_the_file_is_a_configuration(cli, folders, prompts, tmp_path, kind, constants):
    output, plot = tmp_path / "cache.yaml", tmp_path / "fit.png"
    result = cli(
        "calibrate", folders / "flux-shapes", "--prompts", prompts, "--kind", kind, "--skip", 0.3, "--force",
        "--output", output, "--plot", plot, *CALL,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"saved {output}" in result.stdout and "R2" in result.stdout
    assert yaml.safe_load(output.read_text())["cache"]["kind"] == kind
    assert getattr(AccelConfig.from_yaml(output).cache, constants)
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = cli(
        "run", folders / "flux-shapes", "--prompt", "a fox", "--config", output, "--output", tmp_path / "fox.png", *CALL
    )
    assert result.exit_code == 0, result.output
    assert "steps skipped" in result.stdout


def test_what_is_refused(cli, refused, folders, prompts, tmp_path, monkeypatch):
    model = folders / "flux-shapes"
    (tmp_path / "none.txt").write_text("\n\n")
    assert "it holds no prompts" in refused("calibrate", model, "--prompts", tmp_path / "none.txt", *CALL)
    assert "nothere.txt" in refused("calibrate", model, "--prompts", tmp_path / "nothere.txt", *CALL)
    output = tmp_path / "cache.yaml"
    assert "no folder" in refused(
        "calibrate", model, "--prompts", prompts, "--output", tmp_path / "no" / "where.yaml", *CALL
    )
    # Random weights explain little; how little depends on the tokenizer, which comes out otherwise in every process.
    monkeypatch.setattr(calibration, "REFUSED", 0.99)
    result = cli("calibrate", model, "--prompts", prompts, "--output", output, *CALL)
    assert result.exit_code == 2 and "error: " in result.stderr and result.stderr.rstrip().endswith("or --force.")
    assert not output.exists()
