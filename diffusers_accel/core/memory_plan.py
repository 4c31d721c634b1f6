"""The memory plan: arithmetic that decides what stays on the GPU and what is streamed, from bytes and seconds alone.

A pipeline works in stages (text encoders, denoisers, VAE). All weights that stay on the GPU are there in every stage;
activations are there in one. The plan takes the least intrusive level that keeps the largest stage within the budget:

- level 0: everything stays on the GPU.
- level 1: the VAE decodes in slices or tiles.
- level 2: text encoders are streamed too.
- level 3: denoisers are streamed too. As many blocks stay on the GPU as fit, spread so that copies of the others have
  the most computation to hide behind.

`simulate` predicts a step's duration from bytes, seconds and the speed of copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

LEVELS = (0, 1, 2, 3)
# Numbers of slots that a plan tries. More than four hide nothing that four do not.
SLOTS = (2, 3, 4)
# Slots of a streamed text encoder, which computes much faster than it is copied.
ENCODER_SLOTS = 2
# Of a block, in sums of shares.
_ROUNDING = 1e-6
Role = Literal["denoiser", "text encoder", "vae", "other"]


@dataclass(frozen=True)
class ModelSizes:
    """The bytes of one model, and the seconds of its blocks.

    Attributes:
        name: The pipeline's name for it.
        role: Its part in the pipeline.
        blocks: Bytes of each block that streaming copies.
        in_place: Bytes of each block that a streamed model reads from host memory, if at all.
        rest: Bytes outside of blocks.
        seconds: Predicted seconds of each block; empty if unknown.
        mappable: Whether the rest of a streamed model is read from host memory, so that it takes nothing on the GPU.
    """

    name: str
    role: Role
    blocks: tuple[int, ...] = ()
    in_place: tuple[int, ...] = ()
    rest: int = 0
    seconds: tuple[float, ...] = ()
    mappable: bool = False

    @property
    def bytes(self) -> int:
        """All its bytes."""
        return sum(self.blocks) + sum(self.in_place) + self.rest


@dataclass(frozen=True)
class Work:
    """The bytes of activations in each stage.

    Attributes:
        text: Of the text encoders.
        denoise: Of a denoiser call.
        vae: Way of decoding -> bytes, from the fastest way to the one that needs least.
        reserve: Workspaces of libraries, and fragmentation.
        graphs: Held by CUDA graphs in all stages; `denoise` includes them.
        fragmentation: Bytes that the allocator takes for each byte of the VAE's, whose tensors have many sizes.
    """

    text: int = 0
    denoise: int = 0
    vae: Mapping[str, int] = field(default_factory=lambda: {"whole": 0})
    reserve: int = 0
    graphs: int = 0
    fragmentation: float = 1.0


@dataclass(frozen=True)
class ModelPlan:
    """The placement of one model.

    Attributes:
        sizes: Its bytes.
        streamed: Whether it is streamed.
        resident: Of each block, whether it stays on the GPU.
    """

    sizes: ModelSizes
    streamed: bool
    resident: tuple[bool, ...]

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay on the GPU."""
        if not self.streamed:
            return self.sizes.bytes
        kept = sum(size for size, stays in zip(self.sizes.blocks, self.resident, strict=True) if stays)
        return kept + (0 if self.sizes.mappable else self.sizes.rest)

    @property
    def streamed_bytes(self) -> tuple[int, ...]:
        """Bytes of each block that is copied."""
        return tuple(size for size, stays in zip(self.sizes.blocks, self.resident, strict=True) if not stays)

    @property
    def host_bytes(self) -> int:
        """Bytes of slabs in host memory."""
        if not self.streamed:
            return 0
        mapped = self.sizes.rest if self.sizes.mappable else 0
        return sum(self.streamed_bytes) + sum(self.sizes.in_place) + mapped


@dataclass(frozen=True)
class MemoryPlan:
    """The placement of a pipeline's weights, and its predicted peak and steps.

    Attributes:
        level: The level, 0 to 3.
        models: The placement of each model.
        slots: Number of the denoisers' slots; 0 if none is streamed.
        slot_bytes: Bytes of the denoisers' slots.
        vae: The VAE's way of decoding.
        work: Bytes of activations.
        link: Bytes a second from host to GPU.
    """

    level: int
    models: tuple[ModelPlan, ...]
    slots: int
    slot_bytes: int
    vae: str
    work: Work
    link: float

    @property
    def resident_bytes(self) -> int:
        """Bytes that are on the GPU in every stage."""
        return sum(model.resident_bytes for model in self.models) + self.slot_bytes

    @property
    def peaks(self) -> dict[str, int]:
        """Stage -> predicted bytes on the GPU."""
        always = self.resident_bytes + self.work.reserve
        # A streamed text encoder has slots while it runs.
        encoders = [each for each in self.models if each.streamed and each.sizes.role == "text encoder"]
        slots = max((_encoder_slot_bytes(each.sizes.blocks) for each in encoders), default=0)
        return {
            "text": always + self.work.graphs + self.work.text + slots,
            "denoise": always + self.work.denoise,
            "vae": always + self.work.graphs + int(self.work.fragmentation * self.work.vae[self.vae]),
        }

    @property
    def peak(self) -> int:
        """Predicted bytes on the GPU in the largest stage."""
        return max(self.peaks.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of slabs in host memory."""
        return sum(model.host_bytes for model in self.models)

    def model(self, name: str) -> ModelPlan:
        """The placement of a model by its name."""
        return next(model for model in self.models if model.sizes.name == name)

    def step(self, name: str) -> Step:
        """The predicted step of a denoiser."""
        model = self.model(name)
        seconds = model.sizes.seconds or (0.0,) * len(model.sizes.blocks)
        sizes = [0 if stays else size for size, stays in zip(model.sizes.blocks, model.resident, strict=True)]
        return simulate(sizes, seconds, self.link, max(self.slots, 2))


def _encoder_slot_bytes(blocks: Sequence[int]) -> int:
    """Bytes of a streamed text encoder's slots."""
    return sum(max(blocks[slot::ENCODER_SLOTS], default=0) for slot in range(ENCODER_SLOTS))


@dataclass(frozen=True)
class Step:
    """A simulated forward.

    Attributes:
        seconds: Its duration, while the same forward is repeated.
        compute: Seconds of computation in it.
        copy: Seconds of copies in it.
    """

    seconds: float
    compute: float
    copy: float

    @property
    def hidden(self) -> float:
        """Share of the copies' time that computation hides."""
        return 1.0 if self.copy == 0 else max(0.0, 1 - (self.seconds - self.compute) / self.copy)


def slot_of(index: int, count: int, slots: int) -> int:
    """The slot of a block among the streamed blocks of a model that is called again and again.

    Args:
        index: Index of the block.
        count: Number of streamed blocks.
        slots: Number of slots.
    """
    if slots > 2 and count > slots and count % slots == 1 and index == count - 1:
        # The first block follows the last: in one slot, neither could be copied while the other runs.
        return 1
    return index % slots


def simulate(sizes: Sequence[int], seconds: Sequence[float], link: float, slots: int) -> Step:
    """A forward's duration when it is repeated: one stream computes, another copies, and events order them.

    Args:
        sizes: Bytes to copy of each block, in call order; 0 for a block that stays on the GPU.
        seconds: Seconds of computation of each block.
        link: Bytes a second of copies.
        slots: Number of slots.
    """
    streamed = [index for index, size in enumerate(sizes) if size]
    place = {index: slot_of(number, len(streamed), slots) for number, index in enumerate(streamed)}
    copied = computed = 0.0
    free = [0.0] * slots
    ends: list[float] = []
    # The first repetition begins with empty slots; the durations of later ones are equal up to a pattern of `slots`.
    for _ in range(2 * slots + 1):
        for index, (size, duration) in enumerate(zip(sizes, seconds, strict=True)):
            if size:
                copied = max(copied, free[place[index]]) + size / link
                computed = max(computed, copied)
            computed += duration
            if size:
                free[place[index]] = computed
        ends.append(computed)
    return Step((ends[-1] - ends[slots]) / slots, sum(seconds), sum(sizes) / link)


def spread(rates: Sequence[float], kept: int) -> tuple[bool, ...]:
    """Of each block, whether it is among `kept` ones that stay on the GPU.

    Any run of blocks streams bytes in proportion to the computation that hides them: FLUX.1's double blocks have twice
    the bytes of its single blocks and no more computation, so that more of them stay. Equal blocks are spread evenly.

    Args:
        rates: Seconds of computation per byte of each block, in call order. Their scale is arbitrary.
        kept: Number of blocks that stay.
    """
    streamed = [0.0] * len(rates)
    wanted, total = float(len(rates) - kept), float(sum(rates))
    # A block is streamed at most once: what the fastest cannot take is left to the others.
    for done, index in enumerate(sorted(range(len(rates)), key=lambda index: -rates[index])):
        share = rates[index] / total if total > 0 else 1 / (len(rates) - done)
        streamed[index] = min(1.0, wanted * share)
        wanted, total = wanted - streamed[index], total - rates[index]
    found, stay = [], 0.0
    for share in streamed:
        # A little more than the sum, so that rounding loses no block.
        before, stay = int(stay + _ROUNDING), stay + 1 - share
        found.append(int(stay + _ROUNDING) > before)
    return tuple(found)


def _rates(model: ModelSizes) -> list[float]:
    """Seconds of computation per byte of each block; equal ones if the seconds are unknown."""
    if not model.seconds:
        return [1.0] * len(model.blocks)
    return [each / max(size, 1) for each, size in zip(model.seconds, model.blocks, strict=True)]


def plan_memory(
    models: Sequence[ModelSizes],
    work: Work,
    link: float,
    *,
    budget: int | None = None,
    level: int | None = None,
    slots: int | None = None,
) -> MemoryPlan:
    """The plan with the lowest level, and then the shortest step, whose peak is within a budget.

    Args:
        models: The pipeline's models.
        work: Bytes of activations.
        link: Bytes a second from host to GPU.
        budget: Bytes that may be used on the GPU; `None` for no limit.
        level: The level; `None` takes the lowest that keeps the budget.
        slots: Number of slots; `None` takes the number with the shortest step.

    Returns:
        The plan. If none keeps the budget, the one with the lowest peak: its `peak` then exceeds the budget.
    """
    least: MemoryPlan | None = None
    for each in LEVELS if level is None else (level,):
        found = _plan_level(each, models, work, link, budget, slots)
        if budget is None or found.peak <= budget:
            return found
        least = found if least is None or found.peak < least.peak else least
    assert least is not None
    return least


def _plan_level(
    level: int, models: Sequence[ModelSizes], work: Work, link: float, budget: int | None, slots: int | None
) -> MemoryPlan:
    """The best plan of a level, or the one with the lowest peak if none keeps the budget."""
    ways = list(work.vae)
    # Of a level that is asked for without a budget, the VAE takes the way that needs least.
    allowed = ways[:1] if level == 0 else ways if budget is not None else ways[-1:]
    plans: list[MemoryPlan] = []
    for way in allowed:
        for number in (slots,) if slots is not None else SLOTS:
            plans += _placements(level, models, work, link, budget, number, way)
            if level < 2:
                break
    fitting = [each for each in plans if budget is None or each.peak <= budget]
    if fitting:
        # A way of decoding that needs less leaves memory for blocks, which are copied at every step.
        return min(fitting, key=lambda each: (round(_seconds(each), 4), ways.index(each.vae), each.peak))
    return min(plans, key=lambda each: each.peak)


def _placements(
    level: int,
    models: Sequence[ModelSizes],
    work: Work,
    link: float,
    budget: int | None,
    slots: int,
    way: str,
) -> list[MemoryPlan]:
    """The plan of a level with a number of slots: with the most resident blocks that fit."""
    streams = {
        model.name: bool(model.blocks) and level >= {"text encoder": 2, "denoiser": 3}.get(model.role, 4)
        for model in models
    }

    def plan(share: float) -> MemoryPlan:
        placed = []
        for model in models:
            denoises = model.role == "denoiser" and streams[model.name]
            kept = int(share * len(model.blocks)) if denoises else 0
            resident = spread(_rates(model), kept) if streams[model.name] else (True,) * len(model.blocks)
            placed.append(ModelPlan(model, streams[model.name], resident))
        ring = [0] * slots
        for each in placed:
            if each.streamed and each.sizes.role == "denoiser":
                sizes = each.streamed_bytes
                for index, size in enumerate(sizes):
                    number = slot_of(index, len(sizes), slots)
                    ring[number] = max(ring[number], size)
        used = sum(1 for size in ring if size)
        return MemoryPlan(level, tuple(placed), used, sum(ring), way, work, link)

    most = max((len(model.blocks) for model in models if model.role == "denoiser" and streams[model.name]), default=0)
    if budget is None or most == 0:
        return [plan(0.0)]
    plans = []
    # From all blocks on the GPU to none: the first that fits keeps the most.
    for kept in range(most, -1, -1):
        # A little above the fraction, so that rounding keeps `kept` blocks.
        plans.append(plan((kept + 1e-6) / most))
        if plans[-1].peak <= budget:
            return plans[-1:]
    # Of unequal blocks, the ones that are left may need smaller slots than all of them.
    return [min(plans, key=lambda each: each.peak)]


def _seconds(plan: MemoryPlan) -> float:
    """Predicted seconds of one call of every streamed denoiser."""
    return sum(
        plan.step(model.sizes.name).seconds
        for model in plan.models
        if model.sizes.role == "denoiser" and model.streamed
    )


def least_budget(plan: MemoryPlan, slots: int | None = None) -> int:
    """The lowest budget that any plan of these models keeps.

    Args:
        plan: A plan of the models.
        slots: Number of slots; `None` takes the number that needs least.
    """
    models = [model.sizes for model in plan.models]
    return _plan_level(3, models, plan.work, plan.link, 0, slots).peak
