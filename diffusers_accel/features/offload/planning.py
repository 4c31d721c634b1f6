"""The memory plan of a pipeline: what its models, its largest request, the budget and the link say to the planner."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ...config import OffloadConfig
from ...config.offload import AUTO
from ...core.memory_plan import MemoryPlan, ModelSizes, Work, least_budget, plan_memory
from ...core.streaming import TRANSFERS
from ...core.timestamps import seconds_between, timestamp
from ...errors import Unsupported
from ..context import PipelineContext
from .estimates import block_seconds, largest_request, latent_shape, work
from .models import Changes, Model
from .notes import gib
from .vae import estimate

# Bytes a second from page-locked host memory where no GPU can be asked: PCIe 4 with 16 lanes.
_LINK = 24e9


def planned_changes(context: PipelineContext) -> Changes:
    """The changes to layers that the features before this one have planned."""
    formats: dict[int, Any] = {}
    shards: dict[int, tuple[int, int]] = {}
    for plan in context.plans.values():
        formats |= plan.formats
        shards |= plan.shards
    return Changes(formats, shards)


def plan_of(
    context: PipelineContext, config: OffloadConfig, models: list[Model], changes: Changes | None
) -> MemoryPlan:
    """The memory plan.

    Args:
        context: The pipeline.
        config: The section `offload`.
        models: The pipeline's models.
        changes: Planned changes to layers; `None` once they are applied.

    Raises:
        Unsupported: No plan keeps the budget.
    """
    stages = config.stages
    sizes = []
    for model in models:
        seconds: tuple[float, ...] = ()
        if model.denoiser is not None:
            seconds = block_seconds(context, model.denoiser, [block.module for block in model.blocks], changes)
        each = model.sizes(changes, seconds)
        may_stream = stages is None or model.name in stages
        sizes.append(each if may_stream else _fixed(each))
    budget = budget_of(context, config, models)
    slots = None if config.prefetch is None else config.prefetch + 1
    found = plan_memory(
        sizes, _work(context, changes), link_of(context), budget=budget, level=config.level, slots=slots
    )
    if budget is not None and found.peak > budget:
        least = least_budget(found, slots) if config.level in (None, 3) and stages is None else found.peak
        graphs = f", cuda_graph=None, whose graphs hold {gib(found.work.graphs)}," if found.work.graphs else ""
        raise Unsupported(
            "offload",
            f"the least that this pipeline needs is {gib(least)} with these settings, and {gib(budget)} are allowed.",
            f"offload='{-(-least // 2**20)}MiB' or more, smaller sizes in warmup.resolutions{graphs} or linear='fp8', "
            "which halves the weights.",
            str(context),
        )
    return found


def _work(context: PipelineContext, changes: Changes | None) -> Work:
    """The bytes of activations in each stage."""
    latents = latent_shape(context, largest_request(context))
    vae = estimate(context.pipe, latents, context.home)
    if not cuts_vae(context):
        # A strip of each tensor, but for its halos.
        vae = {"whole": next(iter(vae.values())) // _vae_ranks(context)}
    return replace(work(context, changes), vae=vae)


def _fixed(sizes: ModelSizes) -> ModelSizes:
    """The sizes of a model that stays on the GPU."""
    return replace(sizes, role="other")


def budget_of(context: PipelineContext, config: OffloadConfig, models: list[Model]) -> int | None:
    """The budget in bytes; of `"auto"`, the memory that is free or taken by this pipeline."""
    if config.vram != AUTO:
        return config.budget
    if context.device.type != "cuda":
        return None
    device = context.home
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    own = sum(
        weight.bytes
        for model in models
        for weight in (*model.rest, *model.buffers, *(each for block in model.blocks for each in block.copied))
        if weight.tensor.device == device
    )
    unused = held - torch.cuda.memory_allocated(device)
    return min(free + unused + own, int(total * torch.cuda.get_per_process_memory_fraction(device)))


@cache
def _measured_link(device: torch.device) -> float:
    """Bytes a second from page-locked memory to a GPU, measured once: the fastest of some copies of 64 MiB, since an
    idle link is slow at first."""
    source = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    times = [timestamp(device)]
    for _ in range(8):
        target.copy_(source, non_blocking=True)
        times.append(timestamp(device))
    return source.numel() / min(seconds_between(begin, end) for begin, end in pairwise(times))


def link_of(context: PipelineContext) -> float:
    return _measured_link(context.home) if context.device.type == "cuda" else _LINK


def reads_in_place(context: PipelineContext, config: OffloadConfig) -> bool:
    """Whether weights in host memory can be read in place."""
    return config.pin_memory and context.device.type in TRANSFERS


def cuts_vae(context: PipelineContext) -> bool:
    """Whether this feature decides how the VAE decodes: there is one, and no ranks share its work."""
    vae = getattr(context.pipe, "vae", None)
    return isinstance(vae, nn.Module) and hasattr(vae, "decode") and _vae_ranks(context) == 1


def _vae_ranks(context: PipelineContext) -> int:
    """The number of ranks that share the VAE's work."""
    parallel = context.config.parallel if context.config is not None else None
    return 1 if parallel is None else parallel.vae
