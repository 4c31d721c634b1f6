"""Fused projections: linear layers that read one tensor are packed into one layer, so that one GEMM computes them all.

Such layers are an attention's query, key and value, and the feed-forward's first layer in FLUX's single-stream blocks.
Stock code still calls each layer: a slice of the packed layer (`kernels/linear/packed.py`) takes its place. Models
therefore need no support for packing. Quantized layers, layers with a LoRA and the shards of tensor parallelism can be
packed too.

The weights lie in one tensor, and the separate weights are freed. `restore` slices them out of it again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..compat.torch_private import children_of
from ..config import FuseConfig
from ..core.edits import Edit, SwapModule
from ..core.locations import ModuleLocations
from ..errors import Unsupported
from ..kernels.linear import STOCK, CannotPack, LinearSlice, PackedLinear, release_tensors, restore_tensors
from .context import Denoiser, PipelineContext
from .feature import Plan, refuse_offloaded

# Names of attention projections, grouped by the tensor that they read: the module's own stream, the encoder's states
# in cross attention, and the added streams of joint attention and of image conditioning.
_SELF_ATTENTION = ("to_q", "to_k", "to_v")
_CROSS_ATTENTION = ("to_k", "to_v")
_ADDED = (("add_q_proj", "add_k_proj", "add_v_proj"), ("k_img", "v_img"))


@dataclass(frozen=True)
class _Group:
    """Layers that read one tensor.

    Attributes:
        paths: Their paths in the stock model.
        slots: Of each layer, the module that holds it and its name there.
    """

    paths: tuple[str, ...]
    slots: tuple[tuple[nn.Module, str], ...]

    @property
    def layers(self) -> list[Any]:
        """The layers. For slices of an earlier `accelerate`, the layers whose places they have taken."""
        layers = [children_of(parent)[name] for parent, name in self.slots]
        return [layer.original if isinstance(layer, LinearSlice) else layer for layer in layers]

    @property
    def stock_layers(self) -> list[Any]:
        """The layers, with stock layers instead of another package's: an earlier `accelerate` is undone first."""
        return [vars(layer).get(STOCK, (layer,))[0] for layer in self.layers]

    def __str__(self) -> str:
        return ", ".join(self.paths)


def check(context: PipelineContext, config: FuseConfig) -> Plan:
    """The plan: number of groups that would be packed, and the groups that cannot be, with the reason.

    Raises:
        Unsupported: A denoiser has no layers that read one tensor, a glob matches none of them, no group can be packed,
            or the weights are offloaded.
    """
    modules, notes, skipped = 0, [], []
    for denoiser in context.denoisers:
        refuse_offloaded("fuse", denoiser, context)
        groups, fused = _groups(denoiser), _fused_by_diffusers(denoiser)
        if not groups and fused:
            undo = f"{denoiser.name}.unfuse_qkv_projections()"
            raise Unsupported(
                "fuse",
                f"diffusers' own fuse_qkv_projections() has fused the projections of {len(fused)} modules already.",
                f"pipe.{undo} first, or fuse=None.",
                str(denoiser),
            )
        if fused:
            notes.append(f"{denoiser.name}: diffusers' own fuse_qkv_projections() has fused {len(fused)} modules.")
        for glob in config.ignore or ():
            if not any(denoiser.matches(path, glob) for group in groups for path in group.paths):
                example = groups[0].paths[0] if groups else None
                raise Unsupported(
                    f"fuse.ignore: {glob!r}",
                    "it matches no layer that shares its input with another.",
                    f"a glob over names like {example!r}." if example else "fuse=None.",
                    str(denoiser),
                )
        candidates = _candidates(context, denoiser, groups, config)
        reasons = [(group, PackedLinear.refusal(group.stock_layers)) for group in candidates]
        packable = [group for group, reason in reasons if reason is None]
        skipped += [
            f"{denoiser.name}: {group} are not packed: {reason}." for group, reason in reasons if reason is not None
        ]
        if not packable:
            raise Unsupported(
                "fuse",
                skipped[0]
                if skipped
                else "fuse.ignore excludes all but one layer of every group that reads one tensor."
                if groups and config.ignore
                else "the model has no linear layers that read one tensor.",
                "fewer globs in fuse.ignore, or fuse=None."
                if groups and config.ignore and not skipped
                else "fuse=None.",
                str(denoiser),
            )
        modules += len(packable)
        names = sorted(
            {
                path.rpartition(".")[2]
                for group in groups
                for path in group.paths
                if _has_fused_activation(context, denoiser, group, path)
            }
        )
        if names:
            notes.append(
                f"{denoiser.name}: {', '.join(names)} are not packed: the activation is fused into their own GEMM."
            )
        notes.append(
            f"{denoiser.name}: {len(packable)} GEMMs instead of {sum(len(group.paths) for group in packable)}."
        )
    return Plan("layers that read one tensor are packed into one", modules, tuple(notes), tuple(skipped))


def edits(context: PipelineContext, config: FuseConfig) -> Iterator[Edit]:
    """One edit per group of layers. A group that turns out not to be packable is left as it is, with a warning."""
    for denoiser in context.denoisers:
        for group in _candidates(context, denoiser, _groups(denoiser), config):
            reason = PackedLinear.refusal(group.layers)
            if reason is None:
                try:
                    yield _PackLayers(group.slots, PackedLinear(group.layers), denoiser.module)
                except CannotPack as error:
                    reason = str(error)
            if reason is not None:
                warnings.warn(f"accelerate: fuse: {denoiser.name}: {group} are not packed: {reason}.", stacklevel=2)


@dataclass(eq=False)
class _PackLayers:
    """Puts slices of a packed layer in the places of its layers, and frees the layers' own tensors.

    Args:
        slots: Of each layer, the module that holds it and its name there.
        packed: The packed layer.
        root: The denoiser: `undo` searches it for the slices, which a LoRA may have moved.

    Attributes:
        locations: Set by the journal, which shares one index of modules among edits.
    """

    slots: tuple[tuple[nn.Module, str], ...]
    packed: PackedLinear
    root: nn.Module
    locations: ModuleLocations | None = field(default=None, init=False)
    _swaps: list[tuple[LinearSlice, SwapModule]] = field(default_factory=list, init=False)

    def apply(self) -> None:
        if not self._swaps:
            originals: list[Any] = [children_of(parent)[name] for parent, name in self.slots]
            slices = [LinearSlice(self.packed, index, original) for index, original in enumerate(originals)]
            self._swaps = [
                (item, SwapModule(parent, name, item, self.root))
                for item, (parent, name) in zip(slices, self.slots, strict=True)
            ]
        for item, swap in self._swaps:
            swap.locations = self.locations
            swap.apply()
            release_tensors(item.original)

    def undo(self) -> None:
        for item, swap in reversed(self._swaps):
            restore_tensors(item)
            swap.locations = self.locations
            swap.undo()


def _candidates(context: PipelineContext, denoiser: Denoiser, groups: list[_Group], config: FuseConfig) -> list[_Group]:
    """The groups, without layers in `fuse.ignore` and without layers whose activation is fused into their own GEMM."""
    candidates = []
    for group in groups:
        kept = [
            index
            for index, path in enumerate(group.paths)
            if not any(denoiser.matches(path, glob) for glob in config.ignore or ())
            and not _has_fused_activation(context, denoiser, group, path)
        ]
        if len(kept) > 1:
            candidates.append(
                _Group(tuple(group.paths[index] for index in kept), tuple(group.slots[index] for index in kept))
            )
    return candidates


def _has_fused_activation(context: PipelineContext, denoiser: Denoiser, group: _Group, path: str) -> bool:
    """Whether a rewrite fuses the activation after a 16-bit layer into the layer's GEMM (`epilogue.linear_gelu`). With
    quantized layers the activation is fused into the quantization instead."""
    if path.rpartition(".")[2] not in denoiser.adapter.activated or not context.rewrites(denoiser):
        return False
    quantized = context.config is not None and context.config.linear is not None
    return type(group.layers[group.paths.index(path)]) is nn.Linear and not quantized


def _fused_by_diffusers(denoiser: Denoiser) -> list[str]:
    """Paths of attention modules whose projections diffusers has fused itself. Older classes keep the flag
    `fused_projections` after unfusing; there the processor's class decides."""
    return [
        path
        for path, module in denoiser.module.named_modules()
        if vars(module).get("fused_projections")
        and (
            hasattr(module, "unfuse_projections")
            or type(getattr(module, "processor", None)).__name__.startswith("Fused")
        )
    ]


def _groups(denoiser: Denoiser) -> list[_Group]:
    """Groups of layers that read one tensor: the adapter's `projections` first, then projections of attention modules.
    A layer is in one group at most."""
    adapter = denoiser.adapter
    groups: list[_Group] = []
    taken: set[str] = set()
    paths = {id(module): path for path, module in denoiser.module.named_modules()}

    def add(owner: nn.Module, names: tuple[str, ...]) -> None:
        group = _group(paths[id(owner)], owner, names)
        if group is not None and taken.isdisjoint(group.paths):
            taken.update(group.paths)
            groups.append(group)

    fused = tuple(f"{path}." for path in _fused_by_diffusers(denoiser))
    for path, block in adapter.named_blocks(denoiser.module):
        for names in adapter.projections:
            # Stock code no longer calls the projections that diffusers has fused.
            if not any(f"{path}.{name}".startswith(fused) for name in names):
                add(block, names)
    for path, module in list(denoiser.module.named_modules()):
        if "to_k" not in children_of(module) or f"{path}.".startswith(fused):
            continue
        cross = path.rpartition(".")[2] in adapter.cross_attention or getattr(module, "is_cross_attention", False)
        values_alone = type(getattr(module, "processor", None)).__name__ in adapter.value_only_processors
        for names in (_CROSS_ATTENTION if cross else _SELF_ATTENTION[:2] if values_alone else _SELF_ATTENTION, *_ADDED):
            add(module, tuple(name for name in names if name in children_of(module)))
    return groups


def _group(path: str, owner: nn.Module, names: tuple[str, ...]) -> _Group | None:
    """The group of linear layers with these names below a module; of LoRA layers, the base layers.

    Returns:
        `None` if a layer is missing or of another class, or if there are fewer than two.
    """
    slots: list[tuple[nn.Module, str]] = []
    for name in names:
        holder, _, child = name.rpartition(".")
        try:
            parent = owner.get_submodule(holder)
            layer: Any = children_of(parent).get(child)
        except AttributeError:
            return None
        if layer is not None and isinstance(getattr(layer, "base_layer", None), nn.Module):
            parent, child, layer = layer, "base_layer", layer.base_layer
        if not isinstance(layer, nn.Linear):
            return None
        slots.append((parent, child))
    return _Group(tuple(f"{path}.{name}".lstrip(".") for name in names), tuple(slots)) if len(slots) > 1 else None
