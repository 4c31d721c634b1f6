"""Parallel: several ranks share one request, and each ends with the whole result.

Every rank runs the same script with the same pipeline. What is divided: branches of guidance and samples of a batch
(`guidance.py`), weights (`tensor.py`, a feature of its own, since it comes before all that touches weights), a sequence
of tokens (`division.py`, with `kernels/attention/transport.py` for attention), a VAE's picture (`vae/`). Scheduler and
text encoders run on every rank alike, so ranks must be given the same: `agreement.py` sees to that. `gpus.py` gives
each a GPU of its own, `opening.py` memory that others write to. Whole blocks' weights may be shared too: another
feature, `weights.py`, which comes last.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist

from ...config import AttentionConfig, ParallelConfig
from ...core.edits import AddLayer, Edit, SetAttr
from ...core.mesh import SEQUENCE, Mesh, begin, everyone, launched
from ...errors import Unsupported
from ...kernels.attention import KERNELS, Shipping, Transport
from ...models.tensor import Heads
from ..context import Denoiser, PipelineContext
from ..feature import Plan
from . import gpus, vae
from .agreement import Agreement, same_random_numbers
from .division import Division
from .guidance import Guidance, Samples
from .opening import open_for
from .vae import others as vae_others

_LAUNCH = "start it with `torchrun --nproc-per-node N script.py`, N the product of the numbers in `parallel`."


def check(context: PipelineContext, config: ParallelConfig) -> Plan:
    """Who would do what.

    Raises:
        Unsupported: There are not as many processes as the numbers make, a model's tokens or heads cannot be divided,
            or what is asked for beside it does not know of several ranks.
    """
    world = launched()
    if world is None:
        raise Unsupported("parallel", "no launcher says which of several processes this is.", _LAUNCH)
    if config.ranks != world and not (config.fsdp and config.ranks == 1):
        raise Unsupported("parallel", f"{config.product}, and there are {world} processes.", _LAUNCH)
    _refuse_neighbours(context, config)
    actions, notes = [], gpus.notes(context)
    if config.dp > 1:
        actions.append(f"samples of a batch on {config.dp}")
        notes.append(f"Requests of fewer than {config.dp} samples gain nothing from dp.")
    if config.cfg > 1:
        actions.append(f"branches of guidance on {config.cfg}")
        if context.config is not None and context.config.cache is not None:
            notes.append("With cfg, a cache decides for each rank's branches by themselves.")
        embedded = [str(item) for item in context.denoisers if item.adapter.guidance == "embedded"]
        if embedded:
            notes.append(f"{', '.join(embedded)} calls several branches only with true guidance (a negative prompt).")
    if config.vae > 1:
        actions.append(_vae(context, config, world))
    if config.vae_others != "compute" and config.vae < world:
        if getattr(context.pipe, "vae", None) is None:
            raise Unsupported("parallel.vae_others", "there is no VAE.", "vae_others='compute'.")
        what = "receive what the others decode" if config.vae_others == "receive" else "get zeros for pictures"
        actions.append(f"{world - config.vae} of {world} ranks {what}")
    if config.sequence > 1:
        _refuse_kernels(context, config)
        for denoiser in context.denoisers:
            _refuse_undivided(denoiser, config)
        ways = [f"{name} {size}" for name, size in (("ulysses", config.ulysses), ("ring", config.ring)) if size > 1]
        if config.attn2d != (1, 1):
            ways.append(f"attn2d {config.attn2d[0]} x {config.attn2d[1]}")
        if config.payload == "fp8" and config.ulysses > 1:
            notes.append("What Ulysses exchanges is rounded to fp8 on its way, and is not overlapped with products.")
        actions.append(f"a sequence on {config.sequence} ({', '.join(ways)})")
    # What tp does is a row of its own.
    alone = "requests compared" if config.tp > 1 else "one rank"
    left = []
    on_host = context.device.type == "cpu" and torch.cuda.is_available()
    if on_host and config.exchange == "auto" and config.sequence * config.tp * config.vae > 1:
        left.append(
            "The pipeline is on the CPU, so ranks will exchange by messages, also if it is moved to GPUs later: slower "
            "than through windows. Move or offload it before accelerate, or say parallel.exchange='messages'."
        )
    return Plan("; ".join(actions) or alone, context.blocks if config.sequence > 1 else 0, tuple(notes), tuple(left))


def _refuse_neighbours(context: PipelineContext, config: ParallelConfig) -> None:
    """Refuses features that would let ranks go different ways."""
    others = context.config
    cache = others.cache if others is not None else None
    if config.sequence * config.tp > 1 and getattr(cache, "guard", False):
        raise Unsupported(
            "parallel",
            "a cache's guard looks at what one rank has of a sequence, or at its rounding, so ranks would part.",
            "cache.guard=0, or parallel without tp, ulysses, ring and attn2d.",
        )


def _vae(context: PipelineContext, config: ParallelConfig, world: int) -> str:
    """What is done with the VAE, in words; refuses what cannot be."""
    module, others = getattr(context.pipe, "vae", None), context.config
    if world % config.vae:
        raise Unsupported("parallel.vae", f"{config.vae} does not divide {world} processes.", "a divisor of them.")
    if module is None:
        raise Unsupported("parallel.vae", "there is no VAE.", "parallel without vae.")
    if others is not None and others.vae is not None and others.vae.compile:
        raise Unsupported("parallel.vae", "a compiled decoder cannot exchange rows.", "vae.compile=False.")
    if others is not None and others.cuda_graph is not None and others.cuda_graph.vae:
        raise Unsupported("parallel.vae", "a recorded decoder cannot exchange rows.", "cuda_graph.vae=False.")
    reason = vae.refuse(module, config.vae_dim)
    if reason is not None:
        instead = "vae.disable_tiling()." if getattr(module, "use_tiling", False) else "parallel without vae."
        raise Unsupported("parallel.vae", reason, instead, type(module).__name__)
    return f"the VAE's {config.vae_dim} on {config.vae}"


def _refuse_kernels(context: PipelineContext, config: ParallelConfig) -> None:
    """Refuses kernels whose partial results cannot be merged, where keys are divided among ranks."""
    attention = context.config.attention if context.config is not None else None
    if attention is None or not config.partial:
        return
    for denoiser in context.denoisers:
        for field, name in _kernels(denoiser, attention):
            if name != "auto" and KERNELS.knows(name) and not KERNELS.get(name).lse:
                records = [KERNELS.get(other) for other in KERNELS if "/" not in other]
                able = [repr(each.name) for each in records if each.lse and each.missing(denoiser.device) is None]
                raise Unsupported(
                    f"attention.{field}={name!r}",
                    "it returns no logsumexp, by which ring and attn2d merge what ranks have found.",
                    f"{' or '.join(['auto', *able])}, or parallel with ulysses alone.",
                    str(denoiser),
                )


def _kernels(denoiser: Denoiser, config: AttentionConfig) -> Iterator[tuple[str, str]]:
    """(field, kernel) of every attention module whose keys are divided among ranks."""
    plan = denoiser.adapter.sequence
    for path, module in denoiser.module.named_modules():
        attends = plan.attention.get(path.rpartition(".")[2]) if plan is not None else None
        if attends is None or not attends.keys or getattr(module, "processor", None) is None:
            continue
        paths = (path, f"{denoiser.name}.{path}")
        glob = next((glob for glob in config.layers or {} if any(fnmatchcase(each, glob) for each in paths)), None)
        kind = "cross_attention" if path.rpartition(".")[2] in denoiser.adapter.cross_attention else "self_attention"
        if glob is not None:
            yield f"layers[{glob!r}]", (config.layers or {})[glob]
        elif getattr(config, kind) is not None:
            yield kind, getattr(config, kind)
        else:
            yield "backend", config.backend
        if config.dense_steps or config.dense_layers:
            yield "dense_backend", config.dense_backend


def _refuse_undivided(denoiser: Denoiser, config: ParallelConfig) -> None:
    """Refuses models whose tokens or heads cannot be divided so."""
    plan, feature = denoiser.adapter.sequence, "parallel"
    instead = "parallel with cfg and dp alone."
    if plan is None:
        raise Unsupported(feature, "no adapter says how its tokens may be divided.", instead, str(denoiser))
    for path, module in denoiser.module.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None:
            continue
        if "IPAdapter" in type(processor).__name__:
            raise Unsupported(feature, f"{path} attends to an IP-Adapter's pictures too.", instead, str(denoiser))
        heads = Heads.of(module)
        attends = plan.attention.get(path.rpartition(".")[2])
        if attends is None or not attends.keys or heads is None:
            continue
        # Too few for tp are refused there.
        own = heads.query if heads.key < config.tp else heads.shares(config.tp)[-1][0]
        if own < config.ulysses:
            whose = f" on a rank of tp={config.tp}" if config.tp > 1 else ""
            raise Unsupported(
                feature,
                f"{path} has {own} head{'s' if own > 1 else ''}{whose}, which ulysses={config.ulysses} cannot divide.",
                f"ulysses={own} or less, with ring for the rest.", str(denoiser),
            )  # fmt: skip


def settle(context: PipelineContext) -> Iterator[Edit]:
    """The process group, and a GPU of its own for each rank. These come before the edits of any other feature, which
    then find weights where they are to stay.

    Raises:
        Unsupported: Ranks are on one GPU and cannot be moved.
    """
    device = context.device.type
    # A pipeline that is divided on the host may be moved afterwards.
    begin("cuda" if torch.cuda.is_available() and dist.is_nccl_available() else device)
    if device == "cuda":
        yield from gpus.edits(context, everyone())
    elif torch.cuda.is_available():
        yield from gpus.beforehand(context)


def components(context: PipelineContext, config: ParallelConfig) -> tuple[str, ...]:
    """The components besides the denoisers that it changes."""
    return ("vae",) if config.vae > 1 or config.vae_others != "compute" else ()


def edits(context: PipelineContext, config: ParallelConfig) -> Iterator[Edit]:
    """The mesh; layers around denoisers and blocks; and what carries attention, for its dispatchers."""
    device, ranks = context.device.type, everyone()
    mesh = Mesh(config.axes(launched() or 1), device)
    for axis in SEQUENCE:
        open_for(context, mesh.group(axis), device, config)
    agreement = Agreement(context, ranks)
    if config.sequence * config.tp > 1:
        # Ranks of one forward decide together: those of tp see the same, but for rounding.
        context.outputs.reduce = mesh.neighbours(config.sequence * config.tp).sum
    if hasattr(context.pipe, "check_inputs"):
        yield AddLayer(context.pipe, context.rank("request"), same_random_numbers(ranks, device), "check_inputs")
    if ranks.rank:
        # One bar is enough.
        bar = vars(context.pipe).get("_progress_bar_config") or {}
        yield SetAttr(context.pipe, "_progress_bar_config", {**bar, "disable": True})
    if config.vae > 1 and "vae" not in context.shared:
        group = mesh.neighbours(config.vae)
        open_for(context, group, device, config)
        yield from vae.edits(context.pipe.vae, group, config.vae_dim, context.rank("vae"))
    if config.vae_others != "compute" and "vae" not in context.shared:
        idle = config.vae_others == "idle"
        yield from vae_others.edits(context.pipe.vae, ranks, config.vae, idle, context.rank("vae of others"))
    for denoiser in context.denoisers:
        yield AddLayer(denoiser.module, context.rank("agreement"), agreement.around_denoiser(denoiser))
        if config.cfg > 1:
            guidance = Guidance(context, denoiser, mesh.group("cfg"), context.shares_weights)
            yield AddLayer(denoiser.module, context.rank("guidance"), guidance.around_denoiser)
        if config.dp > 1:
            samples = Samples(denoiser, mesh.group("dp"))
            yield AddLayer(denoiser.module, context.rank("samples"), samples.around_denoiser)
        if config.sequence > 1:
            yield from _divided(context, denoiser, mesh, config)


def _divided(context: PipelineContext, denoiser: Denoiser, mesh: Mesh, config: ParallelConfig) -> Iterator[Edit]:
    """Layers around one denoiser and its blocks, and its transports."""
    adapter, plan = denoiser.adapter, denoiser.adapter.sequence
    assert plan is not None
    division = Division(denoiser, plan, mesh.sequence())
    ulysses = mesh.group("ulysses")
    shipping = Shipping(ulysses) if ulysses.windows is not None else None
    transport = Transport(
        mesh.sequence(),
        ulysses,
        mesh.group("ring"),
        mesh.group("column"),
        mesh.group("row"),
        shipping,
        config.async_ulysses,
        config.payload == "fp8",
    )
    for name, attends in plan.attention.items():
        context.outputs.attention_carriers[denoiser.name, name] = division.carrier(attends, transport)
    yield AddLayer(denoiser.module, context.rank("division"), division.around_denoiser)
    for stack in (*adapter.side_stacks, *adapter.stacks):
        blocks = stack.blocks(denoiser.module)
        for block in blocks:
            last = stack is adapter.stacks[-1] and block is blocks[-1]
            yield AddLayer(block, context.rank("division of a block"), division.around_block(stack, block, last))
    if plan.gathered_before is not None:
        module = denoiser.module.get_submodule(plan.gathered_before)
        yield AddLayer(module, context.rank("division of a block"), division.before_module)
