"""One form for operations that stock code writes in several: casts, inactive dropout, RMS norms written out."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from .graph import arguments, fits, is_call, is_method, only_user, put, replace, root, value, written

_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
_ADD, _MUL = (operator.add, torch.add), (operator.mul, torch.mul)


def rewrite(graph: Graph) -> None:
    """Rewrites a graph in place."""
    changed = written(graph)
    for node in list(graph.nodes):
        if node.op in ("call_method", "call_function"):
            _simplified(graph, node, changed)
    for node in list(graph.nodes):
        if is_call(node, torch.rsqrt):
            _rms_norm(graph, node, changed)


def cast(node: Any) -> torch.dtype | None:
    """The dtype that a node casts its tensor to; `None` for a node that does anything else."""
    if is_method(node, *_CASTS) and len(node.args) == 1:
        return _CASTS[node.target]
    if is_method(node, "type_as"):
        found = value(node)
        return None if found is None else found.dtype
    if is_method(node, "to") and len(node.args) + len(node.kwargs) == 2:
        kind = node.args[1] if len(node.args) == 2 else node.kwargs.get("dtype")
        return kind if isinstance(kind, torch.dtype) else None
    return None


def _simplified(graph: Graph, node: Any, changed: set[Any]) -> None:
    kind = cast(node)
    if kind is not None:
        source = node.args[0]
        found = value(source)
        if found is None or value(node) is None or not isinstance(source, Node):
            return
        if found.dtype == kind:
            replace(node, source)
        elif node.target != "to":
            with graph.inserting_before(node):
                made = graph.call_method("to", (source, kind))
            made.meta.update(node.meta)
            replace(node, made)
        return
    if is_call(node, F.dropout):
        source, probability, training = arguments(node, "input", "p", "training", p=0.5, training=True)
        if not training or probability == 0.0:
            replace(node, source)
    elif is_method(node, "to") and len(node.args) == 2 and isinstance(node.args[1], torch.device):
        source, found = node.args[0], value(node)
        before = value(source)
        if found is not None and before is not None and before.device == found.device:
            replace(node, source)
    elif is_method(node, "repeat_interleave") and node.args[1:] == (1,) and not {node, root(node.args[0])} & changed:
        replace(node, node.args[0])  # a copy of a tensor that nothing changes


def _rms_norm(graph: Graph, rsqrt: Any, changed: set[Any]) -> None:
    """Replaces x * rsqrt(mean(x^2) + eps), with or without a weight, by `torch.rms_norm`."""
    total = rsqrt.args[0]
    if not is_call(total, *_ADD) or len(total.args) != 2:
        return
    mean, eps = total.args
    if not isinstance(eps, float) or not is_method(mean, "mean") or mean.kwargs.get("keepdim") is not True:
        return
    dim = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    power = mean.args[0]
    if dim not in (-1, (-1,), [-1]) or not is_method(power, "pow") or power.args[1] != 2:
        return
    x = power.args[0]
    x = x.args[0] if cast(x) is not None else x
    product = only_user(rsqrt)
    if not fits(x) or root(x) in changed or not is_call(product, *_MUL) or product is None:
        return
    one, other = product.args
    left = other if one is rsqrt else one
    if left is not x and not (cast(left) is not None and left.args[0] is x):
        return
    last, weight = product, None
    after = only_user(product)
    if after is not None and cast(after) is not None:
        last, after = after, only_user(after)
    if after is not None and is_call(after, *_MUL) and _is_weight(after, last):
        weight, last = next(item for item in after.args if item is not last), after
    found = value(last)
    source = value(x)
    if found is None or source is None:
        return
    before = last.next
    made = put(graph, before, torch.rms_norm, (x, (source.shape[-1],), weight, eps), last)
    if found.dtype != source.dtype:
        made.meta["example_value"] = source
        with graph.inserting_after(made):
            wider = graph.call_method("to", (made, found.dtype))
        wider.meta.update(last.meta)
        made = wider
    replace(last, made)


def _is_weight(node: Any, normed: Any) -> bool:
    """Whether a product multiplies a norm by its weight, one number per channel."""
    others = [item for item in node.args if item is not normed]
    found, whole = (value(others[0]), value(normed)) if len(others) == 1 else (None, None)
    return found is not None and whole is not None and found.ndim == 1 and found.shape[0] == whole.shape[-1]
