"""Ranks must be given the same. Where a script draws random numbers without a generator of its own, all draw rank 0's;
and what a request's first call is given is compared, so that ranks that differ are told apart by name instead of mixing
two pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...core.comm import Group
from ...errors import RanksDiffer, Unsupported
from ...models.adapter import by_name, parameter_names
from ..context import Denoiser, PipelineContext

# Tensors of no more values are compared as they are, others by so many sums.
_FEW, _SUMS = 64, 65


def same_random_numbers(everyone: Group, device: str) -> Callable[..., Any]:
    """The layer around the pipeline's check of its inputs, which is where a request begins."""
    # This rank's GPU is the current one here, and need not be later.
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)

    def check_inputs(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Through the device, which any process group that we are given knows.
        torch.set_rng_state(everyone.broadcast(torch.get_rng_state().to(place), 0).cpu())
        if place.type == "cuda":
            torch.cuda.set_rng_state(everyone.broadcast(torch.cuda.get_rng_state(place).to(place), 0).cpu(), place)
        return inner(*args, **kwargs)

    return check_inputs


class Agreement:
    """Compares what ranks are given, at the first call of every request: its form before the call, since ranks that
    differ in it would wait for each other for ever, and its values when the next call begins, when they have long been
    exchanged and nobody waits for them.

    Args:
        context: The pipeline.
        everyone: All ranks.
    """

    def __init__(self, context: PipelineContext, everyone: Group):
        self.context, self.everyone = context, everyone
        self._request = 0
        self._judge: Callable[[], None] | None = None

    def around_denoiser(self, denoiser: Denoiser) -> Callable[..., Any]:
        """The layer around a denoiser's forward."""
        names = parameter_names(denoiser.module)

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state = self.context.clock.current
            if state is not None and state.request != self._request:
                self._request = state.request
                for windows in self.context.outputs.windows:
                    windows.begin()
                self._judge = self._compare(by_name(names, args, kwargs), str(denoiser))
                out = inner(*args, **kwargs)
                # There may be no next call.
                if state.last:
                    self._judged()
                return out
            self._judged()
            return inner(*args, **kwargs)

        return forward

    def _judged(self) -> None:
        judge, self._judge = self._judge, None
        if judge is not None:
            judge()

    def _compare(self, arguments: dict[str, Any], denoiser: str) -> Callable[[], None]:
        """Compares forms, and begins to exchange values; what is returned compares these."""
        marks = {name: _marks(value) for name, value in arguments.items()}
        forms = {name: [_form(mark) for mark in each] for name, each in marks.items()}
        told = self.everyone.objects((_gpu(arguments), forms))
        _refuse_one_gpu([gpu for gpu, _ in told], denoiser)
        for rank, other in enumerate(everyone := [form for _, form in told]):
            for name in dict.fromkeys([*everyone[0], *other]):
                if name not in everyone[0] or name not in other or everyone[0][name] != other[name]:
                    raise _differ(denoiser, name, rank, everyone[0].get(name), other.get(name))
        own = [(name, mark) for name, each in marks.items() for mark in each if isinstance(mark, _Mark)]
        if not own:
            return lambda: None
        device = max((mark.values.device for _, mark in own), key=lambda item: item.type == "cuda")
        values = torch.cat([mark.values.to(device) for _, mark in own])
        found = torch.stack(self.everyone.gather(values, 0))
        there = None
        if device.type == "cuda":
            found = found.to("cpu", non_blocking=True)
            there = torch.cuda.Event()
            there.record(torch.cuda.current_stream(device))

        def judge() -> None:
            if there is not None:
                there.synchronize()
            lengths = [mark.values.numel() for _, mark in own]
            parts = [rank.split(lengths) for rank in found]
            for rank, part in enumerate(parts):
                for (name, mark), one, two in zip(own, parts[0], part, strict=True):
                    if not replace(mark, values=one).alike(replace(mark, values=two)):
                        raise _differ(denoiser, name, rank, forms[name], forms[name])

        return judge


def _gpu(arguments: Any) -> str | None:
    """What tells the GPU that a call's tensors are on from all others."""
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda":
            return str(torch.cuda.get_device_properties(leaf.device).uuid)
    return None


def _refuse_one_gpu(gpus: list[str | None], denoiser: str) -> None:
    """Ranks on one GPU, where something has brought them since `accelerate`, would wait for each other for ever."""
    for rank, gpu in enumerate(gpus):
        first = gpus.index(gpu)
        if gpu is not None and first != rank:
            raise Unsupported(
                "parallel",
                f"ranks {first} and {rank} are on one GPU.",
                "after accelerate, pipe.to('cuda') and offloading without a GPU's number, or with the process's own "
                "(LOCAL_RANK).",
                denoiser,
            )


def _form(mark: Any) -> Any:
    return mark.form if isinstance(mark, _Mark) else mark


def _differ(denoiser: str, name: str, rank: int, first: list[Any] | None, other: list[Any] | None) -> RanksDiffer:
    return RanksDiffer(
        f"parallel: {name} of {denoiser} is not the same on ranks 0 and {rank}: {_short(first)} and {_short(other)}. "
        "Every rank must be given the same request: the same prompt, sizes, and a generator with the same seed."
    )


@dataclass(frozen=True)
class _Mark:
    """What tells tensors apart: their form, and sums of every n-th value with that of all squares, or the values if
    they are few; float64, on the tensor's device."""

    form: tuple[tuple[int, ...], str]
    values: torch.Tensor
    few: bool

    @classmethod
    def of(cls, x: torch.Tensor) -> _Mark:
        wide = (torch.view_as_real(x) if x.is_complex() else x).double().flatten()
        few = wide.numel() <= _FEW
        if not few:
            sums = torch.nn.functional.pad(wide, (0, -wide.numel() % _SUMS)).view(-1, _SUMS).sum(0)
            wide = torch.cat([sums, wide.square().sum()[None]])
        return cls((tuple(x.shape), str(x.dtype)), wide, few)

    def alike(self, other: _Mark) -> bool:
        """Whether they are the same but for rounding: ranks may compute a prompt's embedding by other kernels. Rounded
        to bf16 throughout, a sum of n values of size s moves by 0.2% of s sqrt(n); another seed moves it by 140%."""
        if self.form != other.form or self.few:
            return self.form == other.form and torch.equal(self.values, other.values)
        bound = 0.01 * (torch.maximum(self.values[-1], other.values[-1]) / _SUMS).sqrt()
        return bool(((self.values[:-1] - other.values[:-1]).abs() <= bound).all())


def _marks(value: Any) -> list[Any]:
    """Of everything in an argument that can be compared."""
    leaves = pytree.tree_leaves(value)
    kept = [leaf for leaf in leaves if isinstance(leaf, (torch.Tensor, bool, int, float, str, type(None)))]
    return [_Mark.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in kept]


def _short(forms: list[Any] | None) -> str:
    if forms is None:
        return "not given"
    return ", ".join(f"{item[0]} {item[1]}" if isinstance(item, tuple) else repr(item) for item in forms)
