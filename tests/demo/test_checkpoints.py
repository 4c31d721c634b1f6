"""The shipped checkpoints: that they load as stock pipelines, do what they were trained for, and keep it accelerated.

Judged from pixels on captions whose combinations were held out of training, through the scorer of `benchmarks/shapes`;
the thresholds of the whole measurement (200 captions) are in the model cards.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import FluxPipeline, WanPipeline

from diffusers_accel import AccelConfig, TeaCacheConfig, accelerate, demo, restore, stats
from diffusers_accel.errors import AccelError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "shapes"))
import scenes
import score

# Captions per checkpoint: all 16 of the stated measurement where a CPU has the time.
COUNTS = {"flux-shapes": 16, "wan-shapes": 2}
BOUNDS = {"flux-shapes": 33.0, "wan-shapes": 30.0}
NAMES = sorted(COUNTS)


@pytest.fixture(scope="module")
def made():
    """Per checkpoint: the pipeline, the held-out scenes and captions, and the stock pictures, one request each."""
    cache = {}

    def get(name):
        if name not in cache:
            pipe = demo.load(name)
            pipe.set_progress_bar_config(disable=True)
            asked, captions = scenes.held_out_captions(demo.CHECKPOINTS[name].kind, COUNTS[name], seed=7)
            cache[name] = (pipe, asked, captions, generate(name, pipe, captions))
        return cache[name]

    return get


def generate(name, pipe, captions):
    record, pictures = demo.CHECKPOINTS[name], []
    for number, caption in enumerate(captions):
        out = pipe(caption, generator=torch.Generator().manual_seed(number), output_type="pt", **record.arguments)
        pictures.append((out.images if record.kind == "image" else out.frames).float())
    return torch.cat(pictures)


def as_judged(kind, pictures):
    """The scorer's layout: (count, 3, [frames,] height, width) in [0, 1]."""
    return pictures.transpose(1, 2) if kind == "video" else pictures


def test_stock_classes_and_size():
    assert isinstance(demo.load("flux-shapes"), FluxPipeline) and isinstance(demo.load("wan-shapes"), WanPipeline)
    size = sum(path.stat().st_size for path in demo.ROOT.rglob("*") if path.is_file())
    assert size <= 16 * 2**20
    with pytest.raises(AccelError, match="Did you mean 'flux-shapes'"):
        demo.load("flux-shape")


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_what_was_asked(name, made):
    kind = demo.CHECKPOINTS[name].kind
    _, asked, _, pictures = made(name)
    found = score.judge(asked, as_judged(kind, pictures))
    shuffled = score.judge(asked.take(numpy.roll(numpy.arange(len(asked)), 1)), as_judged(kind, pictures))
    key = "right" if kind == "image" else "directions right"
    # Over 200 captions: 99% of images, 99% of directions. One miss in sixteen is let pass, and no more.
    assert (1 - found[key]) * COUNTS[name] < COUNTS[name] // 16 + 0.01, found
    assert shuffled[key] <= 0.5, "the judge must tell a wrong picture from a right one"


@pytest.mark.parametrize("name", NAMES)
def test_vae_reconstruction(name, made):
    pipe = made(name)[0]
    scenes_each = COUNTS[name] // 2
    assert score.reconstruction_psnr(pipe.vae, demo.CHECKPOINTS[name].kind, 128, scenes_each, batch=4) >= 30.0


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_teacache_keeps_fidelity_and_skips_forty_percent(name, made):
    pipe, _, captions, stock = made(name)
    accelerate(pipe, AccelConfig.from_yaml(demo.CHECKPOINTS[name].config_file))
    found = generate(name, pipe, captions)
    statistics = stats(pipe)
    restore(pipe)
    steps = statistics.steps_skipped + statistics.steps_computed
    assert statistics.steps_skipped / steps >= 0.4
    psnr = -10 * float((found - stock).square().mean().log10())
    assert BOUNDS[name] <= psnr < 80, psnr


@pytest.mark.parametrize("name", NAMES)
def test_threshold_zero_is_stock(name, made):
    pipe, _, captions, stock = made(name)
    accelerate(pipe, cache=TeaCacheConfig(threshold=0.0, coefficients=(1.0, 0.0)))
    found = generate(name, pipe, captions[:1])
    restore(pipe)
    assert torch.equal(found, stock[:1])


def test_wan_needs_its_guidance(made):
    """Without classifier-free guidance the pictures are others, and worse: what the checkpoint was trained to show."""
    pipe, _, captions, stock = made("wan-shapes")
    record = demo.CHECKPOINTS["wan-shapes"]
    out = pipe(
        captions[0],
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **{**record.arguments, "guidance_scale": 1.0},
    )
    assert -10 * float((out.frames.float() - stock[:1]).square().mean().log10()) < 35
