"""`demo` end to end on the stand-ins, and the sheets it draws."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_accel import AccelError, demo
from diffusers_accel.cli import demo as demo_module
from diffusers_accel.cli import sheet

from .conftest import CARELESS


def test_lossless(cli, shapes, tmp_path):
    result = cli("demo", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("infinite (equal)") == 2
    assert "at least 33.0 dB" in result.stdout
    assert "at least 30.0 dB" in result.stdout
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "flux-shapes.png",
        "wan-shapes.gif",
        "wan-shapes.png",
    ]
    picture = np.asarray(Image.open(tmp_path / "out" / "flux-shapes.png"))
    assert picture.shape[1] >= 3 * 256
    assert picture.shape[0] >= 2 * 256
    animation = Image.open(tmp_path / "out" / "wan-shapes.gif")
    assert animation.n_frames == 5
    # equal pictures: nothing but black in the last column's tiles, and something in the first's
    middle = picture.shape[0] - sheet.MARGIN - 128
    assert picture[middle, -sheet.MARGIN - 128 : -sheet.MARGIN - 10].max() == 0
    assert picture[middle, sheet.MARGIN : sheet.MARGIN + 200].std() > 5


@pytest.fixture
def careless(shapes, monkeypatch):
    """The configuration of both stand-ins skips all it can."""
    for name, record in demo.CHECKPOINTS.items():
        (shapes / name / "careless.yaml").write_text(CARELESS)
        monkeypatch.setitem(demo.CHECKPOINTS, name, replace(record, config="careless.yaml"))


def test_broken_fidelity_fails_and_is_named(cli, careless, tmp_path):
    result = cli("demo", "--output", tmp_path, "--captions", 1, "--only", "image")
    assert result.exit_code == 1
    assert "flux-shapes: the PSNR of " in result.stderr
    assert "under its bound of 33 dB" in result.stderr
    assert "wan-shapes" not in result.output
    rows = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in result.stdout.splitlines() if "│" in line
    }
    assert (rows["steps computed"], rows["steps skipped"]) == ("2", "3")
    assert (tmp_path / "flux-shapes.png").is_file()
    assert not (tmp_path / "wan-shapes.png").exists()


def test_values_that_are_no_numbers_have_no_fidelity():
    record = demo.CHECKPOINTS["flux-shapes"]
    stock = np.full((1, 8, 8, 3), 0.5, np.float32)
    broken = stock.copy()
    broken[0, 0, 0, 0] = np.nan
    comparison = demo_module.Comparison(
        record, ("a fox",), demo_module.Side(stock, 1.0), demo_module.Side(broken, 1.0), 1, 0
    )
    assert comparison.psnr() == 0
    assert comparison.ssim() < 1


def test_output_that_is_a_file(refused, shapes, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "taken" in refused("demo", "--output", tmp_path / "taken")


def test_missing_checkpoints(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "ROOT", tmp_path / "none")
    assert "'flux-shapes' is missing from this installation" in refused("demo", "--output", tmp_path)


def test_missing_packages(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_module.platform, "has_module", lambda name: name != "skimage")
    assert "The demo needs skimage: pip install" in refused("demo", "--output", tmp_path)


def test_checkpoints_as_data(shapes):
    with pytest.raises(AccelError, match="Did you mean 'wan-shapes'"):
        demo.load("wan-shape")
    arguments = demo.call_arguments("wan-shapes")
    arguments.clear()
    assert demo.call_arguments("wan-shapes")["num_frames"] == 5
    assert type(demo.load("wan-shapes")).__name__ == "WanPipeline"


def test_captions_are_held_out_of_training(monkeypatch):
    """Every (colour, shape, place or motion) of a caption is on the side of the split that training never sees."""
    folder = Path(__file__).parents[2] / "benchmarks" / "shapes"
    if not (folder / "scenes.py").is_file():
        pytest.skip("needs a checkout with benchmarks/shapes")
    monkeypatch.syspath_prepend(str(folder))
    import scenes

    for record in demo.CHECKPOINTS.values():
        thirds = scenes.PLACES if record.kind == "image" else scenes.MOTION_NAMES
        colours, shapes = "|".join(scenes.COLOUR_NAMES), "|".join(scenes.SHAPES)
        # the longest alternative first: "at the top left" is not "at the top"
        pattern = f"({colours}) ({shapes}) ({'|'.join(sorted(thirds, key=len, reverse=True))})"
        for caption in record.captions:
            found = re.findall(pattern, caption)
            assert len(found) == caption.count("large ") + caption.count("small ") > 0
            for colour, shape, third in found:
                indices = scenes.COLOUR_NAMES.index(colour), scenes.SHAPES.index(shape), thirds.index(third)
                assert scenes.is_held_out(record.kind, *indices), (record.name, caption)


def test_difference_is_amplified_and_cut_off():
    a, b = np.zeros((1, 1, 3)), np.array([[[0.0, -0.05, 0.5]]])
    assert np.allclose(sheet.difference(a, b), [[[0.0, 0.4, 1.0]]])


def test_sheet_places_tiles_under_their_headings():
    colours = np.eye(3)
    rows = [sheet.Row([np.tile(colour, (4, 4, 1)) for colour in colours], caption="word " * 60, label="left")] * 2
    picture = np.asarray(sheet.draw(rows, ["one", "two", "three"], tile=64))
    # both rows hold their three tiles whole: 64 x 64 pixels of each pure colour
    for colour in colours:
        assert (picture == colour * 255).all(-1).sum() == 2 * 64 * 64
    red, blue = (np.argwhere((picture == colours[index] * 255).all(-1)) for index in (0, 2))
    assert red[:, 1].max() < blue[:, 1].min()
    assert (picture[: sheet.MARGIN // 2] == 255).all()
    assert (picture[-sheet.MARGIN // 2 :] == 255).all()
