"""Passes over rows, joined: a residual sum, its norm and its modulation; an activation; the 8-bit rounding of either.

`residual_norm` and `concat_quantize` of `kernels/elementwise` replace them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from ....kernels.elementwise import operators  # noqa: F401 - registers the operators
from .canonical import cast
from .graph import arguments, drop, fits, is_call, is_method, item, only_user, put, replace, root, value, view, written
from .linear import GELU

_ADD, _MUL = (operator.add, torch.add), (operator.mul, torch.mul)
_NORMS = (F.layer_norm, torch.layer_norm, torch.rms_norm)
# Fewest and most channels: a program holds a row in registers, and rows of a head's channels would be too many
# programs.
_NARROWEST, _WIDEST = 512, 16384


def rewrite(graph: Graph) -> None:
    """Rewrites a graph in place."""
    changed = written(graph)
    for target in _NORMS:
        for node in graph.find_nodes(op="call_function", target=target):
            _fuse_norm(graph, node, changed)
    for rounding in _roundings(graph):
        _fuse_activation(graph, rounding, changed)


# --- rounding -------------------------------------------------------------------------------------------------------


@dataclass
class _Rounding:
    """All roundings of one tensor to one type.

    Attributes:
        source: The node of the tensor.
        kind: The type, `"e4m3"` or `"int8"`.
        nodes: The nodes that round it.
    """

    source: Any
    kind: str
    nodes: list[Any] = field(default_factory=list)

    @property
    def all(self) -> bool:
        """Whether only roundings read the tensor."""
        views = {item.args[0] for item in self.nodes}
        return all(user in views for user in self.source.users) and all(
            user in self.nodes for one in views if one is not self.source for user in one.users
        )

    def replace_with(self, values: Any, scale: Any) -> None:
        """Replaces all roundings by values, (rows, columns), and their scales."""
        for node in self.nodes:
            for user in list(node.users):
                replace(user, values if user.args[1] == 0 else scale)
            drop(node)


def _flat(node: Any) -> bool:
    """Whether a view flattens batch and sequence, and does nothing else."""
    if not is_method(node, "reshape", "view", "flatten"):
        return False
    found, before = value(node), value(node.args[0])
    return (
        found is not None and before is not None and found.ndim == 2 and before.ndim in (2, 3)
        and found.shape[1] == before.shape[-1]
    )  # fmt: skip


def _roundings(graph: Graph) -> list[_Rounding]:
    found: dict[tuple[Any, str], _Rounding] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.diffusers_accel.quantize_rows.default):
        x, kind = node.args
        source = x.args[0] if _flat(x) else x
        found.setdefault((source, kind), _Rounding(source, kind)).nodes.append(node)
    return list(found.values())


# --- norms ----------------------------------------------------------------------------------------------------------


def _fuse_norm(graph: Graph, node: Any, changed: set[Any]) -> None:
    """Joins a norm over the channels of (batch, sequence, channels), or of packed sequences (tokens, channels), with
    the residual sum before it and the modulation and rounding after it."""
    rms = is_call(node, torch.rms_norm)
    names = ("input", "normalized_shape", "weight", *(() if rms else ("bias",)), "eps")
    x, shape, weight, *rest = arguments(node, *names, **({} if rms else {"eps": 1e-5}))
    bias, eps = (None, rest[0]) if rms else rest
    source = _before_casts(x)
    whole = value(source)
    if whole is None or whole.ndim not in (2, 3) or len(shape) != 1 or eps is None or not fits(source):
        return
    if not _NARROWEST <= whole.shape[-1] <= _WIDEST:
        return
    last, factor, plus_one, shift = _modulation(node, whole)
    total = _sum(source, node, last, changed)
    rounding = next((found for found in _roundings(graph) if found.source is last and found.all), None)
    kind = rounding.kind if rounding is not None else ""
    base, y, gate = total if total is not None else (source, None, None)
    dtype = value(last).dtype
    vectors = [_before_casts(item) if isinstance(item, Node) else None for item in (weight, bias)]
    if any(root(each) in changed for each in (base, y, gate, factor, shift, *vectors)):
        return
    sums = [_of_table(each, changed) for each in (gate, factor, shift)]
    place = last.next
    gates, factors, shifts = (
        [] if each is None else [each] if found is None else [_selected(graph, place, one, found) for one in found.of]
        for each, found in zip((gate, factor, shift), sums, strict=True)
    )
    batched = (_batched(graph, place, each) for each in (base, y))
    made = put(
        graph, place, torch.ops.diffusers_accel.residual_norm.default,
        (*batched, gates, *vectors, factors, shifts, float(eps), rms, plus_one, kind, dtype),
    )  # fmt: skip
    if total is not None:
        summed = _like(graph, place, made, 0, whole)
        source.replace_all_uses_with(summed)
        drop(source)
    if rounding is None:
        replace(last, _like(graph, place, made, 1, value(last)))
        return
    rounded = next(user for node in rounding.nodes for user in node.users if user.args[1] == 0)
    result = item(graph, place, made, 1, value(rounded).view(whole.shape if whole.ndim == 3 else (1, *whole.shape)))
    rounding.replace_with(view(graph, place, result, "flatten", 0, 1), item(graph, place, made, 2))
    for user in list(last.users):
        drop(user)
    drop(last)


def _batched(graph: Graph, before: Any, node: Any) -> Any:
    """A tensor with a batch dimension, of size 1 if it has none."""
    return view(graph, before, node, "unsqueeze", 0) if node is not None and value(node).ndim == 2 else node


def _like(graph: Graph, before: Any, made: Any, place: int, found: torch.Tensor) -> Any:
    """One of an operator's results, without its batch dimension if `found` has none."""
    if found.ndim == 3:
        return item(graph, before, made, place, found)
    return view(graph, before, item(graph, before, made, place, found[None]), "squeeze", 0)


def _modulation(node: Any, whole: torch.Tensor) -> tuple[Any, Any, bool, Any]:
    """The modulation of a norm: its last node, the factor, whether 1 is added to the factor, and the shift."""
    factor, plus_one, shift, last = None, False, None, node
    last = _after_cast(last)
    user = only_user(last)
    if user is not None and is_call(user, *_MUL):
        other = _other(user, last)
        if _is_vector(other, whole):
            factor, last = other, _after_cast(user)
            plus_one, factor = _plus_one(factor)
    user = only_user(last)
    if user is not None and is_call(user, *_ADD) and len(user.args) == 2 and not user.kwargs:
        other = _other(user, last)
        if _is_vector(other, whole):
            shift, last = other, _after_cast(user)
    return last, factor, plus_one, shift


@dataclass
class _OfTable:
    """A modulation vector per row, as one piece of the sum of every row's embedding and a block's table. A kernel that
    adds both itself saves the write of that sum.

    Attributes:
        of: Embedding and table, (batch or 1, sequence or 1, pieces, channels) each.
        piece: Index of the piece.
    """

    of: tuple[Any, Any]
    piece: int


def _of_table(node: Any, changed: set[Any]) -> _OfTable | None:
    """The sum that a modulation vector per row is a piece of; `None` if it is no such piece."""
    node = _before_casts(node)
    found = value(node)
    if found is None or found.ndim != 3 or found.shape[1] == 1:
        return None
    if is_method(node, "squeeze") and node.args[1:] == (2,):
        node = node.args[0]
    if not is_call(node, operator.getitem) or not isinstance(node.args[1], int):
        return None
    split: Any = node.args[0]
    total: Any = split.args[0] if is_method(split, "chunk", "unbind") else None
    whole = value(total)
    if whole is None or whole.ndim != 4 or not is_call(total, *_ADD) or len(total.args) != 2 or total.kwargs:
        return None
    pieces, dim = (split.args[1], split.args[2:]) if is_method(split, "chunk") else (whole.shape[2], split.args[1:])
    if (dim or (split.kwargs.get("dim"),))[0] not in (2, -2) or pieces != whole.shape[2]:
        return None
    sides = [_before_casts(item) for item in total.args]
    if not all(isinstance(item, Node) and fits(item) and value(item).ndim == 4 for item in sides):
        return None
    sides.sort(key=lambda item: -value(item).shape[1])
    large, small = sides
    if any(root(item) in changed or value(item).shape[2:] != whole.shape[2:] for item in sides):
        return None
    return _OfTable((large, small), node.args[1]) if value(small).shape[1] == 1 else None


def _selected(graph: Graph, before: Any, source: Any, found: _OfTable) -> Any:
    """The piece of one addend of such a sum, as a view."""
    return view(graph, before, source, "select", 2, found.piece)


def _plus_one(node: Any) -> tuple[bool, Any]:
    if is_call(node, *_ADD) and len(node.args) == 2 and 1 in node.args and not node.kwargs:
        inner = next(item for item in node.args if item != 1)
        if isinstance(inner, Node):
            return True, inner
    return False, node


def _sum(source: Any, node: Any, last: Any, changed: set[Any]) -> tuple[Any, Any, Any] | None:
    """x, y and gate of a norm's input x + gate * y; `None` if other nodes read the sum before the norm has run."""
    # The sum may be float32, with a cast to the stream's dtype after it.
    total = source.args[0] if cast(source) is not None else source
    whole = value(source)
    assert whole is not None
    if not is_call(total, *_ADD) or len(total.args) != 2 or total.kwargs:
        return None
    if total is not source and only_user(total) is not source:
        return None
    order = {each: place for place, each in enumerate(source.graph.nodes)}
    for user in source.users:
        if order[user] <= order[last] and user is not node and not (cast(user) is not None and only_user(user) is node):
            return None  # a modulation computed from the sum itself, say
    sides = total.args
    for first, second in (sides, sides[::-1]):
        base, y, gate = _before_casts(first), _before_casts(second), None
        if not isinstance(base, Node) or not isinstance(y, Node) or value(base) is None or value(y) is None:
            continue
        if is_call(y, *_MUL) and only_user(y) is not None:
            one, other = (_before_casts(item) for item in y.args)
            if _of_table(other, changed) is not None:  # both may have the shape of the stream
                one, other = other, one
            if _is_vector(one, whole) and _is_whole(other, whole):
                y, gate = other, one
            elif _is_vector(other, whole) and _is_whole(one, whole):
                y, gate = one, other
            elif not _is_whole(y, whole):
                continue
        # In a sum without a gate either side may be the stream, but not a product.
        if gate is None and is_call(base, *_MUL):
            continue
        if _is_whole(base, whole) and _is_whole(y, whole) and value(base).dtype == whole.dtype:
            return base, y, gate
    return None


def _is_whole(node: Any, whole: torch.Tensor) -> bool:
    found = value(node)
    return found is not None and found.shape == whole.shape


def _is_vector(node: Any, whole: torch.Tensor) -> bool:
    """Whether a tensor has one number per channel, for all rows or for each row."""
    found = value(node)
    if found is None or found.ndim != 3 or not found.is_floating_point():
        return False
    return all(one in (1, own) for one, own in zip(found.shape, whole.shape, strict=True)) and (
        found.shape[2] == whole.shape[2]
    )


def _before_casts(node: Any) -> Any:
    """A tensor before casts that lose nothing."""
    while cast(node) is not None:
        found, before = value(node), value(node.args[0])
        if found is None or before is None or not before.is_floating_point():
            break
        if before.itemsize > found.itemsize or (before.itemsize == found.itemsize and before.dtype != found.dtype):
            break
        node = node.args[0]
    return node


def _after_cast(node: Any) -> Any:
    user = only_user(node)
    return user if user is not None and cast(user) is not None and fits(user) else node


def _other(node: Any, one: Any) -> Any:
    others = [item for item in node.args if item is not one]
    return others[0] if len(others) == 1 else None


# --- activations ----------------------------------------------------------------------------------------------------


def _fuse_activation(graph: Graph, rounding: _Rounding, changed: set[Any]) -> None:
    """Joins the roundings of one tensor, and the activation before them, to one pass."""
    source, before = rounding.source, min(rounding.nodes)
    parts = _parts(source) if rounding.all else None
    if root(source) in changed:
        return
    if parts is not None and not any(root(each) in changed for part in parts for each in part[:2]):
        tensors, gates, kinds = zip(*parts, strict=True)
        batched = ([_batched(graph, before, each) for each in items] for items in (tensors, gates))
        made = put(
            graph, before, torch.ops.diffusers_accel.concat_quantize.default,
            (*batched, ",".join(kinds), rounding.kind),
        )  # fmt: skip
    elif len(rounding.nodes) > 1:
        first = min(rounding.nodes)
        made = put(graph, before, first.target, first.args)
    else:
        return
    sample = next((user for user in before.users if user.args[1] == 0), before)
    rounding.replace_with(item(graph, before, made, 0, value(sample)), item(graph, before, made, 1))


_Part = tuple[Any, Any, str]


def _parts(source: Any) -> list[_Part] | None:
    """The tensors whose concatenation is rounded, each with its gate and its activation; `None` if there is nothing to
    join."""
    whole = value(source)
    if whole is None or whole.ndim not in (2, 3) or not fits(source) or whole.shape[-1] > _WIDEST:
        return None
    if not is_call(source, torch.cat):
        found = _activation(source)
        return None if found is None else [found]
    nodes, dim = arguments(source, "tensors", "dim", dim=0)
    if len(nodes) != 2 or dim not in (-1, whole.ndim - 1):
        return None
    return [(_activation(node) if only_user(node) is source else None) or (node, None, "") for node in nodes]


def _activation(node: Any) -> _Part | None:
    if is_call(node, GELU):
        x, approximate = arguments(node, "input", "approximate", approximate="none")
        return x, None, "gelu_tanh" if approximate == "tanh" else "gelu"
    if is_call(node, F.silu):
        return node.args[0], None, "silu"
    if is_call(node, *_MUL):
        for one, other in (node.args, node.args[::-1]):
            if is_call(one, F.silu) and only_user(one) is node and isinstance(other, Node):
                x = one.args[0]
                if value(other) is not None and value(x) is not None and value(x).shape == value(other).shape:
                    return x, other, "swiglu"
    return None
