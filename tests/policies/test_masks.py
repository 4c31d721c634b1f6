"""DBCache's rule, step masks and TaylorSeer, against transcriptions of the published rules."""

from __future__ import annotations

import math

import numpy
import pytest

from diffusers_accel.config import MASKS as NAMES
from diffusers_accel.core.step import Mode, StepState
from diffusers_accel.policies import MASKS, DBCache, StepMask, Taylor, interval_mask, named_mask, scale_mask


def step(index, total=28, first=0):
    return StepState("transformer", "cond", 1, index, first, total)


def modes(policy, changes, first=0, total=None):
    """Whether each step is computed."""
    total = total or len(changes) + first
    return [
        policy.decide(step(first + place, total, first), change) is Mode.FULL for place, change in enumerate(changes)
    ]


class TestDBCache:
    def test_warm_up_and_threshold(self):
        changes = [None, 0.01, 0.2, 0.05, 0.01, 0.09, 0.08, 0.01]
        assert modes(DBCache(0.08, warmup=3), changes) == [True, True, True, False, False, True, True, False]
        assert all(modes(DBCache(0.0, warmup=0), [None, *[0.0] * 5]))

    def test_warm_up_is_of_the_request(self):
        """Image to image begins in the middle of the schedule."""
        assert modes(DBCache(1.0, warmup=2), [None, 0.0, 0.0], first=9) == [True, True, False]

    def test_caps(self):
        small = [None, *[0.0] * 9]
        assert modes(DBCache(0.1, warmup=1, max_skipped=3), small).count(False) == 3
        assert modes(DBCache(0.1, warmup=1, max_skipped=0), small).count(False) == 0
        found = modes(DBCache(0.1, warmup=1, max_consecutive=2), small)
        assert found == [True, False, False, True, False, False, True, False, False, True]

    def test_refresh(self):
        small = [None, *[0.0] * 9]
        assert modes(DBCache(0.1, warmup=1, refresh=4), small) == [place in (0, 4) for place in range(10)]
        found = modes(DBCache(0.1, warmup=1, refresh=4, repeat=True), small)
        assert found == [place in (0, 4, 8) for place in range(10)]

    def test_a_mask_beside_the_threshold(self):
        mask = StepMask((True, False, True, False, False))
        assert modes(DBCache(0.1, warmup=1, mask=mask), [None, 0.0, 0.0, 0.5, 0.0]) == [True, False, True, True, False]

    @pytest.mark.parametrize("change", [float("nan"), None])
    def test_a_change_that_is_unknown_computes(self, change):
        assert DBCache(1e9, warmup=0).decide(step(5), change) is Mode.FULL
        assert DBCache(1e9, warmup=0).decide(StepState("t", "c", 1, None, 0, 9), 0.0) is Mode.FULL


class TestMasks:
    def test_the_published_ones(self):
        """The numbers of computed steps of 28, and the places of the runs."""
        assert set(MASKS) == set(NAMES)
        assert {name: sum(named_mask(name)) for name in MASKS} == {"slow": 18, "medium": 15, "fast": 11, "ultra": 8}
        assert all(len(named_mask(name)) == 28 for name in MASKS)
        text = "".join("#" if computed else "." for computed in named_mask("fast"))
        assert text == "######.#...#....#.....#....#"

    @pytest.mark.parametrize("name", sorted(MASKS))
    @pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 28, 50, 100])
    def test_any_number_of_steps(self, name, steps):
        mask, published = scale_mask(named_mask(name), steps), named_mask(name)
        assert len(mask) == steps and mask[0]
        if steps == 28:
            assert mask == published
        if steps >= 20:
            assert abs(sum(mask) / steps - sum(published) / 28) < 0.15
            runs = "".join("1" if item else "0" for item in mask).split("0")
            # As many runs of computed steps, but that a skipped step alone between two may fall out.
            assert len(MASKS[name][0]) - sum(map(bool, runs)) in ((0, 1) if steps < 28 else (0,))

    def test_an_interval(self):
        assert interval_mask(3, 9, warmup=2) == (True, True, False, False, True, False, False, True, False)
        assert all(interval_mask(1, 5))

    def test_the_mask_alone_decides(self):
        policy = StepMask((True, False, False, True))
        assert modes(policy, [None, 0.0, 0.0, 0.0]) == [True, False, False, True]
        assert modes(policy, [None, None, 0.0, 0.0]) == [True, True, False, True]  # nothing to skip with
        assert modes(StepMask(interval=2), [None, 0.0, 0.0, 0.0], first=5, total=9) == [True, False, True, False]
        assert policy.decide(StepState("t", "c", 1, None, 0, 9), 0.0) is Mode.FULL


class TestTaylor:
    @pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
    def test_against_the_published_recursion(self, order):
        generator = numpy.random.default_rng(0)
        taylor, factors, before = Taylor(order), [], None
        for place in (0, 1, 2, 4, 5, 8, 12):
            value = generator.normal(size=7)
            new = [value]
            for k in range(order):
                if before is None or place < 2 or k >= len(factors):  # none at the second step
                    break
                new.append((new[k] - factors[k]) / (place - before))
            factors, before = new, place
            taylor.update(place, value)
            for ahead in (1, 2, 3):
                expected = sum(factor * ahead**k / math.factorial(k) for k, factor in enumerate(factors))
                numpy.testing.assert_allclose(taylor.predict(place + ahead), expected, rtol=1e-12)

    def test_a_line_is_continued(self):
        taylor = Taylor(1)
        for place in (2, 5):
            taylor.update(place, numpy.array([3.0 * place + 1]))
        assert taylor.predict(7) == pytest.approx(22.0)

    def test_a_step_that_is_computed_again_starts_anew(self):
        taylor = Taylor(2)
        taylor.update(3, 1.0)
        taylor.update(3, 2.0)
        assert taylor.derivatives == [2.0]
