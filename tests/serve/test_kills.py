"""`kill -9` of ranks at any time: no job is lost, none is computed after it has ended."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from ranks import preloaded

from diffusers_accel.serve import Engine, JobFailed, replica
from serve import models


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2))
def test_ranks_are_killed(seed, monkeypatch):
    """Between jobs, in one, and while a replica starts."""
    monkeypatch.setattr(replica, "_context", preloaded)
    draw = random.Random(seed)
    with Engine(models.flux, {}, replicas=2, load={"seconds": 0.02}) as engine:
        ended = []
        complete, fail = engine.jobs.complete, engine.jobs.fail
        monkeypatch.setattr(engine.jobs, "complete", lambda *given: note(complete(*given)))
        monkeypatch.setattr(engine.jobs, "fail", lambda *given: note(fail(*given)))

        def note(job):
            if job is not None:
                ended.append(job.id)
            return job

        jobs = []
        for number in range(12):
            jobs.append(engine.submit("a fox", seed=number, height=32, width=32, num_inference_steps=4))
            time.sleep(draw.random() / 4)
            living = [process.pid for each in engine._replicas for process in each.processes if process.is_alive()]
            if living and draw.random() < 0.6:
                os.kill(draw.choice(living), signal.SIGKILL)
        codes = []
        for number, job in enumerate(jobs):
            try:
                result = job.result(120)
            except JobFailed as error:
                codes.append(error.code)
                continue
            assert result.seeds == (number,) and result.files[0].is_file()
            codes.append("completed")
        assert set(codes) <= {"completed", "worker_died"}
        assert codes.count("completed") >= 6
        rows = [engine.jobs.get(job.id) for job in jobs]
        assert all(row.ended and 1 <= row.attempt <= 2 for row in rows)
        assert all(row.attempt == 2 for row in rows if row.status == "failed")
        assert len(ended) == len(set(ended)) and engine.jobs.waiting() == 0
