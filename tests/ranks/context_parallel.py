"""Functions that ranks run in tests of attention over a sharded sequence."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffusers_accel.core.comm import shard_sizes
from diffusers_accel.core.mesh import Mesh, init_process_group
from diffusers_accel.core.symm_mem import SymmetricMemory
from diffusers_accel.kernels.attention import (
    KERNELS,
    ContextParallelAttention,
    Inputs,
    Layout,
    Operand,
    UlyssesAllToAll,
)
from diffusers_accel.kernels.attention.ulysses import KEY, QUERY, VALUE

from .shared_memory import SharedFiles


def attend(sizes, query, key, value, mask, streams, replicated, local_mask, symm_mem=False, fp8=False):
    """This rank's rows of attention, as the places they have in the whole and the values.

    Args:
        sizes: Of the mesh.
        query: The whole query, (batch, sequence, heads, head_dim).
        key: The whole key, (batch, sequence, heads, head_dim), replicated keys first.
        value: The whole value, (batch, sequence, heads, head_dim), replicated keys first.
        mask: Over whole sequences, streams one after another, or `None`.
        streams: Lengths of the query's streams, and of the key's.
        replicated: How many keys all have.
        local_mask: Whether a rank is given the mask of its own keys alone.
        symm_mem: Whether everything is exchanged through shared memory.
        fp8: Whether they travel in 8 bits.
    """
    init_process_group("cpu")
    mesh = Mesh(sizes, "cpu")
    sequence = mesh.sequence()
    groups = [mesh.group(axis) for axis in ("ulysses", "ring", "column", "row")]
    context_parallel = ContextParallelAttention(sequence, *groups, fp8=fp8)
    if symm_mem:
        for group in groups:
            group.symm_mem = SymmetricMemory(group, SharedFiles) if group.size > 1 else None

    rows, columns = _own(streams[0], sequence), _own(streams[1], sequence)
    kept = torch.cat([torch.arange(replicated), columns + replicated])
    if mask is not None and local_mask:
        mask = mask[..., columns]
    layout = Layout(tuple(streams[0]), tuple(streams[1]), replicated)
    inputs = Inputs(query[:, rows], key[:, kept], value[:, kept], mask)
    kernel = KERNELS.get("sdpa").load()
    if not symm_mem:
        return rows, context_parallel.attend(inputs, layout, kernel)
    # As often as symm_mem come round, one shape after another; the first results are read at the end.
    found = []
    for sign in (1, -1, 1, -1):
        found.append(context_parallel.attend(replace(inputs, query=inputs.query * sign), layout, kernel))
        assert not any(group.symm_mem._next for group in groups if group.symm_mem), "graphs begin with the first"
    return rows, found[2]


def sent(sizes, query, key, value, mask, streams, weights, tables, async_op, together):
    """The same with query, key and value sent off before norm and rotation, in two parts along the sequence, those at
    once that are `together`."""
    init_process_group("cpu")
    mesh = Mesh(sizes, "cpu")
    sequence, ulysses = mesh.sequence(), mesh.group("ulysses")
    ulysses.symm_mem = SymmetricMemory(ulysses, SharedFiles)
    others = [mesh.group(axis) for axis in ("ring", "column", "row")]
    context_parallel = ContextParallelAttention(sequence, ulysses, *others, UlyssesAllToAll(ulysses))
    rows, layout = _own(streams, sequence), Layout(tuple(streams), tuple(streams))
    heads = query.shape[2], key.shape[2]

    def operand(x, weight=None):
        parts = x[:, rows].split([3, len(rows) - 3], 1)
        if weight is None:
            return Operand((x[:, rows],))
        cos, sin = (table[:, rows].split([3, len(rows) - 3], 1) for table in tables)
        return Operand(parts, [weight, weight], 1e-6, list(zip(cos, sin, strict=True)))

    assert context_parallel.can_send(heads)
    for sign in (-1, 1):
        operands = {VALUE: operand(value * sign), QUERY: operand(query, weights[0]), KEY: operand(key, weights[1])}
        for some in together:
            context_parallel.send({which: operands[which] for which in some}, heads, layout, async_op)
        found = context_parallel.wait_and_attend(heads[0], layout, mask, None, KERNELS.get("sdpa").load())
    return rows, found


def _own(lengths, group):
    """The tokens that a rank has, of streams of these lengths."""
    found, start = [], 0
    for length in lengths:
        counts = shard_sizes(length, group.size)
        begins = start + sum(counts[: group.rank])
        found += range(begins, begins + counts[group.rank])
        start += length
    return torch.tensor(found, dtype=torch.long)
