"""Every pair of features on every family, generated from FEATURES: exact, whatever order they are named in.

One family has each pair by itself. The others have a covering array: few sets of features, among which every two
features are found with both of them, with one without the other, and with neither (which is stock).
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tape import TapeBackend
from tiny import TINY, build
from transfers import HostTransfers

from diffusers_accel import CompileConfig, TeaCacheConfig, accelerate, register_linear, restore, stats
from diffusers_accel.api import FEATURES, resolve
from diffusers_accel.core.graphs import GRAPH_BACKENDS
from diffusers_accel.core.streaming import TRANSFERS
from diffusers_accel.features.offload import planning
from diffusers_accel.kernels.linear import LINEARS

# A lossless setting of each feature. A feature without one here fails `test_every_feature_has_a_setting`.
SETTINGS = {
    "linear": {"algo": "copied", "smallest": 0},
    "fuse": True,
    "attention": "sdpa",
    "compile": CompileConfig(backend="eager"),
    "cuda_graph": True,
    "cache": TeaCacheConfig(threshold=0.0, coefficients=(1.0, 0.0)),
    "vae": {"slicing": True},
    "offload": 3,
}
FAMILIES = ["flux", "flux2", "wan", "ltx2", "qwen", "cosmos", "cosmos3", "sd3"]
# The third one of a kind of call plays what the second one recorded.
STEPS = 3
PAIRS = list(itertools.combinations(SETTINGS, 2))
# Each feature is in three of five sets, no two of them in the same three: any two meet, and part both ways.
_PLACES = dict(zip(SETTINGS, itertools.combinations(range(5), 3), strict=False))
SETS = [tuple(feature for feature in SETTINGS if number in _PLACES[feature]) for number in range(5)]


def test_every_feature_has_a_setting():
    # Several ranks, with other features too, are in tests/parallel.
    assert set(SETTINGS) == set(FEATURES) - {
        "request",
        "process group",
        "parallel",
        "tensor parallel",
        "fsdp",
        "diffusers offload",
    }


def test_sets_cover_every_pair():
    for one, other in itertools.permutations(SETTINGS, 2):
        assert any(one in each and other in each for each in SETS), (one, other)
        assert any(one in each and other not in each for each in SETS), (one, other)


@pytest.fixture
def copied():
    """A format that loses nothing."""
    register_linear("copied", copy.deepcopy)
    yield
    LINEARS._records.pop("copied")


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    """Graphs and streamed weights, without a GPU."""
    monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
    monkeypatch.setitem(TRANSFERS, "cpu", HostTransfers)
    monkeypatch.setattr(planning, "estimate", lambda *_: {"whole": 0})


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_pairs(name, copied, graphs_on_the_cpu):
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=STEPS)
    expected = stock if isinstance(stock, tuple) else (stock,)
    for features in PAIRS if name == FAMILIES[0] else SETS:
        torch.compiler.reset()  # a block's forward may be compiled anew eight times in a process
        sections = {feature: SETTINGS[feature] for feature in features}
        # All that features are given, so one order stands for both.
        assert resolve(pipe, **sections) == resolve(pipe, **dict(reversed(sections.items())))
        accelerate(pipe, **sections)
        found = entry.run(pipe, steps=STEPS)
        for one, other in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
            # The eager backend and the same kernel: nothing may change.
            assert torch.equal(one, other), features
        assert stats(pipe).steps_computed == STEPS
    restore(pipe)
    again = entry.run(pipe, steps=STEPS)
    assert all(map(torch.equal, again if isinstance(again, tuple) else (again,), expected))
