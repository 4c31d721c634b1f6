"""Rank devices: each rank's pipeline gets a GPU of its own.

After `pipe.to("cuda")` every rank's pipeline is on the first GPU, unless the launcher shows each process one GPU alone.
Ranks on a shared GPU are therefore moved to the GPU numbered LOCAL_RANK, which the launcher has set. All ranks compare
the devices of all ranks, and so decide alike: pipelines on different GPUs stay there, and all ranks raise the same
error.

The rank's GPU becomes and stays the process's current one. Generators and tensors that a script then makes on "cuda"
are on this GPU. An earlier generator may be on the first GPU, since torch draws the same numbers on any. An earlier
tensor is moved when it is passed to a denoiser. Models that wait on the host (`enable_model_cpu_offload`,
`enable_sequential_cpu_offload`, before or after) go to the rank's GPU too.
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

from ...compat.accelerate_private import ACCELERATE_HOOK
from ...compat.diffusers_private import OFFLOAD_DEVICE, OFFLOAD_GPU_ID, diffusers_hooks, offload_gpu
from ...compat.torch_private import pytree
from ...core.comm import Group
from ...core.edits import AddLayer, Edit, MoveTensors, SetAttr
from ...core.mesh import rank_device
from ...core.submodules import submodules
from ...errors import Unsupported
from ..context import PipelineContext

_INSTEAD = (
    "`torchrun --virtual-local-rank ...`, which shows each process a GPU of its own, or torch.cuda.set_device(n) with "
    "n the process's number on its machine before the pipeline is moved to 'cuda'; no more processes than GPUs."
)


@dataclass(frozen=True)
class RankDevice:
    """The device of one rank's pipeline, and the device that the launcher intends for it.

    Attributes:
        name: The device that the pipeline is on, e.g. `"cuda:0"`.
        uuid: The UUID of that GPU, unique among machines.
        local_uuid: The UUID of the GPU numbered LOCAL_RANK; `None` without the variable, or with a single GPU.
        pinned: The reason why the pipeline cannot be moved; `None` if it can.
    """

    name: str
    uuid: str
    local_uuid: str | None
    pinned: str | None


def notes(context: PipelineContext) -> list[str]:
    """Notes for `explain`. Other ranks' devices are known only when edits are applied."""
    if context.device.type != "cuda":
        return []
    here, own = _current_device(context), _local_rank_device()
    if own is None or own == here:
        return []
    return [f"The pipeline goes from {here} to {own}, this rank's GPU by LOCAL_RANK, if other ranks are on {here} too."]


def edits_on_host(context: PipelineContext) -> Iterator[Edit]:
    """Makes this rank's GPU the current one, so that a pipeline on the host goes there if it is moved or offloaded
    afterwards."""
    if _local_rank_device() is not None:
        torch.cuda.set_device(rank_device())
        yield from _offloading(context)


def edits(context: PipelineContext, ranks: Group) -> Iterator[Edit]:
    """Moves this rank's pipeline to the rank's GPU, if it shares one.

    Args:
        context: The pipeline, on a GPU.
        ranks: All ranks.

    Raises:
        Unsupported: A pipeline that shares a GPU cannot be moved, or there are fewer GPUs than ranks.
    """
    here, own = _current_device(context), _local_rank_device()
    modules = [module for module in context.pipe.components.values() if isinstance(module, nn.Module)]
    # NCCL gathers objects over the current GPU, which must differ among ranks.
    torch.cuda.set_device(here if own is None else own)
    devices = ranks.all_gather_object(_rank_device(modules, here, own))
    moved = ranks_to_move(devices)
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
        if OFFLOAD_DEVICE in vars(context.pipe):
            yield SetAttr(context.pipe, OFFLOAD_DEVICE, own)
        for denoiser in context.denoisers:
            yield AddLayer(denoiser.module, context.rank("rank device"), move_inputs(here, own))
    yield from _offloading(context)
    if moved:
        # Ranks that stay wait until the GPU is theirs alone.
        ranks.all_gather_object(None)


def _offloading(context: PipelineContext) -> Iterator[Edit]:
    """Sets the current GPU as the target of offloading, also of hooks that diffusers renews after a request."""
    index = torch.cuda.current_device()
    if index != vars(context.pipe).get(OFFLOAD_GPU_ID, 0):
        yield SetAttr(context.pipe, OFFLOAD_GPU_ID, index)


def ranks_to_move(devices: Sequence[RankDevice]) -> tuple[int, ...]:
    """The ranks whose pipelines move to the GPU numbered LOCAL_RANK: all that share a GPU.

    Args:
        devices: The devices of all ranks, in order.

    Raises:
        Unsupported: A pipeline that shares a GPU cannot be moved, or two ranks would share one afterwards.
    """
    shared = [rank for rank, device in enumerate(devices) if sum(other.uuid == device.uuid for other in devices) > 1]
    moved = tuple(rank for rank in shared if devices[rank].local_uuid not in (None, devices[rank].uuid))
    for rank in moved:
        if devices[rank].pinned is not None:
            raise Unsupported(
                "parallel",
                f"the pipelines of ranks {shared} are on one GPU, and rank {rank}'s cannot be moved to its own: "
                f"{devices[rank].pinned}.",
                _INSTEAD,
            )
    then = [device.local_uuid if rank in moved else device.uuid for rank, device in enumerate(devices)]
    for gpu in then:
        twins = [rank for rank, other in enumerate(then) if other == gpu]
        if len(twins) > 1:
            raise Unsupported("parallel", f"ranks {twins} have one GPU, {devices[twins[0]].name}.", _INSTEAD)
    return moved


@dataclass(eq=False)
class _MoveHooks:
    """Changes the execution device of accelerate's hooks.

    Args:
        modules: The models.
        here: The present execution device; hooks with another one stay.
        there: The new execution device.
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
                if _execution_device(hook) == here:
                    hook.execution_device = there


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of the package accelerate on a model and its submodules."""
    found: list[Any] = []
    waiting = [vars(part)[ACCELERATE_HOOK] for part in submodules(module) if ACCELERATE_HOOK in vars(part)]
    while waiting:
        hook = waiting.pop()
        inside = getattr(hook, "hooks", None)
        waiting += inside or []
        found += [] if inside else [hook]
    return found


def _execution_device(hook: Any) -> torch.device | None:
    """The device to which a hook moves weights; `None` if it moves none."""
    device = getattr(hook, "execution_device", None)
    if isinstance(device, int):
        return torch.device("cuda", device)
    return None if device is None else torch.device(device)


def _pinned_module(module: nn.Module) -> str | None:
    """The reason why hooks keep a model on one GPU; `None` if it can be moved."""
    name = type(module).__name__
    # A hook without an execution device only moves outputs to the inputs' device, as in sequential offloading.
    if not all(hasattr(hook, "execution_device") for hook in _hooks(module)):
        return f"hooks of its {name} move tensors to a device of their own"
    for part in submodules(module):
        for hook in diffusers_hooks(part).values():
            group = getattr(hook, "group", None)
            if group is None:
                continue
            if torch.device(group.onload_device).index is not None:
                return f"its {name} is offloaded in groups that go to {group.onload_device} and not to 'cuda'"
            if getattr(group, "stream", None) is not None:
                return f"its {name} is offloaded in groups, by a stream of another GPU"
    return None


def move_inputs(here: torch.device, there: torch.device) -> Callable[..., Any]:
    """The layer around a moved denoiser's forward: tensors on the first GPU are moved to the rank's.

    Args:
        here: The GPU on which the script has made tensors.
        there: The rank's GPU.
    """

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, torch.Tensor) and leaf.device == here for leaf in pytree.tree_leaves((args, kwargs))):
            args, kwargs = pytree.tree_map(
                lambda x: x.to(there) if isinstance(x, torch.Tensor) and x.device == here else x, (args, kwargs)
            )
        return inner(*args, **kwargs)

    return forward


def _local_rank_device() -> torch.device | None:
    """The GPU numbered LOCAL_RANK; `None` without the variable, or where this process sees one GPU alone."""
    number, gpus = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    return torch.device("cuda", int(number)) if number is not None and gpus > 1 and int(number) < gpus else None


def _current_device(context: PipelineContext) -> torch.device:
    """The GPU that a pipeline is on, or to which its hooks move it."""
    module = context.denoisers[0].module
    found = [next(module.parameters()).device, *filter(None, map(_execution_device, _hooks(module)))]
    gpus = [device for device in found if device.type == "cuda"]
    # Other models that wait on the host go to the GPU of an offloading that has ended, or to the rank's.
    return gpus[0] if gpus else offload_gpu(context.pipe) or rank_device()


def _rank_device(modules: Sequence[nn.Module], here: torch.device, own: torch.device | None) -> RankDevice:
    properties = torch.cuda.get_device_properties
    return RankDevice(
        str(here),
        str(properties(here).uuid),
        None if own is None else str(properties(own).uuid),
        None if own is None else _pinned(modules, here, own),
    )


def _pinned(modules: Sequence[nn.Module], here: torch.device, own: torch.device) -> str | None:
    """The reason why a pipeline cannot be moved from one GPU to another; `None` if it can."""
    for module in modules:
        pinned = _pinned_module(module)
        if pinned is not None:
            return pinned
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.device.type == "cuda" and tensor.device != here:
                return f"its {type(module).__name__} is on {tensor.device} and not on {here}"
    names = [torch.cuda.get_device_name(device) for device in (here, own)]
    # All checks have judged the first GPU.
    return None if names[0] == names[1] else f"{own} ({names[1]}) is another kind of GPU than {here} ({names[0]})"
