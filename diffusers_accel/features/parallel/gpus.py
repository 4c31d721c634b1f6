"""Each rank on a GPU of its own.

Where a script says `pipe.to("cuda")` every rank's pipeline is on the first GPU, unless the launcher shows each process
one GPU alone. Ranks that are on one GPU are therefore moved: each to the GPU that has its number on this machine, which
the launcher has told it (LOCAL_RANK). Which ranks move is decided by all alike, from what all have said, so a script
that has placed its pipelines otherwise is left alone, and whatever is wrong is raised by all.

That GPU becomes the process's current one, and stays it, as the process group stays: generators and tensors that a
script makes on "cuda" from then on are there. A generator made before may be on the first GPU, since torch draws the
same numbers from it on any; tensors made before are brought along where a denoiser is given them. Models that wait on
the host for their turn (`enable_model_cpu_offload`, `enable_sequential_cpu_offload`, before or after) go to the rank's
GPU too.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...core.comm import Group
from ...core.edits import AddLayer, Edit, MoveTensors, SetAttr
from ...core.mesh import own_gpu
from ...core.submodules import submodules
from ...errors import Unsupported
from ..context import PipelineContext

_INSTEAD = (
    "`torchrun --virtual-local-rank ...`, which shows each process a GPU of its own, or torch.cuda.set_device(n) with "
    "n the process's number on its machine before the pipeline is moved to 'cuda'; no more processes than GPUs."
)


@dataclass(frozen=True)
class Seat:
    """Where one rank's pipeline is, and where it could be.

    Attributes:
        name: The GPU it is on, e.g. `"cuda:0"`.
        gpu: What tells that GPU from all others, also of other machines.
        own: The same of the GPU that the launcher's number means; `None` if there is no number, or no choice.
        bound: Why the pipeline cannot be moved, if it cannot.
    """

    name: str
    gpu: str
    own: str | None
    bound: str | None


def notes(context: PipelineContext) -> list[str]:
    """What `explain` says of it. Whether others are on the same GPU is not known until they are asked."""
    if context.device.type != "cuda":
        return []
    here, own = _gpu(context), _own()
    if own is None or own == here:
        return []
    return [f"The pipeline goes from {here} to {own}, this rank's GPU by LOCAL_RANK, if others are on {here} too."]


def beforehand(context: PipelineContext) -> Iterator[Edit]:
    """Has a pipeline on the host go to this rank's GPU, should it be moved or offloaded afterwards: that is the
    process's current one from now on."""
    if _own() is not None:
        torch.cuda.set_device(own_gpu())
        yield from _offloading(context)


def edits(context: PipelineContext, ranks: Group) -> Iterator[Edit]:
    """Moves this rank's pipeline if it has to be."""
    here, own = _gpu(context), _own()
    modules = [module for module in context.pipe.components.values() if isinstance(module, nn.Module)]
    # A process group that knows no other way than NCCL's asks through the current GPU, which must not be everybody's.
    torch.cuda.set_device(here if own is None else own)
    seats = ranks.objects(_seat(modules, here, own))
    moved = moving(seats)
    if ranks.rank not in moved:
        torch.cuda.set_device(here)
    else:
        assert own is not None
        if ranks.rank == moved[0]:
            warnings.warn(
                f"accelerate: pipelines were on one GPU; those of ranks {list(moved)} have been moved to GPUs of their "
                "own, by LOCAL_RANK. `torchrun --virtual-local-rank` needs no moving, and no room for all on one GPU.",
                stacklevel=2,
            )
        yield MoveTensors(modules, here, own)
        yield _MoveHooks(modules, here, own)
        if "_offload_device" in vars(context.pipe):
            yield SetAttr(context.pipe, "_offload_device", own)
        for denoiser in context.denoisers:
            yield AddLayer(denoiser.module, context.rank("gpu"), brought(here, own))
    yield from _offloading(context)
    if moved:
        # Whoever stays has the GPU to itself before it goes on.
        ranks.objects(None)


def _offloading(context: PipelineContext) -> Iterator[Edit]:
    """Models that are offloaded from now on, or whose hooks are renewed, as after every request, go to the current
    GPU."""
    index = torch.cuda.current_device()
    if index != vars(context.pipe).get("_offload_gpu_id", 0):
        yield SetAttr(context.pipe, "_offload_gpu_id", index)


def moving(seats: Sequence[Seat]) -> tuple[int, ...]:
    """The ranks that go to the GPU the launcher means for them: those that are on one GPU with others.

    Raises:
        Unsupported: One of them cannot be moved, or some are on one GPU even so.
    """
    shared = [rank for rank, seat in enumerate(seats) if sum(other.gpu == seat.gpu for other in seats) > 1]
    moved = tuple(rank for rank in shared if seats[rank].own not in (None, seats[rank].gpu))
    for rank in moved:
        if seats[rank].bound is not None:
            raise Unsupported(
                "parallel",
                f"the pipelines of ranks {shared} are on one GPU, and rank {rank}'s cannot be moved to its own: "
                f"{seats[rank].bound}.",
                _INSTEAD,
            )
    then = [seat.own if rank in moved else seat.gpu for rank, seat in enumerate(seats)]
    for gpu in then:
        twins = [rank for rank, other in enumerate(then) if other == gpu]
        if len(twins) > 1:
            raise Unsupported("parallel", f"ranks {twins} have one GPU, {seats[twins[0]].name}.", _INSTEAD)
    return moved


@dataclass(eq=False)
class _MoveHooks:
    """Has accelerate's hooks bring models to another GPU than they would.

    Args:
        modules: The models.
        here: The GPU that they bring them to.
        there: The one that they are to.
    """

    modules: Sequence[nn.Module]
    here: torch.device
    there: torch.device

    def apply(self) -> None:
        self._turn(self.here, self.there)

    def undo(self) -> None:
        self._turn(self.there, self.here)

    def _turn(self, here: torch.device, there: torch.device) -> None:
        for module in self.modules:
            for hook in _hooks(module):
                if _brings_to(hook) == here:
                    hook.execution_device = there


def _hooks(module: nn.Module) -> list[Any]:
    """Hooks of accelerate's, on a model and all that is in it."""
    found: list[Any] = []
    waiting = [vars(part)["_hf_hook"] for part in submodules(module) if "_hf_hook" in vars(part)]
    while waiting:
        hook = waiting.pop()
        inside = getattr(hook, "hooks", None)
        waiting += inside or []
        found += [] if inside else [hook]
    return found


def _brings_to(hook: Any) -> torch.device | None:
    """The device that a hook brings weights to."""
    device = getattr(hook, "execution_device", None)
    if isinstance(device, int):
        return torch.device("cuda", device)
    return None if device is None else torch.device(device)


def _bound_by(module: nn.Module) -> str | None:
    """What keeps a model on a GPU of its own."""
    name = type(module).__name__
    # One whose device is nobody's only puts outputs where inputs were, as sequential offloading has them.
    if not all(hasattr(hook, "execution_device") for hook in _hooks(module)):
        return f"hooks of its {name} move tensors to a device of their own"
    for part in submodules(module):
        for hook in getattr(vars(part).get("_diffusers_hook"), "hooks", {}).values():
            group = getattr(hook, "group", None)
            if group is None:
                continue
            if torch.device(group.onload_device).index is not None:
                return f"its {name} is offloaded in groups that go to {group.onload_device} and not to 'cuda'"
            if getattr(group, "stream", None) is not None:
                return f"its {name} is offloaded in groups, by a stream of another GPU"
    return None


def brought(here: torch.device, there: torch.device) -> Callable[..., Any]:
    """The layer around a moved denoiser's forward: what the script has made on the first GPU is brought along."""

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, torch.Tensor) and leaf.device == here for leaf in pytree.tree_leaves((args, kwargs))):
            args, kwargs = pytree.tree_map(
                lambda x: x.to(there) if isinstance(x, torch.Tensor) and x.device == here else x, (args, kwargs)
            )
        return inner(*args, **kwargs)

    return forward


def _own() -> torch.device | None:
    """The GPU that has this process's number on its machine, if it was given one and has a choice."""
    number, gpus = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    return torch.device("cuda", int(number)) if number is not None and gpus > 1 and int(number) < gpus else None


def _gpu(context: PipelineContext) -> torch.device:
    module = context.denoisers[0].module
    found = [next(module.parameters()).device, *filter(None, map(_brings_to, _hooks(module)))]
    gpus = [device for device in found if device.type == "cuda"]
    # A model that waits on the host for anything else goes to its rank's own GPU.
    return gpus[0] if gpus else own_gpu()


def _seat(modules: Sequence[nn.Module], here: torch.device, own: torch.device | None) -> Seat:
    properties = torch.cuda.get_device_properties
    return Seat(
        str(here),
        str(properties(here).uuid),
        None if own is None else str(properties(own).uuid),
        None if own is None else _bound(modules, here, own),
    )


def _bound(modules: Sequence[nn.Module], here: torch.device, own: torch.device) -> str | None:
    """Why a pipeline cannot be moved."""
    for module in modules:
        bound = _bound_by(module)
        if bound is not None:
            return bound
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.device.type == "cuda" and tensor.device != here:
                return f"its {type(module).__name__} is on {tensor.device} and not on {here}"
    names = [torch.cuda.get_device_name(device) for device in (here, own)]
    # What can run was judged by the first.
    return None if names[0] == names[1] else f"{own} ({names[1]}) is another kind of GPU than {here} ({names[0]})"
