"""Ranks must be given the same. Where a script draws random numbers without a generator of its own, all draw rank 0's;
and what a request's first call is given is compared, so that ranks that differ are told apart by name instead of mixing
two pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...core.comm import Group
from ...core.mesh import Mesh
from ...errors import RanksDiffer
from ...models.adapter import parameter_names
from ..feature import Denoiser, Target


def same_random_numbers(everyone: Group, device: str) -> Callable[..., Any]:
    """The layer around the pipeline's check of its inputs, which is where a request begins."""

    def check_inputs(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        torch.set_rng_state(everyone.broadcast(torch.get_rng_state(), 0))
        if device == "cuda":
            torch.cuda.set_rng_state(everyone.broadcast(torch.cuda.get_rng_state(), 0))
        return inner(*args, **kwargs)

    return check_inputs


class Agreement:
    """Compares what ranks are given, at the first call of every request.

    Args:
        target: The pipeline.
        everyone: All ranks.
        mesh: Who they are.
    """

    def __init__(self, target: Target, everyone: Group, mesh: Mesh):
        self.target, self.everyone, self.mesh = target, everyone, mesh
        self._request = 0

    def around_denoiser(self, denoiser: Denoiser) -> Callable[..., Any]:
        """The layer around a denoiser's forward."""
        names = parameter_names(denoiser.module)

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state = self.target.clock.current
            if state is not None and state.request != self._request:
                self._request = state.request
                self._compare({**dict(zip(names, args, strict=False)), **kwargs}, str(denoiser))
            return inner(*args, **kwargs)

        return forward

    def _compare(self, arguments: dict[str, Any], denoiser: str) -> None:
        mine = {name: _mark(value) for name, value in arguments.items()}
        for rank, marks in enumerate(everyone := self.everyone.objects(mine)):
            for name in dict.fromkeys([*everyone[0], *marks]):
                first, other = everyone[0].get(name), marks.get(name)
                if first != other:
                    raise RanksDiffer(
                        f"parallel: {name} of {denoiser} is not the same on ranks 0 and {rank}: {first} and {other} "
                        "(shape, type, sums). Every rank must be given the same request: the same prompt, sizes, and a "
                        "generator with the same seed."
                    )


def _mark(value: Any) -> Any:
    """What tells two arguments apart: shapes, types, and sums of tensors."""
    marks: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            wide = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            wide = wide.double()
            marks.append((tuple(leaf.shape), str(leaf.dtype), float(wide.sum()), float(wide.square().sum())))
        elif isinstance(leaf, (bool, int, float, str, type(None))):
            marks.append(leaf)
    return marks
