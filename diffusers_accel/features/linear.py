"""Quantized linear layers: each stock layer is replaced by one that stores its weight in a low-bit format.

Layers are quantized one at a time, on the GPU if there is one. Each takes the stock layer's place before the next one
is quantized, so that at most one layer is in memory twice. Stock weights are offloaded to host memory, from where
`restore` brings them back bit for bit, or dropped.

A layer keeps its stock weight if its adapter or the user excludes it, or if the format cannot store it. `check` names
these layers with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..compat.torch_private import apply_to_tensors
from ..config import LinearConfig
from ..core.edits import Edit, OffloadWeight, SwapModule
from ..core.platform import to_device
from ..core.weights import is_plain
from ..errors import AccelError, Unsupported
from ..kernels.linear import (
    LINEARS,
    STOCK,
    ActivationCache,
    LinearKernel,
    LinearProxy,
    LinearSlice,
    QuantizedLinear,
    unsharded_layer,
)
from ..models.adapter import default_adapter
from .context import Denoiser, PipelineContext
from .feature import Plan, refuse_offloaded

# The value of `linear.plan` for layers that are not quantized.
NOT_QUANTIZED = "none"


@dataclass(frozen=True)
class _LayerPlan:
    """One layer to be quantized.

    Attributes:
        path: Its path in the stock model.
        parent: The module that holds it.
        name: Its name in the parent.
        module: The stock layer.
        kernel: The record of its format.
    """

    path: str
    parent: nn.Module
    name: str
    module: nn.Linear
    kernel: LinearKernel


@dataclass
class _ModelPlan:
    """The decision about each linear layer of a denoiser.

    Attributes:
        quantized: Layers to be quantized.
        excluded: Path -> reason, of layers that the adapter or the configuration excludes.
        unsupported: Path -> reason, of layers that their format cannot store.
        unsupported_shards: Paths in `unsupported` whose whole layer the format could store: a rank's shard is too
            small.
    """

    quantized: list[_LayerPlan] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    unsupported_shards: list[str] = field(default_factory=list)


def check(context: PipelineContext, config: LinearConfig) -> Plan:
    """The plan: number of layers per format, memory before and after, and the layers that are not quantized.

    Raises:
        Unsupported: A format is unknown or cannot run here, a glob matches no layer, the layers are quantized already
            or their weights are not loaded, or no layer is left to quantize.
    """
    denoisers = _targets(context, config)
    kernels = {name: _kernel(name, denoiser) for denoiser in denoisers for name in _named(config)}
    _refuse_unmatched(denoisers, config)
    actions, notes, skipped, modules = [], [], [], 0
    formats: dict[int, LinearKernel] = {}
    for denoiser in denoisers:
        refuse_offloaded("linear", denoiser, context)
        plan = _plan(denoiser, config, kernels, loaded_later=context.takes_over_offloading)
        if not plan.quantized:
            raise Unsupported(
                "linear" if config.algo is None else f"linear={config.algo!r}",
                f"no linear layer is left to quantize: {_reasons(plan)}.",
                _ways_out(denoiser, config),
                str(denoiser),
            )
        _try_foreign_formats(context, denoiser, plan.quantized)
        modules += len(plan.quantized)
        formats |= {id(layer.module): layer.kernel for layer in plan.quantized}
        counts = Counter(layer.kernel.name for layer in plan.quantized)
        actions.append(f"{denoiser.name}: {', '.join(f'{name} x {count}' for name, count in counts.items())}")
        before, after = _bytes(plan.quantized)
        parallel = context.config.parallel if context.config is not None else None
        summed = ", summed over ranks" if parallel is not None and parallel.tp > 1 else ""
        notes.append(
            f"{denoiser.name}: their weights take {after / 2**20:.1f} MiB instead of {before / 2**20:.1f}{summed}."
        )
        if plan.excluded:
            paths = _shortened(list(plan.excluded))
            notes.append(f"{denoiser.name}: {len(plan.excluded)} layers are not quantized: {paths}.")
        for reason, affected in _paths_by_reason(plan.unsupported).items():
            skipped.append(
                f"{denoiser.name}: {len(affected)} layers are not quantized ({reason}): {_shortened(affected)}."
            )
        for name in counts:
            note = kernels[name].note(denoiser.device)
            if note is not None:
                notes.append(f"{denoiser.name}: {name}: {note}")
    if config.keep_original == "drop":
        notes.append("The original weights are dropped: restore cannot bring them back.")
    return Plan("; ".join(actions), modules, tuple(dict.fromkeys(notes)), tuple(skipped), formats)


def _try_foreign_formats(context: PipelineContext, denoiser: Denoiser, layers: list[_LayerPlan]) -> None:
    """Tries each format of another package on a copy of its smallest layer: only a trial shows whether it works.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        layers: The layers to be quantized.

    Raises:
        Unsupported: The package raised an error on that layer.
    """
    for name in dict.fromkeys(layer.kernel.name for layer in layers if layer.kernel.foreign):
        candidates = [layer for layer in layers if layer.kernel.name == name]
        layer = min(candidates, key=lambda each: each.module.weight.numel())
        if layer.module.weight.is_meta:
            continue
        try:
            with torch.no_grad():
                quantized = _quantized(replace(layer, module=copy.deepcopy(layer.module)), context.home)
                weight = layer.module.weight
                if weight.device.type == denoiser.device.type:
                    quantized(torch.zeros(32, layer.module.in_features, dtype=weight.dtype, device=weight.device))
        except AccelError:
            raise
        except Exception as error:  # another package raises errors of any kind
            first = (str(error).strip() or "no message").splitlines()[0]
            raise Unsupported(
                f"linear={name!r}",
                f"its package failed on {layer.path}, where it was tried: {type(error).__name__}: {first.rstrip('.')}.",
                f"another format, or linear.plan={{{layer.path!r}: 'none'}} for layers like it.",
                str(denoiser),
            ) from error


def components(context: PipelineContext, config: LinearConfig) -> tuple[str, ...]:
    """Names of the components that it changes, without denoisers."""
    denoisers = {denoiser.name for denoiser in context.denoisers}
    return tuple(name for name in config.targets or () if name not in denoisers)


def edits(context: PipelineContext, config: LinearConfig) -> Iterator[Edit]:
    """Two edits per layer: the swap, and the offload of the stock weight, before the next layer is quantized."""
    for denoiser in _targets(context, config):
        if denoiser.name in context.shared:
            continue
        kernels = {name: _kernel(name, denoiser) for name in _named(config)}
        activation_cache = ActivationCache()
        plan = _plan(denoiser, config, kernels)
        _warn_of_unsupported_shards(denoiser, plan)
        for layer in plan.quantized:
            quantized = _quantized(layer, context.home)
            keep = config.keep_original == "cpu"
            if isinstance(quantized, QuantizedLinear):
                quantized.activation_cache = activation_cache
                if keep:
                    quantized.keep_stock(layer.module)
            elif keep:
                vars(quantized)[STOCK] = (layer.module,)
            elif getattr(getattr(quantized, "weight", None), "shape", None) != layer.module.weight.shape:
                # If a later layer failed, the unwinding journal could not recover the stock weight.
                raise Unsupported(
                    "linear.keep_original='drop'",
                    f"the layer that {layer.kernel.name!r} makes of {layer.path} has no weight of the stock shape, "
                    "so an error in a later layer could not be undone.",
                    "linear.keep_original='cpu'.",
                    str(denoiser),
                )
            yield SwapModule(layer.parent, layer.name, quantized, denoiser.module)
            yield OffloadWeight(layer.module, quantized, keep)


def _warn_of_unsupported_shards(denoiser: Denoiser, plan: _ModelPlan) -> None:
    """Warns of layers whose shards a format cannot store. `check` sees whole layers and cannot know them."""
    for reason, paths in _paths_by_reason({path: plan.unsupported[path] for path in plan.unsupported_shards}).items():
        warnings.warn(
            f"accelerate: linear: {denoiser.name}: this rank's shards of {len(paths)} layers are not quantized "
            f"({reason}): {_shortened(paths)}.",
            stacklevel=2,
        )


def _paths_by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    """Reason -> paths, from path -> reason."""
    found: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        found.setdefault(reason, []).append(path)
    return found


def _quantized(layer: _LayerPlan, home: torch.device) -> nn.Module:
    """The quantized layer, on the stock layer's device.

    Args:
        layer: The layer.
        home: The device that the model runs on. A weight on the host is quantized there, or else on the first GPU.
    """
    make, weight = layer.kernel.load(), layer.module.weight
    if weight.device.type != "cpu" or not torch.cuda.is_available():
        return make(layer.module)
    kept = weight.data
    weight.data = to_device(kept, home if home.type == "cuda" else torch.device("cuda"))
    try:
        made = make(layer.module)
        apply_to_tensors(made, lambda x: to_device(x, kept.device) if is_plain(x) else x.to(kept.device))
        return made
    finally:
        weight.data = kept


# --- which layers ----------------------------------------------------------------------------------------------------


def _targets(context: PipelineContext, config: LinearConfig) -> tuple[Denoiser, ...]:
    """The denoisers, or the components that `linear.targets` names. A component that is no denoiser has the default
    adapter.

    Raises:
        Unsupported: The pipeline has no loaded model of a given name.
    """
    if config.targets is None:
        return context.denoisers
    known = {denoiser.name: denoiser for denoiser in context.denoisers}
    targets = []
    for name in config.targets:
        module = context.pipe.components.get(name)
        if not isinstance(module, nn.Module):
            modules = [key for key, item in context.pipe.components.items() if isinstance(item, nn.Module)]
            raise Unsupported(
                f"linear.targets: {name!r}",
                f"the pipeline has no such model{' loaded' if name in context.pipe.components else ''}.",
                f"linear.targets with names of {', '.join(modules)}.",
            )
        device = context.device
        targets.append(known.get(name) or Denoiser(name, module, default_adapter(module), device))
    return tuple(targets)


def _named(config: LinearConfig) -> list[str]:
    """Names of the formats in `linear.algo` and `linear.plan`."""
    names = [config.algo, *(config.plan or {}).values()]
    return [name for name in dict.fromkeys(names) if name is not None and name != NOT_QUANTIZED]


def _kernel(name: str, denoiser: Denoiser) -> LinearKernel:
    kernel = LINEARS.get(name)
    missing = kernel.missing(denoiser.device)
    if missing is not None:
        usable = [repr(other) for other in LINEARS if LINEARS.get(other).missing(denoiser.device) is None]
        raise Unsupported(f"linear={name!r}", f"{name} {missing}", f"one of {', '.join(usable)}.", str(denoiser))
    return kernel


def _linears(denoiser: Denoiser) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """(path, parent, name, layer) of a denoiser's linear layers; of a LoRA layer, its base layer at its path."""
    for parent_path, parent in denoiser.module.named_modules():
        wrapped = isinstance(getattr(parent, "base_layer", None), nn.Module)
        for name, module in parent.named_children():
            (module,) = vars(module).get(STOCK, (module,))
            if not isinstance(module, nn.Linear) or (wrapped and name != "base_layer"):
                continue
            if ".lora_" in f".{parent_path}." or isinstance(parent, LinearSlice):
                continue
            path = parent_path if wrapped else f"{parent_path}.{name}" if parent_path else name
            yield path, parent, name, module


def _plan(
    denoiser: Denoiser, config: LinearConfig, kernels: dict[str, LinearKernel], loaded_later: bool = False
) -> _ModelPlan:
    """Decides for each linear layer of a denoiser whether it is quantized, and to which format.

    Args:
        denoiser: The denoiser.
        config: The configuration.
        kernels: Name -> record of each named format.
        loaded_later: Whether weights on the meta device will be there before layers are quantized.
    """
    plan = _ModelPlan()
    adapter = denoiser.adapter
    inside, ends = _block_prefixes(denoiser)
    uses = Counter(id(item) for _, item in denoiser.module.named_parameters(remove_duplicate=False))
    for path, parent, name, module in _linears(denoiser):
        # The decision is by the whole layer: it must not depend on the number of ranks that share it.
        whole = unsharded_layer(module)
        smaller_side, sharded = min(whole.in_features, whole.out_features), whole is not module
        module = _stock_layer(denoiser, path, module)
        algo = next((algo for glob, algo in (config.plan or {}).items() if denoiser.matches(path, glob)), None)
        planned = algo is not None
        if not planned:
            smallest = adapter.max_unquantized_features if config.smallest is None else config.smallest
            bound = f"linear.smallest={smallest}" + (", the model's own" if config.smallest is None else "")
            if any(denoiser.matches(path, glob) for glob in config.ignore or ()):
                plan.excluded[path] = "named by linear.ignore"
            elif not path.startswith(inside) or path.startswith(ends):
                plan.excluded[path] = "outside the blocks whose layers are quantized by default"
            elif smaller_side <= smallest:
                plan.excluded[path] = f"no larger than {bound}"
            algo = None if path in plan.excluded else config.algo
        if algo is None or algo == NOT_QUANTIZED:
            plan.excluded.setdefault(path, "'none' in linear.plan" if planned else "not named by linear.plan")
            continue
        shared = "its weight is shared with another layer" if uses[id(module.weight)] > 1 else None
        reason = shared or _refusal(module, loaded_later) or kernels[algo].refuses(module)
        if reason is not None:
            plan.unsupported[path] = reason
            if sharded and kernels[algo].refuses(whole) is None:
                plan.unsupported_shards.append(path)
        else:
            plan.quantized.append(_LayerPlan(path, parent, name, module, kernels[algo]))
    return plan


def _reasons(plan: _ModelPlan) -> str:
    """Counts and examples of the reasons why layers are not quantized, the most frequent first."""
    counts = Counter([*plan.unsupported.values(), *plan.excluded.values()])
    if not counts:
        return "the model has none"
    example = {reason: path for path, reason in reversed([*plan.unsupported.items(), *plan.excluded.items()])}
    phrases = [
        f"{count} {'are' if reason in set(plan.excluded.values()) else 'cannot be:'} {reason} (e.g. {example[reason]})"
        for reason, count in counts.most_common(3)
    ]
    return f"of {counts.total()}, {', '.join(phrases)}"


def _ways_out(denoiser: Denoiser, config: LinearConfig) -> str:
    """Settings that quantize at least one layer; each was tried."""
    usable = [name for name in LINEARS if LINEARS.get(name).missing(denoiser.device) is None]
    usable.sort(key=lambda name: name != config.algo)
    trials: dict[str, dict[str, object]] = {}
    if config.ignore:
        trials["fewer globs in linear.ignore"] = {"ignore": None}
    if config.smallest != 0:
        trials["linear.smallest=0"] = {"smallest": 0}
    if config.plan and config.algo is not None:
        trials["linear.plan without 'none'"] = {"plan": None}
    formats = {f"linear={name!r}": {"algo": name} for name in usable if name != config.algo}
    with_small = {f"linear.algo={name!r} with linear.smallest=0": {"algo": name, "smallest": 0} for name in usable}
    everything = {f"linear.plan={{'*': {name!r}}}": {"plan": {"*": name}} for name in usable}
    ways: list[str] = []
    for group in (trials, formats, with_small, everything):
        for setting, changes in group.items():
            tried = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
            kernels = {name: LINEARS.get(name) for name in _named(tried)}
            if not ways or group is trials:
                ways += [setting] if _plan(denoiser, tried, kernels).quantized else []
        if ways:
            break
    return f"{', or '.join(ways) or 'linear=None for this model'}."


def _block_prefixes(denoiser: Denoiser) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Path prefixes of all blocks, and of the first and last blocks that the adapter excludes from quantization. The
    latter are empty where they would be most of the model."""
    adapter = denoiser.adapter
    blocks = {id(block) for block in adapter.blocks(denoiser.module)}
    main = {id(block) for stack in adapter.stacks for block in stack.blocks(denoiser.module)}
    paths = [
        (f"{path}.", id(module) in main) for path, module in denoiser.module.named_modules() if id(module) in blocks
    ]
    main_paths = [path for path, in_main in paths if in_main]
    first, last = adapter.unquantized_ends
    if len(main_paths) < 2 * (first + last):
        first = last = 0
    ends = (*main_paths[:first], *main_paths[len(main_paths) - last :])
    return tuple(path for path, _ in paths), ends


def _stock_layer(denoiser: Denoiser, path: str, module: nn.Linear) -> nn.Linear:
    """The stock layer behind one that an earlier `accelerate` quantized or packed.

    Raises:
        Unsupported: The stock weight was dropped, or never loaded.
    """
    if not isinstance(module, LinearProxy):
        return module
    if module.stock is None:
        raise Unsupported(
            "linear",
            f"{path} is quantized already ({module.kind}), and its original weight is gone.",
            "leave linear=None, or load the pipeline again.",
            str(denoiser),
        )
    return module.stock


def _refusal(module: nn.Linear, loaded_later: bool) -> str | None:
    """The reason why no format can store a layer, or `None`."""
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}"
    if type(module.weight) not in (nn.Parameter, torch.Tensor) or type(module.weight.data) is not torch.Tensor:
        return f"its weight is a {type(module.weight.data).__name__}"
    if module.weight.is_meta and not loaded_later:
        return "its weight is not loaded (meta device)"
    return None


def _refuse_unmatched(denoisers: tuple[Denoiser, ...], config: LinearConfig) -> None:
    """Refuses globs of `linear.ignore` and `linear.plan` that match no linear layer."""
    paths = [(denoiser, path) for denoiser in denoisers for path, *_ in _linears(denoiser)]
    for option, globs in (("ignore", config.ignore or ()), ("plan", tuple(config.plan or ()))):
        for glob in globs:
            if not any(denoiser.matches(path, glob) for denoiser, path in paths):
                names = ", ".join(str(denoiser) for denoiser in denoisers)
                raise Unsupported(
                    f"linear.{option}: {glob!r}",
                    "it matches no linear layer." if paths else "the model has no linear layer.",
                    f"a glob over names like {paths[0][1]!r}; nn.Module.named_modules lists them."
                    if paths
                    else "linear.targets with a model that has linear layers.",
                    names,
                )


def _bytes(layers: list[_LayerPlan]) -> tuple[int, int]:
    """Bytes of the layers' weights before and after. A format of unknown size counts as the stock dtype."""
    before = sum(layer.module.weight.numel() * layer.module.weight.element_size() for layer in layers)
    after = sum(
        layer.module.weight.numel() * (layer.kernel.bits or 8 * layer.module.weight.element_size()) / 8
        for layer in layers
    )
    return before, int(after)


def _shortened(paths: list[str], most: int = 6) -> str:
    """Paths for a message: block numbers become `*`, and repeated paths are merged."""
    merged = list(
        dict.fromkeys(".".join("*" if part.isdigit() else part for part in path.split(".")) for path in paths)
    )
    return ", ".join(merged[:most]) + (f" and {len(merged) - most} more" if len(merged) > most else "")
