"""Rewrites around products: what a 16-bit one's epilogue can do, operands that need not be laid side by side, and
products of a few rows, which are made for no matrix unit.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph

from ....kernels.linear import (  # noqa: F401 - registers the operators
    eight_bit,
    epilogue,
    narrow,
)
from .graph import arguments, fits, is_call, is_method, put, replace, root, value, written

LINEAR, GELU = torch._C._nn.linear, torch._C._nn.gelu
# Weights of fewer numbers cost no more than their launch, whatever multiplies them.
_LEAST = 1 << 20


def rewrite(graph: Graph) -> None:
    """Rewrites a graph in place."""
    changed = written(graph)

    def still(node: Any) -> bool:
        """Whether what a node reads, and what that is made of, stays what it was."""
        read = node.all_input_nodes
        return not any(
            root(each) in changed for each in (*read, *(one for item in read for one in item.all_input_nodes))
        )

    for node in filter(still, graph.find_nodes(op="call_function", target=GELU)):
        _activated(graph, node)
    for node in filter(still, graph.find_nodes(op="call_function", target=LINEAR)):
        if not _narrow(graph, node):
            _of_parts(graph, node)
    for target in (torch._scaled_mm, torch.ops.diffusers_accel.int8_product.default):
        for node in graph.find_nodes(op="call_function", target=target):
            _narrow_of_8_bits(graph, node, changed)


def _activated(graph: Graph, node: Any) -> None:
    """gelu(linear(x)) in one."""
    source, approximate = arguments(node, "input", "approximate")
    if approximate != "tanh" or not is_call(source, LINEAR) or len(source.users) > 1 or not _fits(source):
        return
    x, weight, bias = arguments(source, "input", "weight", "bias")
    if bias is not None and value(weight) is not None:
        replace(node, put(graph, node, torch.ops.diffusers_accel.linear_gelu.default, (x, weight, bias), node))


def _narrow(graph: Graph, node: Any) -> bool:
    """linear(silu(x)) of a few rows, or without the SiLU."""
    x, weight, bias = arguments(node, "input", "weight", "bias")
    if not _few(x) or not _fits(node) or not _large(weight) or value(weight).dtype != value(x).dtype:
        return False
    source, silu = _before_silu(x)
    replace(
        node,
        put(graph, node, torch.ops.diffusers_accel.narrow_linear.default, (source, weight, None, bias, silu), node),
    )
    return True


def _narrow_of_8_bits(graph: Graph, node: Any, changed: set[Any]) -> None:
    """The same of a weight of 8 bits with a scale per row: its activations need no rounding."""
    if is_call(node, torch._scaled_mm):
        data, weight, _, scale = node.args[:4]
        bias = node.kwargs.get("bias")
        if not is_method(weight, "t") or not is_method(scale, "t"):
            return
        weight, scale = weight.args[0], scale.args[0]
    else:
        data, _, weight, scale, bias, _ = node.args
    rounding: Any = data.args[0] if is_call(data, operator.getitem) else None
    if not is_call(rounding, torch.ops.diffusers_accel.quantize_rows.default):
        return
    x = rounding.args[0]
    if not _few(x) or not fits(node) or value(node).dtype != value(x).dtype:
        return
    source, silu = _before_silu(x)
    if not _large(weight) or root(source) in changed:
        return
    args = (source, weight, scale, bias, silu)
    replace(node, put(graph, node, torch.ops.diffusers_accel.narrow_linear.default, args, node))


def _few(x: Any) -> bool:
    """Whether a tensor has few rows, whose number is known."""
    found = value(x)
    return found is not None and found.ndim == 2 and isinstance(found.shape[0], int) and found.shape[0] <= narrow.MOST


def _large(weight: Any) -> bool:
    return value(weight) is not None and value(weight).numel() >= _LEAST


def _before_silu(x: Any) -> tuple[Any, bool]:
    """A tensor before SiLU, which costs next to nothing to do again for another layer."""
    source = x.args[0] if is_method(x, "reshape") and value(x.args[0]).shape == value(x).shape else x
    return (source.args[0], True) if is_call(source, F.silu) else (x, False)


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
