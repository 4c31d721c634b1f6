"""Attention: routes a denoiser's attention calls to kernels, and counts what really ran.

Two seams. A stock processor that carries `_attention_backend` hands it to diffusers' dispatcher, so it is given a
backend of ours on the instance: the process-wide setting, which diffusers' own setter changes for every pipeline, is
left alone. A processor without it (SD3, Cosmos 1 and 2, and most classes outside the table) is replaced by one that
runs the *stock code* with a single global name bound to our kernel: no source is copied, and the stock processor
comes back with `restore`.

Modules that play one role in every block (`attn1`, `audio_attn2`) share one site, so that all blocks share one compiled
graph. Which block is running is marked from outside the compiled block, and only if the configuration asks for it.

Names private to diffusers' dispatcher appear in this file only.
"""

from __future__ import annotations

import copy
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import AttentionConfig
from ..core.edits import AddLayer, Edit, SetAttr, SetItem
from ..errors import Unsupported, nearest
from ..kernels.attention import (
    KERNELS,
    SITES,
    AttentionSite,
    Call,
    Choice,
    Fastest,
    Fixed,
    Rotated,
    Timings,
    candidates,
    margin,
    recipes,
)
from .feature import Denoiser, Plan, Target


@dataclass(frozen=True)
class _Layer:
    """One attention module: its path, and the number of its block among all blocks (`None` outside them)."""

    path: str
    module: nn.Module
    block: int | None


@dataclass
class _Role:
    """The modules that play one part in every block.

    Attributes:
        name: Path within the block; the full path of a module outside the blocks.
        cross: Whether it attends to another stream.
        layers: Its modules.
        backends: The kernel's name for each module.
    """

    name: str
    cross: bool
    layers: list[_Layer] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)

    @property
    def head_dim(self) -> int | None:
        return _head_dim(self.layers[0].module)


@dataclass
class _Place:
    """The block that is running, as its mark says."""

    block: int | None = None
    dense: bool = False


def check(target: Target, config: AttentionConfig) -> Plan:
    """The kernels each denoiser would use.

    Raises:
        Unsupported: A kernel or recipe is unknown or cannot run here, a glob matches nothing, or no attention layer can
            be given to a kernel.
    """
    _refuse_unmatched(target, config)
    actions, notes, left, modules = [], [], [], 0
    for denoiser in target.denoisers:
        roles, closed = _roles(denoiser, config)
        touched = sum(len(role.layers) for role in roles)
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
        for role in roles:
            for layer in role.layers:
                if getattr(layer.module.processor, "_parallel_config", None) is not None:
                    raise Unsupported(
                        f"attention={config.backend!r}",
                        "diffusers' own context parallelism is on, and it needs diffusers' own attention backends.",
                        "attention=None, or load the pipeline without enable_parallelism.",
                        str(denoiser),
                    )
        modules += touched
        used: dict[str, Choice] = {}
        for role in roles:
            for backend in dict.fromkeys(role.backends):
                used[backend] = _choice(denoiser, role, backend, config)
        # A denoiser without a single attention layer still gets its kernel judged.
        used = used or {_named(config): _choice(denoiser, None, _named(config), config)}
        actions.append(f"{denoiser.name}: {_described(roles, used)}")
        dense = _dense(denoiser, config)
        if dense is not None:
            notes.append(f"{denoiser.name}: {_share(config)} run on {_label(dense)}.")
        dims = {role.head_dim for role in roles} or {None}
        for choice in used.values():
            notes += _notes(denoiser, choice, dims)
    return Plan("; ".join(actions), modules, tuple(dict.fromkeys(notes)), tuple(left))


def _notes(denoiser: Denoiser, choice: Choice, head_dims: set[int | None]) -> list[str]:
    """What a user should know of a choice: how it is made and what is known already, or where a kernel stops."""
    if isinstance(choice, Fastest) and len(choice.kernels) > 1:
        names = ", ".join(kernel.name for kernel in choice.kernels)
        known = {shape: times for dim in head_dims for shape, times in choice.remembered(dim).items()}
        return [
            f"{denoiser.name}: each new shape is timed once on {names}; answers are kept in {choice.timings.path}.",
            *(f"{denoiser.name}: {shape}: {margin(times)}." for shape, times in sorted(known.items())),
        ]
    kernel = choice.kernels[0]
    if kernel.mask:
        return []
    kind = "a mask that is not over keys alone" if kernel.key_mask else "a mask"
    return [f"{denoiser.name}: calls with {kind} run on sdpa, since {kernel.name} takes none."]


def edits(target: Target, config: AttentionConfig) -> Iterator[Edit]:
    """A site per role, entered in diffusers' registry while it is in use, one edit per processor, and marks on the
    blocks if the block matters."""
    for denoiser in target.denoisers:
        roles, _ = _roles(denoiser, config)
        place, dense = _Place(), _dense(denoiser, config)
        owners = Counter(id(layer.module.processor) for role in roles for layer in role.layers)
        for role in roles:
            choices = {name: _choice(denoiser, role, name, config, target) for name in dict.fromkeys(role.backends)}
            by_block = {layer.block: choices[name] for layer, name in zip(role.layers, role.backends, strict=True)}
            # What `by_block` holds for a module outside the blocks is under None.
            select = _selector(target, config, place, by_block, dense)
            site = AttentionSite(select, target.attention_calls)
            yield SetItem(SITES, site.number, site)
            member, registrations = _dispatcher_backend(site)
            if any(hasattr(layer.module.processor, "_attention_backend") for layer in role.layers):
                yield from registrations
            # Kernels that round query and key rotate them in the same pass; for others the stock function does it then.
            fold = any(kernel.rotary for choice in choices.values() for kernel in choice.kernels)
            # One class per stock class, so that all blocks share one compiled graph.
            classes: dict[type, type] = {}
            for layer in role.layers:
                processor: Any = layer.module.processor
                rotary = fold and type(processor).__name__ in denoiser.adapter.rotary
                if hasattr(processor, "_attention_backend") and not rotary:
                    if owners[id(processor)] > 1:
                        processor = copy.copy(processor)
                        yield SetAttr(layer.module, "processor", processor)
                    yield SetAttr(processor, "_attention_backend", member)
                else:
                    kind = type(processor)
                    if kind not in classes:
                        classes[kind] = _rebound_class(kind, site, rotary)
                    clone: Any = object.__new__(classes[kind])
                    vars(clone).update(vars(processor))
                    yield SetAttr(layer.module, "processor", clone)
        if config.dense_layers or any(len(set(role.backends)) > 1 for role in roles):
            yield from _marks(denoiser, target, config, place)


def _selector(
    target: Target,
    config: AttentionConfig,
    place: _Place,
    by_block: dict[int | None, Choice],
    dense: Choice | None,
) -> Callable[[], Choice]:
    """What a site asks on every call: the choice for the step and block that are running."""
    first = next(iter(by_block.values()))
    uniform = all(choice is first for choice in by_block.values())

    def select() -> Choice:
        if dense is not None and (place.dense or _in_dense_steps(target, config.dense_steps)):
            return dense
        return first if uniform else by_block[place.block]

    return select


def _in_dense_steps(target: Target, share: float) -> bool:
    if not share:
        return False
    state = target.clock.current
    if state is None or state.step is None:
        return True  # a place that is unknown is computed with care
    return state.step - state.first < math.ceil(share * (state.total - state.first))


def _marks(denoiser: Denoiser, target: Target, config: AttentionConfig, place: _Place) -> Iterator[Edit]:
    """A layer around each block that says which one is running."""
    adapter = denoiser.adapter
    dense: dict[int, bool] = {}
    for stacks in (adapter.side_stacks, adapter.stacks):
        blocks = [block for stack in stacks for block in stack.blocks(denoiser.module)]
        count = math.ceil(config.dense_layers * len(blocks))
        dense |= {id(block): index < count for index, block in enumerate(blocks)}
    for number, block in enumerate(adapter.blocks(denoiser.module)):
        yield AddLayer(block, target.rank("attention layer"), _marked(place, number, dense[id(block)]))


def _marked(place: _Place, number: int, dense: bool) -> Callable[..., Any]:
    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = place.block, place.dense
        place.block, place.dense = number, dense
        try:
            return inner(*args, **kwargs)
        finally:
            place.block, place.dense = before

    return forward


# --- which kernel ----------------------------------------------------------------------------------------------------


def _named(config: AttentionConfig) -> str:
    """The kernel that `backend` and `recipe` name together."""
    if config.recipe is None:
        return config.backend
    known = recipes(config.backend)
    if not known:
        having = dict.fromkeys(name.partition("/")[0] for name in KERNELS if "/" in name)
        raise Unsupported(
            f"attention.recipe={config.recipe!r}",
            f"{config.backend!r} has no recipes; {', '.join(map(repr, having))} have.",
            "recipe=None.",
        )
    if config.recipe not in known:
        raise Unsupported(
            f"attention.recipe={config.recipe!r}",
            f"{config.backend!r} has no such recipe, but {', '.join(map(repr, known))}.",
            nearest(config.recipe, known),
        )
    return f"{config.backend}/{config.recipe}"


def _backend_of(denoiser: Denoiser, path: str, cross: bool, config: AttentionConfig) -> str:
    for glob, backend in (config.layers or {}).items():
        if _matches(denoiser, path, glob):
            return backend
    return (config.cross_attention if cross else config.self_attention) or _named(config)


def _matches(denoiser: Denoiser, path: str, glob: str) -> bool:
    return fnmatchcase(path, glob) or fnmatchcase(f"{denoiser.name}.{path}", glob)


def _refuse_unmatched(target: Target, config: AttentionConfig) -> None:
    for glob in config.layers or {}:
        paths = [(denoiser, path) for denoiser in target.denoisers for path, _ in _attention_modules(denoiser.module)]
        if not any(_matches(denoiser, path, glob) for denoiser, path in paths):
            example = paths[0][1] if paths else "none"
            raise Unsupported(
                f"attention.layers[{glob!r}]",
                "it matches no attention layer.",
                f"a glob over names like {example!r}; nn.Module.named_modules lists them.",
            )


def _choice(
    denoiser: Denoiser, role: _Role | None, backend: str, config: AttentionConfig, target: Target | None = None
) -> Choice:
    """What a name stands for on this denoiser; raises `Unsupported` if it cannot be."""
    if backend == "auto":
        return _fastest(denoiser, config.fidelity == "exact", target)
    kernel = KERNELS.get(backend)
    feature = f"attention={backend!r}"
    instead = "attention='auto' or 'sdpa'."
    missing = kernel.missing(denoiser.device)
    if missing is not None:
        raise Unsupported(feature, f"{kernel.name} {missing}", instead, str(denoiser))
    head_dim = role.head_dim if role is not None else None
    refused = kernel.refuses(Call(dtype=denoiser.dtype, head_dim=head_dim))
    if refused is not None:
        where = f" in {role.layers[0].path}" if role is not None else ""
        raise Unsupported(feature, f"{kernel.name} {refused}{where}.", instead, str(denoiser))
    return Fixed(kernel)


def _fastest(denoiser: Denoiser, exact: bool, target: Target | None = None) -> Fastest:
    kernels = candidates(denoiser.device, exact)
    seen = target.attention_timings if target is not None else {}
    return Fastest(kernels, Timings(denoiser.device), seen)


def _dense(denoiser: Denoiser, config: AttentionConfig) -> Choice | None:
    """The choice for dense steps and layers, or `None` if there are none."""
    if not config.dense_steps and not config.dense_layers:
        return None
    if config.dense_backend == "auto":
        return _fastest(denoiser, True)
    return _choice(denoiser, None, config.dense_backend, config)


def _share(config: AttentionConfig) -> str:
    parts = []
    if config.dense_steps:
        parts.append(f"the first {config.dense_steps:.0%} of steps")
    if config.dense_layers:
        parts.append(f"the first {config.dense_layers:.0%} of blocks")
    return " and ".join(parts)


def _label(choice: Choice) -> str:
    return choice.kernels[0].name if len(choice.kernels) == 1 else "the fastest exact kernel"


def _described(roles: list[_Role], used: dict[str, Choice]) -> str:
    """E.g. `"sage-fp8"`, or `"attn1 sage-fp8, attn2 sdpa"` if the roles differ."""

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


# --- which modules ---------------------------------------------------------------------------------------------------


def _attention_modules(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None and callable(processor):
            yield path, module


def _roles(denoiser: Denoiser, config: AttentionConfig) -> tuple[list[_Role], list[Any]]:
    """A denoiser's attention modules by the part they play, and the processors that cannot be redirected."""
    blocks = {id(block): number for number, block in enumerate(denoiser.adapter.blocks(denoiser.module))}
    inside = {path: blocks[id(module)] for path, module in denoiser.module.named_modules() if id(module) in blocks}
    roles: dict[tuple[str, str], _Role] = {}
    closed = []
    for path, module in _attention_modules(denoiser.module):
        processor: Any = module.processor
        if not hasattr(processor, "_attention_backend") and (
            isinstance(processor, nn.Module) or not _calls_by_name(processor)
        ):
            closed.append(processor)
            continue
        parts = path.split(".")
        block = next((".".join(parts[:end]) for end in range(1, len(parts)) if ".".join(parts[:end]) in inside), None)
        name = path if block is None else path[len(block) + 1 :]
        stack = "" if block is None else block.rpartition(".")[0]
        cross = parts[-1] in denoiser.adapter.cross_attention
        role = roles.setdefault((stack, name), _Role(name, cross))
        role.layers.append(_Layer(path, module, None if block is None else inside[block]))
        role.backends.append(_backend_of(denoiser, path, cross, config))
    return list(roles.values()), closed


def _head_dim(module: Any) -> int | None:
    """What an attention module's own attributes say of its head dimension."""
    for name in ("head_dim", "dim_head"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    inner, heads = getattr(module, "inner_dim", None), getattr(module, "heads", None)
    if isinstance(inner, int) and isinstance(heads, int) and heads and inner % heads == 0:
        return inner // heads
    return None


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
        return site(query, key, value, attn_mask, is_causal, scale)

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


def _rebound_class(stock: type, site: AttentionSite, rotary: bool = False) -> type:
    """A subclass of a stock processor that runs the stock code with its attention function bound to `site`; with
    `rotary`, query and key reach it with their rotation still to be applied."""
    call = stock.__call__  # type: ignore[operator]
    code = call.__code__

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
        return site(query, key, value, attn_mask, is_causal, scale)

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
        return site(query, key, value, attn_mask, is_causal, scale).transpose(1, 2)

    scope = dict(call.__globals__)
    # Dynamo looks a function's globals up in the module that `__name__` names; without it, in the dictionary itself.
    scope.pop("__name__", None)
    scope["dispatch_attention_fn"] = dispatched
    scope["F"] = _Functional(heads_first)
    if rotary:
        code = _rotation_put_off(code, scope)
    function = types.FunctionType(code, scope, call.__name__, call.__defaults__, call.__closure__)
    function.__kwdefaults__ = call.__kwdefaults__
    function.__annotations__ = dict(call.__annotations__)
    function.__module__ = stock.__module__
    return type(stock.__name__, (stock,), {"__call__": function, "__module__": stock.__module__})


def _rotation_put_off(code: types.CodeType, scope: dict[str, Any]) -> types.CodeType:
    """A processor's code whose rotation returns `Rotated`, be it a function of its module or one it defines itself."""
    stock = scope.get("apply_rotary_emb")
    if "apply_rotary_emb" in code.co_names and callable(stock):

        def put_off(x: Any, freqs_cis: Any, *args: Any, **kwargs: Any) -> Any:
            def apply(item: Any) -> Any:
                return stock(item, freqs_cis, *args, **kwargs)

            # The one form that is known to be interleaved pairs over (batch, sequence, heads, head_dim).
            if torch.compiler.is_compiling() or args or kwargs != {"sequence_dim": 1}:
                return apply(x)
            cos, sin = freqs_cis
            return Rotated.of(x, cos, sin, apply)

        scope["apply_rotary_emb"] = put_off
        return code
    constants = list(code.co_consts)
    own = next((item for item in constants if getattr(item, "co_name", None) == "apply_rotary_emb"), None)
    if own is None:
        return code
    rotation = types.FunctionType(own, scope)

    def put_off_own(x: Any, cos: Any, sin: Any) -> Any:
        def apply(item: Any) -> Any:
            return rotation(item, cos, sin)

        # The stock function reads cosines at even channels and sines at odd ones; both hold every value twice.
        return apply(x) if torch.compiler.is_compiling() else Rotated.of(x, cos, sin, apply)

    scope["_diffusers_accel_put_off"] = put_off_own
    constants[constants.index(own)] = _own_rotation.__code__
    return code.replace(co_consts=tuple(constants))


def _own_rotation(hidden_states: Any, freqs_cos: Any, freqs_sin: Any) -> Any:
    return _diffusers_accel_put_off(hidden_states, freqs_cos, freqs_sin)  # type: ignore[name-defined]  # noqa: F821
