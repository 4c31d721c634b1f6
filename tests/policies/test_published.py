"""MagCache, EasyCache, SeaCache and PAB, against transcriptions of the published rules."""

from __future__ import annotations

import numpy
import pytest

from diffusers_accel.core.step import Mode, StepState
from diffusers_accel.models import MAGCACHE_ROWS
from diffusers_accel.policies import (
    Broadcast,
    EasyCache,
    MagCache,
    SeaCache,
    change_ratio,
    estimated_change,
    wiener_gain,
)


def step(index, total, first=0):
    return StepState("transformer", "cond", 1, index, first, total)


def computed(policy, total, changes=None, first=0):
    """Whether each step is computed."""
    return [
        policy.decide(step(place, total, first), 0.0 if changes is None else changes[place]) is Mode.FULL
        for place in range(first, total)
    ]


class TestMagCache:
    @pytest.mark.parametrize("table", sorted(MAGCACHE_ROWS))
    @pytest.mark.parametrize(("threshold", "most", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (1.0, 2, 0.33)])
    @pytest.mark.parametrize("steps", [12, 28, 50])
    def test_the_published_loop(self, table, threshold, most, retention, steps):
        ratios = numpy.array(MAGCACHE_ROWS[table].ratios)
        assert ratios[0] == 1.0 and len(ratios) in (28, 40, 50) and ((ratios > 0.3) & (ratios < 2)).all()
        places = numpy.round(numpy.arange(steps) * (len(ratios) - 1) / (steps - 1)).astype(int)
        expected, product, error, count = [], 1.0, 0.0, 0
        for place in range(steps):
            skip = False
            if place >= int(retention * steps + 0.5):
                product, count = product * ratios[places[place]], count + 1
                error += numpy.abs(1 - product)
                skip = error <= threshold and count <= most
            if not skip:
                product, error, count = 1.0, 0.0, 0
            expected.append(not skip)
        assert computed(MagCache(threshold, tuple(ratios), most, retention), steps) == expected
        assert not all(expected)

    def test_each_expert_keeps_its_own_first_steps(self):
        """A second expert that takes over at step 20 of 40 computes its first four of twenty."""
        policy = MagCache(1.0, (1.0,) * 40, max_consecutive=100, retention=0.2)
        modes = [policy.decide(step(place, 40), 0.0) is Mode.FULL for place in range(20, 40)]
        assert modes == [True] * 4 + [False] * 16

    def test_nothing_is_skipped(self):
        assert all(computed(MagCache(0.0, (1.0,) * 10), 10))
        assert all(computed(MagCache(9.0, (1.0,) * 10), 10, changes=[None] * 10))
        assert all(computed(MagCache(9.0, (float("nan"),) * 10), 10))


class TestEasyCache:
    @pytest.mark.parametrize("threshold", [0.02, 0.05, 0.2])
    def test_the_published_loop(self, threshold):
        """Over a trajectory whose outputs are known: estimated changes are summed until they reach the threshold."""
        random, steps, first = numpy.random.default_rng(0), 24, 5
        inputs = numpy.cumsum(random.normal(size=(steps, 64)) * 0.05, 0) + random.normal(size=64)
        outputs = numpy.sin(inputs) + 2

        expected, total, k, last_in, last_out, before = [], 0.0, None, None, None, None
        for place, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
            skip = False
            if first <= place < steps - 1:
                total += k * numpy.abs(x - before).mean() / numpy.abs(last_out).mean()
                skip = total < threshold
            if not skip:
                total = 0.0
                if last_in is not None:
                    k = numpy.abs(y - last_out).mean() / numpy.abs(x - last_in).mean()
                last_in, last_out = x, y
            before = x
            expected.append(not skip)

        policy, found, kept, own, before = EasyCache(threshold, first), [], None, None, None
        for place, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
            change = None
            if own is not None:
                change = estimated_change(own, numpy.abs(x - before).mean(), numpy.abs(kept[1]).mean())
            found.append(policy.decide(step(place, steps), change) is Mode.FULL)
            if found[-1]:
                if kept is not None:
                    own = change_ratio(numpy.abs(y - kept[1]).mean(), numpy.abs(x - kept[0]).mean())
                kept = (x, y)
            before = x
        assert found == expected and False in found


class TestSeaCache:
    def test_the_sum_and_the_caps(self):
        policy = SeaCache(0.5, first=2, last=1, max_consecutive=2)
        changes = [None, 0.0, 0.2, 0.2, 0.0, 0.45, 0.04, 0.02, 0.0, 0.0]
        # Two in a row, then one computed; 0.45 + 0.04 stays below 0.5; again one computed after two; the last one too.
        assert computed(policy, 10, changes) == [True, True, False, False, True, False, False, True, False, True]

    def test_wieners_filter(self):
        """Against the textbook: the linear filter with the least expected error of clean + noise, by brute force."""
        for frequency, noise, power in ((0.1, 0.3, 2.0), (0.4, 0.8, 3.0), (0.02, 0.95, 2.0)):
            clean, signal = frequency**-power, 1 - noise
            tried = numpy.linspace(0, 25, 2500001)
            error = (tried * signal - 1) ** 2 * clean + tried**2 * noise**2
            assert wiener_gain(frequency, noise, power) == pytest.approx(tried[error.argmin()], abs=1e-3)
        assert wiener_gain(0.0, 0.5, 2.0) == pytest.approx(2.0)  # all signal: scaled back
        assert 0 < wiener_gain(0.5, 1.0, 2.0) < 1e-4  # nothing but noise


class TestBroadcast:
    def test_interval_and_window(self):
        """Of ten steps from 1000 down: every other one within the window, all outside it."""
        rule, age, found = Broadcast(2, (150.0, 750.0)), None, []
        for timestep in range(1000, 0, -100):
            found.append(rule.computes(timestep, age))
            age = 1 if found[-1] else age + 1
        assert found == [True, True, True, False, True, False, True, False, True, True]
        assert rule.computes(500.0, None)
