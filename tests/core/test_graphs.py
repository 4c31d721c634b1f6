"""Recordings, with the stand-in for what records them."""

from __future__ import annotations

import pytest
import torch
from tape import TapeRecorder

from diffusers_accel.core.graphs import Recording


def recording(inputs, function):
    return Recording(inputs, function, TapeRecorder(TapeRecorder.pool(), torch.device("cpu")))


def test_plays_over_other_values():
    calls = []

    def function(static):
        calls.append(1)
        x, y = static
        return [x @ y, (x + 1).sum(0)]

    first, second = ([torch.randn(3, 4), torch.randn(4, 2)] for _ in range(2))
    played = recording(first, function)
    count = len(calls)
    for x, y in (first, second):
        product, total = played([x, y])
        assert torch.equal(product, x @ y) and torch.equal(total, (x + 1).sum(0))
    assert len(calls) == count, "Python is not run again"


def test_the_layout_is_kept():
    strides = []

    def function(static):
        strides.append([item.stride() for item in static])
        return list(static)

    turned, spread = torch.randn(3, 4).t(), torch.randn(1, 4).expand(3, 4)
    played = recording([turned, spread], function)
    assert strides[-1] == [turned.stride(), (4, 1)]
    assert all(map(torch.equal, played([turned, spread]), [turned, spread]))


def test_what_was_kept_while_preparing_is_not_recorded():
    """Layers that share a rounded input keep it as long as nobody writes to the tensor."""
    kept = {}

    def function(static):
        [x] = static
        if kept.get("of") != (id(x), x._version):
            kept.update(of=(id(x), x._version), value=x * 2)
        return [kept["value"] + 0]

    played = recording([torch.ones(2)], function)
    [found] = played([torch.full((2,), 5.0)])
    assert found.tolist() == [10.0, 10.0]


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(1, 2)])
def test_what_fits(other):
    played = recording([torch.ones(2)], lambda static: [static[0] * 2])
    assert played.fits([torch.zeros(2)]) and not played.fits([other]) and not played.fits([])
