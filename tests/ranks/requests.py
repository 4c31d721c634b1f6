"""Functions that ranks run in tests of whole requests."""

from __future__ import annotations

import functools
import warnings

import torch
from exact import relative
from tape import TapeBackend
from tiny import TINY, build, same, tensors
from tiny.heads import with_heads

from diffusers_accel import accelerate, demo, explain, register_attention, restore, stats
from diffusers_accel.core import symm_collectives, symm_mem
from diffusers_accel.core.graphs import GRAPH_BACKENDS
from diffusers_accel.core.symm_mem import ALLOCATORS
from diffusers_accel.features.parallel import cfg_parallel
from diffusers_accel.kernels.attention import KERNELS

from .shared_memory import SharedFiles

# Of stock pipelines, and of one rank: found once for all ways to divide the same request.
_EXPECTED = {}


@functools.lru_cache(maxsize=32)
def _pipeline(name, heads, double):
    """A pipeline, built once for the requests of all tests: each leaves it restored."""
    pipe = with_heads(name, heads)
    return pipe.to(torch.float64) if double else pipe


def offload(pipe, kind):
    """Has models wait elsewhere for their turn; the host stands in for both places."""
    host = torch.device("cpu")
    if kind == "models":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.transformer.enable_group_offload(host, host, offload_type=kind, **options)


def offloaded_request(name, configuration, kind, ours_first):
    """How far outputs with offloading are from stock ones without, in two requests, and in one after `restore`."""
    pipe, entry = build(name), TINY[name]
    expected = tensors(entry.run(pipe, steps=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not ours_first:
            offload(pipe, kind)
        accelerate(pipe, **configuration)
        if ours_first:
            offload(pipe, kind)
        outs = [tensors(entry.run(pipe, steps=2)) for _ in range(2)]
        restore(pipe)
        outs.append(tensors(entry.run(pipe, steps=2)))
    return [max(relative(one, other) for one, other in zip(out, expected, strict=True)) for out in outs]


def request(name, configuration, steps=2, calls=None, recorded=False, heads=None, symm_memory=False, double=False):
    """How far a tiny pipeline's outputs under a configuration are from those in this process alone, in relative terms,
    and what `stats` says.

    Args:
        name: The pipeline.
        configuration: Sections. Lossless ones are compared with stock, others with the same on one rank.
        steps: Of the request.
        calls: Other arguments of the call.
        recorded: Whether graphs are recorded by a stand-in for CUDA's.
        symm_memory: Whether heads are exchanged through shared memory.
        heads: How many the denoisers have, if not as many as usual.
        double: Whether all is in float64, so that sums in another order do not move what is rounded to 8 bits.
    """
    if symm_memory:
        ALLOCATORS["cpu"] = SharedFiles
        summed, symm_collectives.ALL_REDUCE_MIN_BYTES = symm_collectives.ALL_REDUCE_MIN_BYTES, 0
        try:
            sharding = {**configuration["parallel"], "comm": "symm_mem"}
            return request(name, {**configuration, "parallel": sharding}, steps, calls, recorded, heads, double=double)
        finally:
            del ALLOCATORS["cpu"]
            symm_collectives.ALL_REDUCE_MIN_BYTES = summed
    if recorded:
        GRAPH_BACKENDS["cpu"] = TapeBackend
    pipe, entry, calls = _pipeline(name, heads, double), TINY[name], calls or {}
    alone = {**configuration, "parallel": None} if {"cache", "linear"} & set(configuration) else {}
    key = repr((name, heads, double, steps, calls, alone))
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


def broken_off(name, way):
    """How far a request is from stock after one that an error ended in an exchange, on the last rank after it had taken
    a window."""
    pipe, entry, calls = _pipeline(name, None, False), TINY[name], 0
    expected = tensors(entry.run(pipe, steps=2))
    stock = symm_mem.SymmetricMemory.next_buffer

    def next_buffer(self, nbytes):
        nonlocal calls
        calls += 1
        if calls == 4 and self._group.rank < self._group.size - 1:
            raise ValueError("no more")
        window = stock(self, nbytes)
        if calls == 4:
            raise ValueError("no more")
        return window

    ALLOCATORS["cpu"] = SharedFiles
    try:
        accelerate(pipe, attention="sdpa", parallel={**way, "comm": "symm_mem"})
        symm_mem.SymmetricMemory.next_buffer = next_buffer
        try:
            entry.run(pipe, steps=2)
        except ValueError as error:
            broken = str(error)
        finally:
            symm_mem.SymmetricMemory.next_buffer = stock
        out = tensors(entry.run(pipe, steps=2))
    finally:
        del ALLOCATORS["cpu"]
        restore(pipe)
    return broken, max(relative(one, other) for one, other in zip(out, expected, strict=True))


def overlapped(name, fuse):
    """A request whose exchanges are rewritten to go on beside products, through shared memory: what `request` returns,
    and the operators of attention in each graph, in their order, with `*` for a product."""
    from diffusers_accel.features import context
    from diffusers_accel.features.compile import rewrites
    from diffusers_accel.features.compile.rewrites import overlap

    graphs = []

    def backend(module, inputs, **_):
        graphs.append(
            [
                "*" if overlap._is_product(node) else node.target.__name__.split(".")[0]
                for node in module.graph.nodes
                if overlap._is_product(node) or overlap._is_attention(node)
            ]
        )
        return module.forward

    before = rewrites.graph.KINDS, context.REWRITTEN_ON, overlap._WORTH
    rewrites.graph.KINDS, context.REWRITTEN_ON, overlap._WORTH = [("cpu", torch.float32)], ("cpu",), 0
    torch._dynamo.register_backend(backend, name="watched")
    torch.compiler.reset()
    try:
        compiled = {"backend": "watched", "rewrites": True}
        sections = {"compile": compiled, "parallel": {"ulysses": 2}, "attention": "sdpa", "fuse": fuse}
        found = request(name, sections, symm_memory=True)
    finally:
        rewrites.graph.KINDS, context.REWRITTEN_ON, overlap._WORTH = before
        torch._dynamo.backends.registry._COMPILER_FNS.pop("watched")
        rewrites.rewritten.cache_clear()
        torch.compiler.reset()
    return found, graphs


def rounds(name, configuration):
    """Three requests, the third one of one step and without guidance: how many calls each exchange of branches was for,
    and how far outputs are from stock."""
    pipe, entry, found = build(name), TINY[name], []
    calls = [{"steps": 3}, {"steps": 3}, {"steps": 1, "guidance_scale": 1.0}]
    expected = [tensors(entry.run(pipe, **call)) for call in calls]
    resolve = cfg_parallel.CFGParallel._resolve

    def counted(self, call):
        if not call.found:
            found[-1].append(len(self._open) if call in self._open else 1)
        return resolve(self, call)

    cfg_parallel.CFGParallel._resolve = counted
    errors = []
    try:
        accelerate(pipe, **configuration)
        for call, stock in zip(calls, expected, strict=True):
            found.append([])
            out = tensors(entry.run(pipe, **call))
            errors.append(max(relative(one, other) for one, other in zip(out, stock, strict=True)))
        restore(pipe)
    finally:
        cfg_parallel.CFGParallel._resolve = resolve
    return found, errors


@functools.lru_cache(maxsize=1)
def _checkpoint(name):
    """A shipped checkpoint, loaded once for all requests in a row, and what it makes in this process alone."""
    pipe = demo.load(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe, _made(pipe, name)


def _made(pipe, name):
    record = demo.CHECKPOINTS[name]
    arguments = {**record.arguments, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    if record.kind == "video":
        arguments["num_frames"] = 5
    out = pipe(record.captions[0], output_type="pt", **arguments)
    return out.images if record.kind == "image" else out.frames


def checkpoint(name, configuration):
    """How far the picture or video of a shipped checkpoint, in float32, is from stock; and whether it is the same bit
    for bit after `restore`."""
    pipe, expected = _checkpoint(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate(pipe, **configuration)
        out = _made(pipe, name)
        restore(pipe)
    return relative(out, expected), torch.equal(_made(pipe, name), expected)


def twice(name, configuration, steps=2):
    """Whether a pipeline gives the same before `accelerate` and after `restore`, and two equal requests under it."""
    pipe, entry = build(name), TINY[name]
    before = entry.run(pipe, steps=steps)
    accelerate(pipe, **configuration)
    one, two = entry.run(pipe, steps=steps), entry.run(pipe, steps=steps)
    restore(pipe)
    return same(before, entry.run(pipe, steps=steps)), same(one, two)


def refusal(name, configuration, offloaded=False):
    """The error of `accelerate`, and whether the pipeline is stock afterwards. There is an attention kernel `plain`."""
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


def explained(name, configuration, gpus=False, heads=None):
    """The text of `explain`, on a machine with GPUs or without."""
    pipe = with_heads(name, heads)
    explain(pipe, **configuration)  # what is imported looks for GPUs too
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: gpus
    try:
        return str(explain(pipe, **configuration))
    finally:
        torch.cuda.is_available = available


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
