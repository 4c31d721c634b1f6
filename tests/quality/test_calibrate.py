"""Calibration: what it records against torch hooks of its own, and what it makes of it against numpy."""

from __future__ import annotations

import numpy
import pytest
import torch
from tiny import TINY, build

from diffusers_accel import MagCacheConfig, TeaCacheConfig, Unsupported, accelerate, calibrate, demo, stats
from diffusers_accel.api import recorded
from diffusers_accel.features.cache import Record
from diffusers_accel.quality.calibrate import PoorFit, _judge, _polynomial

# Two captions of the training split's kind; the held-out ones are for judging.
PROMPTS = [
    "a large red circle in the center, on a plain gray background",
    "a small blue ring on the left, on a beige one",
]


def test_what_is_recorded():
    entry, pipe = TINY["wan"], build("wan")
    stock = entry.run(pipe, steps=6)
    before, after = [], []
    pipe.transformer.blocks[0].register_forward_pre_hook(lambda module, args: before.append(args[0].clone()))
    pipe.transformer.blocks[-1].register_forward_hook(lambda module, args, output: after.append(output.clone()))
    with recorded(pipe) as target:
        assert torch.equal(entry.run(pipe, steps=6), stock)
    records = target.cache_records["transformer", "cond"]
    residuals = [out - into for out, into in zip(after[::2], before[::2], strict=True)]
    assert [each.step for each in records] == [1, 2, 3, 4, 5]
    for each, now, was in zip(records, residuals[1:], residuals, strict=False):
        assert each.residual == pytest.approx(((now - was).abs().mean() / was.abs().mean()).item(), rel=1e-4)
        assert each.ratio == pytest.approx((now.norm(dim=-1) / was.norm(dim=-1)).mean().item(), rel=1e-4)
    assert torch.equal(entry.run(pipe, steps=6), stock)


@pytest.mark.parametrize("kind", ["teacache", "magcache"])
def test_a_shipped_checkpoint(kind, tmp_path):
    record = demo.CHECKPOINTS["flux-shapes"]
    pipe = demo.load("flux-shapes")
    pipe.set_progress_bar_config(disable=True)
    arguments = {**record.arguments, "num_inference_steps": 12, "output_type": "latent"}
    found = calibrate(pipe, PROMPTS, kind=kind, skip=0.25, force=True, **arguments)
    [fit] = found.fits.values()
    if kind == "teacache":
        x, y = numpy.array(fit.points).T
        expected = numpy.polyfit(x, y, len(fit.coefficients) - 1)
        numpy.testing.assert_allclose(found.config.coefficients, expected, rtol=1e-6)
        assert isinstance(found.config, TeaCacheConfig) and found.config.use_ret_steps
    else:
        assert isinstance(found.config, MagCacheConfig) and len(fit.ratios) == 12 and fit.ratios[0] == 1.0
        step, ratio = numpy.array(fit.points).T
        assert fit.ratios[5] == pytest.approx(ratio[step == 5].mean(), abs=1e-5)
    found.save(tmp_path / "cache.yaml")
    found.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 1000
    accelerate(pipe, str(tmp_path / "cache.yaml"))
    pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **arguments)
    # The threshold was found by playing the rule over full runs: a real one may differ by a step.
    assert abs(stats(pipe).steps_skipped - 3) <= 2


def test_a_poor_fit_is_refused():
    """Residuals that have nothing to do with the signal explain nothing; half noise is warned of; a line is taken."""
    random = numpy.random.default_rng(0)

    def fit(noise):
        signal = random.uniform(0.0, 0.3, (8, 20))
        residual = signal + noise * random.normal(0.0, 0.1, (8, 20))
        return _polynomial(
            [
                Record(request, step + 1, 22, signal[request, step], residual[request, step], 1.0)
                for request in range(8)
                for step in range(20)
            ],
            None,
            False,
        )

    with pytest.raises(PoorFit, match="explains"):
        _judge("transformer", fit(10.0), force=False)
    with pytest.warns(UserWarning, match="Compare with FBCacheConfig"):
        _judge("transformer", fit(10.0), force=True)
    with pytest.warns(UserWarning, match="explains"):
        _judge("transformer", fit(0.8), force=False)
    good = fit(0.0)
    assert good.r2 > 0.999
    assert good.coefficients == pytest.approx((1.0, 0.0), abs=1e-6)
    _judge("transformer", good, force=False)


def test_what_is_refused():
    pipe = build("flux")
    with pytest.raises(ValueError, match="prompts"):
        calibrate(pipe, [])
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate(pipe, PROMPTS, skip=1.5)
    accelerate(pipe, attention="sdpa")
    with pytest.raises(Unsupported, match="accelerated"):
        calibrate(pipe, PROMPTS)
