"""Jobs in SQLite: a row before a request is acknowledged, and after everything that ends it.

One process writes, the front. A row is on the disk before `add` and the functions that end a job return, so that
neither `kill -9` nor a loss of power loses a job that was acknowledged. Progress is not written: it is worth nothing
after a restart.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
# A job whose worker died runs once more.
ATTEMPTS = 2

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    owner TEXT NOT NULL,
    key TEXT,
    status TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    request TEXT NOT NULL,
    result TEXT,
    error TEXT,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    UNIQUE (model, owner, key)
);
CREATE INDEX IF NOT EXISTS waiting ON jobs (model, status, number);
"""


@dataclass(frozen=True)
class Job:
    """A job as its row says.

    Attributes:
        number: Its place in the order of arrival.
        id: Its name.
        model: The model's name.
        owner: Whose job it is; an empty text for the process itself.
        key: The caller's idempotency key, or `None`.
        status: `"queued"`, `"in_progress"`, `"completed"` or `"failed"`.
        attempt: How often it was begun.
        request: What is to be computed.
        result: What was made; `None` before it is.
        error: `code` and `message` of a failed job, else `None`.
        created_at: Unix time of its arrival, in seconds.
        started_at: Unix time of its last beginning, in seconds; `None` before.
        completed_at: Unix time of its end, in seconds; `None` before.
    """

    number: int
    id: str
    model: str
    owner: str
    key: str | None
    status: str
    attempt: int
    request: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: Mapping[str, str] | None
    created_at: float
    started_at: float | None
    completed_at: float | None

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in (COMPLETED, FAILED)


class JobStore:
    """The jobs of one front. Any of its threads may call it.

    Args:
        file: The database, made if it is missing.
    """

    def __init__(self, file: Path):
        self._lock = threading.Lock()
        self._database = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._database.row_factory = sqlite3.Row
        # FULL: a commit is on the disk, so that a job is, too, after a loss of power.
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 5000"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.executescript(_SCHEMA)

    def add(
        self,
        model: str,
        request: Mapping[str, Any],
        *,
        owner: str = "",
        key: str | None = None,
        name: str | None = None,
    ) -> tuple[Job, bool]:
        """A new job, which waits; or the job of the model that the owner has already added with the same key, ended or
        not.

        Args:
            model: The model's name.
            request: What is to be computed, plain values.
            owner: Whose job it is.
            key: An idempotency key; `None` for a new job in any case.
            name: The job's id; drawn if `None`.

        Returns:
            The job, and whether it is new.
        """
        values = (name or f"job_{uuid.uuid4().hex}", model, owner, key, QUEUED, json.dumps(request), time.time())
        with self._lock:
            found = self._database.execute(
                "INSERT INTO jobs (id, model, owner, key, status, attempt, request, created_at) "
                "VALUES (?, ?, ?, ?, ?, 0, ?, ?) ON CONFLICT (model, owner, key) DO NOTHING RETURNING *",
                values,
            ).fetchone()
            if found is not None:
                return _job(found), True
            query = "SELECT * FROM jobs WHERE model = ? AND owner = ? AND key = ?"
            return _job(self._database.execute(query, (model, owner, key)).fetchone()), False

    def claim(self, model: str) -> Job | None:
        """The oldest waiting job of a model, which is in progress from now on; `None` if none waits."""
        with self._lock:
            found = self._database.execute(
                "UPDATE jobs SET status = ?, attempt = attempt + 1, started_at = ? WHERE number = "
                "(SELECT number FROM jobs WHERE model = ? AND status = ? ORDER BY number LIMIT 1) RETURNING *",
                (IN_PROGRESS, time.time(), model, QUEUED),
            ).fetchone()
        return None if found is None else _job(found)

    def complete(self, name: str, result: Mapping[str, Any]) -> Job | None:
        """Ends a job that is in progress; `None` if it is not any more."""
        return self._end(name, COMPLETED, "result", result, (IN_PROGRESS,))

    def fail(self, name: str, code: str, message: str) -> Job | None:
        """Ends a job that waits or is in progress with an error; `None` if it has ended before."""
        return self._end(name, FAILED, "error", {"code": code, "message": message}, (QUEUED, IN_PROGRESS))

    def requeue(self, name: str) -> Job | None:
        """Lets a job whose worker has died wait again, at its old place; it fails after its last attempt. `None` if it
        was not in progress."""
        with self._lock:
            found = self._database.execute(
                "UPDATE jobs SET status = ?, started_at = NULL WHERE id = ? AND status = ? AND attempt < ? RETURNING *",
                (QUEUED, name, IN_PROGRESS, ATTEMPTS),
            ).fetchone()
        if found is not None:
            return _job(found)
        message = f"The worker died while it computed this job, {ATTEMPTS} times."
        return self._end(name, FAILED, "error", {"code": "worker_died", "message": message}, (IN_PROGRESS,))

    def release(self, name: str) -> Job | None:
        """Lets a job in progress wait again, as if it had not been begun; `None` if it was not in progress."""
        with self._lock:
            found = self._database.execute(
                "UPDATE jobs SET status = ?, started_at = NULL, attempt = attempt - 1 WHERE id = ? AND status = ? "
                "RETURNING *",
                (QUEUED, name, IN_PROGRESS),
            ).fetchone()
        return None if found is None else _job(found)

    def recover(self, model: str) -> list[Job]:
        """A model's jobs that another front has left in progress, after `requeue`. A front calls it as it starts."""
        query = "SELECT id FROM jobs WHERE model = ? AND status = ?"
        with self._lock:
            left = self._database.execute(query, (model, IN_PROGRESS)).fetchall()
        found = [self.requeue(row["id"]) for row in left]
        return [job for job in found if job is not None]

    def get(self, name: str) -> Job | None:
        """A job by its name; `None` if there is none."""
        with self._lock:
            found = self._database.execute("SELECT * FROM jobs WHERE id = ?", (name,)).fetchone()
        return None if found is None else _job(found)

    def waiting(self, model: str | None = None) -> int:
        """Number of jobs that wait, of one model or of all."""
        query, values = "SELECT count(*) FROM jobs WHERE status = ?", (QUEUED,)
        if model is not None:
            query, values = f"{query} AND model = ?", (QUEUED, model)  # type: ignore[assignment]
        with self._lock:
            return int(self._database.execute(query, values).fetchone()[0])

    def delete(self, name: str) -> None:
        """Forgets a job."""
        with self._lock:
            self._database.execute("DELETE FROM jobs WHERE id = ?", (name,))

    def close(self) -> None:
        """Closes the database."""
        with self._lock:
            self._database.close()

    def _end(
        self, name: str, status: str, column: str, value: Mapping[str, Any], before: tuple[str, ...]
    ) -> Job | None:  # fmt: skip
        places = ", ".join("?" * len(before))
        with self._lock:
            found = self._database.execute(
                f"UPDATE jobs SET status = ?, {column} = ?, completed_at = ? WHERE id = ? AND status IN ({places}) "
                "RETURNING *",
                (status, json.dumps(value), time.time(), name, *before),
            ).fetchone()
        return None if found is None else _job(found)


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    for name in ("request", "result", "error"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return Job(**values)
