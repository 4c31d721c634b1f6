"""CUDA graphs of whole forwards: the VAE's decoder and the text encoders, which run a few times per request.

The first call of a signature runs without capture, the second is captured, later ones are replayed. Outputs are copied
out of the graph's buffers, because a pipeline keeps one prompt's embeddings while it encodes the next. A forward that
reads from the device or writes to its arguments cannot be captured: it runs without graphs, with a warning.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.graphs import GRAPH_BACKENDS, CapturedGraph
from ...core.tree import Form, split
from ..context import PipelineContext
from .dependencies import call_signature, dependencies_of, first_line
from .segments import CONSTANTS


@dataclass(frozen=True)
class _CapturedForward:
    """A captured forward.

    Attributes:
        graph: The graph.
        output: Form of the forward's output.
    """

    graph: CapturedGraph
    output: Form


class ModuleGraphs:
    """The graphs of one module's forward, and the layer that captures and replays them.

    Args:
        context: The pipeline. It is held weakly, because a module that pipelines share may outlive it.
        name: The module's name in the pipeline, e.g. `"vae.decoder"`.
        module: The module.
        limit: Largest number of graph variants.

    Attributes:
        replays: Number of graph replays in the last request.
    """

    def __init__(self, context: PipelineContext, name: str, module: nn.Module, limit: int):
        self.name, self.module, self.limit = name, module, limit
        self._context = weakref.ref(context)
        self.replays = 0
        # Signature of a call -> its captured forward; `None` after the first call.
        self._variants: dict[Hashable, _CapturedForward | None] = {}
        self._weights: Hashable = None
        self._pool: Any = None
        self._request = 0
        self._refused: set[Hashable] = set()
        self._warned: set[str] = set()

    @property
    def captured(self) -> int:
        """Number of graphs that are held."""
        return sum(variant is not None for variant in self._variants.values())

    def around_module(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the module's forward."""
        context = self._context()
        if context is not None and self._request != context.clock.request:
            self._request, self.replays = context.clock.request, 0
        tensors, form = split((args, kwargs))
        refusal = self._refusal(args, kwargs, tensors, form)
        if refusal is not None:
            self._warn(refusal)
            return inner(*args, **kwargs)
        device = tensors[0].device
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device.type)
        key = (call_signature(args), call_signature(kwargs), modes)
        if key in self._refused:
            return inner(*args, **kwargs)
        if key not in self._variants:
            if len(self._variants) >= self.limit:
                self._warn(f"{self.limit} graph variants exist already (cuda_graph.limit)")
            else:
                self._variants[key] = None
            return inner(*args, **kwargs)
        captured = self._variants[key]
        if captured is None:
            try:
                captured = self._variants[key] = self._capture(inner, tensors, form)
            except RuntimeError as error:
                del self._variants[key]
                self._refused.add(key)
                self._warn(f"it cannot be captured ({first_line(error)})")
                return inner(*args, **kwargs)
        outputs = [item.clone() for item in captured.graph(tensors)]
        self.replays += 1
        return captured.output.fill(outputs)

    def _refusal(self, args: Any, kwargs: Any, tensors: list[torch.Tensor], form: Form) -> str | None:
        """The reason for which a call cannot be captured, or `None`. Graphs over old weights are dropped."""
        if torch.is_grad_enabled() and any(item.requires_grad for item in (*tensors, *self.module.parameters())):
            return "gradients are recorded"
        if not tensors or any(item.device.type not in GRAPH_BACKENDS for item in tensors):
            return "its arguments are not on a CUDA device"
        if any(_is_mutable(item) for item in (*args, *kwargs.values())):
            return "an argument can be written to and read in a later call"
        if not all(isinstance(item, CONSTANTS) for item in form.constants):
            return "an argument is neither a tensor nor a constant"
        found = dependencies_of(self.module)
        if found.weights != self._weights:
            self._variants.clear()
            self._refused.clear()
            self._pool, self._weights = None, found.weights
        return found.refusal

    def _capture(self, inner: Callable[..., Any], tensors: list[torch.Tensor], form: Form) -> _CapturedForward:
        output: list[Form] = []

        def function(buffers: list[torch.Tensor]) -> list[torch.Tensor]:
            args, kwargs = form.fill(buffers)
            found, form_of_output = split(inner(*args, **kwargs))
            if not all(isinstance(item, CONSTANTS) for item in form_of_output.constants):
                raise RuntimeError("it returns something besides tensors")
            output[:] = [form_of_output]
            return found

        backend = GRAPH_BACKENDS[tensors[0].device.type]
        if self._pool is None:
            self._pool = backend.pool()
        graph = CapturedGraph(tensors, function, backend(self._pool, tensors[0].device))
        return _CapturedForward(graph, output[0])

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"cuda_graph: {self.name} runs without graphs: {reason}.", stacklevel=3)


def _is_mutable(value: Any) -> bool:
    """Whether a module may keep something in an argument, e.g. the feature cache of a video decoder."""
    return isinstance(value, (list, dict, set)) and bool(value)
