"""CUDA graphs: a function captured once on the GPU and replayed in one call, over buffers that stay in place.

A graph holds addresses. Inputs are therefore copied into buffers of the graph before every replay, and outputs lie in
buffers that the next replay overwrites. `GraphBackend` is the seam between a graph and the device that captures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch


class GraphBackend(Protocol):
    """Captures one function on a device, and replays it.

    Args:
        pool: The memory pool, made by `pool`.
        device: The device that the function runs on.
    """

    def __init__(self, pool: Any, device: torch.device): ...

    def warm_up(self, function: Callable[[], list[torch.Tensor]]) -> None:
        """Runs the function without capture, so that one-time work (autotuning, workspaces) is done."""
        ...

    def capture(self, function: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Captures the function. Its kernels do not run.

        Returns:
            The function's tensors, which every replay fills.
        """
        ...

    def replay(self) -> None:
        """Runs the captured kernels."""
        ...

    @staticmethod
    def pool() -> Any:
        """A new memory pool. Graphs of one pool share memory, so only one of them may be in use at a time."""
        ...


@cache
def _capture_stream(device: torch.device) -> Any:
    """The stream on which a device captures. torch's default capture stream belongs to the device of the process's
    first capture."""
    return torch.cuda.Stream(device)


class CudaGraphBackend:
    """A CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)."""

    def __init__(self, pool: Any, device: torch.device):
        self._pool, self._device, self._graph = pool, device, torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], list[torch.Tensor]]) -> None:
        """See `GraphBackend`. The function runs on a side stream, as torch requires before a capture: on the stream of
        captures, since libraries keep a workspace for each stream."""
        stream, current = _capture_stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()
        current.wait_stream(stream)

    def capture(self, function: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """See `GraphBackend`."""
        stream = _capture_stream(self._device)
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            return function()

    def replay(self) -> None:
        """See `GraphBackend`."""
        self._graph.replay()

    @staticmethod
    def pool() -> Any:
        """See `GraphBackend`."""
        return torch.cuda.graph_pool_handle()


# Device type -> backend. The tests add one for the CPU.
GRAPH_BACKENDS: dict[str, type[GraphBackend]] = {"cuda": CudaGraphBackend}


class Copies(Protocol):
    """Copies of weights that a graph records beside its kernels (`streaming.RecordedCopies`)."""

    def prepare(self) -> None:
        """Called before the function runs, is captured or replayed."""
        ...

    def recording(self) -> AbstractContextManager[None]:
        """A context around the function while it is captured."""
        ...

    def replayed(self) -> None:
        """Called after each replay."""
        ...


class CapturedGraph:
    """One captured function with its input and output buffers.

    Args:
        inputs: Tensors of one call. The graph keeps buffers of its own with the same layouts.
        function: The function to capture; called with the buffers, it returns tensors.
        backend: The backend that captures it.
        copies: Copies of weights within the function; `None` without any.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        function: Callable[[list[torch.Tensor]], list[torch.Tensor]],
        backend: GraphBackend,
        copies: Copies | None = None,
    ):
        self._inputs = [_buffer_like(item) for item in inputs]
        self._backend, self._copies = backend, copies
        self._copy(inputs)
        if copies is not None:
            copies.prepare()
        backend.warm_up(lambda: function(self._inputs))
        # The second copy raises the buffers' version. An activation cache that was filled during warm-up then sees a
        # new version, so that the layer computes again and its work is part of the graph.
        self._copy(inputs)
        if copies is not None:
            copies.prepare()

        def recorded() -> list[torch.Tensor]:
            with copies.recording() if copies is not None else nullcontext():
                return function(self._inputs)

        self._outputs = backend.capture(recorded)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Replays the graph over these tensors.

        Returns:
            The graph's output buffers, valid until the next call.
        """
        self._copy(inputs)
        if self._copies is not None:
            self._copies.prepare()
        self._backend.replay()
        if self._copies is not None:
            self._copies.replayed()
        return self._outputs

    def fits(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether tensors have the number, shapes, dtypes and devices of the captured call's."""
        return len(inputs) == len(self._inputs) and all(
            (one.shape, one.dtype, one.device) == (own.shape, own.dtype, own.device)
            for one, own in zip(inputs, self._inputs, strict=True)
        )

    def _copy(self, inputs: Sequence[torch.Tensor]) -> None:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)


def _buffer_like(item: torch.Tensor) -> torch.Tensor:
    """An empty tensor with the strides of `item`, because kernels are chosen by strides too. A broadcast tensor gets a
    contiguous buffer."""
    if any(stride == 0 and size > 1 for size, stride in zip(item.shape, item.stride(), strict=True)):
        return torch.empty_like(item, memory_format=torch.contiguous_format)
    return torch.empty_strided(item.size(), item.stride(), dtype=item.dtype, device=item.device)
