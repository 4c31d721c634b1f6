"""Reading and changing a graph of torch functions: the helpers of every rewrite."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from ....compat.torch_private import is_erased, is_traceable_wrapper_subclass

# Devices and dtypes of tensors that rewritten code supports.
KINDS = [("cuda", torch.bfloat16), ("cuda", torch.float16), ("cuda", torch.float32)]


def is_call(node: Any, *targets: Callable[..., Any]) -> bool:
    """Whether a node calls one of some functions."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_method(node: Any, *names: str) -> bool:
    """Whether a node calls one of some methods."""
    return isinstance(node, Node) and node.op == "call_method" and node.target in names


def arguments(node: Any, *names: str, **defaults: Any) -> tuple[Any, ...]:
    """The arguments of a call in the order of `names`, the parameters of its function. `None` stands for an argument
    that is neither given nor in `defaults`."""
    given = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return tuple(given.get(name) for name in names)


def value(node: Any) -> Any:
    """The fake tensor of a node: its shape, dtype and device. `None` for a tensor subclass (e.g. torchao's), which
    defines its own operations."""
    found = node.meta.get("example_value") if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) and not is_traceable_wrapper_subclass(found) else None


def fits(node: Any) -> bool:
    """Whether rewritten code supports the device and dtype of a node's tensor."""
    found = value(node)
    return found is not None and (found.device.type, found.dtype) in KINDS


def only_user(node: Any) -> Any:
    """The only node that reads this one; `None` if there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def put(graph: Graph, before: Any, target: Callable[..., Any], args: Sequence[Any], like: Any = None) -> Any:
    """Inserts a call of a function before a node. `like` describes the result: a fake tensor, or a node with one."""
    with graph.inserting_before(before):
        made = graph.call_function(target, tuple(args))
    if isinstance(like, Node):
        made.meta.update(like.meta)
    elif like is not None:
        made.meta["example_value"] = like
    return made


def item(graph: Graph, before: Any, source: Any, place: int, like: Any = None) -> Any:
    """One of several results of a node."""
    return put(graph, before, operator.getitem, (source, place), like)


def view(graph: Graph, before: Any, source: Any, method: str, *args: Any) -> Any:
    """A view of a node's tensor, by a method of tensors."""
    with graph.inserting_before(before):
        made = graph.call_method(method, (source, *args))
    found = value(source)
    if found is not None:
        made.meta["example_value"] = getattr(found, method)(*args)
    return made


def replace(node: Any, by: Any) -> None:
    """Replaces a node by another one, and erases nodes that nothing reads any more."""
    node.replace_all_uses_with(by)
    drop(node)


# Methods that may return a view of their tensor.
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "permute", "t", "chunk", "split", "unbind",
    "unsqueeze", "squeeze", "expand", "contiguous", "to", "narrow", "view_as", "detach", "float", "type_as",
}  # fmt: skip


def root(node: Any) -> Any:
    """The node whose memory a node's tensor may share: the start of its chain of views."""
    while isinstance(node, Node) and node.args and isinstance(node.args[0], Node):
        if not (is_method(node, *_VIEWS) or is_call(node, operator.getitem)):
            break
        node = node.args[0]
    return node


@functools.cache
def _inplace_position(function: Any) -> int | None:
    """The position of a function's parameter `inplace`, by which activations overwrite their input; `None` without
    one."""
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (TypeError, ValueError):  # a method's name, a function of C++, or no such parameter
        return None


def written(graph: Graph) -> set[Any]:
    """The roots of tensors that the graph changes in place; no node that reads one of them may be moved."""
    found = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or not (node.args or node.kwargs):
            continue
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        in_place = name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul")
        if node.args and (in_place or (name.endswith("_") and not name.endswith("__"))):
            found.add(root(node.args[0]))
        position = _inplace_position(node.target)
        if node.kwargs.get("inplace") or (position is not None and any(node.args[position : position + 1])):
            found.add(root(node.args[0] if node.args else node.kwargs.get("input")))
        if "out" in node.kwargs:
            found.add(root(node.kwargs["out"]))
    return found


def drop(node: Any) -> None:
    """Erases a node that nothing reads, then the nodes that only it read."""
    if not isinstance(node, Node) or is_erased(node) or node.users or node.op not in ("call_function", "call_method"):
        return
    if node.target is operator.setitem or str(node.target).endswith("_"):
        return
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        drop(source)
