"""`launch`: a pipeline in several processes, called from one that is none of them."""

from __future__ import annotations

import os
import sys

import pytest
from exact import relative
from ranks import pipelines
from tiny import TINY, build, tensors

from diffusers_accel import Unsupported, WorkerFailed, launch


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """New processes find what the tests consist of."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.mark.parametrize(
    ("fails", "words", "parallel"),
    [("raises", "rank 1 raised.*had enough", {"cfg": 2}), ("dies", "rank 1 died .*7", {"ulysses": 2})],
)
def test_it_is_called_as_the_pipeline_until_a_rank_fails(fails, words, parallel):
    entry, pipe = TINY["wan"], build("wan")
    expected = [tensors(entry.run(pipe, steps=2)), tensors(entry.run(pipe, steps=3))]
    load = {"name": "wan", "fails": fails, "after": 2}
    with launch(pipelines.tiny, parallel=parallel, attention="sdpa", load=load) as launched:
        assert launched.ranks == 2
        for steps, one in zip((2, 3), expected, strict=True):
            found = tensors(entry.output(launched(**entry.call(steps))))
            assert all(relative(item, other) < 1e-4 for item, other in zip(found, one, strict=True))
        # Rank 0 waits for it meanwhile, and would for ten minutes: longer than a test may take.
        with pytest.raises(WorkerFailed, match=f"(?s){words}"):
            launched(**entry.call(2))
        # One's end is all ranks'.
        assert launched.ranks == 0
        with pytest.raises(WorkerFailed, match="have ended"):
            launched()


def test_a_worker_that_cannot_begin_says_why():
    with pytest.raises(WorkerFailed, match="Unsupported: attention='fa4'"):
        launch(pipelines.tiny, parallel={"ulysses": 2}, attention="fa4")


def test_what_cannot_be_launched_is_refused():
    with pytest.raises(Unsupported, match="how many ranks"):
        launch(pipelines.tiny, attention="sdpa")
    with pytest.raises(Unsupported, match="cannot import the function"):
        launch(lambda: build("wan"), parallel={"cfg": 2})
