"""What a rank does in tests of whole requests."""

from __future__ import annotations

import functools
import warnings

import torch
from exact import relative
from tape import TapeRecorder
from tiny import TINY, build, same, tensors

from diffusers_accel import accelerate, explain, register_attention, restore, stats
from diffusers_accel.core.graphs import RECORDERS
from diffusers_accel.kernels.attention import KERNELS

# Of stock pipelines, and of one rank: found once for all ways to divide the same request.
_EXPECTED = {}


@functools.lru_cache(maxsize=4)
def _pipeline(name):
    """A pipeline, built once for all requests in a row: each leaves it restored."""
    return build(name)


def request(name, configuration, steps=2, calls=None, recorded=False):
    """How far a tiny pipeline's outputs under a configuration are from those in this process alone, in relative terms,
    and what `stats` says.

    Args:
        name: The pipeline.
        configuration: Sections. What loses nothing is compared with stock, the rest with itself on one rank.
        steps: Of the request.
        calls: Other arguments of the call.
        recorded: Whether graphs are recorded by a stand-in for CUDA's.
    """
    if recorded:
        RECORDERS["cpu"] = TapeRecorder
    pipe, entry, calls = _pipeline(name), TINY[name], calls or {}
    alone = {**configuration, "parallel": None} if {"cache", "linear"} & set(configuration) else {}
    key = repr((name, steps, calls, alone))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if key not in _EXPECTED:
            if alone:
                accelerate(pipe, **alone)
            _EXPECTED[key] = [item.clone() for item in tensors(entry.run(pipe, steps=steps, **calls))]
            if alone:
                restore(pipe)
        expected = _EXPECTED[key]
        accelerate(pipe, **configuration)
        out = tensors(entry.run(pipe, steps=steps, **calls))
        seen = stats(pipe)
        restore(pipe)
    errors = [relative(one, other) for one, other in zip(out, expected, strict=True)]
    return max(errors), seen.branches, seen.attention_kernels, seen.graph_replays


def twice(name, configuration, steps=2):
    """Whether a pipeline gives the same before `accelerate` and after `restore`, and two equal requests under it."""
    pipe, entry = build(name), TINY[name]
    before = entry.run(pipe, steps=steps)
    accelerate(pipe, **configuration)
    one, two = entry.run(pipe, steps=steps), entry.run(pipe, steps=steps)
    restore(pipe)
    return same(before, entry.run(pipe, steps=steps)), same(one, two)


def refusal(name, configuration, offloaded=False):
    """What `accelerate` raises, and whether the pipeline is stock afterwards. There is an attention kernel `plain`."""
    if "plain" not in KERNELS:
        register_attention("plain", lambda query, key, value, **_: query)
    pipe = build(name)
    if offloaded:
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    forward = vars(pipe.transformer).get("forward")
    try:
        accelerate(pipe, **configuration)
    except Exception as error:
        return type(error).__name__, str(error), vars(pipe.transformer).get("forward") is forward
    restore(pipe)
    return None


def explained(name, configuration):
    return str(explain(build(name), **configuration))


def without_generator(name, configuration):
    """Requests of ranks whose own random numbers differ, without a generator; and rank 0's of one process."""
    torch.manual_seed(100 + torch.distributed.get_rank() if torch.distributed.is_initialized() else 100)
    pipe, entry = build(name), TINY[name]
    accelerate(pipe, **configuration)
    out = tensors(entry.run(pipe, steps=2, generator=None))
    restore(pipe)
    return [item.clone() for item in out]


def different(name, configuration):
    """Ranks that were given different seeds."""
    pipe, entry = build(name), TINY[name]
    accelerate(pipe, **configuration)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    try:
        entry.run(pipe, steps=2, generator=generator)
    except Exception as error:
        return type(error).__name__, str(error)
    return None
