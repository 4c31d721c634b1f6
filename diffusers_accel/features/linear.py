"""Linear layers: stores their weights in low-bit formats and multiplies them so, one layer at a time.

A layer is quantized where its weight lies (on the GPU if there is one) and takes the stock layer's place before the
next one is touched, so that nothing more than one layer is held twice. The stock weights go to the host's memory, from
where `restore` brings them back bit for bit, or are dropped.

What stays wide: what the adapter lists for its model, what the user lists, and what the format cannot take.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..config import LinearConfig
from ..core.edits import Edit, ParkWeight, SwapModule
from ..errors import AccelError, Unsupported
from ..kernels.linear import LINEARS, STOCK, LinearKernel, Part, QuantizedLinear, RoundedOnce, StandIn, unsharded_layer
from ..models.adapter import default_adapter
from .context import Denoiser, PipelineContext
from .feature import Plan, refuse_offloaded

WIDE = "none"


@dataclass(frozen=True)
class _Layer:
    """One linear layer: its path, as stock code has it, its parent, its name there, and the format it gets."""

    path: str
    parent: nn.Module
    name: str
    module: nn.Linear
    kernel: LinearKernel


@dataclass
class _Layers:
    """What becomes of a denoiser's linear layers.

    Attributes:
        quantized: Those that are quantized.
        wide: Path -> why, of those that the lists keep wide.
        refused: Path -> why the format named for it cannot take it.
        parts: Those of them whose whole it could take: a rank's part is too small for it.
    """

    quantized: list[_Layer]
    wide: dict[str, str]
    refused: dict[str, str]
    parts: list[str]


def check(context: PipelineContext, config: LinearConfig) -> Plan:
    """What would be quantized, how, and what would not.

    Raises:
        Unsupported: A format is unknown or cannot run here, a glob matches nothing, the layers are quantized already or
            their weights are not there, or nothing is left to quantize.
    """
    denoisers = _targets(context, config)
    kernels = {name: _kernel(name, denoiser) for denoiser in denoisers for name in _named(config)}
    _refuse_unmatched(denoisers, config)
    actions, notes, left, modules = [], [], [], 0
    for denoiser in denoisers:
        refuse_offloaded("linear", denoiser)
        found = _layers(denoiser, config, kernels)
        if not found.quantized:
            raise Unsupported(
                "linear" if config.algo is None else f"linear={config.algo!r}",
                f"no linear layer is left to quantize: {_reasons(found)}.",
                _ways_out(denoiser, config),
                str(denoiser),
            )
        _refuse_untaken(denoiser, found.quantized)
        modules += len(found.quantized)
        counts = Counter(layer.kernel.name for layer in found.quantized)
        actions.append(f"{denoiser.name}: {', '.join(f'{name} x {count}' for name, count in counts.items())}")
        before, after = _bytes(found.quantized)
        parallel = context.config.parallel if context.config is not None else None
        together = ", all ranks' parts together" if parallel is not None and parallel.tp > 1 else ""
        notes.append(
            f"{denoiser.name}: their weights take {after / 2**20:.1f} MiB instead of {before / 2**20:.1f}{together}."
        )
        if found.wide:
            notes.append(f"{denoiser.name}: {len(found.wide)} layers stay wide: {_shortened(list(found.wide))}.")
        for reason in dict.fromkeys(found.refused.values()):
            paths = [path for path, why in found.refused.items() if why == reason]
            left.append(f"{denoiser.name}: {len(paths)} layers stay as they are ({reason}): {_shortened(paths)}.")
        for name in counts:
            note = kernels[name].note(denoiser.device)
            if note is not None:
                notes.append(f"{denoiser.name}: {name}: {note}")
    if config.keep_original == "drop":
        notes.append("The original weights are dropped: restore cannot bring them back.")
    return Plan("; ".join(actions), modules, tuple(dict.fromkeys(notes)), tuple(left))


def _refuse_untaken(denoiser: Denoiser, layers: list[_Layer]) -> None:
    """Tries another package's format on a copy of its smallest layer, which is all that tells whether it can take it.

    Raises:
        Unsupported: It fails.
    """
    for name in dict.fromkeys(layer.kernel.name for layer in layers if layer.kernel.foreign):
        mine = [layer for layer in layers if layer.kernel.name == name]
        layer = min(mine, key=lambda each: each.module.weight.numel())
        if layer.module.weight.is_meta:
            continue
        try:
            with torch.no_grad():
                made = _made(replace(layer, module=copy.deepcopy(layer.module)))
                weight = layer.module.weight
                if weight.device.type == denoiser.device.type:
                    made(torch.zeros(32, layer.module.in_features, dtype=weight.dtype, device=weight.device))
        except AccelError:
            raise
        except Exception as error:  # whatever a foreign package raises on a layer it cannot take
            first = (str(error).strip() or "no message").splitlines()[0]
            raise Unsupported(
                f"linear={name!r}",
                f"it cannot take {layer.path}, on which it was tried: {type(error).__name__}: {first}",
                f"another format, or linear.plan={{{layer.path!r}: 'none'}} for layers like it.",
                str(denoiser),
            ) from error


def components(context: PipelineContext, config: LinearConfig) -> tuple[str, ...]:
    """The components besides the denoisers that it changes."""
    denoisers = {denoiser.name for denoiser in context.denoisers}
    return tuple(name for name in config.targets or () if name not in denoisers)


def edits(context: PipelineContext, config: LinearConfig) -> Iterator[Edit]:
    """One swap per layer, and its stock weight put aside, before the next layer is touched."""
    for denoiser in _targets(context, config):
        if denoiser.name in context.shared:
            continue
        kernels = {name: _kernel(name, denoiser) for name in _named(config)}
        rounded_once = RoundedOnce()
        found = _layers(denoiser, config, kernels)
        _warn_of_parts(denoiser, found)
        for layer in found.quantized:
            made = _made(layer)
            keep = config.keep_original == "cpu"
            if isinstance(made, QuantizedLinear):
                made.rounded_once = rounded_once
                if keep:
                    made.keep(layer.module)
            elif keep:
                vars(made)[STOCK] = (layer.module,)
            elif getattr(getattr(made, "weight", None), "shape", None) != layer.module.weight.shape:
                # Should a later layer fail, the stock weight would be found nowhere.
                raise Unsupported(
                    "linear.keep_original='drop'",
                    f"the layer that {layer.kernel.name!r} makes of {layer.path} has no weight of the stock shape.",
                    "keep_original='cpu'.",
                    str(denoiser),
                )
            yield SwapModule(layer.parent, layer.name, made, denoiser.module)
            yield ParkWeight(layer.module, made, keep)


def _warn_of_parts(denoiser: Denoiser, found: _Layers) -> None:
    """Says which layers stay as they are because ranks share them, which shows only when they do."""
    for reason in dict.fromkeys(found.refused[path] for path in found.parts):
        paths = [path for path in found.parts if found.refused[path] == reason]
        warnings.warn(
            f"accelerate: linear: {denoiser.name}: a rank's part of {len(paths)} layers stays as it is ({reason}): "
            f"{_shortened(paths)}.",
            stacklevel=2,
        )


def _made(layer: _Layer) -> nn.Module:
    """The quantized layer, on the stock one's device; a weight on the host is quantized on the GPU if there is one."""
    make, weight = layer.kernel.load(), layer.module.weight
    if weight.device.type != "cpu" or not torch.cuda.is_available():
        return make(layer.module)
    kept = weight.data
    weight.data = kept.cuda()
    try:
        return make(layer.module).to(kept.device)
    finally:
        weight.data = kept


# --- which layers ----------------------------------------------------------------------------------------------------


def _targets(context: PipelineContext, config: LinearConfig) -> tuple[Denoiser, ...]:
    """The denoisers, or the components that the configuration names; a text encoder is described by its own class."""
    if config.targets is None:
        return context.denoisers
    known = {denoiser.name: denoiser for denoiser in context.denoisers}
    found = []
    for name in config.targets:
        module = context.pipe.components.get(name)
        if not isinstance(module, nn.Module):
            modules = [key for key, item in context.pipe.components.items() if isinstance(item, nn.Module)]
            raise Unsupported(
                f"linear.targets: {name!r}",
                f"the pipeline has no such model{' loaded' if name in context.pipe.components else ''}.",
                f"linear.targets of {', '.join(modules)}.",
            )
        device = context.device
        found.append(known.get(name) or Denoiser(name, module, default_adapter(module), device))
    return tuple(found)


def _named(config: LinearConfig) -> list[str]:
    """Every format the configuration names."""
    names = [config.algo, *(config.plan or {}).values()]
    return [name for name in dict.fromkeys(names) if name is not None and name != WIDE]


def _kernel(name: str, denoiser: Denoiser) -> LinearKernel:
    kernel = LINEARS.get(name)
    missing = kernel.missing(denoiser.device)
    if missing is not None:
        usable = [repr(other) for other in LINEARS if LINEARS.get(other).missing(denoiser.device) is None]
        raise Unsupported(f"linear={name!r}", f"{name} {missing}", f"one of {', '.join(usable)}.", str(denoiser))
    return kernel


def _linears(denoiser: Denoiser) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """(path, parent, name, layer) of a denoiser's linear layers; of a LoRA layer, what lies beneath it."""
    for parent_path, parent in denoiser.module.named_modules():
        wrapped = isinstance(getattr(parent, "base_layer", None), nn.Module)
        for name, module in parent.named_children():
            (module,) = vars(module).get(STOCK, (module,))
            if not isinstance(module, nn.Linear) or (wrapped and name != "base_layer"):
                continue
            if ".lora_" in f".{parent_path}." or isinstance(parent, Part):
                continue
            path = parent_path if wrapped else f"{parent_path}.{name}" if parent_path else name
            yield path, parent, name, module


def _layers(denoiser: Denoiser, config: LinearConfig, kernels: dict[str, LinearKernel]) -> _Layers:
    found = _Layers([], {}, {}, [])
    adapter = denoiser.adapter
    inside, ends = _blocks(denoiser)
    uses = Counter(id(item) for _, item in denoiser.module.named_parameters(remove_duplicate=False))
    for path, parent, name, module in _linears(denoiser):
        # What stays wide does not depend on how many ranks share a layer.
        whole = unsharded_layer(module)
        narrow, divided = min(whole.in_features, whole.out_features), whole is not module
        module = _stock(denoiser, path, module)
        algo = next((algo for glob, algo in (config.plan or {}).items() if _matches(denoiser, path, glob)), None)
        planned = algo is not None
        if not planned:
            smallest = adapter.smallest_linear if config.smallest is None else config.smallest
            bound = f"linear.smallest={smallest}" + (", the model's own" if config.smallest is None else "")
            if any(_matches(denoiser, path, glob) for glob in config.ignore or ()):
                found.wide[path] = "named by linear.ignore"
            elif not path.startswith(inside) or path.startswith(ends):
                found.wide[path] = "outside the blocks whose layers are quantized by default"
            elif narrow <= smallest:
                found.wide[path] = f"no larger than {bound}"
            algo = None if path in found.wide else config.algo
        if algo is None or algo == WIDE:
            found.wide.setdefault(path, "'none' in linear.plan" if planned else "not named by linear.plan")
            continue
        shared = "its weight is shared with another layer" if uses[id(module.weight)] > 1 else None
        refused = shared or _refusal(module) or kernels[algo].refuses(module)
        if refused is not None:
            found.refused[path] = refused
            if divided and kernels[algo].refuses(whole) is None:
                found.parts.append(path)
        else:
            found.quantized.append(_Layer(path, parent, name, module, kernels[algo]))
    return found


def _reasons(found: _Layers) -> str:
    """Why layers are not quantized, the commonest reason first."""
    counts = Counter([*found.refused.values(), *found.wide.values()])
    if not counts:
        return "there is none"
    example = {reason: path for path, reason in reversed([*found.refused.items(), *found.wide.items()])}
    said = [
        f"{count} {'are' if reason in set(found.wide.values()) else 'cannot be:'} {reason} ({example[reason]}, say)"
        for reason, count in counts.most_common(3)
    ]
    return f"of {counts.total()}, {', '.join(said)}"


def _ways_out(denoiser: Denoiser, config: LinearConfig) -> str:
    """What to write instead, each of it tried: with it a layer is quantized."""
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
    found: list[str] = []
    for group in (trials, formats, with_small, everything):
        for words, changes in group.items():
            tried = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
            kernels = {name: LINEARS.get(name) for name in _named(tried)}
            if not found or group is trials:
                found += [words] if _layers(denoiser, tried, kernels).quantized else []
        if found:
            break
    return f"{', or '.join(found) or 'linear=None for this model'}."


def _blocks(denoiser: Denoiser) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Beginnings of paths: of all blocks; and of the first and last ones that the adapter keeps wide, if they are not
    most of the model."""
    adapter = denoiser.adapter
    blocks = {id(block) for block in adapter.blocks(denoiser.module)}
    main = {id(block) for stack in adapter.stacks for block in stack.blocks(denoiser.module)}
    paths = [
        (f"{path}.", id(module) in main) for path, module in denoiser.module.named_modules() if id(module) in blocks
    ]
    stacked = [path for path, in_stack in paths if in_stack]
    first, last = adapter.wide_ends
    if len(stacked) < 2 * (first + last):
        first = last = 0
    ends = (*stacked[:first], *stacked[len(stacked) - last :])
    return tuple(path for path, _ in paths), ends


def _stock(denoiser: Denoiser, path: str, module: nn.Linear) -> nn.Linear:
    """The stock layer behind one that an earlier `accelerate` quantized or fused."""
    if not isinstance(module, StandIn):
        return module
    if module.stock is None:
        raise Unsupported(
            "linear",
            f"{path} is quantized already ({module.kind}), and its original weight is gone.",
            "leave linear=None, or load the pipeline again.",
            str(denoiser),
        )
    return module.stock


def _refusal(module: nn.Linear) -> str | None:
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}"
    if type(module.weight) not in (nn.Parameter, torch.Tensor) or type(module.weight.data) is not torch.Tensor:
        return f"its weight is a {type(module.weight.data).__name__}"
    if module.weight.is_meta:
        return "its weight is not loaded (meta device)"
    return None


def _matches(denoiser: Denoiser, path: str, glob: str) -> bool:
    return fnmatchcase(path, glob) or fnmatchcase(f"{denoiser.name}.{path}", glob)


def _refuse_unmatched(denoisers: tuple[Denoiser, ...], config: LinearConfig) -> None:
    paths = [(denoiser, path) for denoiser in denoisers for path, *_ in _linears(denoiser)]
    for option, globs in (("ignore", config.ignore or ()), ("plan", tuple(config.plan or ()))):
        for glob in globs:
            if not any(_matches(denoiser, path, glob) for denoiser, path in paths):
                names = ", ".join(str(denoiser) for denoiser in denoisers)
                raise Unsupported(
                    f"linear.{option}: {glob!r}",
                    "it matches no linear layer." if paths else "there is no linear layer at all.",
                    f"a glob over names like {paths[0][1]!r}; nn.Module.named_modules lists them."
                    if paths
                    else "other linear.targets.",
                    names,
                )


def _bytes(layers: list[_Layer]) -> tuple[int, int]:
    """Bytes of the layers' weights before, and after as far as it is known."""
    before = sum(layer.module.weight.numel() * layer.module.weight.element_size() for layer in layers)
    after = sum(
        layer.module.weight.numel() * (layer.kernel.bits or 8 * layer.module.weight.element_size()) / 8
        for layer in layers
    )
    return before, int(after)


def _shortened(paths: list[str], most: int = 6) -> str:
    """Paths for a reader, alike ones of different blocks joined."""
    joined = list(
        dict.fromkeys(".".join("*" if part.isdigit() else part for part in path.split(".")) for path in paths)
    )
    return ", ".join(joined[:most]) + (f" and {len(joined) - most} more" if len(joined) > most else "")
