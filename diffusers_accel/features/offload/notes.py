"""A memory plan in sentences, as `explain` prints them."""

from __future__ import annotations

from collections.abc import Iterator

from ...config import OffloadConfig
from ...config.offload import bytes_of
from ...core.memory_plan import MemoryPlan


def gib(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def model_notes(plan: MemoryPlan) -> Iterator[str]:
    """The placement of each model, and the bytes of slots and slabs."""
    for model in plan.models:
        sizes = model.sizes
        if not model.streamed:
            yield f"{sizes.name}: {gib(sizes.bytes)} on the GPU."
            continue
        copied = model.streamed_bytes
        text = f"{sizes.name}: {len(copied)} of {len(sizes.blocks)} blocks are streamed, {gib(sum(copied))}"
        text += f"; {gib(model.resident_bytes)} stay on the GPU" if model.resident_bytes else ""
        if sum(sizes.in_place):
            text += f"; {gib(sum(sizes.in_place))} of precomputed modulations are read from host memory once a request"
        yield text + "."
    if plan.slots:
        yield f"{plan.slots} slots of blocks take {gib(plan.slot_bytes)}."
    if plan.host_bytes:
        yield f"Page-locked host memory: {gib(plan.host_bytes)}."


def vae_notes(plan: MemoryPlan) -> Iterator[str]:
    """The VAE's way of decoding, with the bytes of every way."""
    if plan.level and any(model.sizes.role == "vae" for model in plan.models):
        ways = ", ".join(f"{way} {gib(size)}" for way, size in plan.work.vae.items())
        yield f"The VAE decodes {plan.vae!r} at the planned size ({ways})."


def peak_notes(plan: MemoryPlan, config: OffloadConfig) -> Iterator[str]:
    """The predicted peak, and that of each stage."""
    peaks = ", ".join(f"{stage} {gib(size)}" for stage, size in plan.peaks.items())
    allowed = f" of {gib(bytes_of(config.vram))}" if config.budget is not None else ""  # type: ignore[arg-type]
    yield f"Predicted peak: {gib(plan.peak)}{allowed} ({peaks})."


def step_notes(plan: MemoryPlan) -> Iterator[str]:
    """The predicted duration of a call of each streamed denoiser, and the share of its copies that hides."""
    for model in plan.models:
        if model.sizes.role == "denoiser" and model.streamed and model.streamed_bytes:
            step = plan.step(model.sizes.name)
            yield (
                f"{model.sizes.name}: a call is predicted to take {1000 * step.seconds:.0f} ms: "
                f"{1000 * step.compute:.0f} of computation, {1000 * step.copy:.0f} of copies at "
                f"{plan.link / 1e9:.0f} GB/s, of which {step.hidden:.0%} hide."
            )


def host_left(plan: MemoryPlan, config: OffloadConfig) -> tuple[str, ...]:
    """The part of the slabs for which `offload.ram` does not suffice."""
    if config.ram is None or plan.host_bytes <= bytes_of(config.ram):
        return ()
    return (
        f"offload.ram={config.ram!r} does not suffice for {gib(plan.host_bytes)} of weights: the others are copied "
        "from ordinary memory, several times slower.",
    )
