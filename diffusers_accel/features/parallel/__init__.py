"""Parallelism: several ranks share one request, and each ends with the whole result.

Every rank runs the same script with the same pipeline. Owns the mesh, and all edits for parallelism except edits of
weights and devices:

- `cfg_parallel.py`, `data_parallel.py`: branches of guidance, and samples of a batch.
- `sequence_sharding.py`: the tokens of a denoiser, with `kernels/attention/context_parallel.py` for its attention.
- `vae/`: the VAE's decoding and encoding.
- `input_consistency.py`: the scheduler and text encoders run on every rank, so all must be given the same inputs.
- `symm_mem_setup.py`: memory that peers write to.

Three other features have this section too: `process_group.py` comes first, `tensor_parallel.py` before all features
that change weights, and `fsdp.py` after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch

from ...compat.diffusers_private import PROGRESS_BAR_CONFIG
from ...config import AttentionConfig, ParallelConfig
from ...core.edits import AddLayer, Edit, SetAttr
from ...core.mesh import SEQUENCE, Mesh, world_group, world_size
from ...errors import Unsupported
from ...kernels.attention import KERNELS, ContextParallelAttention, UlyssesAllToAll
from ...models.tensor_parallel import Heads
from ..context import Denoiser, PipelineContext
from ..feature import Plan
from . import vae
from .cfg_parallel import CFGParallel
from .data_parallel import DataParallel
from .input_consistency import InputConsistency, broadcast_rng_state
from .sequence_sharding import SequenceSharding, ShardedAttention
from .symm_mem_setup import set_up_symm_mem
from .vae import idle_ranks

_LAUNCH = "start it with `torchrun --nproc-per-node N script.py`, N the product of the numbers in `parallel`."


def check(context: PipelineContext, config: ParallelConfig) -> Plan:
    """The axes of the mesh, and the work of each.

    Raises:
        Unsupported: The number of processes is not the product of the configuration, a model's tokens or heads cannot
            be sharded, or another feature would make ranks diverge.
    """
    world = world_size()
    if world is None:
        raise Unsupported("parallel", "no launcher says which of several processes this is.", _LAUNCH)
    if config.ranks != world and not config.any_world_size:
        raise Unsupported("parallel", f"{config.product}, and there are {world} processes.", _LAUNCH)
    _refuse_cache_guard(context, config)
    actions: list[str] = []
    notes: list[str] = []
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
    if config.vae_idle_ranks != "compute" and config.vae < world:
        if getattr(context.pipe, "vae", None) is None:
            raise Unsupported("parallel.vae_idle_ranks", "there is no VAE.", "vae_idle_ranks='compute'.")
        action = "receive decoded pictures" if config.vae_idle_ranks == "receive" else "get zeros for pictures"
        actions.append(f"{world - config.vae} of {world} ranks {action}")
    if config.sequence > 1:
        _refuse_kernels(context, config)
        for denoiser in context.denoisers:
            _refuse_unshardable(denoiser, config)
        axes = [f"{name} {size}" for name, size in (("ulysses", config.ulysses), ("ring", config.ring)) if size > 1]
        if config.attn2d != (1, 1):
            axes.append(f"attn2d {config.attn2d[0]} x {config.attn2d[1]}")
        if config.comm_dtype == "fp8" and config.ulysses > 1:
            notes.append("Ulysses communicates in fp8, and does not overlap with computation.")
        actions.append(f"a sequence on {config.sequence} ({', '.join(axes)})")
    # Tensor parallelism has a row of its own.
    alone = "requests compared" if config.tp > 1 else "one rank"
    left = []
    on_host = context.device.type == "cpu" and torch.cuda.is_available()
    if on_host and config.comm == "auto" and config.sequence * config.tp * config.vae > 1:
        left.append(
            "The pipeline is on the CPU, so ranks will communicate by collectives, also if it is moved to GPUs later: "
            "slower than symmetric memory. Move or offload it before accelerate, or say parallel.comm='collectives'."
        )
    return Plan("; ".join(actions) or alone, context.blocks if config.sequence > 1 else 0, tuple(notes), tuple(left))


def _refuse_cache_guard(context: PipelineContext, config: ParallelConfig) -> None:
    """Refuses a cache with a guard, which looks at one shard, or at rounding that differs among ranks."""
    others = context.config
    cache = others.cache if others is not None else None
    if config.sequence * config.tp > 1 and getattr(cache, "guard", False):
        raise Unsupported(
            "parallel",
            "a cache's guard looks at one rank's shard of a sequence, or at its rounding, so ranks would diverge.",
            "cache.guard=0, or parallel without tp, ulysses, ring and attn2d.",
        )


def _vae(context: PipelineContext, config: ParallelConfig, world: int) -> str:
    """The plan's words for the VAE. Raises `Unsupported` if it cannot be sharded."""
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
    """Refuses kernels without a logsumexp, by which the outputs of sharded keys are merged."""
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
                    "it returns no logsumexp, by which ring and attn2d merge the outputs of ranks.",
                    f"{' or '.join(['auto', *able])}, or parallel with ulysses alone.",
                    str(denoiser),
                )


def _kernels(denoiser: Denoiser, config: AttentionConfig) -> Iterator[tuple[str, str]]:
    """(field of the section `attention`, kernel name) of every attention module whose keys are sharded."""
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


def _refuse_unshardable(denoiser: Denoiser, config: ParallelConfig) -> None:
    """Refuses models whose tokens or heads these axes cannot shard."""
    plan, feature = denoiser.adapter.sequence, "parallel"
    instead = "parallel with cfg and dp alone."
    if plan is None:
        raise Unsupported(feature, "no adapter says how its tokens are sharded.", instead, str(denoiser))
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
        # The row "tensor parallel" refuses fewer heads than tp.
        own = heads.query if heads.key < config.tp else heads.shard_sizes(config.tp)[-1][0]
        if own < config.ulysses:
            whose = f" on a rank of tp={config.tp}" if config.tp > 1 else ""
            raise Unsupported(
                feature,
                f"{path} has {own} head{'s' if own > 1 else ''}{whose}, which ulysses={config.ulysses} cannot shard.",
                f"ulysses={own} or less, with ring for the rest.", str(denoiser),
            )  # fmt: skip


def components(context: PipelineContext, config: ParallelConfig) -> tuple[str, ...]:
    """Names of the components, besides the denoisers, that the feature changes."""
    return ("vae",) if config.vae > 1 or config.vae_idle_ranks != "compute" else ()


def edits(context: PipelineContext, config: ParallelConfig) -> Iterator[Edit]:
    """The mesh, layers around denoisers, blocks and the VAE, and context parallelism for the attention dispatchers."""
    device, ranks = context.device.type, world_group()
    mesh = Mesh(config.axes(world_size() or 1), device)
    for axis in SEQUENCE:
        set_up_symm_mem(context, mesh.group(axis), device, config)
    consistency = InputConsistency(context, ranks)
    if config.sequence * config.tp > 1:
        # Ranks that share a forward take a cache's decisions together; tensor-parallel ranks differ in rounding.
        context.outputs.all_reduce = mesh.consecutive(config.sequence * config.tp).all_reduce
    if hasattr(context.pipe, "check_inputs"):
        yield AddLayer(context.pipe, context.rank("request"), broadcast_rng_state(ranks, device), "check_inputs")
    if ranks.rank:
        # Rank 0 alone shows a progress bar.
        bar = vars(context.pipe).get(PROGRESS_BAR_CONFIG) or {}
        yield SetAttr(context.pipe, PROGRESS_BAR_CONFIG, {**bar, "disable": True})
    if config.vae > 1 and "vae" not in context.shared:
        group = mesh.consecutive(config.vae)
        set_up_symm_mem(context, group, device, config)
        yield from vae.edits(context.pipe.vae, group, config.vae_dim, context.rank("vae"))
    if config.vae_idle_ranks != "compute" and "vae" not in context.shared:
        idle = config.vae_idle_ranks == "idle"
        yield from idle_ranks.edits(context.pipe.vae, ranks, config.vae, idle, context.rank("vae idle ranks"))
    for denoiser in context.denoisers:
        yield AddLayer(denoiser.module, context.rank("input consistency"), consistency.around_denoiser(denoiser))
        if config.cfg > 1:
            branches = CFGParallel(context, denoiser, mesh.group("cfg"), config.fsdp)
            yield AddLayer(denoiser.module, context.rank("cfg parallel"), branches.around_denoiser)
        if config.dp > 1:
            samples = DataParallel(denoiser, mesh.group("dp"))
            yield AddLayer(denoiser.module, context.rank("data parallel"), samples.around_denoiser)
        if config.sequence > 1:
            yield from _context_parallel(context, denoiser, mesh, config)


def _context_parallel(
    context: PipelineContext, denoiser: Denoiser, mesh: Mesh, config: ParallelConfig
) -> Iterator[Edit]:
    """Layers around one denoiser and its blocks, and the context parallelism of its attention modules."""
    plan = denoiser.adapter.sequence
    assert plan is not None
    sharding = SequenceSharding(denoiser, plan, mesh.sequence())
    ulysses = mesh.group("ulysses")
    all_to_all = UlyssesAllToAll(ulysses) if ulysses.symm_mem is not None else None
    context_parallel = ContextParallelAttention(
        mesh.sequence(),
        ulysses,
        mesh.group("ring"),
        mesh.group("column"),
        mesh.group("row"),
        all_to_all,
        config.async_ulysses,
        config.comm_dtype == "fp8",
    )
    for name, attends in plan.attention.items():
        context.outputs.context_parallel[denoiser.name, name] = ShardedAttention(sharding, attends, context_parallel)
    yield from sharding.edits(context, "sequence sharding", "sequence sharding of a block")
