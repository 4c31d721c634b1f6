"""Functions that workers of `launch` import."""

from __future__ import annotations

import itertools
import os

from tiny import build


def tiny(name="wan", fails=None, after=0):
    """A tiny pipeline; rank 1's raises or dies, if asked for, when it has been called so often and is once more."""
    pipe = build(name)
    if fails is not None and os.environ["RANK"] == "1":
        inner = pipe.encode_prompt

        calls = itertools.count()

        def encode_prompt(*args, **kwargs):
            if next(calls) >= after:
                if fails == "dies":
                    os._exit(7)
                raise ValueError("this rank has had enough")
            return inner(*args, **kwargs)

        pipe.encode_prompt = encode_prompt
    return pipe
