"""Whole forwards as graphs: the VAE's decoder and the text encoders, which are called a few times a request, each time
from the beginning to the end.

The first call of a kind runs as it is, the second records, later ones play. Results are copied out: a pipeline keeps
the embeddings of one prompt while it encodes the next. Whatever a forward does besides computing (reading from the
device, writing to what it was given) cannot be played: such calls stay as they are, and that is said.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...core.graphs import RECORDERS, Recording
from ..context import PipelineContext
from .segments import CONSTANTS
from .state import call_form, first_line, state_of


@dataclass(frozen=True)
class _Played:
    """A recording, and how its outputs are put together."""

    recording: Recording
    structure: Any
    rest: list[Any]


class Whole:
    """The graphs of one module's forward.

    Args:
        context: The pipeline.
        name: The module, as a user knows it.
        module: The module.
        limit: Kinds of calls that are recorded at most.
    """

    def __init__(self, context: PipelineContext, name: str, module: nn.Module, limit: int):
        self.name, self.module, self.limit = name, module, limit
        # The module may outlive the pipeline: one that others share.
        self._context = weakref.ref(context)
        self.replays = 0
        # A call's kind -> its graph; `None` after its first call.
        self._kinds: dict[Hashable, _Played | None] = {}
        self._weights: Hashable = None
        self._pool: Any = None
        self._request = 0
        self._refused: set[Hashable] = set()
        self._warned: set[str] = set()

    @property
    def captured(self) -> int:
        """Graphs that are held."""
        return sum(kind is not None for kind in self._kinds.values())

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the module's forward."""
        context = self._context()
        if context is not None and self._request != context.clock.request:
            self._request, self.replays = context.clock.request, 0
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [item for item in leaves if isinstance(item, torch.Tensor)]
        why = self._refusal(args, kwargs, leaves, tensors)
        if why is not None:
            self._say(why)
            return inner(*args, **kwargs)
        device = tensors[0].device
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device.type)
        key = (call_form(args), call_form(kwargs), modes)
        if key in self._refused:
            return inner(*args, **kwargs)
        if key not in self._kinds:
            if len(self._kinds) >= self.limit:
                self._say(f"{self.limit} kinds of calls are recorded already (cuda_graph.limit)")
            else:
                self._kinds[key] = None
            return inner(*args, **kwargs)
        played = self._kinds[key]
        if played is None:
            try:
                played = self._kinds[key] = self._record(inner, leaves, structure, tensors)
            except RuntimeError as error:
                del self._kinds[key]
                self._refused.add(key)
                self._say(f"it cannot be recorded ({first_line(error)})")
                return inner(*args, **kwargs)
        outputs = iter([item.clone() for item in played.recording(tensors)])
        self.replays += 1
        found = [next(outputs) if isinstance(item, torch.Tensor) else item for item in played.rest]
        return pytree.tree_unflatten(found, played.structure)

    def _refusal(self, args: Any, kwargs: Any, leaves: list[Any], tensors: list[torch.Tensor]) -> str | None:
        """Why a call cannot be recorded, or `None`."""
        if torch.is_grad_enabled() and any(item.requires_grad for item in (*tensors, *self.module.parameters())):
            return "gradients are recorded"
        if not tensors or any(item.device.type not in RECORDERS for item in tensors):
            return "what it is given lies on no CUDA device"
        if any(_keeps(item) for item in (*args, *kwargs.values())):
            return "it is given something that it may write to, and reads again in a later call"
        if not all(isinstance(item, (torch.Tensor, *CONSTANTS)) for item in leaves):
            return "it is given something besides tensors and constants"
        state = state_of(self.module)
        if state.weights != self._weights:
            self._kinds.clear()
            self._refused.clear()
            self._pool, self._weights = None, state.weights
        return state.why

    def _record(
        self, inner: Callable[..., Any], leaves: list[Any], structure: Any, tensors: list[torch.Tensor]
    ) -> _Played:
        made: list[Any] = []

        def function(static: list[torch.Tensor]) -> list[torch.Tensor]:
            given = iter(static)
            args, kwargs = pytree.tree_unflatten(
                [next(given) if isinstance(item, torch.Tensor) else item for item in leaves], structure
            )
            found, form = pytree.tree_flatten(inner(*args, **kwargs))
            if not all(isinstance(item, (torch.Tensor, *CONSTANTS)) for item in found):
                raise RuntimeError("it returns something besides tensors")
            made[:] = found, form
            return [item for item in found if isinstance(item, torch.Tensor)]

        recorder = RECORDERS[tensors[0].device.type]
        if self._pool is None:
            self._pool = recorder.pool()
        recording = Recording(tensors, function, recorder(self._pool, tensors[0].device))
        return _Played(recording, made[1], made[0])

    def _say(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"cuda_graph: {self.name} is run without graphs: {why}.", stacklevel=3)


def _keeps(value: Any) -> bool:
    """Whether a value can be written to by whom it is given: a list of features that a video decoder hands on, say."""
    return isinstance(value, (list, dict, set)) and bool(value)
