"""Stock pipelines that workers load: small, and slow or fragile where a test wants time or a death."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from tiny import build


def flux(seconds: float = 0.0):
    """A pipeline whose denoiser takes so many seconds a call."""
    torch.set_num_threads(1)
    pipe = build("flux")
    pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return pipe


def from_pictures():
    return build("flux-img2img")


def wan():
    return build("wan")


def fragile(folder: str):
    """A pipeline whose process kills itself at a denoiser call, and takes a file of the folder with it."""
    pipe = flux(0.05)

    def die(*_):
        for file in sorted(Path(folder).glob("die*"))[:1]:
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    pipe.transformer.register_forward_pre_hook(die)
    return pipe


def broken():
    raise OSError("no such weights")
