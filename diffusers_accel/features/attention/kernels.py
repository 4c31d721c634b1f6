"""From a kernel's name in the configuration to a `Choice` on a denoiser: a fixed kernel, the fastest by measurement, or
the kernel of dense steps. Also describes choices for `explain`."""

from __future__ import annotations

from collections import Counter

from ...config import AttentionConfig
from ...errors import Unsupported
from ...kernels.attention import KERNELS, SELECTORS, Call, Choice, Fastest, Fixed, Sparse, Timings, candidates
from ..context import Denoiser, PipelineContext
from .layers import Role, matches, named


def choice(
    denoiser: Denoiser, role: Role | None, backend: str, config: AttentionConfig, context: PipelineContext | None = None
) -> Choice:
    """The choice that a kernel's name stands for on a denoiser.

    Args:
        denoiser: The denoiser.
        role: The role of its layers; `None` for a choice that no role names.
        backend: The kernel's name, or `"auto"`.
        config: The section of the configuration.
        context: Receives the measurements of `"auto"` in its statistics; `None` to keep none.

    Raises:
        Unsupported: The kernel cannot run on the device, or not with the denoiser's dtype and head_dim.
    """
    if backend == "auto":
        return _fastest(denoiser, config.fidelity == "exact", context)
    kernel = KERNELS.get(backend)
    field = _field(denoiser, role, backend, config)
    feature = f"attention{field}={backend!r}"
    instead = f"attention{field}='auto' or 'sdpa'."
    missing = kernel.missing(denoiser.device)
    if missing is not None:
        raise Unsupported(feature, f"{kernel.name} {missing}", instead, str(denoiser))
    head_dim = role.head_dim if role is not None else None
    refused = kernel.refuses(Call(dtype=denoiser.dtype, head_dim=head_dim))
    if refused is not None:
        where = f" in {role.layers[0].path}" if role is not None else ""
        raise Unsupported(feature, f"{kernel.name} {refused}{where}.", instead, str(denoiser))
    return Fixed(kernel, sparse_of(denoiser, role, config) if kernel.sparse else None)


def takes_lists(backend: str) -> bool:
    """Whether a kernel's name stands for one that takes lists of blocks."""
    return backend != "auto" and KERNELS.get(backend).sparse


def sparse_of(denoiser: Denoiser, role: Role | None, config: AttentionConfig) -> Sparse | None:
    """Sparse attention of a role's layers whose kernel takes lists of blocks; `None` if all its calls are dense."""
    settings = config.sparse
    if settings is None or role is None or role.name.rpartition(".")[2] not in denoiser.adapter.sparse_attention:
        return None
    return Sparse(
        selector=SELECTORS.get(settings.selector),
        keep=settings.keep,
        block=settings.block,
        min_tokens=settings.min_tokens,
    )


def refuse_sparse(context: PipelineContext, denoiser: Denoiser, roles: list[Role], config: AttentionConfig) -> None:
    """Refuses sparse attention where no layer would be sparse, and where keys are sharded among ranks.

    Raises:
        Unsupported: The denoiser's adapter names no layer that may be sparse, no kernel of these takes lists of blocks,
            or blocks of keys would be chosen within a rank's shard.
    """
    if config.sparse is None:
        return
    able = [role for role in roles if sparse_of(denoiser, role, config)]
    if not able:
        raise Unsupported(
            "attention.sparse",
            "no self-attention over the tokens of pictures or frames alone is known in it.",
            "attention.sparse=None for this model.",
            str(denoiser),
        )
    backends = dict.fromkeys(backend for role in able for backend in role.backends)
    if not any(map(takes_lists, backends)):
        raise Unsupported(
            "attention.sparse",
            f"{', '.join(map(repr, backends))} takes no lists of blocks.",
            "attention.backend='sage-fp8', 'sage' or 'qk16pv8', or sparse=None.",
            str(denoiser),
        )
    parallel = context.config.parallel if context.config is not None else None
    if parallel is not None and parallel.partial:
        raise Unsupported(
            "attention.sparse",
            "parallel.ring and parallel.attn2d shard the keys, and blocks would be chosen within each shard.",
            "parallel.ulysses, which shards heads, or attention.sparse=None.",
            str(denoiser),
        )


def _field(denoiser: Denoiser, role: Role | None, backend: str, config: AttentionConfig) -> str:
    """The field that names a kernel for a role, `".cross_attention"` say; empty for the field `backend`."""
    if role is None:
        return ".dense_backend" if backend not in (named(config), config.backend) else ""
    for glob, name in (config.layers or {}).items():
        if name == backend and any(matches(denoiser, layer.path, glob) for layer in role.layers):
            return f".layers[{glob!r}]"
    kind = "cross_attention" if role.cross else "self_attention"
    return f".{kind}" if getattr(config, kind) == backend else ""


def _fastest(denoiser: Denoiser, exact: bool, context: PipelineContext | None = None) -> Fastest:
    kernels = candidates(denoiser.device, exact)
    measured = context.stats.attention_timings if context is not None else {}
    return Fastest(kernels, Timings(denoiser.device), measured)


def dense(denoiser: Denoiser, config: AttentionConfig) -> Choice | None:
    """The choice for dense steps and layers, or `None` if there are none."""
    if not config.dense_steps and not config.dense_layers:
        return None
    if config.dense_backend == "auto":
        return _fastest(denoiser, True)
    return choice(denoiser, None, config.dense_backend, config)


def share(config: AttentionConfig) -> str:
    """The dense steps and layers, in words."""
    parts = []
    if config.dense_steps:
        parts.append(f"the first {config.dense_steps:.0%} of steps")
    if config.dense_layers:
        parts.append(f"the first {config.dense_layers:.0%} of blocks")
    return " and ".join(parts)


def label(choice: Choice) -> str:
    """The kernel of a choice, in words."""
    return choice.kernels[0].name if len(choice.kernels) == 1 else "the fastest exact kernel"


def described(roles: list[Role], used: dict[str, Choice]) -> str:
    """The kernels of the roles: `"sage-fp8"`, or `"attn1 sage-fp8, attn2 sdpa"` if the roles differ."""

    def one(backend: str) -> str:
        kernels = used[backend].kernels
        if backend != "auto":
            return backend
        return f"{kernels[0].name} (chosen)" if len(kernels) == 1 else "the fastest, measured"

    if len(used) == 1:
        return one(next(iter(used)))
    parts: dict[str, str] = {}
    for role in roles:
        counts = Counter(role.backends)
        several = len(counts) > 1
        parts[role.name] = " + ".join(
            f"{one(name)} x {count}" if several else one(name) for name, count in counts.items()
        )
    return ", ".join(f"{name} {kernels}" for name, kernels in parts.items())
