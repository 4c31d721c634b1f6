"""Stand-ins for the shipped checkpoints: the suite's tiny random pipelines, saved as diffusers folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import build
from typer.testing import CliRunner

from diffusers_accel import demo
from diffusers_accel.cli.main import app

STAND_INS = {
    "flux-shapes": ("flux", {"height": 32, "width": 32, "num_inference_steps": 5, "max_sequence_length": 16}),
    "wan-shapes": (
        "wan",
        {
            "height": 32,
            "width": 48,
            "num_frames": 5,
            "num_inference_steps": 5,
            "guidance_scale": 4.0,
            "max_sequence_length": 16,
        },
    ),
}
LOSSLESS = "attention: sdpa\n"
# the accumulated change never reaches such a threshold: every step between the first and the last is skipped
CARELESS = "cache: {kind: teacache, threshold: 1.0e+9, coefficients: [1.0, 0.0]}\n"


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """A folder with both stand-ins, in float16 as the real ones."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (tiny, _) in STAND_INS.items():
        pipe = build(tiny)
        pipe.to(torch.float16)
        pipe.save_pretrained(root / name)
        (root / name / "accel.yaml").write_text(LOSSLESS)
    return root


@pytest.fixture
def shapes(folders, monkeypatch) -> Path:
    """The stand-ins in the place of the shipped checkpoints."""
    monkeypatch.setattr(demo, "ROOT", folders)
    for name, (_, arguments) in STAND_INS.items():
        record = replace(demo.CHECKPOINTS[name], arguments=arguments, captions=("a red fox", "snow", "a fox"))
        monkeypatch.setitem(demo.CHECKPOINTS, name, record)
    return folders


@pytest.fixture
def cli():
    """Calls the command line in this process; `result.stdout`, `result.stderr`, `result.exit_code`."""

    def call(*arguments: object):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def refused(cli):
    """Calls the command line, expects one line of error and no more, and returns it."""

    def call(*arguments: object) -> str:
        result = cli(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    return call
