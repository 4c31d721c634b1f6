"""Rewrites of linear layers in compiled graphs.

- gelu(linear(x)) in 16 bits becomes one GEMM with the GELU in its epilogue.
- linear(cat(a, b)) in 16 bits becomes two accumulating GEMMs without the concatenation.
- linear(x) and linear(silu(x)) of a few rows become a skinny GEMM, which also dequantizes 8-bit weights.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph

from ....compat.torch_private import scaled_mm
from ....kernels.linear import (  # noqa: F401 - registers the operators
    eight_bit,
    epilogue,
    skinny,
)
from .graph import arguments, fits, is_call, is_method, put, replace, root, value, written

# Graphs hold the functions of `torch.nn.functional`, which are those of C++.
LINEAR, GELU = F.linear, F.gelu
# With fewer elements in the weight, a GEMM of a few rows takes a launch's time with any kernel. It is not rewritten.
_LEAST_ELEMENTS = 1 << 20


def rewrite(graph: Graph) -> None:
    """Rewrites a graph in place."""
    changed = written(graph)

    def is_unchanged(node: Any) -> bool:
        """Whether no in-place write touches a node's inputs or their inputs."""
        read = node.all_input_nodes
        return not any(
            root(each) in changed for each in (*read, *(source for item in read for source in item.all_input_nodes))
        )

    for node in filter(is_unchanged, graph.find_nodes(op="call_function", target=GELU)):
        _fuse_gelu(graph, node)
    for node in filter(is_unchanged, graph.find_nodes(op="call_function", target=LINEAR)):
        if not _use_skinny(graph, node, changed):
            _split_concat(graph, node)
    for target in (scaled_mm, torch.ops.diffusers_accel.int8_linear.default):
        for node in graph.find_nodes(op="call_function", target=target):
            _use_skinny_8_bit(graph, node, changed)


def _fuse_gelu(graph: Graph, node: Any) -> None:
    """Replaces gelu(linear(x)) by `linear_gelu`."""
    source, approximate = arguments(node, "input", "approximate")
    if approximate != "tanh" or not is_call(source, LINEAR) or len(source.users) > 1 or not _is_16_bit(source):
        return
    x, weight, bias = arguments(source, "input", "weight", "bias")
    if bias is not None and value(weight) is not None:
        replace(node, put(graph, node, torch.ops.diffusers_accel.linear_gelu.default, (x, weight, bias), node))


def _use_skinny(graph: Graph, node: Any, changed: set[Any]) -> bool:
    """Replaces linear(silu(x)) or linear(x) of a few rows by `skinny_linear`.

    Returns:
        Whether the node was replaced.
    """
    x, weight, bias = arguments(node, "input", "weight", "bias")
    if not _few(x) or not _is_16_bit(node) or not _large(weight) or value(weight).dtype != value(x).dtype:
        return False
    source, silu = _before_silu(x)
    if root(source) in changed:
        return False
    replace(
        node,
        put(graph, node, torch.ops.diffusers_accel.skinny_linear.default, (source, weight, None, bias, silu), node),
    )
    return True


def _use_skinny_8_bit(graph: Graph, node: Any, changed: set[Any]) -> None:
    """Replaces an 8-bit GEMM of a few rows by `skinny_linear`, which leaves activations unquantized. The weight has a
    scale per row. `changed` has the roots of tensors that the graph changes in place."""
    if is_call(node, scaled_mm):
        data, weight, _, scale = node.args[:4]
        bias = node.kwargs.get("bias")
        if not is_method(weight, "t") or not is_method(scale, "t"):
            return
        weight, scale = weight.args[0], scale.args[0]
    else:
        data, _, weight, scale, bias, _ = node.args
    quantization: Any = data.args[0] if is_call(data, operator.getitem) else None
    if not is_call(quantization, torch.ops.diffusers_accel.quantize_rows.default):
        return
    x = quantization.args[0]
    if not _few(x) or not fits(node) or value(node).dtype != value(x).dtype:
        return
    source, silu = _before_silu(x)
    if not _large(weight) or root(source) in changed:
        return
    args = (source, weight, scale, bias, silu)
    replace(node, put(graph, node, torch.ops.diffusers_accel.skinny_linear.default, args, node))


def _few(x: Any) -> bool:
    """Whether a tensor is (rows, columns) with a static number of rows up to `MAX_ROWS`."""
    fake = value(x)
    return fake is not None and fake.ndim == 2 and isinstance(fake.shape[0], int) and fake.shape[0] <= skinny.MAX_ROWS


def _large(weight: Any) -> bool:
    return value(weight) is not None and value(weight).numel() >= _LEAST_ELEMENTS


def _before_silu(x: Any) -> tuple[Any, bool]:
    """(the SiLU's input, True) if `x` is a SiLU's output, else (`x`, False). Each layer then repeats the SiLU, which
    costs next to nothing."""
    source = x.args[0] if is_method(x, "reshape") and value(x.args[0]).shape == value(x).shape else x
    return (source.args[0], True) if is_call(source, F.silu) else (x, False)


def _split_concat(graph: Graph, node: Any) -> None:
    """Replaces linear(cat(inputs)) by `concat_linear`."""
    x, weight, bias = arguments(node, "input", "weight", "bias")
    if not is_call(x, torch.cat) or len(x.users) > 1 or not _is_16_bit(node):
        return
    inputs, dim = arguments(x, "tensors", "dim", dim=0)
    concatenated = value(x)
    if len(inputs) < 2 or concatenated is None or value(weight) is None:
        return
    if dim not in (-1, concatenated.ndim - 1):
        return
    replacement = put(graph, node, torch.ops.diffusers_accel.concat_linear.default, (list(inputs), weight, bias), node)
    replace(node, replacement)


def _is_16_bit(node: Any) -> bool:
    """Whether a node's tensor has a 16-bit dtype. On the CPU any dtype is allowed, for tests."""
    fake = value(node)
    return fits(node) and fake is not None and (fake.itemsize == 2 or not fake.is_cuda)
