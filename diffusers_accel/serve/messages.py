"""Messages between the front and a rank: JSON objects over a pipe of this machine. Nothing is pickled, so that no value
of a request becomes code, and the front needs no torch to read an answer."""

from __future__ import annotations

import json
from typing import Any

# To a rank.
RUN, CANCEL = "run", "cancel"
# From a rank.
READY, STEP, DONE, FAILED = "ready", "step", "done", "failed"


def send(pipe: Any, kind: str, **values: Any) -> None:
    """Sends a message.

    Args:
        pipe: A `multiprocessing` connection.
        kind: The kind of the message.
        values: Plain values.

    Raises:
        OSError: The other side is gone.
        TypeError: A value is not plain.
    """
    pipe.send_bytes(json.dumps({"kind": kind, **values}).encode())


def receive(pipe: Any) -> dict[str, Any]:
    """The next message; waits for it.

    Raises:
        EOFError: The other side is gone.
    """
    found: dict[str, Any] = json.loads(pipe.recv_bytes())
    return found
