"""TeaCache's rule against a straight transcription in numpy."""

from __future__ import annotations

import numpy
import pytest

from diffusers_accel.core.step import Mode, StepState
from diffusers_accel.models import TEACACHE_ROWS
from diffusers_accel.policies import TeaCache
from diffusers_accel.policies.teacache import polynomial


def step(index, total=20, first=0):
    return StepState("transformer", "cond", 1, index, first, total)


def reference(changes, threshold, coefficients, ret_steps=False, first=0):
    """The published loop, in float64."""
    accumulated, modes = 0.0, []
    for index in range(first, len(changes)):
        always = index - first < 5 if ret_steps else index in (first, len(changes) - 1)
        if always:
            accumulated, compute = 0.0, True
        else:
            accumulated += abs(numpy.poly1d(coefficients)(changes[index]))
            compute = not accumulated < threshold
            accumulated = 0.0 if compute else accumulated
        modes.append(compute)
    return modes


@pytest.mark.parametrize("row", sorted(TEACACHE_ROWS))
@pytest.mark.parametrize("first", [0, 3])
def test_every_row_against_the_reference(row, first):
    published = TEACACHE_ROWS[row]
    changes = numpy.random.default_rng(0).uniform(0.0, 0.3, 40)
    for threshold in (0.0, published.threshold, 5 * published.threshold):
        policy = TeaCache.published(threshold, published.coefficients, published.use_ret_steps)
        found = [
            policy.decide(step(index, 40, first), None if index == first else float(changes[index])) is Mode.FULL
            for index in range(first, 40)
        ]
        assert found == reference(changes, threshold, published.coefficients, published.use_ret_steps, first)


def test_some_steps_are_skipped_and_some_are_not():
    policy = TeaCache.published(0.25, (1.0, 0.0))
    modes = [policy.decide(step(index), 0.1 if index else None) for index in range(20)]
    assert modes[0] is modes[-1] is Mode.FULL
    assert modes[1:5] == [Mode.SKIP, Mode.SKIP, Mode.FULL, Mode.SKIP]


def test_polynomial_is_highest_degree_first():
    assert polynomial((2.0, -1.0, 0.5), 3.0) == numpy.poly1d([2.0, -1.0, 0.5])(3.0)


@pytest.mark.parametrize("change", [float("nan"), None])
def test_a_change_that_is_unknown_computes(change):
    policy = TeaCache.published(1e9, (1.0, 0.0))
    policy.decide(step(0), None)
    assert policy.decide(step(1), change) is Mode.FULL


def test_an_unknown_step_computes():
    assert TeaCache.published(1e9, (1.0, 0.0)).decide(step(None), 0.1) is Mode.FULL
