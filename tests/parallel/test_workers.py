"""`launch`: a pipeline in several processes, called from one that is none of them."""

from __future__ import annotations

import multiprocessing
import os
import sys

import diffusers
import pytest
import torch
from exact import relative
from ranks import pipelines, preloaded
from tiny import TINY, build, tensors

from diffusers_accel import Unsupported, WorkerFailed, launch, workers


@pytest.fixture
def started(request, monkeypatch):
    """How workers are started: as `launch` does it, or without their seconds of imports."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    if request.param == "forkserver":
        context = preloaded()
        monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: context)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("fails", "words", "parallel", "started"),
    [
        ("raises", "rank 1 raised.*had enough", {"cfg": 2}, "spawn"),
        ("dies", "rank 1 died .*7", {"ulysses": 2}, "forkserver"),
    ],
    indirect=["started"],
)
def test_it_is_called_as_the_pipeline_until_a_rank_fails(fails, words, parallel, started):
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


@pytest.mark.parametrize("started", ["forkserver"], indirect=True)
def test_a_worker_that_cannot_begin_says_why(started):
    with pytest.raises(WorkerFailed, match="Unsupported: attention='fa4'"):
        launch(pipelines.tiny, parallel={"ulysses": 2}, attention="fa4")


def test_a_rank_that_has_died_meanwhile():
    """Between two calls: the others are ended, and the next call says so."""
    launched = standing()
    assert launched(2, b=3) == (0, (2,), {"b": 3})
    other, killed = launched._processes
    killed.kill()
    killed.join()
    with pytest.raises(WorkerFailed, match=r"rank 1 died between two calls \(exit code -9\)\. All .*have been ended"):
        launched()
    assert launched.ranks == 0 and not other.is_alive()
    with pytest.raises(WorkerFailed, match="have ended"):
        launched()


def test_an_argument_that_cannot_be_sent():
    """Nothing is sent to any rank, and all go on."""
    with standing() as launched:
        with pytest.raises(Unsupported, match=r"an argument cannot be sent to its workers"):
            launched(callback=lambda: None)
        tensor = torch.arange(3.0)
        assert torch.equal(launched(tensor)[1][0], tensor)


def _answering(pipe, rank):
    while True:
        args, kwargs = pipe.recv()
        pipe.send((True, (rank, args, kwargs)))


def standing():
    """Two workers that return what they are given."""
    context = multiprocessing.get_context("fork")
    launched = workers.Launched.__new__(workers.Launched)
    launched._processes, launched._pipes = [], []
    for rank in range(2):
        here, there = context.Pipe()
        process = context.Process(target=_answering, args=(there, rank), daemon=True)
        process.start()
        there.close()
        launched._processes.append(process)
        launched._pipes.append(here)
    return launched


def test_weights_of_one_type(tmp_path):
    """Without a type, diffusers' models and transformers' would be loaded in two: float32, and the file's."""
    pipe = build("flux")
    pipe.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    sections = {"attention": "sdpa"}
    loaded = workers._loaded(str(tmp_path), {}, None, sections)
    entry = TINY["flux"]
    assert relative(entry.run(loaded, steps=2), entry.run(build_like(tmp_path), steps=2)) < 1e-5
    for given in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}):
        loaded = workers._loaded(str(tmp_path), given, None, sections)
        assert {item.dtype for item in loaded.transformer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "sections", "moved"),
    [
        (None, {"parallel": {"cfg": 2}}, ["cuda:1"]),
        (None, {"parallel": {"cfg": 2, "fsdp": True}}, []),
        (None, {"parallel": {"cfg": 2}, "offload": "12GiB"}, []),
        ({"parallel": {"cfg": 2}, "offload": 3}, {}, []),
        ({"parallel": {"cfg": 2}, "offload": 3}, {"offload": None}, ["cuda:1"]),
    ],
)
def test_weights_that_may_be_too_many_wait_on_the_host(config, sections, moved, monkeypatch):
    found = []

    class Pipe:
        def to(self, device):
            found.append(device)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(workers, "accelerate", lambda made, config, **sections: made)
    workers._loaded(Pipe, {}, config, sections)
    assert found == moved


def build_like(folder):
    return diffusers.FluxPipeline.from_pretrained(folder, dtype=torch.float32)


def test_what_cannot_be_launched_is_refused():
    with pytest.raises(Unsupported, match="load cannot be sent to its workers"):
        launch(pipelines.tiny, parallel={"cfg": 2}, load={"name": lambda: "wan"})
    with pytest.raises(Unsupported, match="how many ranks"):
        launch(pipelines.tiny, attention="sdpa")
    with pytest.raises(Unsupported, match="cannot import the function"):
        launch(lambda: build("wan"), parallel={"cfg": 2})
