"""Async Ulysses: the all-to-all of query, key and value overlaps with independent computation in a compiled block.

Query, key and value are sent as soon as they are computed, together if one layer makes them. Computation that attention
does not read runs after the send and before attention: FLUX's feed-forward in single-stream blocks, for instance.
Layers that make query and key apart from the value run after the value is sent.
(https://github.com/NVIDIA/TensorRT-LLM, VisualGen.)

An exchange ends before the next one begins, so no other attention is moved into it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph

from ....kernels.attention import SITES
from ....kernels.attention.ulysses import KEY, QUERY, VALUE
from . import graph as graphs
from .graph import is_call, put, value
from .linear import LINEAR

_OPERATORS = torch.ops.diffusers_accel
_SITES = ("attention", "attention_unprepared", "ulysses_send", "ulysses_attention")
_PRODUCTS = ("linear_gelu", "linear_of_parts", "int8_product")
# Multiplications of a product that are worth a split: some ten microseconds' on a large GPU.
_WORTH = 1 << 32


def rewrite(graph: Graph) -> None:
    """Rewrites a graph in place."""
    if graphs.written(graph):
        return
    # What stands beside one exchange is not moved on to the next one.
    settled: set[Any] = set()
    for node in graph.find_nodes(op="call_function", target=_OPERATORS.attention_unprepared.default):
        _split(graph, node, settled)


def _split(graph: Graph, node: Any, settled: set[Any]) -> None:
    """One attention in steps, if there is something to compute between them."""
    query, key, value_, norms, eps, query_tables, key_tables, halves, mask, causal, scale, site = node.args
    heads = [value(parts[0]).shape[2] for parts in (query, key)]
    context_parallel = SITES[site].context_parallel if site in SITES else None
    alike = {(value(item).shape[-1], value(item).dtype) for item in (query[0], key[0], value_)}
    if (
        context_parallel is None
        or not context_parallel.overlaps
        or causal
        or len(alike) > 1
        or not context_parallel.can_send((heads[0], heads[1]))
    ):
        return
    before = _before(graph, node)
    count = len(query)
    sent = {
        VALUE: ([value_], [], []),
        QUERY: (query, norms[:count], query_tables),
        KEY: (key, norms[count:], key_tables),
    }
    its = {which: _needed(item for items in lists for item in items) for which, lists in sent.items()}
    of_others = _needed([] if mask is None else [mask])
    needed = its[VALUE] | its[QUERY] | its[KEY] | of_others
    # Other exchanges, and their inputs, come first.
    first = _needed([item for item in before if _is_site(item) or item in settled])
    rest = [item for item in before if item not in needed and item not in first]
    if not any(map(_is_product, rest)) and not any(map(_is_product, (its[QUERY] | its[KEY]) - its[VALUE] - first)):
        return
    placed = first | of_others
    order = [item for item in before if item in placed]
    sends: list[Any] = []
    waiting: list[int] = []

    def send() -> None:
        """Sends the waiting operands."""
        lists = {which: sent[which] if which in waiting else ([], [], []) for which in sent}
        (query, query_norms, query_turns), (key, key_norms, key_turns) = lists[QUERY], lists[KEY]
        sending = (query, key, lists[VALUE][0], [*query_norms, *key_norms], eps, query_turns, key_turns, halves, heads,
                   causal, site)  # fmt: skip
        sends.append(put(graph, node, _OPERATORS.ulysses_send.default, sending, value(value_).new_empty(0)))
        order.append(sends[-1])
        waiting.clear()

    for which, needs in its.items():
        new = [item for item in before if item in needs and item not in placed]
        # Operands that are ready are sent before the next product, together with those that are ready at once.
        if waiting and any(map(_is_product, new)):
            send()
        order += new
        placed |= needs
        waiting.append(which)
    send()
    order += [item for item in before if item not in placed]
    for item in order:
        node.prepend(item)
    settled.update(rest)
    args = (sends, query, value_, mask, causal, scale, site)
    graphs.replace(node, put(graph, node, _OPERATORS.ulysses_attention.default, args, node))


def _before(graph: Graph, node: Any) -> list[Any]:
    """What is computed before a node, in its order."""
    found = []
    for item in graph.nodes:
        if item is node:
            break
        if item.op not in ("placeholder", "get_attr"):
            found.append(item)
    return found


def _needed(nodes: Iterable[Any]) -> set[Any]:
    """Nodes, and all that they are computed from."""
    found: set[Any] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _is_site(node: Any) -> bool:
    return is_call(node, *(getattr(_OPERATORS, name).default for name in _SITES))


def _is_product(node: Any) -> bool:
    """Whether a node multiplies matrices for long."""
    targets = [getattr(_OPERATORS, name).default for name in _PRODUCTS]
    if not is_call(node, LINEAR, torch._scaled_mm, *targets) or value(node) is None:
        return False
    sizes = [value(item).shape[-1] for item in node.all_input_nodes[:1] if value(item) is not None]
    return bool(sizes) and value(node).numel() * sizes[0] >= _WORTH
