"""QK-norm, rotation and attention as one operator, `fused_qk_norm_rope_attention`.

From attention the rewrite walks back over query and key: over views, a rotation and an RMS norm, also through a
concatenation of parts (e.g. text and image). Where query and key differ in these operations, nothing is rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph

from ....kernels.attention import apply_rope, fused_qk_norm_rope_attention  # noqa: F401 - registers the operators
from . import graph as graphs
from .graph import arguments, fits, is_call, is_method, put, value


@dataclass(frozen=True)
class _Part:
    """A part of query or key along the sequence, before norm and rotation.

    Attributes:
        source: The node before both.
        heads_first: Whether the source has heads before the sequence.
        norm: Weight and epsilon of the norm; `None` without one.
        tables: Cosines, sines, and whether both have heads before the sequence; `None` without a rotation.
        rope_style: `"interleaved"` or `"half"`, as `Rotary` describes it.
    """

    source: Any
    heads_first: bool = False
    norm: tuple[Any, float] | None = None
    tables: tuple[Any, Any, bool] | None = None
    rope_style: str = "interleaved"


@dataclass
class _Operand:
    """Query or key.

    Attributes:
        parts: Its parts along the sequence.
        whole: Whether one rotation is over all parts together; the first part then has its tables.
    """

    parts: list[_Part] = field(default_factory=list)
    whole: bool = False


def rewrite(graph: Graph) -> None:
    """Rewrites a graph in place."""
    changed = graphs.written(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.diffusers_accel.attention.default):
        _fuse(graph, node, changed)


def _fuse(graph: Graph, node: Any, changed: set[Any]) -> None:
    query, key, value_, mask, causal, scale, dispatcher = node.args
    operands = [_operand(item) for item in (query, key)]
    if any(item is None or not item.parts for item in operands):
        return
    one, other = operands
    assert one is not None and other is not None
    parts = [*one.parts, *other.parts]
    whole = value(query)
    # Parts with different norms or rotations, or with neither, stay as they are.
    if len(one.parts) != len(other.parts) or one.whole != other.whole or whole is None or not fits(query):
        return
    if len({item.norm is None for item in parts}) > 1 or len({item.norm[1] for item in parts if item.norm}) > 1:
        return
    rotated = [item.tables is not None for item in parts]
    if one.whole:
        rotated = [one.parts[0].tables is not None, other.parts[0].tables is not None]
    if len(set(rotated)) > 1 or len({item.rope_style for item in parts}) > 1:
        return
    if parts[0].norm is None and not rotated[0]:
        return
    if any(graphs.root(part.source) in changed for part in parts):
        return
    dim, heads = whole.shape[-1], [whole.shape[2], value(key).shape[2]]
    if dim % 8 or dim > 256 or not all(isinstance(count, int) for count in heads):
        return
    for operand, count in zip((one, other), heads, strict=True):
        for part in operand.parts:
            if part.norm is not None and value(part.norm[0]).numel() not in (dim, count * dim):
                return
    sources, tables = [], []
    for operand, count in zip((one, other), heads, strict=True):
        sources.append([_by_token(graph, node, part.source, part.heads_first, count) for part in operand.parts])
        tables.append(
            [
                _by_token(graph, node, table, part.tables[2], count)
                for part in operand.parts
                if part.tables is not None
                for table in part.tables[:2]
            ]
        )
    if any(item is None for item in [*sources[0], *sources[1], *tables[0], *tables[1]]):
        return
    norms = [part.norm[0] for part in parts if part.norm is not None]
    eps = parts[0].norm[1] if parts[0].norm is not None else 0.0
    args = (*sources, value_, norms, eps, *tables, parts[0].rope_style, mask, causal, scale, dispatcher)
    made = put(graph, node, torch.ops.diffusers_accel.fused_qk_norm_rope_attention.default, args, node)
    graphs.replace(node, made)


def _by_token(graph: Graph, before: Any, node: Any, heads_first: bool, heads: int) -> Any:
    """A node's tensor as (batch, sequence, heads, channels); `None` for a node without one."""
    found = value(node)
    if found is None:
        return None
    if found.ndim == 3:
        return graphs.view(graph, before, node, "unflatten", 2, (heads, -1))
    return graphs.view(graph, before, node, "transpose", 1, 2) if heads_first else node


def _operand(node: Any) -> _Operand | None:
    """The parts of a query or key, traced back from attention; `None` if it has neither norm nor rotation."""
    part = _trace_back(_Part(node))
    if not _is_cat(part.source) or part.norm is not None:
        return None if part.source is node else _Operand([part])
    nodes, dim = arguments(part.source, "tensors", "dim", dim=0)
    if dim not in ((2, -2) if part.heads_first else (1, -3)) or value(part.source).ndim != 4:
        return None
    inner = [_trace_back(_Part(item, part.heads_first)) for item in nodes]
    if part.tables is None:
        return _Operand(inner)
    if any(item.tables is not None for item in inner):
        return None
    inner = [replace(item, rope_style=part.rope_style) for item in inner]
    return _Operand([replace(inner[0], tables=part.tables), *inner[1:]], whole=True)


def _is_cat(node: Any) -> bool:
    return is_call(node, torch.cat)


def _trace_back(part: _Part) -> _Part:
    """A part traced back over views, one rotation and one norm."""
    while True:
        node = part.source
        if is_method(node, "transpose", "swapaxes") and set(node.args[1:]) in ({1, 2}, {-3, -2}):
            if value(node).ndim != 4:
                return part
            part = replace(part, source=node.args[0], heads_first=not part.heads_first)
        elif _splits_heads(node):
            part = replace(part, source=node.args[0])
        elif is_call(node, torch.ops.diffusers_accel.apply_rope.default) and part.tables is None and part.norm is None:
            x, cos, sin, rope_style, _ = node.args
            part = replace(part, source=x, tables=(cos, sin, part.heads_first), rope_style=rope_style)
        elif is_call(node, torch.rms_norm) and part.norm is None:
            x, shape, weight, eps = arguments(node, "input", "normalized_shape", "weight", "eps")
            if weight is None or eps is None or len(shape) != 1:
                return part
            return _before_transposes(replace(part, source=x, norm=(weight, eps)))
        else:
            return _before_transposes(part) if part.tables is not None else part


def _before_transposes(part: _Part) -> _Part:
    """A part traced back over the transposes of heads and sequence before its norm and rotation."""
    while is_method(part.source, "transpose", "swapaxes") and value(part.source).ndim == 4:
        if set(part.source.args[1:]) not in ({1, 2}, {-3, -2}):
            break
        part = replace(part, source=part.source.args[0], heads_first=not part.heads_first)
    return part


def _splits_heads(node: Any) -> bool:
    """Whether a view splits the last of three dimensions into heads and channels, and does nothing else."""
    if not is_method(node, "unflatten", "view", "reshape"):
        return False
    found, before = value(node), value(node.args[0])
    return (
        found is not None and before is not None and found.ndim == 4 and before.ndim == 3
        and found.shape[:2] == before.shape[:2]
    )  # fmt: skip
