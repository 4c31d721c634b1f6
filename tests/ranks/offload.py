"""Functions that ranks run in tests of offloading."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager

import pytest
import torch
from offloading import on_cpu
from tiny import TINY, tensors

from diffusers_accel import accelerate, restore, stats
from diffusers_accel.features import offload as feature

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


@contextmanager
def plans():
    """A context with the memory plans that are made in it: of each `accelerate` one beforehand, and one of the weights
    that are there then."""
    found, plan = [], feature.plan_of

    def record(*args):
        found.append(plan(*args))
        return found[-1]

    feature.plan_of = record
    try:
        yield found
    finally:
        feature.plan_of = plan


def planned(name, configuration):
    """Bytes of a denoiser's blocks in the plan beforehand, in the plan of the weights that are there then, and in the
    slabs; and the bytes of activations in both plans."""
    pipe = _pipeline(name, None, False)
    with offloading(), plans() as found:
        accelerate(pipe, **configuration)
        stream = vars(pipe)["_diffusers_accel_session"].context.outputs.weight_stream
        held = sum(block.bytes for block in stream.blocks)
        restore(pipe)
    before, then = (sum(plan.model("transformer").sizes.blocks) for plan in found)
    return before, then, held, [plan.work.denoise for plan in found]


def encoded(name, budgets):
    """How an image pipeline's VAE encodes and decodes on ranks with unequal budgets, if all at once takes 50 MB and
    tiles take nothing."""
    pipe, entry = _pipeline(name, None, False), TINY[name]
    with offloading(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature.vae, "predicted_bytes", lambda *args, **_: 50_000_000 if args[3] == "whole" else 0)
        accelerate(pipe, parallel={"ulysses": 2}, offload=budgets[int(os.environ["RANK"])])
        entry.run(pipe, steps=2)
        found = stats(pipe).offload
        restore(pipe)
    return found["vae encode"], found["vae decode"]
