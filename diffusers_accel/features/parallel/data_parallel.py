"""Data parallelism: the samples of a batch are shared among ranks, and every rank ends with the whole batch.

Also owns the slicing of a denoiser's arguments along the batch, which `cfg_parallel.py` uses for calls that hold
several branches as one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compat.torch_private import pytree
from ...core.comm import Group, shard_sizes
from ...models.adapter import by_name, parameter_names
from ..context import Denoiser


class DataParallel:
    """Shares the samples of one denoiser's batches among the ranks of a group.

    Args:
        denoiser: The denoiser.
        group: The ranks along the axis `dp`.
    """

    def __init__(self, denoiser: Denoiser, group: Group):
        self.denoiser, self.group = denoiser, group
        self._names = parameter_names(denoiser.module)

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward. A batch with fewer samples than ranks is computed by all of them."""
        arguments = by_name(self._names, args, kwargs)
        batch = batch_size(latents_of(self.denoiser, arguments)[0])
        if batch < self.group.size:
            return inner(*args, **kwargs)
        counts = shard_sizes(batch, self.group.size)
        start = sum(counts[: self.group.rank])
        out = inner(**select_samples(self.denoiser, arguments, batch, start, counts[self.group.rank]))
        return pytree.tree_map(
            lambda item: torch.cat(self.group.all_gather(item, 0, counts)) if is_tensor(item) else item, out
        )


def select_samples(denoiser: Denoiser, arguments: dict[str, Any], batch: int, start: int, count: int) -> dict[str, Any]:
    """A denoiser's arguments for some samples of a batch.

    Args:
        denoiser: The denoiser; its adapter names arguments without a batch dimension.
        arguments: All arguments by name.
        batch: Samples of the whole batch.
        start: The first sample.
        count: The number of samples.
    """
    whole = denoiser.adapter.unbatched
    return {name: value if name in whole else _select(value, batch, start, count) for name, value in arguments.items()}


def _select(value: Any, batch: int, start: int, count: int) -> Any:
    """Some samples of an argument: tensors along their first dimension, and lists with a list for each sample (shapes
    of pictures, for instance)."""
    if isinstance(value, torch.Tensor):
        return value[start : start + count] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _select(item, batch, start, count) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == batch and all(isinstance(item, (list, tuple)) for item in value):
            return value[start : start + count]
        return type(value)(_select(item, batch, start, count) for item in value)
    return value


def latents_of(denoiser: Denoiser, arguments: dict[str, Any]) -> list[Any]:
    """The latents among a call's arguments: the arguments that the adapter names, otherwise the first argument."""
    known = [arguments[name] for name in denoiser.adapter.denoised if arguments.get(name) is not None]
    return known or [next(iter(arguments.values()))]


def batch_size(latents: Any) -> int:
    """Samples of one call; 1 for packed sequences."""
    return int(latents.shape[0]) if isinstance(latents, torch.Tensor) else 1


def is_tensor(item: Any) -> bool:
    return isinstance(item, torch.Tensor)
