"""Captured graphs, with the stand-in for CUDA graphs on the CPU."""

from __future__ import annotations

import pytest
import torch
from tape import TapeBackend

from diffusers_accel.core.graphs import CapturedGraph


def captured(inputs, function):
    return CapturedGraph(inputs, function, TapeBackend(TapeBackend.pool(), torch.device("cpu")))


def test_replay_over_other_values():
    calls = []

    def function(static):
        calls.append(1)
        x, y = static
        return [x @ y, (x + 1).sum(0)]

    first, second = ([torch.randn(3, 4), torch.randn(4, 2)] for _ in range(2))
    graph = captured(first, function)
    count = len(calls)
    for x, y in (first, second):
        product, total = graph([x, y])
        assert torch.equal(product, x @ y) and torch.equal(total, (x + 1).sum(0))
    assert len(calls) == count, "Python is not run again"


def test_the_layout_is_kept():
    strides = []

    def function(static):
        strides.append([item.stride() for item in static])
        return list(static)

    turned, spread = torch.randn(3, 4).t(), torch.randn(1, 4).expand(3, 4)
    graph = captured([turned, spread], function)
    assert strides[-1] == [turned.stride(), (4, 1)]
    assert all(map(torch.equal, graph([turned, spread]), [turned, spread]))


def test_a_value_memoized_in_warm_up_is_captured_again():
    """Layers that share a rounded input memoize it by the tensor's version."""
    kept = {}

    def function(static):
        [x] = static
        if kept.get("of") != (id(x), x._version):
            kept.update(of=(id(x), x._version), value=x * 2)
        return [kept["value"] + 0]

    graph = captured([torch.ones(2)], function)
    [found] = graph([torch.full((2,), 5.0)])
    assert found.tolist() == [10.0, 10.0]


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(1, 2)])
def test_fits(other):
    graph = captured([torch.ones(2)], lambda static: [static[0] * 2])
    assert graph.fits([torch.zeros(2)]) and not graph.fits([other]) and not graph.fits([])
