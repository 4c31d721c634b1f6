"""Input consistency: all ranks must be given the same request.

Owns two measures. All ranks get rank 0's random state, for scripts that draw random numbers without a generator. The
arguments of a request's first call are compared. If they differ, all ranks raise `RanksDiffer`, which names the
argument, instead of mixing two pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...compat.torch_private import pytree
from ...core.comm import Group
from ...errors import RanksDiffer, Unsupported
from ...models.adapter import by_name, parameter_names
from ..context import Denoiser, PipelineContext

# Tensors of up to `_COMPARED_WHOLE` values are compared value by value, and larger tensors by `_SUMS` sums.
_COMPARED_WHOLE, _SUMS = 64, 65


def broadcast_rng_state(world: Group, device: str) -> Callable[..., Any]:
    """The layer around `check_inputs`, with which a request begins: all ranks take over rank 0's random state.

    Args:
        world: All ranks.
        device: Device type of the pipeline; the state of this rank's GPU is taken over too.
    """
    # The rank's GPU is the current one now, and may not be later.
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)

    def check_inputs(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Over the device: every process group can send from it, NCCL's from nothing else.
        torch.set_rng_state(world.broadcast(torch.get_rng_state().to(place), 0).cpu())
        if place.type == "cuda":
            torch.cuda.set_rng_state(world.broadcast(torch.cuda.get_rng_state(place).to(place), 0).cpu(), place)
        return inner(*args, **kwargs)

    return check_inputs


class InputConsistency:
    """Compares the arguments of every request's first call among ranks.

    Shapes and dtypes are compared before the call: ranks that differ in them would wait for each other for ever. Values
    are gathered meanwhile, and compared when the next call begins, so that no rank waits for them.

    Args:
        context: The pipeline.
        world: All ranks.
    """

    def __init__(self, context: PipelineContext, world: Group):
        self.context, self.world = context, world
        self._request = 0
        self._pending_check: Callable[[], None] | None = None

    def around_denoiser(self, denoiser: Denoiser) -> Callable[..., Any]:
        """The layer around a denoiser's forward."""
        names = parameter_names(denoiser.module)

        def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state = self.context.clock.current
            if state is not None and state.request != self._request:
                self._request = state.request
                for memory in self.context.outputs.symm_mem:
                    memory.resynchronize()
                self._pending_check = self._compare(by_name(names, args, kwargs), str(denoiser))
                out = inner(*args, **kwargs)
                # There may be no next call.
                if state.last:
                    self._finish_check()
                return out
            self._finish_check()
            return inner(*args, **kwargs)

        return forward

    def _finish_check(self) -> None:
        check, self._pending_check = self._pending_check, None
        if check is not None:
            check()

    def _compare(self, arguments: dict[str, Any], denoiser: str) -> Callable[[], None]:
        """Compares metadata, begins to gather values, and returns a function that compares these.

        Raises:
            RanksDiffer: Shapes, dtypes or plain values differ.
            Unsupported: Two ranks are on one GPU.
        """
        fingerprints = {name: _fingerprints(value) for name, value in arguments.items()}
        metadata = {name: [_metadata(fingerprint) for fingerprint in each] for name, each in fingerprints.items()}
        gathered = self.world.all_gather_object((_gpu_uuid(arguments), metadata))
        _refuse_shared_gpu([gpu for gpu, _ in gathered], denoiser)
        for rank, other in enumerate(world := [metadata for _, metadata in gathered]):
            for name in dict.fromkeys([*world[0], *other]):
                if name not in world[0] or name not in other or world[0][name] != other[name]:
                    raise _differ(denoiser, name, rank, world[0].get(name), other.get(name))
        own = [
            (name, fingerprint)
            for name, each in fingerprints.items()
            for fingerprint in each
            if isinstance(fingerprint, _Fingerprint)
        ]
        if not own:
            return lambda: None
        device = max((fingerprint.values.device for _, fingerprint in own), key=lambda item: item.type == "cuda")
        values = torch.cat([fingerprint.values.to(device) for _, fingerprint in own])
        found = torch.stack(self.world.all_gather(values, 0))
        there = None
        if device.type == "cuda":
            found = found.to("cpu", non_blocking=True)
            there = torch.cuda.Event()
            there.record(torch.cuda.current_stream(device))

        def check() -> None:
            if there is not None:
                there.synchronize()
            lengths = [fingerprint.values.numel() for _, fingerprint in own]
            parts = [rank.split(lengths) for rank in found]
            for rank, part in enumerate(parts):
                for (name, fingerprint), one, two in zip(own, parts[0], part, strict=True):
                    if not replace(fingerprint, values=one).matches(replace(fingerprint, values=two)):
                        raise _differ(denoiser, name, rank, metadata[name], metadata[name])

        return check


def _gpu_uuid(arguments: Any) -> str | None:
    """The UUID of the GPU that a call's tensors are on; `None` on the CPU."""
    for leaf in pytree.tree_leaves(arguments):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda":
            return str(torch.cuda.get_device_properties(leaf.device).uuid)
    return None


def _refuse_shared_gpu(gpus: list[str | None], denoiser: str) -> None:
    """Refuses ranks on one GPU, to which something has moved them since `accelerate`: NCCL would deadlock."""
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


def _metadata(fingerprint: Any) -> Any:
    return fingerprint.metadata if isinstance(fingerprint, _Fingerprint) else fingerprint


def _differ(denoiser: str, name: str, rank: int, first: list[Any] | None, other: list[Any] | None) -> RanksDiffer:
    return RanksDiffer(
        f"parallel: {name} of {denoiser} is not the same on ranks 0 and {rank}: {_short(first)} and {_short(other)}. "
        "Every rank must be given the same request: the same prompt, sizes, and a generator with the same seed."
    )


@dataclass(frozen=True)
class _Fingerprint:
    """A short description of a tensor, by which ranks compare it.

    Attributes:
        metadata: Shape and dtype.
        values: float64, on the tensor's device: all values of a small tensor; otherwise sums over every `_SUMS`-th
            value, then the sum of squares.
        few: Whether `values` are all of the tensor's.
    """

    metadata: tuple[tuple[int, ...], str]
    values: torch.Tensor
    few: bool

    @classmethod
    def of(cls, x: torch.Tensor) -> _Fingerprint:
        wide = (torch.view_as_real(x) if x.is_complex() else x).double().flatten()
        few = wide.numel() <= _COMPARED_WHOLE
        if not few:
            sums = torch.nn.functional.pad(wide, (0, -wide.numel() % _SUMS)).view(-1, _SUMS).sum(0)
            wide = torch.cat([sums, wide.square().sum()[None]])
        return cls((tuple(x.shape), str(x.dtype)), wide, few)

    def matches(self, other: _Fingerprint) -> bool:
        """Whether two tensors are equal up to rounding: ranks may compute a prompt's embedding with different kernels.

        Rounding to bf16 throughout moves a sum of n values of size s by 0.2% of s sqrt(n); another seed moves it by
        140%.
        """
        if self.metadata != other.metadata or self.few:
            return self.metadata == other.metadata and torch.equal(self.values, other.values)
        bound = 0.01 * (torch.maximum(self.values[-1], other.values[-1]) / _SUMS).sqrt()
        return bool(((self.values[:-1] - other.values[:-1]).abs() <= bound).all())


def _fingerprints(value: Any) -> list[Any]:
    """Fingerprints of an argument's tensors, and its plain values; other objects are left out."""
    leaves = pytree.tree_leaves(value)
    kept = [leaf for leaf in leaves if isinstance(leaf, (torch.Tensor, bool, int, float, str, type(None)))]
    return [_Fingerprint.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in kept]


def _short(metadata: list[Any] | None) -> str:
    if metadata is None:
        return "not given"
    return ", ".join(f"{item[0]} {item[1]}" if isinstance(item, tuple) else repr(item) for item in metadata)
