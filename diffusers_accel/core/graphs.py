"""CUDA graphs: what a function launched once on the GPU, launched again in one call, over buffers that stay.

A graph holds addresses. So what goes in is copied into buffers of its own before every replay, and what comes out lies
in buffers that the next replay overwrites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """Records one function, and plays it again.

    Args:
        pool: What `pool` returned.
        device: Where the function works.
    """

    def __init__(self, pool: Any, device: torch.device): ...

    def prepare(self, function: Callable[[], list[torch.Tensor]]) -> None:
        """Runs the function as it is, so that whatever it does only the first time is done."""
        ...

    def record(self, function: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Runs the function without its effect on the GPU, and returns the tensors that a replay fills."""
        ...

    def replay(self) -> None:
        """Does on the GPU what the function did."""
        ...

    @staticmethod
    def pool() -> Any:
        """Memory that several recordings share, one being replayed at a time."""
        ...


@cache
def _capture_stream(device: torch.device) -> Any:
    """A device's stream for captures. torch keeps one for the process, on whichever device the first capture was; one
    for each graph would have libraries keep memory for each."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """A CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)."""

    def __init__(self, pool: Any, device: torch.device):
        self._pool, self._device, self._graph = pool, device, torch.cuda.CUDAGraph()

    def prepare(self, function: Callable[[], list[torch.Tensor]]) -> None:
        """See `Recorder`. On a stream of its own, as libraries keep memory for each."""
        stream, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()
        current.wait_stream(stream)

    def record(self, function: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """See `Recorder`."""
        stream = _capture_stream(self._device)
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            return function()

    def replay(self) -> None:
        """See `Recorder`."""
        self._graph.replay()

    @staticmethod
    def pool() -> Any:
        """See `Recorder`."""
        return torch.cuda.graph_pool_handle()


# By type of device. The tests add one for the CPU.
RECORDERS: dict[str, type[Recorder]] = {"cuda": CudaRecorder}


class Recording:
    """One function over static inputs.

    Args:
        inputs: Tensors of one call; the recording keeps copies of its own.
        function: Takes the copies.
        recorder: What records it.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        function: Callable[[list[torch.Tensor]], list[torch.Tensor]],
        recorder: Recorder,
    ):
        self._inputs = [_like(item) for item in inputs]
        self._recorder = recorder
        self._copy(inputs)
        recorder.prepare(lambda: function(self._inputs))
        # Written again: what was kept for these tensors while preparing is no part of the recording, and their new
        # version says so to whoever kept it.
        self._copy(inputs)
        self._outputs = recorder.record(lambda: function(self._inputs))

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Replays it over these tensors. The result is valid until the next call."""
        self._copy(inputs)
        self._recorder.replay()
        return self._outputs

    def fits(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether these have the shapes, types and places of those it was made with."""
        return len(inputs) == len(self._inputs) and all(
            (one.shape, one.dtype, one.device) == (own.shape, own.dtype, own.device)
            for one, own in zip(inputs, self._inputs, strict=True)
        )

    def _copy(self, inputs: Sequence[torch.Tensor]) -> None:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)


def _like(item: torch.Tensor) -> torch.Tensor:
    """Memory of its own in the same layout: kernels are chosen by strides too. Broadcast dimensions are filled."""
    if any(stride == 0 and size > 1 for size, stride in zip(item.shape, item.stride(), strict=True)):
        return torch.empty_like(item, memory_format=torch.contiguous_format)
    return torch.empty_strided(item.size(), item.stride(), dtype=item.dtype, device=item.device)
