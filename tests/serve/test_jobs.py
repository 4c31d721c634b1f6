"""Jobs in SQLite: none is lost or doubled, whatever ends."""

from __future__ import annotations

import threading

import pytest

from diffusers_accel.serve.jobs import COMPLETED, FAILED, IN_PROGRESS, QUEUED, JobStore


@pytest.fixture
def jobs(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    yield store
    store.close()


def test_the_life_of_a_job(jobs):
    added, new = jobs.add("model", {"arguments": {"prompt": "a fox"}, "n": 1}, name="one")
    assert new and (added.status, added.attempt, added.started_at) == (QUEUED, 0, None)
    assert jobs.claim("other") is None and jobs.waiting() == jobs.waiting("model") == 1
    claimed = jobs.claim("model")
    assert (claimed.id, claimed.status, claimed.attempt) == ("one", IN_PROGRESS, 1) and jobs.claim("model") is None
    assert claimed.request == {"arguments": {"prompt": "a fox"}, "n": 1}
    done = jobs.complete("one", {"files": ["a.png"]})
    assert done.ended and done.status == COMPLETED and done.result == {"files": ["a.png"]}
    # It ends once.
    assert jobs.complete("one", {}) is None and jobs.fail("one", "failed", "late") is None
    assert jobs.requeue("one") is None and jobs.get("one") == done
    jobs.delete("one")
    assert jobs.get("one") is None


def test_the_oldest_first(jobs):
    for name in "abc":
        jobs.add("model", {}, name=name)
    first = jobs.claim("model")
    assert first.id == "a"
    # A job that waits again keeps its place.
    jobs.requeue("a")
    assert [jobs.claim("model").id for _ in range(3)] == ["a", "b", "c"]


def test_a_job_whose_worker_dies_runs_twice(jobs):
    jobs.add("model", {}, name="a")
    jobs.claim("model")
    assert jobs.requeue("a").status == QUEUED
    assert jobs.claim("model").attempt == 2
    left = jobs.requeue("a")
    assert left.status == FAILED and left.error["code"] == "worker_died" and left.ended


def test_a_job_that_was_not_begun_after_all(jobs):
    jobs.add("model", {}, name="a")
    for _ in range(3):
        assert jobs.claim("model").attempt == 1 and jobs.release("a").attempt == 0
    assert jobs.release("a") is None


def test_a_key_is_one_job(jobs):
    first, new = jobs.add("model", {"n": 1}, owner="me", key="k")
    again, second = jobs.add("model", {"n": 2}, owner="me", key="k")
    assert new and not second and again == first
    assert jobs.add("model", {}, owner="you", key="k")[1] and jobs.add("other", {}, owner="me", key="k")[1]
    assert jobs.add("model", {})[1] and jobs.add("model", {})[1]


def test_another_front_goes_on(tmp_path):
    """Jobs in progress wait again; the others are as they were."""
    one = JobStore(tmp_path / "jobs.sqlite")
    for name in ("done", "running", "twice", "waiting"):
        one.add("model", {}, name=name)
    one.claim("model")
    one.complete("done", {"files": []})
    one.claim("model")
    one.claim("model")
    one.requeue("twice")
    assert one.claim("model").id == "twice"
    # The first front has ended without a word.
    two = JobStore(tmp_path / "jobs.sqlite")
    assert {job.id: job.status for job in two.recover("model")} == {"running": QUEUED, "twice": FAILED}
    assert two.get("done").status == COMPLETED and two.claim("model").id == "running"
    assert two.claim("model").id == "waiting"
    one.close()
    two.close()


def test_threads_claim_each_job_once(jobs):
    for number in range(60):
        jobs.add("model", {}, name=str(number))
    claimed: list[str] = []

    def claim():
        while (job := jobs.claim("model")) is not None:
            claimed.append(job.id)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, claimed)) == list(range(60))
