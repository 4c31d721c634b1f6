"""What a rank does in tests of attention over a divided sequence."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffusers_accel.core.comm import shares
from diffusers_accel.core.mesh import Mesh, begin
from diffusers_accel.core.windows import Windows
from diffusers_accel.kernels.attention import KERNELS, Inputs, Layout, Operand, Shipping, Transport
from diffusers_accel.kernels.attention.shipping import KEY, QUERY, VALUE

from .shared import SharedFiles


def attend(sizes, query, key, value, mask, streams, shared, local_mask, windows=False, rounded=False):
    """This rank's rows of attention, as the places they have in the whole and the values.

    Args:
        sizes: Of the mesh.
        query: Whole, as are the next two: (batch, sequence, heads, head_dim), keys that all have in front.
        key: See there.
        value: See there.
        mask: Over whole sequences, streams one after another, or `None`.
        streams: Lengths of the query's streams, and of the key's.
        shared: How many keys all have.
        local_mask: Whether a rank is given the mask of its own keys alone.
        windows: Whether everything is exchanged through shared memory.
        rounded: Whether they travel in 8 bits.
    """
    begin("cpu")
    mesh = Mesh(sizes, "cpu")
    everyone = mesh.sequence()
    groups = [mesh.group(axis) for axis in ("ulysses", "ring", "column", "row")]
    transport = Transport(everyone, *groups, rounded=rounded)
    if windows:
        for group in groups:
            group.windows = Windows(group, SharedFiles) if group.size > 1 else None

    rows, columns = _own(streams[0], everyone), _own(streams[1], everyone)
    kept = torch.cat([torch.arange(shared), columns + shared])
    if mask is not None and local_mask:
        mask = mask[..., columns]
    layout = Layout(tuple(streams[0]), tuple(streams[1]), shared)
    inputs = Inputs(query[:, rows], key[:, kept], value[:, kept], mask)
    kernel = KERNELS.get("sdpa").load()
    if not windows:
        return rows, transport.attend(inputs, layout, kernel)
    # As often as windows come round, one shape after another; the first results are read at the end.
    found = []
    for sign in (1, -1, 1, -1):
        found.append(transport.attend(replace(inputs, query=inputs.query * sign), layout, kernel))
        assert not any(group.windows._turn for group in groups if group.windows), "graphs begin with the first"
    return rows, found[2]


def shipped(sizes, query, key, value, mask, streams, weights, tables, aside, together):
    """The same with query, key and value sent off before norm and rotation, in two parts along the sequence, those at
    once that are `together`."""
    begin("cpu")
    mesh = Mesh(sizes, "cpu")
    everyone, ulysses = mesh.sequence(), mesh.group("ulysses")
    ulysses.windows = Windows(ulysses, SharedFiles)
    others = [mesh.group(axis) for axis in ("ring", "column", "row")]
    transport = Transport(everyone, ulysses, *others, Shipping(ulysses))
    rows, layout = _own(streams, everyone), Layout(tuple(streams), tuple(streams))
    heads = query.shape[2], key.shape[2]

    def operand(x, weight=None):
        parts = x[:, rows].split([3, len(rows) - 3], 1)
        if weight is None:
            return Operand((x[:, rows],))
        cos, sin = (table[:, rows].split([3, len(rows) - 3], 1) for table in tables)
        return Operand(parts, [weight, weight], 1e-6, list(zip(cos, sin, strict=True)))

    assert transport.ships(heads)
    for sign in (-1, 1):
        operands = {VALUE: operand(value * sign), QUERY: operand(query, weights[0]), KEY: operand(key, weights[1])}
        for some in together:
            transport.ship({which: operands[which] for which in some}, heads, layout, aside)
        found = transport.arrived(heads[0], layout, mask, None, KERNELS.get("sdpa").load())
    return rows, found


def _own(lengths, group):
    """The tokens that a rank has, of streams of these lengths."""
    found, start = [], 0
    for length in lengths:
        counts = shares(length, group.size)
        begins = start + sum(counts[: group.rank])
        found += range(begins, begins + counts[group.rank])
        start += length
    return torch.tensor(found, dtype=torch.long)
