"""Sparse attention of a denoiser: which layers, calls and steps are sparse, by which rule, and with what share.

Owns the reading of `SparseConfig`, its refusals, and the state of a denoiser that sparse calls share: the place and
order of tokens, the dense phase, and the shares that `stats` reports.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ...config import AttentionConfig, SparseConfig
from ...core.edits import Edit
from ...core.noise import noise_fractions
from ...errors import Unsupported
from ...kernels.attention import KERNELS, SELECTORS, AttentionKernel, Call, Carried, KeptBlocks, Sparse, token_grid
from ...kernels.attention.sparse import KEEP, SKIP, TAU, TOP_P, Amount
from ..context import Denoiser, PipelineContext
from . import skip_softmax
from .layers import Role, matches
from .skip_softmax import calibrated
from .token_order import TokenOrder

# The kernels of sparse calls where `backend="auto"` chooses: by fidelity, the first that can run.
_ENGINES = {"exact": ("triton",), "8bit": ("sage-fp8", "sage", "triton")}


class SparseAttention:
    """Sparse attention of one denoiser.

    Args:
        denoiser: The denoiser.
        config: The section, with its rule resolved.
        context: The pipeline.
        layer: Returns the running block; `None` outside of blocks.
        dense: Returns whether the running step is dense for another reason than the section.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: SparseConfig,
        context: PipelineContext,
        layer: Callable[[], int | None] = lambda: None,
        dense: Callable[[], bool] = lambda: False,
    ):
        self.denoiser, self.asked = denoiser, config
        self.config = config = calibrated(denoiser, config)
        self.kept: KeptBlocks = context.stats.kept_blocks
        phase = dense_phase(context, config)
        self.dense = lambda: dense() or phase()
        self._layer = layer
        self.carried = Carried() if config.shared_steps > 1 else None
        self._order = TokenOrder(
            denoiser, context, config.order, config.block, self.dense, self.kept, self.carried, config.shared_steps,
            config.drift,
        )  # fmt: skip

    def edits(self, context: PipelineContext) -> Iterator[Edit]:
        """The layers that order tokens."""
        if self.config.dense_steps or self.config.dense_until is not None:
            context.outputs.graph_keys.append(self.dense)
        if (carried := self.carried) is not None:
            # Each branch has bits of its own.
            context.outputs.graph_keys.append(lambda: (carried.choosing, carried.branch))
        yield from self._order.edits(context, "token order", "token order of a block")

    def of(self, role: Role) -> Sparse | None:
        """Sparse attention of a role's layers; `None` if they are dense."""
        name = role.name.rpartition(".")[2]
        if not is_visual(self.denoiser, role):
            return None
        plan = self.denoiser.adapter.sequence
        assert plan is not None
        attends = plan.attention[name]
        return rule_of(
            self.denoiser,
            role,
            self.asked,
            span=lambda queries, keys: None if self.dense() else self._order.span(attends, queries, keys),
            layer=lambda: (self.denoiser.name, role.name, self._layer()),
            kept_blocks=self.kept,
            carried=self.carried,
        )


def settings(config: AttentionConfig) -> SparseConfig | None:
    """The section with its rule resolved; `None` if all attention is dense."""
    return None if config.sparse is None else config.sparse.resolved()


def is_visual(denoiser: Denoiser, role: Role) -> bool:
    """Whether a role's layers are self-attention of pictures or frames whose place among the tokens is known."""
    visual, plan = denoiser.adapter.visual, denoiser.adapter.sequence
    name = role.name.rpartition(".")[2]
    return visual is not None and plan is not None and name in visual.attention and name in plan.attention


def rule_of(denoiser: Denoiser, role: Role, config: SparseConfig, **running: Any) -> Sparse:
    """The rule of a role's layers.

    Args:
        denoiser: The denoiser.
        role: The role.
        config: The section as the user gave it, with its rule resolved.
        running: The attributes of `Sparse` that know the running call.
    """
    asked, config = config, calibrated(denoiser, config)
    amounts = {TOP_P: config.top_p, TAU: config.tau}
    rule, amount = next(((name, value) for name, value in amounts.items() if value is not None), (KEEP, config.share))
    selector = SELECTORS.get(config.selector)
    if selector.within_tiles:
        rule, amount = SKIP, config.scale_factor
    blocks = denoiser.adapter.blocks(denoiser.module)
    dense = math.ceil(config.dense_layers * len(blocks))
    by_layer: dict[Any, Amount] = {
        (denoiser.name, role.name, layer.block): (KEEP, 1.0) if factor is None else (SKIP, factor)
        for layer, factor in skip_softmax.by_layer(denoiser, asked, role.layers)
    }
    for layer in role.layers:
        name = denoiser.name, role.name, layer.block
        for glob, shares in (config.heads or {}).items():
            if matches(denoiser, layer.path, glob):
                by_layer.setdefault(name, (KEEP, shares))
        for glob, keep in (config.layers or {}).items():
            if matches(denoiser, layer.path, glob):
                by_layer.setdefault(name, (KEEP, keep))
        if layer.block is not None and layer.block < dense:
            by_layer[name] = (KEEP, 1.0)
    return Sparse(
        selector=selector,
        rule=rule,
        amount=float(amount),
        block=config.block,
        centroids=config.centroids,
        min_tokens=config.min_tokens,
        by_layer=by_layer,
        **running,
    )


def dense_phase(context: PipelineContext, config: SparseConfig) -> Callable[[], bool]:
    """A function that says whether the running step is dense: one of the first, or one with much noise."""
    known: dict[int, list[float] | None] = {}

    def dense() -> bool:
        if not config.dense_steps and config.dense_until is None:
            return False
        state = context.clock.current
        if state is None or state.step is None:
            return True  # an unknown step counts as a dense one
        if state.step - state.first < math.ceil(config.dense_steps * (state.total - state.first)):
            return True
        if config.dense_until is None:
            return False
        if state.request not in known:
            known.clear()
            known[state.request] = noise_fractions(context.clock.scheduler)
            if known[state.request] is None:
                kind = type(context.clock.scheduler).__name__
                warnings.warn(
                    f"attention.sparse.dense_until: {kind} does not tell its noise levels, so that every step is "
                    "dense. Instead: dense_steps.", stacklevel=2,
                )  # fmt: skip
        noise = known[state.request]
        return noise is None or state.step >= len(noise) or noise[state.step] >= config.dense_until

    return dense


def engine(denoiser: Denoiser, role: Role | None, config: AttentionConfig) -> AttentionKernel | None:
    """The kernel of a role's sparse calls where `"auto"` chooses that of dense ones; `None` if none can run on the
    device with the denoiser's dtype and the role's head_dim."""
    call = Call(dtype=denoiser.dtype, head_dim=None if role is None else role.head_dim)
    for name in _ENGINES[config.fidelity]:
        kernel = KERNELS.get(name)
        able = kernel.missing(denoiser.device) is None and kernel.refuses(call) is None
        if able and refuses(kernel, denoiser, config) is None:
            return kernel
    return None


def refuses(kernel: AttentionKernel, denoiser: Denoiser, config: AttentionConfig) -> str | None:
    """Why a kernel cannot compute the sparse attention of a configuration, or `None` if it can."""
    found = settings(config)
    if kernel.sparse is None or found is None:
        return "takes no lists of blocks"
    within = SELECTORS.get(found.selector).within_tiles
    return kernel.sparse.refuses(denoiser.device, found.block, found.centroids, within)


def takes_lists(denoiser: Denoiser, role: Role, config: AttentionConfig, backend: str) -> bool:
    """Whether a kernel's name stands for one that computes the configuration's sparse attention in a role's calls."""
    if backend == "auto":
        return engine(denoiser, role, config) is not None
    return refuses(KERNELS.get(backend), denoiser, config) is None


def refuse(context: PipelineContext, denoiser: Denoiser, roles: list[Role], config: AttentionConfig) -> None:
    """Refuses sparse attention where no layer would be sparse, and where keys are sharded among ranks.

    Raises:
        Unsupported: The denoiser's adapter does not say where the tokens of pictures or frames are, no kernel of these
            takes lists of blocks, a glob of `layers` matches no sparse layer, or blocks of keys would be chosen within
            a rank's shard.
    """
    found = settings(config)
    if found is None:
        return
    able = [role for role in roles if is_visual(denoiser, role)]
    if not able:
        raise Unsupported(
            "attention.sparse",
            "the places of picture and video tokens in its self-attention are not known.",
            "attention.sparse=None for this model.",
            str(denoiser),
        )
    if found.top_p is not None and not SELECTORS.get(found.selector).logits:
        able_rules = ", ".join(repr(name) for name in SELECTORS if SELECTORS.get(name).logits)
        raise Unsupported(
            "attention.sparse.top_p",
            f"scores of {found.selector!r} are no logits, so that a share of their softmax means nothing.",
            f"keep or tau, or one of the rules {able_rules}.",
            str(denoiser),
        )
    backends = dict.fromkeys(backend for role in able for backend in role.backends)
    if not any(takes_lists(denoiser, role, config, backend) for role in able for backend in role.backends):
        known = {name: refuses(KERNELS.get(name), denoiser, config) for name in backends if name != "auto"}
        reasons = [f"{name!r} {reason}" for name, reason in known.items()]
        if "auto" in backends:
            reasons.append(f"no kernel takes lists of blocks on {denoiser.device}, in {denoiser.dtype}")
        raise Unsupported(
            "attention.sparse",
            f"{', '.join(reasons)}.",
            "attention.backend='sage-fp8', 'sage', 'qk16pv8' or 'triton' on a CUDA device, in 16 bits, or sparse=None.",
            str(denoiser),
        )
    rule = SELECTORS.get(found.selector)
    if found.order == token_grid.CLUSTERS and (rule.places or not rule.parts):
        raise Unsupported(
            "attention.sparse.order='clusters'",
            f"{found.selector!r} chooses by the places of blocks, and clusters have none.",
            "order='cubes', or a rule that reads means: 'sub-blocks', 'means', 'similarity'.",
            str(denoiser),
        )
    globs = [("layers", glob) for glob in found.layers or {}] + [("heads", glob) for glob in found.heads or {}]
    for name, glob in globs:
        if not any(matches(denoiser, layer.path, glob) for role in able for layer in role.layers):
            raise Unsupported(
                f"attention.sparse.{name}[{glob!r}]",
                "it matches no layer that may be sparse.",
                f"a glob over names like {able[0].layers[0].path!r}.",
                str(denoiser),
            )
    calibrated(denoiser, found)
    _refuse_heads(context, denoiser, able, found)
    cache = context.config.cache if context.config is not None else None
    if found.shared_steps > 1 and getattr(cache, "kind", "") == "pab":
        raise Unsupported(
            "attention.sparse.refresh",
            "cache='pab' leaves out attention layers one by one, so that a step may choose for some of them only.",
            "refresh=1, or another cache.",
            str(denoiser),
        )
    parallel = context.config.parallel if context.config is not None else None
    plan = denoiser.adapter.sequence
    joint = [role for role in able if plan and len(plan.attention[role.name.rpartition(".")[2]].queries) > 1]
    if parallel is not None and parallel.ulysses > 1 and joint:
        raise Unsupported(
            "attention.sparse",
            f"{joint[0].name} attends to text and pictures jointly, and parallel.ulysses brings their tokens rank by "
            "rank, so that blocks of text are not known.",
            "parallel.cfg, or attention.sparse=None.",
            str(denoiser),
        )
    if parallel is not None and parallel.partial:
        raise Unsupported(
            "attention.sparse",
            "parallel.ring and parallel.attn2d shard the keys, and blocks would be chosen within each shard.",
            "parallel.ulysses, which shards heads, or attention.sparse=None.",
            str(denoiser),
        )


def _refuse_heads(context: PipelineContext, denoiser: Denoiser, roles: list[Role], config: SparseConfig) -> None:
    """Refuses shares of heads where a layer has another number of heads, and where ranks share the heads."""
    for glob, shares in (config.heads or {}).items():
        for layer in (layer for role in roles for layer in role.layers if matches(denoiser, layer.path, glob)):
            heads = getattr(layer.module, "heads", None) or getattr(layer.module, "num_heads", None)
            if isinstance(heads, int) and heads != len(shares):
                raise Unsupported(
                    f"attention.sparse.heads[{glob!r}]",
                    f"{len(shares)} shares are given, and {layer.path} has {heads} heads.",
                    f"{heads} shares.",
                    str(denoiser),
                )
    parallel = context.config.parallel if context.config is not None else None
    if config.heads and parallel is not None and (parallel.ulysses > 1 or parallel.tp > 1):
        raise Unsupported(
            "attention.sparse.heads",
            "parallel.ulysses and parallel.tp share the heads among ranks.",
            "attention.sparse.layers, or another kind of parallelism.",
            str(denoiser),
        )


def notes(denoiser: Denoiser, roles: list[Role], config: AttentionConfig) -> list[str]:
    """Sparse attention in words: one sentence for each role, and one for the dense phase."""
    found = settings(config)
    if found is None:
        return []
    asked, found = found, calibrated(denoiser, found)
    lines = []
    for role in roles:
        listed = [takes_lists(denoiser, role, config, backend) for backend in role.backends]
        if not is_visual(denoiser, role) or not any(listed):
            continue
        some = "" if all(listed) else f" in {sum(listed)} of {len(listed)} layers"
        lines.append(
            f"{denoiser.name}: {role.name}{some} attends to {found.described()}, in calls of {found.min_tokens} "
            "picture or video tokens or more; shorter calls are dense."
        )
        if unknown := skip_softmax.unknown_targets(denoiser, asked, role.layers):
            lines.append(
                f"{denoiser.name}: the checkpoint's calibration is for {', '.join(unknown)}; no layer of {role.name} "
                "is of these classes, and it is taken for all of them."
            )
    if lines and found.shared_steps > 1:
        bounds = [] if found.refresh is None else [f"for {found.refresh} steps"]
        bounds += [] if found.drift is None else [f"until the latents have changed by {found.drift:.1%}"]
        lines.append(f"{denoiser.name}: a choice of blocks serves {' or '.join(bounds)}.")
    if lines and (phase := dense_parts(found)):
        lines.append(f"{denoiser.name}: {phase} stay dense.")
    return lines


def dense_parts(config: SparseConfig) -> str:
    """The dense steps and layers, in words."""
    parts = []
    if config.dense_steps:
        parts.append(f"the first {config.dense_steps:.0%} of steps")
    if config.dense_until is not None:
        parts.append(f"steps with a noise level of {config.dense_until:g} or more")
    if config.dense_layers:
        parts.append(f"the first {config.dense_layers:.0%} of blocks")
    return " and ".join(parts)
