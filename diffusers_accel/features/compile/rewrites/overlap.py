"""Async Ulysses: computation during the exchange of heads between ranks.

Ranks exchange the heads of query, key and value around attention. Each of the three is sent as soon as it is computed;
operands of one layer are sent together. Computation that attention does not depend on then runs between sending and
attention, e.g. the feed-forward of FLUX's single-stream blocks. Where separate layers compute query and key, the value
is sent first, and the other two are computed meanwhile. (The idea: https://github.com/NVIDIA/TensorRT-LLM, VisualGen.)

Exchanges do not overlap, so no other attention is moved into one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph

from ....compat.torch_private import scaled_mm
from ....kernels.attention import DISPATCHERS
from ....kernels.attention.ulysses import KEY, QUERY, VALUE
from . import graph as graphs
from .graph import is_call, put, value
from .linear import LINEAR

_OPERATORS = torch.ops.diffusers_accel
_ATTENTION = ("attention", "fused_qk_norm_rope_attention", "ulysses_send", "ulysses_attention")
_PRODUCTS = ("linear_gelu", "concat_linear", "int8_linear")
# Least number of multiplications of a product that is worth a split: some ten microseconds on a large GPU.
_WORTH = 1 << 32


def rewrite(graph: Graph) -> None:
    """Rewrites a graph in place."""
    if graphs.written(graph):
        return
    # Computation beside one exchange is not moved on to the next one.
    overlapped: set[Any] = set()
    for node in graph.find_nodes(op="call_function", target=_OPERATORS.fused_qk_norm_rope_attention.default):
        _split(graph, node, overlapped)


def _split(graph: Graph, node: Any, overlapped: set[Any]) -> None:
    """Splits one attention into sending and attention, if there is computation to run between them."""
    query, key, value_, norms, eps, query_tables, key_tables, rope_style, mask, causal, scale, dispatcher = node.args
    heads = [value(parts[0]).shape[2] for parts in (query, key)]
    context_parallel = DISPATCHERS[dispatcher].context_parallel if dispatcher in DISPATCHERS else None
    kinds = {(value(item).shape[-1], value(item).dtype) for item in (query[0], key[0], value_)}
    if context_parallel is None or not context_parallel.overlaps or causal or len(kinds) > 1:
        return
    if not context_parallel.can_send((heads[0], heads[1])):
        return
    before = _before(graph, node)
    count = len(query)
    sent = {
        VALUE: ([value_], [], []),
        QUERY: (query, norms[:count], query_tables),
        KEY: (key, norms[count:], key_tables),
    }
    needs = {which: _needed(item for items in lists for item in items) for which, lists in sent.items()}
    of_others = _needed([] if mask is None else [mask])
    needed = needs[VALUE] | needs[QUERY] | needs[KEY] | of_others
    # Other exchanges and their inputs come first.
    first = _needed([item for item in before if _is_attention(item) or item in overlapped])
    rest = [item for item in before if item not in needed and item not in first]
    after_value = (needs[QUERY] | needs[KEY]) - needs[VALUE] - first
    if not any(map(_is_product, rest)) and not any(map(_is_product, after_value)):
        return
    placed = first | of_others
    order = [item for item in before if item in placed]
    sent_nodes: list[Any] = []
    waiting: list[int] = []

    def send() -> None:
        """Inserts a call that sends the waiting operands."""
        lists = {which: sent[which] if which in waiting else ([], [], []) for which in sent}
        (query, query_norms, query_rope), (key, key_norms, key_rope) = lists[QUERY], lists[KEY]
        sending = (
            query, key, lists[VALUE][0], [*query_norms, *key_norms], eps, query_rope, key_rope, rope_style, heads,
            causal, dispatcher,
        )  # fmt: skip
        sent_nodes.append(put(graph, node, _OPERATORS.ulysses_send.default, sending, value(value_).new_empty(0)))
        order.append(sent_nodes[-1])
        waiting.clear()

    for which, required in needs.items():
        new = [item for item in before if item in required and item not in placed]
        # Operands that are computed already are sent before the next product, together.
        if waiting and any(map(_is_product, new)):
            send()
        order += new
        placed |= required
        waiting.append(which)
    send()
    order += [item for item in before if item not in placed]
    for item in order:
        node.prepend(item)
    overlapped.update(rest)
    args = (sent_nodes, query, value_, mask, causal, scale, dispatcher)
    graphs.replace(node, put(graph, node, _OPERATORS.ulysses_attention.default, args, node))


def _before(graph: Graph, node: Any) -> list[Any]:
    """The nodes before a node, in their order, without inputs."""
    found = []
    for item in graph.nodes:
        if item is node:
            break
        if item.op not in ("placeholder", "get_attr"):
            found.append(item)
    return found


def _needed(nodes: Iterable[Any]) -> set[Any]:
    """Nodes and all nodes that they depend on."""
    found: set[Any] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _is_attention(node: Any) -> bool:
    return is_call(node, *(getattr(_OPERATORS, name).default for name in _ATTENTION))


def _is_product(node: Any) -> bool:
    """Whether a node is a matrix product of at least `_WORTH` multiplications."""
    targets = [getattr(_OPERATORS, name).default for name in _PRODUCTS]
    if not is_call(node, LINEAR, scaled_mm, *targets) or value(node) is None:
        return False
    sizes = [value(item).shape[-1] for item in node.all_input_nodes[:1] if value(item) is not None]
    return bool(sizes) and value(node).numel() * sizes[0] >= _WORTH
