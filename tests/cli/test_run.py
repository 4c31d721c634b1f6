"""`run`: arguments of the pipeline, refusals, and saved files."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from ranks import node
from ranks.machines import FOUND, two

from diffusers_accel.cli import run as run_module
from diffusers_accel.cli.common import CommandError
from diffusers_accel.cli.launch import read_parallel

IMAGE = ("--prompt", "a red fox", "--height", 32, "--width", 32, "--steps", 2, "--call", "max_sequence_length=16")
VIDEO = (*IMAGE, "--num-frames", 5)


def stat(printed: str, name: str) -> str:
    """The row `name` of the printed statistics."""
    line = next(line for line in printed.splitlines() if line.startswith(name))
    return line.removeprefix(name).strip()


@pytest.fixture
def run(cli, folders):
    """`run` with a stand-in on the CPU."""

    def call(model: str, *arguments: object):
        result = cli("run", folders / model, "--device", "cpu", *arguments)
        assert result.exit_code == 0, result.output
        return result

    return call


def test_image_is_the_pipelines(run, folders, tmp_path):
    result = run("flux-shapes", *IMAGE, "--seed", 3, "--output", tmp_path / "fox.png")
    assert f"saved {tmp_path / 'fox.png'}" in result.stdout
    assert stat(result.stdout, "steps computed") == "2"
    assert stat(result.stdout, "attention kernels").startswith("sdpa x ")

    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folders / "flux-shapes", dtype=torch.float32)
    expected = pipe(
        "a red fox",
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "fox.png")), np.asarray(expected))


def test_the_seed_matters_and_batches_are_numbered(run, tmp_path):
    run("flux-shapes", *IMAGE, "--prompt", "snow", "--output", tmp_path / "a.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-0.png", "a-1.png"]
    run("flux-shapes", *IMAGE, "--prompt", "snow", "--seed", 1, "--output", tmp_path / "b.png")
    first, again = (np.asarray(Image.open(tmp_path / name)) for name in ("a-0.png", "b-0.png"))
    assert not np.array_equal(first, again)


def test_demo_name_brings_its_arguments(cli, shapes, tmp_path):
    file = tmp_path / "demo.png"
    result = cli("run", "flux-shapes", "--device", "cpu", "--prompt", "fox", "--width", 48, "--output", file)
    assert result.exit_code == 0, result.output
    assert Image.open(file).size == (48, 32)
    assert stat(result.stdout, "steps computed") == "5"


def test_settings_reach_the_pipeline(run, tmp_path):
    careless = ("--set", "cache.kind=teacache", "--set", "cache.threshold=1000000", "--set", "cache.coefficients=[1,0]")
    steps = ("--steps", 5, "--output", tmp_path / "fox.png")
    assert stat(run("flux-shapes", *IMAGE, *steps, *careless).stdout, "steps skipped") == "3"
    assert stat(run("flux-shapes", *IMAGE, *steps).stdout, "steps skipped") == "0"


def test_dtype(run, tmp_path):
    whole = run("flux-shapes", *IMAGE, "--output", tmp_path / "a.png").stdout
    half = run("flux-shapes", *IMAGE, "--dtype", "bfloat16", "--output", tmp_path / "b.png").stdout
    sizes = [float(stat(printed, "denoiser weights").split()[0]) for printed in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_video_as_gif(run, tmp_path):
    file = tmp_path / "fox.gif"
    run("wan-shapes", *VIDEO, "--fps", 10, "--output", file)
    frames = list(ImageSequence.Iterator(Image.open(file)))
    assert len(frames) == 5
    assert frames[0].size == (32, 32)
    assert frames[0].info["duration"] == 100


def test_video_as_mp4_named_after_the_prompt(run, tmp_path, monkeypatch):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.chdir(tmp_path)
    run("wan-shapes", *VIDEO, "--negative-prompt", "blurry")
    frames = imageio.mimread(tmp_path / "a-red-fox.mp4")
    assert len(frames) == 5
    assert frames[0].shape == (32, 32, 3)


def test_arguments_the_pipeline_does_not_take(refused, folders, tmp_path):
    model = ("run", folders / "flux-shapes", "--device", "cpu", *IMAGE, "--output", tmp_path / "fox.png")
    message = refused(*model, "--num-frames", 5, "--call", "fps=3")
    assert "FluxPipeline does not take --num-frames, --call fps" in message
    assert "num_inference_steps" in message
    assert "Give --seed" in refused(*model, "--call", "generator=1")
    assert "Give --output" in refused(*model, "--call", "output_type=pil")
    message = refused(*model, "--width", 33, "--call", "prompt_2=[a, b, c]", "--call", "prompt_embeds=3")
    assert message.startswith("error: FluxPipeline: ")
    assert not list(tmp_path.iterdir())


def test_missing_arguments(folders):
    class Pipeline:
        def __call__(self, prompt, image, strength=0.5, output_type="pil"):
            pass

    with pytest.raises(CommandError, match="Pipeline also needs --image"):
        run_module.call_arguments(Pipeline(), {"prompt": "a fox"})
    arguments = run_module.call_arguments(Pipeline(), {"prompt": "a fox", "image": 1})
    assert arguments == {"prompt": "a fox", "image": 1, "output_type": "np"}


def test_output_is_judged_before_anything_runs(refused, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_module, "accelerate_pipeline", lambda pipe, requested: pytest.fail("got as far as accelerating")
    )
    image = ("run", folders / "flux-shapes", "--device", "cpu", *IMAGE)
    video = ("run", folders / "wan-shapes", "--device", "cpu", *VIDEO)
    assert "A picture is saved as .png" in refused(*image, "--output", tmp_path / "fox.gif")
    assert "A video is saved as .mp4" in refused(*video, "--output", tmp_path / "fox.png")
    assert "not '.txt'" in refused(*image, "--output", tmp_path / "fox.txt")
    assert "there is no folder" in refused(*image, "--output", tmp_path / "none" / "fox.png")
    monkeypatch.setattr(run_module, "has_ffmpeg", lambda: False)
    message = refused(*video, "--output", tmp_path / "fox.mp4")
    assert "pip install" in message
    assert ".gif" in message


def test_refused_feature(refused, folders, tmp_path):
    message = refused(
        "run",
        folders / "flux-shapes",
        "--device",
        "cpu",
        *IMAGE,
        "--set",
        "attention=cudnn",
        "--output",
        tmp_path / "a.png",
    )
    assert "needs a CUDA device" in message


def test_unreadable_image(refused, folders, tmp_path):
    assert "--image" in refused("run", folders / "flux-shapes", *IMAGE, "--image", tmp_path / "none.png")


def one_machine(_, *command):
    command = [sys.executable, "-m", "diffusers_accel", *command]
    return [subprocess.run(command, capture_output=True, text=True, timeout=240)]


def two_machines(folder, *command):
    return two(FOUND, 1, folder, node.command, *command)


@pytest.mark.thorough
@pytest.mark.parametrize("started", [one_machine, two_machines])
def test_ranks_are_started_and_one_of_them_saves(run, folders, tmp_path, started):
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    run("flux-shapes", *IMAGE, "--output", files[0])
    command = ["run", folders / "flux-shapes", "--device", "cpu", *IMAGE, "--parallel", "ulysses=2"]
    done = started(tmp_path, *map(str, [*command, "--output", files[1]]))
    assert not any(each.returncode for each in done), "\n".join(each.stderr for each in done)
    printed = "".join(each.stdout for each in done)
    assert printed.count("saved ") == 1 and stat(printed, "steps computed") == "2"
    one, two = (np.asarray(Image.open(file)).astype(int) for file in files)
    # float32 in another order of summation, rounded to 8 bits.
    assert one.std() > 0 and abs(one - two).max() <= 1


def test_what_a_launcher_has_started_must_fit(refused, folders, monkeypatch, tmp_path):
    def message(*more):
        return refused("run", folders / "flux-shapes", *IMAGE, "--parallel", "cfg=2,ulysses=2", *more)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "cfg 2 x ulysses 2 = 4 ranks, and this machine has 2 GPUs" in message()
    assert "torchrun --nnodes 2 --nproc-per-node GPUS" in message()
    for name, value in (("RANK", 3), ("WORLD_SIZE", 8), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    assert "= 4 ranks, and 8 processes were started" in message()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert "this machine has 2 GPUs, and this is process 4 on it" in message()
    # The first rank alone saves, so no other asks for a folder.
    monkeypatch.setenv("LOCAL_RANK", "1")
    nowhere = ("--device", "cpu", "--output", tmp_path / "none" / "fox.png", "--image", tmp_path / "none.png")
    assert "--image" in message(*nowhere)
    monkeypatch.setenv("RANK", "0")
    assert "there is no folder" in message(*nowhere)


def test_ways_to_divide_are_read():
    assert read_parallel("cfg=2, attn2d=2x2") == ["parallel.cfg=2", "parallel.attn2d=[2,2]"]
    with pytest.raises(CommandError, match="write names and numbers of ranks"):
        read_parallel("ulysses")
