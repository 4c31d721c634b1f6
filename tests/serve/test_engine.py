"""The engine: results of stock pipelines, progress, cancelling, and jobs that outlive the processes computing them."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import preloaded
from tiny import build

from diffusers_accel.errors import ConfigError, Unsupported
from diffusers_accel.serve import Engine, JobCancelled, JobFailed, replica
from diffusers_accel.serve.replica import ReplicaFailed
from serve import models

SIZE = {"height": 32, "width": 32, "num_inference_steps": 3}


@pytest.fixture(autouse=True, scope="module")
def _forked():
    """Workers are forked from a process that has torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica, "_context", preloaded)
        yield


def engine(model, **given):
    return Engine(model, {}, **given)


@pytest.fixture(scope="module")
def slow():
    with engine(models.flux, load={"seconds": 0.05}) as made:
        yield made


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def processes(made):
    return [process.pid for each in made._replicas for process in each.processes]


def stock(pipe, seed, **given):
    call = {"output_type": "np", "generator": torch.Generator().manual_seed(seed), **SIZE, **given}
    found = pipe(prompt="a fox", **call)
    frames = getattr(found, "frames", None)
    return [(each.clip(0, 1) * 255).round().astype(np.uint8) for each in (found.images if frames is None else frames)]


def test_results_are_the_pipelines(slow):
    found = slow.generate("a fox", seed=7, n=2, stats=True, **SIZE)
    assert (found.kind, found.width, found.height, found.seeds, found.frames) == ("image", 32, 32, (7, 8), None)
    pipe = build("flux")
    for seed, picture in zip(found.seeds, found.images, strict=True):
        assert np.array_equal(np.asarray(picture), stock(pipe, seed)[0])
    assert found.seconds > 0.15 and "steps computed" in found.stats
    again, other = (slow.generate("a fox", **SIZE).seeds for _ in range(2))
    assert again != other


def test_steps_are_told(slow):
    async def watch():
        job = slow.submit("a fox", seed=1, **{**SIZE, "num_inference_steps": 8})
        seen = [step async for step in job.watch()]
        return job, seen, await job

    job, seen, result = asyncio.run(watch())
    assert seen == sorted(seen) and seen[-1] == (8, 8) and len(seen) >= 4 and {steps for _, steps in seen} == {8}
    assert job.progress == 1.0 and job.status == "completed" and result.files[0].is_file()


def test_cancelling(slow):
    """A job that is computed ends at its next step, one that waits at once, and the process goes on."""
    before = processes(slow)
    running = slow.submit("a fox", **{**SIZE, "num_inference_steps": 400})
    waiting = slow.submit("a fox", **SIZE)
    wait_for(lambda: running.step >= 2)
    assert 0 < running.progress < 0.5 and running.status == "in_progress" and waiting.status == "queued"
    assert waiting.cancel() and waiting.status == "failed"
    with pytest.raises(JobCancelled):
        waiting.result(0)
    assert running.cancel()
    begin, step = time.monotonic(), running.step
    with pytest.raises(JobCancelled):
        running.result(20)
    assert running.step <= step + 2 or time.monotonic() - begin < 2
    assert not running.cancel()
    assert slow.generate("a fox", seed=3, **SIZE).seeds == (3,) and processes(slow) == before


def test_errors_of_a_request_end_nothing(slow):
    before = processes(slow)
    for given, code, message in (
        ({"num_frames": 5}, "invalid_request", "does not take num_frames"),
        ({"prompt_embeds": [1]}, "invalid_request", "Cannot forward both"),
        ({"num_inference_steps": "three"}, "invalid_request", "TypeError"),
    ):
        with pytest.raises(JobFailed, match=message) as caught:
            slow.generate("a fox", **{**SIZE, **given})
        assert caught.value.code == code
    assert slow.generate("a fox", **SIZE).width == 32 and processes(slow) == before
    with pytest.raises(Unsupported, match=r"submit\(latents=\).*cannot be sent"):
        slow.submit("a fox", latents=torch.zeros(1))


def test_a_key_is_one_job(slow):
    first, second = (slow.submit("a fox", key="one", owner="me", seed=5, **SIZE) for _ in range(2))
    assert first.id == second.id and first.result(30) == second.result(30)
    third = slow.submit("a fox", key="one", owner="me", **SIZE)
    assert third.id == first.id and third.result(0) == first.result(0)


def test_a_picture_goes_in():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    with engine(models.from_pictures) as made:
        found = made.generate("a fox", seed=2, image=picture, **SIZE)
        assert np.array_equal(np.asarray(found.images[0]), stock(build("flux-img2img"), 2, image=picture)[0])
    # The engine's folder has gone with it.
    assert not found.files[0].exists()


def test_a_video_comes_out():
    with engine(models.wan) as made:
        found = made.generate("a fox", seed=2, num_frames=5, guidance_scale=1.0, **SIZE)
        expected = stock(build("wan"), 2, num_frames=5, guidance_scale=1.0)[0]
        assert (found.kind, found.frames, found.width) == ("video", 5, 32)
        assert np.array_equal(found.videos[0], expected)


def test_a_process_that_dies(tmp_path):
    """Its job runs once more, in a new process; a job that kills two is not tried again, and the next is."""
    with engine(models.fragile, load={"folder": str(tmp_path)}) as made:
        before = processes(made)
        (tmp_path / "die").touch()
        job = made.submit("a fox", seed=4, **SIZE)
        assert job.result(60).seeds == (4,)
        assert made.jobs.get(job.id).attempt == 2 and processes(made) != before
        for number in range(2):
            (tmp_path / f"die{number}").touch()
        job, other = (made.submit("a fox", **SIZE) for _ in range(2))
        with pytest.raises(JobFailed, match="died") as caught:
            job.result(60)
        assert caught.value.code == "worker_died"
        assert other.result(60).width == 32 and made.jobs.get(other.id).attempt == 1
        # A death between two jobs.
        os.kill(processes(made)[0], signal.SIGKILL)
        assert made.generate("a fox", **SIZE).width == 32


def test_two_replicas_share_the_queue():
    with engine(models.flux, replicas=2, load={"seconds": 0.1}) as made:
        begin = time.monotonic()
        jobs = [made.submit("a fox", seed=seed, **SIZE) for seed in range(4)]
        assert [job.result(60).seeds for job in jobs] == [(0,), (1,), (2,), (3,)]
        # Four jobs of three slow steps, two at a time.
        assert time.monotonic() - begin < 4 * 0.3 + 5
        assert len(set(processes(made))) == 2


def test_ranks_share_a_job():
    """Two ranks compute one request, and end together when it is cancelled."""
    with engine(models.flux, parallel={"ulysses": 2}, load={"seconds": 0.02}) as made:
        assert len(processes(made)) == 2
        found = np.asarray(made.generate("a fox", seed=7, **SIZE).images[0]).astype(int)
        assert np.abs(found - stock(build("flux"), 7)[0].astype(int)).max() <= 1
        job = made.submit("a fox", **{**SIZE, "num_inference_steps": 500})
        wait_for(lambda: job.step >= 2)
        assert job.cancel()
        with pytest.raises(JobCancelled):
            job.result(20)
        before = processes(made)
        assert made.generate("a fox", **SIZE).width == 32 and processes(made) == before


def test_what_cannot_start():
    with pytest.raises(ReplicaFailed, match="rank 0: OSError: no such weights"):
        engine(models.broken)
    with pytest.raises(Unsupported, match="cannot import the function"):
        engine(lambda: None)
    with pytest.raises(Unsupported, match="how many ranks"):
        engine(models.flux, parallel={"fsdp": True})
    with pytest.raises(ConfigError, match="nothing"):
        engine(models.flux, nothing=1)


def test_a_closed_engine():
    made = engine(models.flux, load={"seconds": 0.05})
    job = made.submit("a fox", **{**SIZE, "num_inference_steps": 100})
    made.close()
    with pytest.raises(JobFailed, match="closed"):
        job.result(0)
    with pytest.raises(JobFailed, match="closed"):
        made.submit("a fox")


FRONT = """
import sys
from serve import models
from diffusers_accel.serve import Engine

if __name__ == "__main__":
    engine = Engine(models.flux, {}, load={"seconds": 0.1}, data=sys.argv[1])
    jobs = [engine.submit("a fox", seed=seed, height=32, width=32, num_inference_steps=3) for seed in range(3)]
    jobs[0].result()
    print("one", *[pid for replica in engine._replicas for pid in (p.pid for p in replica.processes)], flush=True)
    import time
    time.sleep(600)
"""


def test_a_front_that_is_killed(tmp_path):
    """Its workers end, and the next front computes what was left, once each."""
    script = tmp_path / "front.py"
    script.write_text(textwrap.dedent(FRONT))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    front = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "data")], stdout=subprocess.PIPE, text=True, env=environment
    )
    line = front.stdout.readline().split()
    assert line[0] == "one"
    front.kill()
    front.wait()

    def gone():
        try:
            os.kill(int(line[1]), 0)
        except ProcessLookupError:
            return True
        return "State:\tZ" in open(f"/proc/{line[1]}/status").read() if os.path.exists("/proc") else False

    wait_for(gone, 10)
    with engine(models.flux, data=tmp_path / "data") as made:
        rows = made.jobs._database.execute("SELECT id FROM jobs ORDER BY number").fetchall()
        assert len(rows) == 3
        wait_for(lambda: all(made.jobs.get(row["id"]).ended for row in rows))
        found = [made.jobs.get(row["id"]) for row in rows]
    assert [job.status for job in found] == ["completed"] * 3
    assert [job.result["seeds"] for job in found] == [[0], [1], [2]]
    assert found[0].attempt == 1 and all(os.path.isfile(job.result["files"][0]) for job in found)


def test_the_front_has_no_torch():
    code = "import sys, diffusers_accel.serve; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_who_stops_waiting_ends_nothing(slow):
    async def impatient():
        job = slow.submit("a fox", seed=1, **{**SIZE, "num_inference_steps": 20})
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(job, 0.2)
        async for _ in job.watch():
            break
        return job

    job = asyncio.run(impatient())
    assert job.result(30).seeds == (1,) and job.progress == 1.0


def test_engines_that_are_closed_lose_no_attempt(tmp_path):
    """A job that is interrupted waits, however often; only one engine has a folder."""
    for number in range(3):
        with engine(models.flux, data=tmp_path, load={"seconds": 0.05}) as made:
            if number == 0:
                job = made.submit("a fox", seed=3, **{**SIZE, "num_inference_steps": 60})
                with pytest.raises(Unsupported, match="another engine has"):
                    engine(models.flux, data=tmp_path)
            wait_for(lambda jobs=made.jobs, name=job.id: jobs.get(name).status == "in_progress")
    with pytest.raises(JobFailed, match="closed"):
        job.result(0)
    assert job.status == "failed" and not job.cancel()
    with engine(models.flux, data=tmp_path) as made:
        wait_for(lambda: made.jobs.get(job.id).ended)
        assert made.jobs.get(job.id).status == "completed" and made.jobs.get(job.id).attempt == 1


def test_an_error_in_the_front(monkeypatch):
    """A job whose answer was not written runs again in a new process, and the queue goes on."""
    with engine(models.flux) as made:
        before = processes(made)
        complete = made.jobs.complete
        errors = [OSError("disk full")]

        def fails_once(*given):
            if errors:
                raise errors.pop()
            return complete(*given)

        monkeypatch.setattr(made.jobs, "complete", fails_once)
        assert made.generate("a fox", seed=6, **SIZE).seeds == (6,)
        assert processes(made) != before and not errors


def test_rows_that_cannot_be_written(monkeypatch):
    """The handle ends with an error instead of waiting for ever, and the queue goes on."""
    with engine(models.flux) as made:
        errors = [sqlite3.OperationalError("disk full")] * 2

        def full(original):
            def call(*given):
                if errors:
                    raise errors.pop()
                return original(*given)

            return call

        monkeypatch.setattr(made.jobs, "complete", full(made.jobs.complete))
        monkeypatch.setattr(made.jobs, "requeue", full(made.jobs.requeue))
        with pytest.raises(JobFailed, match="its row: disk full"):
            made.generate("a fox", **SIZE)
        assert made.generate("a fox", seed=8, **SIZE).seeds == (8,)


def test_arguments_that_the_engine_sets(slow):
    for given, message in (
        ({"output_type": "pt"}, "results are files"),
        ({"num_images_per_prompt": 2}, r"Instead: n\."),
        ({"n": 0}, "n=1"),
    ):
        with pytest.raises(Unsupported, match=message):
            slow.submit("a fox", **given)
