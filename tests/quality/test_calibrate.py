"""Calibration: the records against torch hooks, and the fits against numpy."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy
import pytest
import torch
from tiny import TINY, build

from diffusers_accel import MagCacheConfig, TeaCacheConfig, Unsupported, accelerate, calibrate, demo, stats
from diffusers_accel.api import recorded
from diffusers_accel.features.cache import StepRecord
from diffusers_accel.features.context import FeatureOutputs
from diffusers_accel.quality import calibrate as calibration
from diffusers_accel.quality.calibrate import PoorFit, _check_fit, _fit_polynomial

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
    with recorded(pipe) as context:
        assert torch.equal(entry.run(pipe, steps=6), stock)
    records = context.outputs.cache_records["transformer", "cond"]
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
        return _fit_polynomial(
            [
                StepRecord(request, step + 1, 22, signal[request, step], residual[request, step], 1.0)
                for request in range(8)
                for step in range(20)
            ],
            None,
            False,
        )

    with pytest.raises(PoorFit, match="explains"):
        _check_fit("transformer", fit(10.0), force=False)
    with pytest.warns(UserWarning, match="Compare with FBCacheConfig"):
        _check_fit("transformer", fit(10.0), force=True)
    with pytest.warns(UserWarning, match="explains"):
        _check_fit("transformer", fit(0.8), force=False)
    good = fit(0.0)
    assert good.r2 > 0.999
    assert good.coefficients == pytest.approx((1.0, 0.0), abs=1e-6)
    _check_fit("transformer", good, force=False)


@pytest.mark.parametrize(
    ("prompts", "given", "message"),
    [
        ([], {}, "prompts is a list of texts to record, eight or more"),
        ("a fox", {}, "prompts is a list of texts to record, eight or more, got 'a fox'"),
        (["a fox", 3], {}, "and one is 3"),
        (PROMPTS, {"skip": 1.5}, "between 0 and 1"),
        (PROMPTS, {"skip": 0}, "between 0 and 1"),
        (PROMPTS, {"skip": float("nan")}, "between 0 and 1"),
        (PROMPTS, {"skip": "half"}, "between 0 and 1"),
        (PROMPTS, {"skip": True}, "between 0 and 1"),
        (PROMPTS, {"kind": "fbcache"}, "kind is 'teacache' or 'magcache', got 'fbcache'"),
        (PROMPTS, {"degree": 0}, "degree is a number from 1 to 8 or None, got 0"),
        (PROMPTS, {"degree": 2.5}, "degree is a number"),
        (PROMPTS, {"prompt": "a fox"}, "each of prompts is the call's prompt"),
        (PROMPTS, {"num_inference_steps": 4}, r"of 4 steps the first 5 are .*steps=7 or more or use_ret_steps=False"),
        (PROMPTS, {"num_inference_steps": 1, "kind": "magcache"}, "num_inference_steps=3 or more"),
    ],
)  # fmt: skip
def test_arguments(prompts, given, message):
    """Invalid arguments are refused before any request."""
    with pytest.raises(ValueError, match=f"calibrate: .*{message}"):
        calibrate(None, prompts, **given)


def requests_of(steps, count=1):
    random = numpy.random.default_rng(0)
    return [
        StepRecord(request, step, steps, *random.uniform(0.1, 0.3, 2), 1.0)
        for request in range(count) for step in range(1, steps)
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:calibrate")
def test_too_little_was_recorded(monkeypatch):
    with pytest.raises(ValueError, match=r"transformer: of 3 calls recorded, in requests of 4 steps, 0 .*use_ret"):
        _fit_polynomial(requests_of(4), None, True, "transformer")
    with pytest.raises(ValueError, match=r"too few for a polynomial of degree 4.*a smaller degree"):
        _fit_polynomial(requests_of(8), 4, True)
    # Degrees that so few points would be met by exactly are not considered.
    assert len(_fit_polynomial(requests_of(8), None, True).coefficients) == 2 + 1

    outputs = FeatureOutputs()

    @contextmanager
    def recorded(pipe, use_ret_steps):
        yield SimpleNamespace(outputs=outputs)

    monkeypatch.setattr(calibration, "recorded", recorded)
    pipe = lambda prompt, **given: None  # noqa: E731
    with pytest.raises(ValueError, match="nothing was recorded"):
        calibrate(pipe, PROMPTS)
    outputs.cache_records = {("transformer", "cond"): requests_of(9, 2)}
    with pytest.raises(ValueError, match=r"no threshold skips 95% of 9 steps; .*use_ret_steps=False"):
        calibrate(pipe, PROMPTS, skip=0.95, force=True)
    # No share at all.
    outputs.cache_records = {("transformer", "cond"): requests_of(6, 8)}
    with pytest.raises(ValueError, match="no threshold skips 60% of 6 steps; none skips 20% either"):
        calibrate(pipe, PROMPTS, skip=0.6, force=True)


def test_what_is_refused():
    pipe = build("flux")
    accelerate(pipe, attention="sdpa")
    with pytest.raises(Unsupported, match="accelerated"):
        calibrate(pipe, PROMPTS)
