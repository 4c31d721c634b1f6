"""Offloading: weights wait in host memory, and are copied to the GPU while earlier blocks compute.

A budget of GPU memory becomes a plan (`core/memory_plan.py`): which blocks stay on the GPU, which are streamed through
how many slots, where text encoders run, how the VAE decodes. `core/streaming/` carries it out.

- `models.py`: the pipeline's models, their blocks and their bytes.
- `planning.py`: the memory plan of a pipeline. `notes.py`: the plan in sentences.
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
from typing import Any

import torch
from torch import nn

from ...config import OffloadConfig
from ...config.offload import bytes_of
from ...core.edits import AddLayer, Edit
from ...core.host_memory import available_bytes
from ...core.memory_plan import ENCODER_SLOTS, MemoryPlan, ModelPlan
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
from ...errors import Unsupported
from ..context import PipelineContext
from ..feature import Plan, refuse_own_graphs
from .models import Model, models_of
from .notes import host_left, model_notes, peak_notes, step_notes, vae_notes
from .planning import budget_of, cuts_vae, link_of, plan_of, planned_changes, reads_in_place
from .prompts import PromptCache
from .vae import DecodeChoice, DecodeChoiceOfRanks

_FEATURE = "offload"
# Host memory that is left to the rest of the machine.
_HOST_RESERVE = 2**30


def check(context: PipelineContext, config: OffloadConfig) -> Plan:
    """The plan: what stays on the GPU, what is streamed, and the predicted peak and step.

    Raises:
        Unsupported: There is no GPU, weights are managed by another offloading or sharded among ranks, torch.compile
            records graphs, a stage is unknown, or no plan keeps the budget.
    """
    _refuse(context, config)
    changes = planned_changes(context)
    models = models_of(context, changes, reads_in_place(context, config))
    found = plan_of(context, config, models, changes)
    notes = [*model_notes(found), *vae_notes(found), *peak_notes(found, config), *step_notes(found)]
    left = host_left(found, config)
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
    models = models_of(context, None, reads_in_place(context, config))
    plan = plan_of(context, config, models, None)
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
    stream = WeightStream(device, ENCODER_SLOTS, link_of(context))
    added = StreamedModel(stream, model.name, [block for block in blocks if block.streamed], repeats=False)
    yield AddLayer(model.module, context.rank("offload model"), added.around_model)
    for block in added.blocks:
        yield AddLayer(block.module, context.rank("offload block"), added.around_block(block))


def _vae_edits(
    context: PipelineContext, config: OffloadConfig, plan: MemoryPlan, models: list[Model]
) -> Iterator[Edit]:
    """The layers that choose how the VAE decodes and encodes: by what is free, or, without a budget, as planned."""
    vae = getattr(context.pipe, "vae", None)
    budget, device = budget_of(context, config, models), context.home
    # Ranks with different plans exchange their free bytes all the same.
    ranks = budget is not None and context.config is not None and context.config.parallel is not None
    if (plan.level == 0 and not ranks) or not cuts_vae(context) or "vae" in context.shared:
        return

    def free(needed: int) -> int | None:
        if budget is None:
            return None
        if device.type != "cuda":
            return budget - plan.resident_bytes
        # Memory that torch holds unused counts as taken: that of CUDA graphs serves nothing else.
        if budget - torch.cuda.memory_reserved(device) < needed:
            torch.cuda.empty_cache()
        return budget - torch.cuda.memory_reserved(device)

    choice = DecodeChoice(vae, free, None if budget is not None else plan.vae)
    if ranks:
        choice = DecodeChoiceOfRanks(vae, free, world_group(), plan.work.vae[plan.vae])
        context.outputs.request_hooks.append(choice.begin_request)
    context.outputs.vae_choice = choice
    for method, layer in (("decode", choice.around_decode), ("encode", choice.around_encode)):
        if hasattr(vae, method):
            yield AddLayer(vae, context.rank("offload model"), layer, method)


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


# --- host memory -----------------------------------------------------------------------------------------------------


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
    refuse_own_graphs(_FEATURE, context)
    others = context.config
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
