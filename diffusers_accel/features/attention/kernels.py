"""From a kernel's name in the configuration to a `Choice` on a denoiser: a fixed kernel, the fastest by measurement, or
the kernel of dense steps. Also describes choices for `explain`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ...config import AttentionConfig
from ...errors import Unsupported
from ...kernels.attention import KERNELS, Call, Choice, Fastest, Fixed, Sparse, Timings, candidates
from ..context import Denoiser, PipelineContext
from . import sparse as sparse_attention
from .layers import Role, matches, named


def choice(
    denoiser: Denoiser,
    role: Role | None,
    backend: str,
    config: AttentionConfig,
    context: PipelineContext | None = None,
    sparse: Sparse | None = None,
) -> Choice:
    """The choice that a kernel's name stands for on a denoiser.

    Args:
        denoiser: The denoiser.
        role: The role of its layers; `None` for a choice that no role names.
        backend: The kernel's name, or `"auto"`.
        config: The section of the configuration.
        context: Receives the measurements of `"auto"` in its statistics; `None` to keep none.
        sparse: Sparse attention of the role's calls; `None` for dense attention.

    Raises:
        Unsupported: The kernel cannot run on the device, or not with the denoiser's dtype and head_dim.
    """
    if backend == "auto":
        found = _fastest(denoiser, config.fidelity == "exact", context)
        engine = sparse_attention.engine(denoiser, role, config) if sparse is not None else None
        return found if engine is None else replace(found, sparse=sparse, sparse_kernel=engine)
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
    listed = sparse is not None and sparse_attention.refuses(kernel, denoiser, config) is None
    return Fixed(kernel, sparse if listed else None)


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
