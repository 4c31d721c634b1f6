"""Serving: any stock pipeline behind a queue of jobs, in processes that are watched.

The front process has no torch and touches no GPU. It holds the jobs, and for each replica of a model a group of ranks,
which it starts, watches and starts again. The files:

- `jobs.py`: the jobs in SQLite, which the front alone writes.
- `messages.py`: what the front and a rank say to each other, as JSON over a pipe.
- `replica.py`: the ranks of one replica, seen from the front.
- `worker.py`: a rank: loads a pipeline, accelerates it, and computes one job after the other.
- `engine.py`: the queue, its replicas, and the Python interface. `generation.py`: a job as the caller holds it.
"""

from __future__ import annotations

from .engine import Engine
from .generation import Generation, JobCancelled, JobFailed, Result

__all__ = ["Engine", "Generation", "JobCancelled", "JobFailed", "Result"]
