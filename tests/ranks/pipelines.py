"""What workers of `launch` are made with: functions that they can import."""

from __future__ import annotations

import os

from tiny import build


def tiny(name="wan", fails=None):
    """A tiny pipeline; rank 1's raises or dies when it is called, if asked for."""
    pipe = build(name)
    if fails is not None and os.environ["RANK"] == "1":
        inner = pipe.encode_prompt

        def encode_prompt(*args, **kwargs):
            if fails == "raises":
                raise ValueError("this rank has had enough")
            if fails == "dies":
                os._exit(7)
            return inner(*args, **kwargs)

        pipe.encode_prompt = encode_prompt
    return pipe
