"""Offloading: weights wait in host memory, and are copied to the GPU while earlier blocks compute.

A budget of GPU memory becomes a plan (`core/memory_plan.py`): which blocks stay on the GPU, which are streamed through
how many slots, where text encoders run, how the VAE decodes. `core/streaming.py` carries it out.

- `models.py`: the pipeline's models, their blocks and their bytes.
- `estimates.py`: the bytes of activations and the seconds of blocks, before a request runs.
- `vae.py`: how the VAE decodes and encodes.
- `prompts.py`: embeddings of prompts that were seen before.
- `taken_over.py`: diffusers' own offloading, which ends where this one begins.

A streamed denoiser keeps its slots from `accelerate` to `restore`. A streamed text encoder has slots while it runs. Its
weights outside of blocks (embeddings, which it reads by the row) are read from host memory in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from ...config import OffloadConfig
from ...config.offload import AUTO, bytes_of
from ...core.edits import AddLayer, Edit
from ...core.host_memory import available_bytes
from ...core.memory_plan import ENCODER_SLOTS, MemoryPlan, ModelPlan, ModelSizes, Work, least_budget, plan_memory
from ...core.mesh import world_group
from ...core.streaming import (
    TRANSFERS,
    MoveWeight,
    OffloadBlock,
    OpenSlots,
    Slabs,
    StreamedBlock,
    StreamedModel,
    StreamedTensor,
    WeightStream,
)
from ...core.timestamps import seconds_between, timestamp
from ...errors import Unsupported
from ..context import PipelineContext
from ..feature import Plan
from .estimates import block_seconds, largest_request, latent_shape, work
from .models import Changes, Model, models_of
from .prompts import PromptCache
from .vae import DecodeChoice, DecodeChoiceOfRanks, estimate

_FEATURE = "offload"
# inductor's modes that record graphs of their own.
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")
# Bytes a second from page-locked host memory where no GPU can be asked: PCIe 4 with 16 lanes.
_LINK = 24e9
# Host memory that is left to the rest of the machine.
_HOST_RESERVE = 2**30


def check(context: PipelineContext, config: OffloadConfig) -> Plan:
    """The plan: what stays on the GPU, what is streamed, and the predicted peak and step.

    Raises:
        Unsupported: There is no GPU, weights are managed by another offloading or sharded among ranks, torch.compile
            records graphs, a stage is unknown, or no plan keeps the budget.
    """
    _refuse(context, config)
    changes = _changes(context)
    models = models_of(context, changes, _mapped(context, config))
    found = _plan(context, config, models, changes)
    notes = [*_model_notes(found), *_vae_notes(found), *_peak_notes(found, config), *_step_notes(found)]
    left = _host_left(found, config)
    streamed = [each for each in found.models if each.streamed]
    action = f"level {found.level}" + (
        f": {', '.join(each.sizes.name for each in streamed)} streamed" if streamed else ": all on the GPU"
    )
    return Plan(action, sum(len(each.streamed_bytes) for each in streamed), tuple(notes), left)


def components(context: PipelineContext, config: OffloadConfig) -> tuple[str, ...]:
    """Names of the changed components besides the denoisers."""
    denoisers = {denoiser.name for denoiser in context.denoisers}
    models = (name for name, item in context.pipe.components.items() if isinstance(item, nn.Module))
    return tuple(name for name in models if name not in denoisers)


def edits(context: PipelineContext, config: OffloadConfig) -> Iterator[Edit]:
    """Slots first, then one edit for each block and each other weight, then the layers."""
    models = models_of(context, None, _mapped(context, config))
    plan = _plan(context, config, models, None)
    device = context.home
    on_host = all(next(denoiser.module.parameters()).device.type == "cpu" for denoiser in context.denoisers)
    stream = WeightStream(device, max(plan.slots, 1), plan.link)
    streamed = [
        (model, placed, _blocks(model, placed))
        for model in models
        if (placed := plan.model(model.name)).streamed and model.name not in context.shared
    ]
    everything = [block for _, _, blocks in streamed for block in blocks]
    slabs = Slabs(stream.transfers, everything, _HostBudget(config), config.pin_memory)
    denoisers = [
        StreamedModel(stream, model.name, [block for block in blocks if block.streamed], repeats=True)
        for model, _, blocks in streamed
        if model.role == "denoiser"
    ]
    if on_host and denoisers:
        # Before anything else is there, so that no gap between other tensors is too small for them.
        yield OpenSlots(stream)
    yield from _with_progress(everything, lambda block: OffloadBlock(block, slabs))
    for model in models:
        if model.name in context.shared:
            continue
        placed = plan.model(model.name)
        for weight in (*_resident(model, placed), *model.buffers):
            if weight.tensor.device.type == "cpu" and not weight.tensor.is_meta:
                yield MoveWeight(weight, device, model.module)
    if denoisers and not on_host:
        yield OpenSlots(stream)
    for added in denoisers:
        module = next(model.module for model in models if model.name == added.name)
        yield AddLayer(module, context.rank("offload model"), added.around_model)
        for block in added.blocks:
            yield AddLayer(block.module, context.rank("offload block"), added.around_block(block))
    if denoisers:
        context.outputs.weight_stream = stream
        context.outputs.request_hooks.append(_request_hook(stream, denoisers))
    for model, _, blocks in streamed:
        if model.role != "denoiser":
            yield from _encoder_edits(context, model, blocks, device)
    yield from _vae_edits(context, config, plan, models)
    cached = bytes_of(config.prompt_cache)
    if cached and hasattr(context.pipe, "encode_prompt"):
        prompts = PromptCache(context, cached)
        context.outputs.prompts = prompts
        context.outputs.request_hooks.append(prompts.begin_request)
        yield AddLayer(context.pipe, context.rank("offload model"), prompts.around_encode_prompt, "encode_prompt")
    if device.type == "cuda":
        yield _EmptyCache(device)


def _encoder_edits(
    context: PipelineContext, model: Model, blocks: list[StreamedBlock], device: torch.device
) -> Iterator[Edit]:
    """The layers of a streamed text encoder. Its slots exist while it runs."""
    stream = WeightStream(device, ENCODER_SLOTS, _link(context))
    added = StreamedModel(stream, model.name, [block for block in blocks if block.streamed], repeats=False)
    yield AddLayer(model.module, context.rank("offload model"), added.around_model)
    for block in added.blocks:
        yield AddLayer(block.module, context.rank("offload block"), added.around_block(block))


def _vae_edits(
    context: PipelineContext, config: OffloadConfig, plan: MemoryPlan, models: list[Model]
) -> Iterator[Edit]:
    """The layers that choose how the VAE decodes and encodes: by what is free, or, without a budget, as planned."""
    vae = getattr(context.pipe, "vae", None)
    budget, device = _budget(context, config, models), context.home
    # Ranks with different plans exchange their free bytes all the same.
    ranks = budget is not None and context.config is not None and context.config.parallel is not None
    if (plan.level == 0 and not ranks) or not _cuts_vae(context) or "vae" in context.shared:
        return

    def free() -> int | None:
        if budget is None:
            return None
        return budget - (torch.cuda.memory_allocated(device) if device.type == "cuda" else plan.resident_bytes)

    choice = DecodeChoice(vae, free, None if budget is not None else plan.vae)
    if ranks:
        choice = DecodeChoiceOfRanks(vae, free, world_group())
        context.outputs.request_hooks.append(choice.begin_request)
    context.outputs.vae_choice = choice
    for method, layer in (("decode", choice.around_decode), ("encode", choice.around_encode)):
        if hasattr(vae, method):
            yield AddLayer(vae, context.rank("offload model"), layer, method)


def _cuts_vae(context: PipelineContext) -> bool:
    """Whether this feature decides how the VAE decodes: there is one, and no ranks share its work."""
    vae = getattr(context.pipe, "vae", None)
    return isinstance(vae, nn.Module) and hasattr(vae, "decode") and _vae_ranks(context) == 1


def _vae_ranks(context: PipelineContext) -> int:
    """The number of ranks that share the VAE's work."""
    parallel = context.config.parallel if context.config is not None else None
    return 1 if parallel is None else parallel.vae


def _request_hook(stream: WeightStream, models: list[StreamedModel]) -> Callable[[Any], None]:
    """A request hook, which tells streamed models of a new request just before its first denoiser call."""

    def begin(pipe: Any) -> None:
        if pipe is None:
            stream.counts.clear()
            for model in models:
                model.begin_request()

    return begin


class _EmptyCache:
    """Gives memory that was freed back to the GPU, so that slots and activations find it in one piece."""

    def __init__(self, device: torch.device):
        self._device = device

    def apply(self) -> None:
        torch.cuda.empty_cache()

    def undo(self) -> None:
        torch.cuda.empty_cache()


def _blocks(model: Model, placed: ModelPlan) -> list[StreamedBlock]:
    """The slabs of a streamed model. Blocks on the GPU have one for the weights that are read in place; a text encoder
    has one for its weights outside of blocks."""
    found = []
    for block, resident in zip(model.blocks, placed.resident, strict=True):
        copied = [] if resident else [StreamedTensor(weight) for weight in block.copied]
        in_place = [StreamedTensor(weight) for weight in block.in_place]
        if copied or in_place:
            found.append(StreamedBlock(block.name, block.module, copied, in_place))
    if placed.sizes.mappable and model.rest:
        found.append(StreamedBlock(model.name, model.module, [], [StreamedTensor(weight) for weight in model.rest]))
    return found


def _resident(model: Model, placed: ModelPlan) -> Iterator[Any]:
    """The weights of a model that stay on the GPU."""
    if not placed.streamed:
        for block in model.blocks:
            yield from (*block.copied, *block.in_place)
        yield from model.rest
        return
    for block, resident in zip(model.blocks, placed.resident, strict=True):
        if resident:
            yield from block.copied
    if not placed.sizes.mappable:
        yield from model.rest


def _with_progress(blocks: list[StreamedBlock], edit: Callable[[StreamedBlock], Edit]) -> Iterator[Edit]:
    """The edits of all blocks, with a progress bar of bytes if they take longer than a second."""
    from tqdm.auto import tqdm

    total = sum(block.layout.length for block in blocks)
    with tqdm(total=total, desc="offload", unit="B", unit_scale=True, unit_divisor=1024, delay=1) as bar:
        for block in blocks:
            yield edit(block)
            bar.update(block.layout.length)


# --- the plan --------------------------------------------------------------------------------------------------------


def _changes(context: PipelineContext) -> Changes:
    """The changes to layers that the features before this one have planned."""
    formats: dict[int, Any] = {}
    shards: dict[int, tuple[int, int]] = {}
    for plan in context.plans.values():
        formats |= plan.formats
        shards |= plan.shards
    return Changes(formats, shards)


def _plan(context: PipelineContext, config: OffloadConfig, models: list[Model], changes: Changes | None) -> MemoryPlan:
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
    budget = _budget(context, config, models)
    slots = None if config.prefetch is None else config.prefetch + 1
    found = plan_memory(sizes, _work(context, changes), _link(context), budget=budget, level=config.level, slots=slots)
    if budget is not None and found.peak > budget:
        least = least_budget(found, slots) if config.level in (None, 3) and stages is None else found.peak
        raise Unsupported(
            _FEATURE,
            f"the least that this pipeline needs is {_gib(least)} with these settings, and {_gib(budget)} are allowed.",
            f"offload='{-(-least // 2**20)}MiB' or more, smaller sizes in warmup.resolutions, or linear='fp8', which "
            "halves the weights.",
            str(context),
        )
    return found


def _work(context: PipelineContext, changes: Changes | None) -> Work:
    """The bytes of activations in each stage."""
    latents = latent_shape(context, largest_request(context))
    vae = estimate(context.pipe, latents, context.home)
    if not _cuts_vae(context):
        # A strip of each tensor, but for its halos.
        vae = {"whole": next(iter(vae.values())) // _vae_ranks(context)}
    return replace(work(context, changes), vae=vae)


def _fixed(sizes: ModelSizes) -> ModelSizes:
    """The sizes of a model that stays on the GPU."""
    return replace(sizes, role="other")


def _budget(context: PipelineContext, config: OffloadConfig, models: list[Model]) -> int | None:
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
    """Bytes a second from page-locked memory to a GPU, measured once with 64 MiB."""
    source = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    target.copy_(source)
    begin = timestamp(device)
    for _ in range(3):
        target.copy_(source, non_blocking=True)
    return 3 * source.numel() / seconds_between(begin, timestamp(device))


def _link(context: PipelineContext) -> float:
    return _measured_link(context.home) if context.device.type == "cuda" else _LINK


def _mapped(context: PipelineContext, config: OffloadConfig) -> bool:
    """Whether weights in host memory can be read in place."""
    return config.pin_memory and context.device.type in TRANSFERS


class _HostBudget:
    """The host memory that slabs may take: `offload.ram`, and what the machine can spare. A first refusal gives a
    warning.

    Args:
        config: The section `offload`.
    """

    def __init__(self, config: OffloadConfig):
        self._ram = config.ram
        self._left = None if config.ram is None else bytes_of(config.ram)
        self._warned = False

    def take(self, length: int) -> bool:
        """Whether so many bytes may be taken; they count as taken then."""
        free = available_bytes()
        in_ram = self._left is None or length <= self._left
        if in_ram and (free is None or length + _HOST_RESERVE <= free):
            self.give_back(-length)
            return True
        if not self._warned:
            self._warned = True
            bound = "free host memory" if in_ram else f"offload.ram={self._ram!r}"
            warnings.warn(
                f"accelerate: offload: {bound} does not suffice for all weights. The others stay in the memory, or in "
                "the file, that they are in: their copies are several times slower and keep the host waiting.",
                stacklevel=2,
            )
        return False

    def give_back(self, length: int) -> None:
        """Gives back bytes that were taken."""
        if self._left is not None:
            self._left += length


# --- what is refused -------------------------------------------------------------------------------------------------


def _refuse(context: PipelineContext, config: OffloadConfig) -> None:
    """Refuses pipelines and configurations that cannot be offloaded."""
    if context.device.type not in TRANSFERS:
        raise Unsupported(
            _FEATURE, f"it runs on {context.device}, and weights are moved from and to a GPU.", "offload=None.",
            str(context),
        )  # fmt: skip
    if context.fsdp:
        raise Unsupported(
            _FEATURE,
            "the weights of blocks are sharded among ranks already (parallel.fsdp).",
            "parallel without fsdp, or offload=None.",
        )
    others = context.config
    if others is not None and others.compile is not None and others.compile.mode in _OWN_GRAPHS:
        raise Unsupported(
            _FEATURE,
            f"torch.compile records graphs in mode {others.compile.mode!r}, which replay on copies of the weights.",
            f"compile='default' or {others.compile.mode + '-no-cudagraphs'!r}.",
        )
    if others is not None and others.cuda_graph is not None and others.cuda_graph.text_encoders:
        raise Unsupported(
            _FEATURE,
            "cuda_graph.text_encoders records addresses of weights, and a text encoder's may be streamed.",
            "cuda_graph.text_encoders=False.",
        )
    models = {name: item for name, item in context.pipe.components.items() if isinstance(item, nn.Module)}
    for name in config.stages or ():
        if name not in models:
            raise Unsupported(
                f"offload.stages: {name!r}",
                "the pipeline has no such model.",
                f"offload.stages with names of {', '.join(models)}.",
                type(context.pipe).__name__,
            )
    for denoiser in context.denoisers:
        if not denoiser.adapter.blocks(denoiser.module) and config.level == 3:
            raise Unsupported(_FEATURE, "no blocks were found in it.", "offload=2, or None.", str(denoiser))


# --- what explain prints ---------------------------------------------------------------------------------------------


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _model_notes(plan: MemoryPlan) -> Iterator[str]:
    for model in plan.models:
        sizes = model.sizes
        if not model.streamed:
            yield f"{sizes.name}: {_gib(sizes.bytes)} on the GPU."
            continue
        copied = model.streamed_bytes
        text = f"{sizes.name}: {len(copied)} of {len(sizes.blocks)} blocks are streamed, {_gib(sum(copied))}"
        text += f"; {_gib(model.resident_bytes)} stay on the GPU" if model.resident_bytes else ""
        if sum(sizes.in_place):
            text += f"; {_gib(sum(sizes.in_place))} of precomputed modulations are read from host memory once a request"
        yield text + "."
    if plan.slots:
        yield f"{plan.slots} slots of blocks take {_gib(plan.slot_bytes)}."
    if plan.host_bytes:
        yield f"Page-locked host memory: {_gib(plan.host_bytes)}."


def _vae_notes(plan: MemoryPlan) -> Iterator[str]:
    if plan.level and any(model.sizes.role == "vae" for model in plan.models):
        ways = ", ".join(f"{way} {_gib(size)}" for way, size in plan.work.vae.items())
        yield f"The VAE decodes {plan.vae!r} at the planned size ({ways})."


def _peak_notes(plan: MemoryPlan, config: OffloadConfig) -> Iterator[str]:
    peaks = ", ".join(f"{stage} {_gib(size)}" for stage, size in plan.peaks.items())
    allowed = f" of {_gib(bytes_of(config.vram))}" if config.budget is not None else ""  # type: ignore[arg-type]
    yield f"Predicted peak: {_gib(plan.peak)}{allowed} ({peaks})."


def _step_notes(plan: MemoryPlan) -> Iterator[str]:
    for model in plan.models:
        if model.sizes.role == "denoiser" and model.streamed and model.streamed_bytes:
            step = plan.step(model.sizes.name)
            yield (
                f"{model.sizes.name}: a call is predicted to take {1000 * step.seconds:.0f} ms: "
                f"{1000 * step.compute:.0f} of computation, {1000 * step.copy:.0f} of copies at "
                f"{plan.link / 1e9:.0f} GB/s, of which {step.hidden:.0%} hide."
            )


def _host_left(plan: MemoryPlan, config: OffloadConfig) -> tuple[str, ...]:
    """The part of the slabs for which `offload.ram` does not suffice."""
    if config.ram is None or plan.host_bytes <= bytes_of(config.ram):
        return ()
    return (
        f"offload.ram={config.ram!r} does not suffice for {_gib(plan.host_bytes)} of weights: the others are copied "
        "from ordinary memory, several times slower.",
    )
