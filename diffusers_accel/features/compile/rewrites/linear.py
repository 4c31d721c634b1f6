"""Rewrites around 16-bit products: what their epilogue can do, and operands that need not be laid side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph

from ....kernels.linear import epilogue  # noqa: F401 - registers the operators
from .graph import arguments, fits, is_call, put, replace, value

LINEAR, GELU = torch._C._nn.linear, torch._C._nn.gelu


def rewrite(graph: Graph) -> None:
    """Rewrites a graph in place."""
    for node in graph.find_nodes(op="call_function", target=GELU):
        _activated(graph, node)
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        _of_parts(graph, node)


def _activated(graph: Graph, node: Any) -> None:
    """gelu(linear(x)) in one."""
    source, approximate = arguments(node, "input", "approximate")
    if approximate != "tanh" or not is_call(source, LINEAR) or len(source.users) > 1 or not _fits(source):
        return
    x, weight, bias = arguments(source, "input", "weight", "bias")
    if bias is not None and value(weight) is not None:
        replace(node, put(graph, node, torch.ops.diffusers_accel.linear_gelu.default, (x, weight, bias), node))


def _of_parts(graph: Graph, node: Any) -> None:
    """linear(cat(a, b)) as two products."""
    x, weight, bias = arguments(node, "input", "weight", "bias")
    if not is_call(x, torch.cat) or len(x.users) > 1 or not _fits(node):
        return
    parts, dim = arguments(x, "tensors", "dim", dim=0)
    whole = value(x)
    if len(parts) < 2 or whole is None or value(weight) is None or dim not in (-1, whole.ndim - 1):
        return
    made = put(graph, node, torch.ops.diffusers_accel.linear_of_parts.default, (list(parts), weight, bias), node)
    replace(node, made)


def _fits(node: Any) -> bool:
    """Of 16 bits: float32 is for tests alone, on the CPU."""
    found = value(node)
    return fits(node) and found is not None and (found.itemsize == 2 or not found.is_cuda)
