"""`launch`: a pipeline in several processes, called from one that is none of them."""

from __future__ import annotations

import os
import sys
import time

import pytest
from exact import relative
from ranks import pipelines
from tiny import TINY, build, tensors

from diffusers_accel import Unsupported, WorkerFailed, launch


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """New processes find what the tests consist of."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def test_it_is_called_as_the_pipeline():
    entry, pipe = TINY["wan"], build("wan")
    expected = [tensors(entry.run(pipe, steps=2)), tensors(entry.run(pipe, steps=3))]
    with launch(pipelines.tiny, parallel={"cfg": 2}, load={"name": "wan"}) as launched:
        assert launched.ranks == 2
        for steps, one in zip((2, 3), expected, strict=True):
            found = tensors(entry.output(launched(**entry.call(steps))))
            assert all(relative(item, other) < 1e-4 for item, other in zip(found, one, strict=True))
    assert launched.ranks == 0
    with pytest.raises(WorkerFailed, match="have ended"):
        launched()


@pytest.mark.parametrize(("fails", "words"), [("raises", "rank 1 raised.*had enough"), ("dies", "rank 1 died .*7")])
def test_one_ranks_end_is_all_ranks(fails, words):
    launched = launch(pipelines.tiny, parallel={"ulysses": 2}, attention="sdpa", load={"name": "wan", "fails": fails})
    begin = time.perf_counter()
    with pytest.raises(WorkerFailed, match=f"(?s){words}"):
        launched(**TINY["wan"].call(2))
    assert launched.ranks == 0
    # Rank 0 waits for it meanwhile; it would for ten minutes.
    assert time.perf_counter() - begin < 60


def test_a_worker_that_cannot_begin_says_why():
    with pytest.raises(WorkerFailed, match="Unsupported: attention='fa4'"):
        launch(pipelines.tiny, parallel={"ulysses": 2}, attention="fa4")


def test_what_cannot_be_launched_is_refused():
    with pytest.raises(Unsupported, match="how many ranks"):
        launch(pipelines.tiny, attention="sdpa")
    with pytest.raises(Unsupported, match="cannot import the function"):
        launch(lambda: build("wan"), parallel={"cfg": 2})
