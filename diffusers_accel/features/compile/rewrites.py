"""Rewrites of a block's graph before inductor sees it: what its own fusion cannot do.

Inductor leaves matrix products to the library, and fuses what stands between them. What a product could do by itself
(its epilogue), or need not have done for it (one tensor laid out from two), is a pass over memory that is saved here:

- GELU in its tanh form, right after a linear layer, goes into the product's epilogue. It is then applied to what was
  summed up in float32, before that is rounded.
- A linear layer of two tensors laid side by side (FLUX's single-stream blocks) becomes two products that add up.

The graph is torch's own, before any decomposition, so the patterns are those that stock code writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from ...kernels.linear import epilogue  # noqa: F401 - registers the operators

# Names the rewrites in inductor's cache: to be raised with every change of what they do.
_VERSION = "diffusers_accel-1"
_LINEAR, _GELU = torch._C._nn.linear, torch._C._nn.gelu
# Where, and of what types, the products' library does this.
_KINDS = [("cuda", torch.bfloat16), ("cuda", torch.float16)]


class Rewrites(CustomGraphPass):
    """All rewrites, in the form of inductor's `pre_grad_custom_pass`."""

    def __call__(self, graph: Graph) -> None:
        """Rewrites a graph in place."""
        for node in graph.find_nodes(op="call_function", target=_GELU):
            _activated(graph, node)
        for node in graph.find_nodes(op="call_function", target=_LINEAR):
            _of_parts(graph, node)
        graph.lint()

    def uuid(self) -> str:
        """Of what they do."""
        return _VERSION


# One for all: compiled code is found again by the very object it was compiled with.
REWRITES = Rewrites()


def _activated(graph: Graph, node: Any) -> None:
    """gelu(linear(x)) in one."""
    source = node.args[0] if node.args else node.kwargs["input"]
    if (
        node.kwargs.get("approximate") != "tanh"
        or not _is(source, _LINEAR)
        or len(source.users) > 1
        or not _fits(source)
    ):
        return
    x, weight, bias = _arguments(source)
    if bias is None:
        return
    _replace(graph, node, torch.ops.diffusers_accel.linear_gelu.default, (x, weight, bias))
    graph.erase_node(source)


def _of_parts(graph: Graph, node: Any) -> None:
    """linear(cat(a, b)) as two products."""
    x, weight, bias = _arguments(node)
    if not _is(x, torch.cat) or len(x.users) > 1 or not _fits(node):
        return
    parts = x.args[0] if x.args else x.kwargs["tensors"]
    dim = x.args[1] if len(x.args) > 1 else x.kwargs.get("dim", 0)
    if len(parts) < 2 or dim not in (-1, x.meta["example_value"].ndim - 1):
        return
    _replace(graph, node, torch.ops.diffusers_accel.linear_of_parts.default, (list(parts), weight, bias))
    graph.erase_node(x)


def _is(node: Any, target: Callable[..., Any]) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def _arguments(node: Any) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a linear layer."""
    names = ("input", "weight", "bias")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given["input"], given["weight"], given.get("bias")


def _fits(node: Any) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and (value.device.type, value.dtype) in _KINDS


def _replace(graph: Graph, node: Any, target: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        made = graph.call_function(target, args)
    made.meta.update(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
