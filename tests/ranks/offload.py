"""Functions that ranks run in tests of offloading."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from offloading import on_cpu
from tiny import TINY, tensors

from diffusers_accel import accelerate, restore, stats

from .fsdp import same_state, state
from .requests import _pipeline, refusal

# Of stock pipelines: found once for all ways to divide the same request.
_STOCK = {}


@contextmanager
def offloading():
    """A context in which this rank streams weights on the CPU."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, on_cpu(patch):
        warnings.simplefilter("ignore")
        yield


def streamed(name, configuration, steps=2, offload=3):
    """A pipeline under a configuration, with weights that are streamed and without.

    Returns:
        Whether each of two requests with streamed weights is the one without, bit for bit; the bytes that each has
        copied; the number of skipped calls; and whether the pipeline is stock after `restore`, bit for bit.
    """
    pipe, entry = _pipeline(name, None, False), TINY[name]
    with offloading():
        if (name, steps) not in _STOCK:
            _STOCK[name, steps] = [item.clone() for item in tensors(entry.run(pipe, steps=steps))]
        # Stock code has left attributes behind by now.
        before = state(pipe)
        accelerate(pipe, **configuration)
        resident = tensors(entry.run(pipe, steps=steps))
        accelerate(pipe, **configuration, offload=offload)
        same, copied = [], []
        for _ in range(2):  # the second request finds blocks in the slots
            out = tensors(entry.run(pipe, steps=steps))
            same.append(all(map(torch.equal, out, resident)))
            copied.append(stats(pipe).offload["bytes"])
        skipped = sum(branch["skipped"] for branch in stats(pipe).branches.values())
        restore(pipe)
        restored = same_state(before, state(pipe))
        again = tensors(entry.run(pipe, steps=steps))
    return same, copied, skipped, restored and all(map(torch.equal, again, _STOCK[name, steps]))


def refused(name, configuration):
    """See `requests.refusal`."""
    with offloading():
        return refusal(name, configuration)
