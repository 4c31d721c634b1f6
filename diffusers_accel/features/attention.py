"""Attention: routes a denoiser's attention calls to one kernel, and counts what really ran.

Two seams. A stock processor that carries `_attention_backend` hands it to diffusers' dispatcher, so it is given a
backend of ours on the instance: the process-wide setting, which diffusers' own setter changes for every pipeline, is
left alone. A processor without it (SD3, Cosmos 1 and 2, and most classes outside the table) is replaced by one that
runs the *stock code* with a single global name bound to our kernel: no source is copied, and the stock processor
comes back with `restore`.

Names private to diffusers' dispatcher appear in this file only.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..config import AttentionConfig
from ..core.edits import Edit, SetAttr, SetItem
from ..errors import Unsupported
from ..kernels.attention import KERNELS, SITES, AttentionKernel, AttentionSite, choose
from .feature import Denoiser, Plan, Target


def check(target: Target, config: AttentionConfig) -> Plan:
    """The kernel each denoiser would use.

    Raises:
        Unsupported: The kernel is unknown, cannot run here, or no attention layer can be given to it.
    """
    actions, notes, left, modules = [], [], [], 0
    for denoiser in target.denoisers:
        kernel = _kernel(denoiser, config)
        dispatched, rebound, closed = _processors(denoiser.module)
        touched = len(dispatched) + len(rebound)
        if closed:
            names = ", ".join(sorted({type(processor).__name__ for processor in closed}))
            if config.backend != "auto" and not touched:
                raise Unsupported(
                    f"attention={config.backend!r}",
                    f"its {len(closed)} attention layers call attention in a way that cannot be redirected ({names}).",
                    "leave attention=None for this model.",
                    str(denoiser),
                )
            left.append(f"{denoiser.name}: {len(closed)} attention layers stay stock ({names}).")
        for processor in dispatched:
            if getattr(processor, "_parallel_config", None) is not None:
                raise Unsupported(
                    f"attention={config.backend!r}",
                    "diffusers' own context parallelism is on, and it needs diffusers' own attention backends.",
                    "attention=None, or load the pipeline without enable_parallelism.",
                    str(denoiser),
                )
        modules += touched
        chosen = f"{kernel.name} (chosen)" if config.backend == "auto" else kernel.name
        actions.append(f"{denoiser.name}: {chosen}")
        if not kernel.mask:
            notes.append(f"{denoiser.name}: calls with a mask run on sdpa, since {kernel.name} takes none.")
    return Plan("; ".join(actions), modules, tuple(notes), tuple(left))


def edits(target: Target, config: AttentionConfig) -> Iterator[Edit]:
    """A site per denoiser, entered in diffusers' registry while it is in use, and one edit per processor."""
    for denoiser in target.denoisers:
        dispatched, rebound, _ = _processors(denoiser.module)
        site = AttentionSite(_kernel(denoiser, config), target.attention_calls)
        yield SetItem(SITES, site.number, site)
        if dispatched:
            member, registrations = _dispatcher_backend(site)
            yield from registrations
            for processor in dispatched:
                yield SetAttr(processor, "_attention_backend", member)
        # One class per stock class, so that all blocks share one compiled graph.
        classes = {kind: _rebound_class(kind, site) for kind in {type(processor) for _, processor in rebound}}
        for module, processor in rebound:
            clone: Any = object.__new__(classes[type(processor)])
            vars(clone).update(vars(processor))
            yield SetAttr(module, "processor", clone)


def _kernel(denoiser: Denoiser, config: AttentionConfig) -> AttentionKernel:
    head_dim = denoiser.config.get("attention_head_dim")
    head_dim = head_dim if isinstance(head_dim, int) else None
    if config.backend == "auto":
        return choose(denoiser.device, denoiser.dtype, head_dim)
    kernel = KERNELS.get(config.backend)
    feature = f"attention={config.backend!r}"
    missing = kernel.missing(denoiser.device)
    if missing is not None:
        raise Unsupported(feature, f"{kernel.name} {missing}", "attention='auto' or 'sdpa'.", str(denoiser))
    refused = kernel.refuses(denoiser.dtype, head_dim)
    if refused is not None:
        raise Unsupported(feature, f"{kernel.name} {refused}.", "attention='auto' or 'sdpa'.", str(denoiser))
    return kernel


def _processors(denoiser: nn.Module) -> tuple[list[Any], list[tuple[nn.Module, Any]], list[Any]]:
    """A denoiser's attention processors: dispatched, those that can be rebound (with their module), and the rest."""
    dispatched: dict[int, Any] = {}
    rebound, closed = [], []
    for module in denoiser.modules():
        processor = getattr(module, "processor", None)
        if processor is None or not callable(processor):
            continue
        if hasattr(processor, "_attention_backend"):
            dispatched[id(processor)] = processor
        elif not isinstance(processor, nn.Module) and _calls_by_name(processor):
            rebound.append((module, processor))
        else:
            closed.append(processor)
    return list(dispatched.values()), rebound, closed


# --- diffusers' dispatcher -------------------------------------------------------------------------------------------


def _dispatcher_backend(site: AttentionSite) -> tuple[Any, list[Edit]]:
    """A backend name of ours, and the edits that enter it in the dispatcher's tables.

    The name is an instance of the dispatcher's enumeration that is not one of its members: the class stays as it is.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    value = f"diffusers_accel_{site.number}"
    member = str.__new__(AttentionBackendName, value)
    member._name_, member._value_ = value, value

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        _refuse_neighbours(_parallel_config)
        return site(query, key, value, attn_mask, is_causal, scale, enable_gqa)

    registry = _AttentionBackendRegistry
    arguments = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
    return member, [
        SetItem(registry._backends, member, attention),
        SetItem(registry._constraints, member, []),
        SetItem(registry._supported_arg_names, member, arguments | {"_parallel_config"}),
    ]


def _refuse_neighbours(given: Any) -> None:
    """Refuses context parallelism switched on after us, or one backend's arguments: ignored, they would do harm."""
    if given:
        raise Unsupported(
            "attention",
            "diffusers' context parallelism or backend arguments reached an accelerated attention layer.",
            "restore(pipe) before using them.",
        )


# --- processors that call attention themselves ----------------------------------------------------------------------


def _calls_by_name(processor: Any) -> bool:
    """Whether the processor's code reaches attention through a global name that can be bound anew."""
    call = vars(type(processor)).get("__call__")
    if not isinstance(call, types.FunctionType):
        return False
    names, scope = call.__code__.co_names, call.__globals__
    # A processor of ours is judged as the stock one it runs, so that a second `accelerate` is checked like the first.
    functional = scope.get("F") is F or isinstance(scope.get("F"), _Functional)
    return "dispatch_attention_fn" in names or ("scaled_dot_product_attention" in names and functional)


class _Functional:
    """`torch.nn.functional` with one function of ours."""

    def __init__(self, attention: Callable[..., Any]):
        self.scaled_dot_product_attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def _rebound_class(stock: type, site: AttentionSite) -> type:
    """A subclass of a stock processor that runs the stock code with its attention function bound to `site`."""
    call = stock.__call__  # type: ignore[operator]

    def dispatched(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: Any = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Any:
        _refuse_neighbours(parallel_config or attention_kwargs)
        return site(query, key, value, attn_mask, is_causal, scale, enable_gqa)

    def heads_first(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return site(query, key, value, attn_mask, is_causal, scale, enable_gqa).transpose(1, 2)

    scope = dict(call.__globals__)
    # Dynamo looks a function's globals up in the module that `__name__` names; without it, in the dictionary itself.
    scope.pop("__name__", None)
    scope["dispatch_attention_fn"] = dispatched
    scope["F"] = _Functional(heads_first)
    function = types.FunctionType(call.__code__, scope, call.__name__, call.__defaults__, call.__closure__)
    function.__kwdefaults__ = call.__kwdefaults__
    function.__annotations__ = dict(call.__annotations__)
    function.__module__ = stock.__module__
    return type(stock.__name__, (stock,), {"__call__": function, "__module__": stock.__module__})
