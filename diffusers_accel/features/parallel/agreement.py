"""Ranks must be given the same. Where a script draws random numbers without a generator of its own, all draw rank 0's;
and what a request's first call is given is compared, so that ranks that differ are told apart by name instead of mixing
two pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...core.comm import Group
from ...errors import RanksDiffer
from ...models.adapter import by_name, parameter_names
from ..feature import Denoiser, Target

# Tensors of no more values are compared as they are, others by so many sums.
_FEW, _SUMS = 64, 65


def same_random_numbers(everyone: Group, device: str) -> Callable[..., Any]:
    """The layer around the pipeline's check of its inputs, which is where a request begins."""

    def check_inputs(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Through the device, which any process group that we are given knows.
        torch.set_rng_state(everyone.broadcast(torch.get_rng_state().to(device), 0).cpu())
        if device == "cuda":
            torch.cuda.set_rng_state(everyone.broadcast(torch.cuda.get_rng_state().to(device), 0).cpu())
        return inner(*args, **kwargs)

    return check_inputs


class Agreement:
    """Compares what ranks are given, at the first call of every request.

    Args:
        target: The pipeline.
        everyone: All ranks.
    """

    def __init__(self, target: Target, everyone: Group):
        self.target, self.everyone = target, everyone
        self._request = 0

    def around_denoiser(self, denoiser: Denoiser) -> Callable[..., Any]:
        """The layer around a denoiser's forward."""
        names = parameter_names(denoiser.module)

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state = self.target.clock.current
            if state is not None and state.request != self._request:
                self._request = state.request
                self._compare(by_name(names, args, kwargs), str(denoiser))
            return inner(*args, **kwargs)

        return forward

    def _compare(self, arguments: dict[str, Any], denoiser: str) -> None:
        mine = {name: _marks(value) for name, value in arguments.items()}
        for rank, marks in enumerate(everyone := self.everyone.objects(mine)):
            for name in dict.fromkeys([*everyone[0], *marks]):
                first, other = everyone[0].get(name), marks.get(name)
                if first is None or other is None or not _alike(first, other):
                    raise RanksDiffer(
                        f"parallel: {name} of {denoiser} is not the same on ranks 0 and {rank}: {_short(first)} and "
                        f"{_short(other)}. Every rank must be given the same request: the same prompt, sizes, and a "
                        "generator with the same seed."
                    )


@dataclass(frozen=True)
class _Mark:
    """What tells tensors apart: their form, and sums of every n-th value, or the values if they are few."""

    shape: tuple[int, ...]
    dtype: str
    sums: tuple[float, ...]
    size: float

    @classmethod
    def of(cls, x: torch.Tensor) -> _Mark:
        wide = (torch.view_as_real(x) if x.is_complex() else x).double().flatten()
        if wide.numel() > _FEW:
            wide_sums = torch.nn.functional.pad(wide, (0, -wide.numel() % _SUMS)).view(-1, _SUMS).sum(0)
        else:
            wide_sums = wide
        return cls(tuple(x.shape), str(x.dtype), tuple(wide_sums.tolist()), float(wide.square().sum()))

    def alike(self, other: _Mark) -> bool:
        """Whether they are the same but for rounding: ranks may compute a prompt's embedding by other kernels. Rounded
        to bf16 throughout, a sum of n values of size s moves by 0.2% of s sqrt(n); another seed moves it by 140%."""
        if (self.shape, self.dtype, len(self.sums)) != (other.shape, other.dtype, len(other.sums)):
            return False
        if len(self.sums) != _SUMS:
            return self.sums == other.sums
        bound = 0.01 * math.sqrt(max(self.size, other.size) / _SUMS)
        return all(abs(one - two) <= bound for one, two in zip(self.sums, other.sums, strict=True))


def _marks(value: Any) -> list[Any]:
    """Of everything in an argument that can be compared."""
    leaves = pytree.tree_leaves(value)
    kept = [leaf for leaf in leaves if isinstance(leaf, (torch.Tensor, bool, int, float, str, type(None)))]
    return [_Mark.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in kept]


def _alike(first: list[Any], other: list[Any]) -> bool:
    return len(first) == len(other) and all(
        one.alike(two) if isinstance(one, _Mark) and isinstance(two, _Mark) else one == two
        for one, two in zip(first, other, strict=True)
    )


def _short(marks: list[Any] | None) -> str:
    if marks is None:
        return "not given"
    return ", ".join(f"{tuple(item.shape)} {item.dtype}" if isinstance(item, _Mark) else repr(item) for item in marks)
