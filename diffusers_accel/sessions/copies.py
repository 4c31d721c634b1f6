"""Copies of accelerated components and pipelines, deep or pickled, which are stock and whole.

`copy` and `pickle` call methods of the instance. A session puts its own in their place: they undo the edits while the
copy is made.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..compat.torch_private import buffers_of, parameters_of
from ..core.edits import Edit, Journal, SetAttr
from ..errors import Unsupported
from .attributes import PIPELINE_EDITS, SESSION, modules_of
from .shared_components import SharedComponent, suspended_component


def stock_copies(owner: Any) -> Iterator[Edit]:
    """Edits that make copies of a component or pipeline stock. `copy` and `pickle` prefer an instance's method."""
    yield SetAttr(owner, "__deepcopy__", functools.partial(_deepcopy, owner))
    yield SetAttr(owner, "__reduce_ex__", functools.partial(_reduce, owner))


def _deepcopy(owner: Any, memo: Any = None) -> Any:
    with _stock(owner, "copy.deepcopy"):
        return copy.deepcopy(owner, memo)


def _reduce(owner: Any, protocol: Any = 4) -> Any:
    with _stock(owner, "pickle"):
        # Pickle reads the state later, when edits are in force again. It therefore gets a copy of the structure with
        # the same tensors.
        tensors = [
            item
            for module in modules_of(owner)
            for part in module.modules()
            for item in (*parameters_of(part).values(), *buffers_of(part).values())
            if item is not None
        ]
        return copy.deepcopy(owner, {id(item): _apart(item) for item in tensors}).__reduce_ex__(protocol)


def _apart(item: torch.Tensor) -> torch.Tensor:
    """A second tensor on the same memory, which keeps the memory when the first tensor's data is moved."""
    if isinstance(item, nn.Parameter):
        return nn.Parameter(item.data, requires_grad=item.requires_grad)
    return item.detach()


@contextmanager
def _stock(owner: Any, what: str) -> Iterator[None]:
    """A context within which a component or pipeline is stock."""
    modules = modules_of(owner)
    found = [vars(module)[SESSION] for module in modules if SESSION in vars(module)]
    with ExitStack() as stack:
        own: Journal | None = vars(owner).get(PIPELINE_EDITS)
        if own is not None:
            for name in (SESSION, PIPELINE_EDITS):
                stack.callback(vars(owner).__setitem__, name, vars(owner).pop(name))
            stack.enter_context(own.suspended())
        for session in dict.fromkeys(found):
            if not session.ended:
                stack.enter_context(session.suspended(what))
        for module in modules:
            shared = SharedComponent.of(module)
            for reason in shared.journal.irreversible if shared is not None else ():
                raise Unsupported(what, f"{reason}.", "load the component again.", type(module).__name__)
            stack.enter_context(suspended_component(module))
        yield
