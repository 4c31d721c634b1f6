"""Fused projections: linear layers that read one tensor are multiplied as one (query, key and value; in FLUX's
single-stream blocks the feed-forward's too).

Stock code still calls each layer: its place is taken by a part that finds its columns in the product of all
(`kernels/linear/stacked.py`). That works for every model alike, quantized or not, with a LoRA around a part, and with
the shards that tensor parallelism leaves. The weights lie in one tensor; the separate ones are let go, and cut out of
it again by `restore`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..config import FuseConfig
from ..core.edits import Edit, SwapModule
from ..core.places import Places
from ..errors import Unsupported
from ..kernels.linear import STOCK, Apart, Part, Stack, emptied, unstacked
from .context import Denoiser, PipelineContext
from .feature import Plan, refuse_offloaded

# Names of an attention module's projections that read its own stream, another one, and one beside it.
_OWN = ("to_q", "to_k", "to_v")
_OTHER = ("to_k", "to_v")
_BESIDE = (("add_q_proj", "add_k_proj", "add_v_proj"), ("k_img", "v_img"))


@dataclass(frozen=True)
class _Group:
    """Layers that read one tensor: their paths as stock code has them, and where they hang."""

    paths: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def layers(self) -> list[Any]:
        """The layers; of a stack of an earlier `accelerate`, those whose places its parts have taken."""
        found = [parent._modules[name] for parent, name in self.places]
        return [layer.original if isinstance(layer, Part) else layer for layer in found]

    @property
    def before(self) -> list[Any]:
        """The layers as they are before another package's take their places: an earlier `accelerate` makes way."""
        return [vars(layer).get(STOCK, (layer,))[0] for layer in self.layers]

    def __str__(self) -> str:
        return ", ".join(self.paths)


def check(context: PipelineContext, config: FuseConfig) -> Plan:
    """How many groups of layers would be multiplied as one.

    Raises:
        Unsupported: There are no such layers, a glob matches none of them, or their weights are not there.
    """
    modules, notes, left = 0, [], []
    for denoiser in context.denoisers:
        refuse_offloaded("fuse", denoiser)
        groups, fused = _groups(denoiser), _fused(denoiser)
        if not groups and fused:
            undo = f"{denoiser.name}.unfuse_qkv_projections()"
            raise Unsupported(
                "fuse",
                f"fuse_qkv_projections() of diffusers' own has joined the projections of {len(fused)} modules already.",
                f"pipe.{undo} first, or fuse=None.",
                str(denoiser),
            )
        if fused:
            notes.append(f"{denoiser.name}: diffusers' own fuse_qkv_projections() has joined {len(fused)} modules.")
        for glob in config.ignore or ():
            if not any(_matches(denoiser, path, glob) for group in groups for path in group.paths):
                example = groups[0].paths[0] if groups else None
                raise Unsupported(
                    f"fuse.ignore: {glob!r}",
                    "it matches no projection.",
                    f"a glob over names like {example!r}." if example else "fuse=None.",
                    str(denoiser),
                )
        wanted = _wanted(context, denoiser, groups, config)
        reasons = [(group, Stack.refusal(group.before)) for group in wanted]
        fit = [group for group, reason in reasons if reason is None]
        left += [f"{denoiser.name}: {group} stay apart: {reason}." for group, reason in reasons if reason is not None]
        if not fit:
            raise Unsupported(
                "fuse",
                left[0]
                if left
                else "fuse.ignore leaves no two layers that read one tensor."
                if groups and config.ignore
                else "no layers were found that read one tensor.",
                "fewer globs in fuse.ignore, or fuse=None." if groups and config.ignore and not left else "fuse=None.",
                str(denoiser),
            )
        modules += len(fit)
        names = sorted(
            {
                path.rpartition(".")[2]
                for group in groups
                for path in group.paths
                if _activated(context, denoiser, group, path)
            }
        )
        if names:
            notes.append(f"{denoiser.name}: {', '.join(names)} stay apart: their own product does the activation.")
        notes.append(f"{denoiser.name}: {len(fit)} products instead of {sum(len(group.paths) for group in fit)}.")
    return Plan("layers that read one tensor are multiplied as one", modules, tuple(notes), tuple(left))


def edits(context: PipelineContext, config: FuseConfig) -> Iterator[Edit]:
    """One edit per group of layers."""
    for denoiser in context.denoisers:
        for group in _wanted(context, denoiser, _groups(denoiser), config):
            reason = Stack.refusal(group.layers)
            if reason is None:
                try:
                    yield _Stacked(group.places, Stack(group.layers), denoiser.module)
                except Apart as error:
                    reason = str(error)
            if reason is not None:
                warnings.warn(f"accelerate: fuse: {denoiser.name}: {group} stay apart: {reason}.", stacklevel=2)


@dataclass(eq=False)
class _Stacked:
    """Puts the parts of a stack in its layers' places, and lets the layers' own tensors go."""

    owners: tuple[tuple[nn.Module, str], ...]
    stack: Stack
    root: nn.Module
    places: Places | None = field(default=None, init=False)
    _swaps: list[tuple[Part, SwapModule]] = field(default_factory=list, init=False)

    def apply(self) -> None:
        if not self._swaps:
            originals: list[Any] = [parent._modules[name] for parent, name in self.owners]
            parts = [Part(self.stack, place, original) for place, original in enumerate(originals)]
            self._swaps = [
                (part, SwapModule(parent, name, part, self.root))
                for part, (parent, name) in zip(parts, self.owners, strict=True)
            ]
        for part, swap in self._swaps:
            swap.places = self.places
            swap.apply()
            emptied(part.original)

    def undo(self) -> None:
        for part, swap in reversed(self._swaps):
            unstacked(part)
            swap.places = self.places
            swap.undo()


def _wanted(context: PipelineContext, denoiser: Denoiser, groups: list[_Group], config: FuseConfig) -> list[_Group]:
    """The groups without the layers that the user left out, and without those of 16 bits that do better apart."""
    found = []
    for group in groups:
        kept = [
            place
            for place, path in enumerate(group.paths)
            if not any(_matches(denoiser, path, glob) for glob in config.ignore or ())
            and not _activated(context, denoiser, group, path)
        ]
        if len(kept) > 1:
            found.append(
                _Group(tuple(group.paths[place] for place in kept), tuple(group.places[place] for place in kept))
            )
    return found


def _activated(context: PipelineContext, denoiser: Denoiser, group: _Group, path: str) -> bool:
    """Whether an activation is part of a layer's own product, in a rewritten graph, unless its result is rounded."""
    if path.rpartition(".")[2] not in denoiser.adapter.activated or not context.rewrites(denoiser):
        return False
    quantized = context.config is not None and context.config.linear is not None
    return type(group.layers[group.paths.index(path)]) is nn.Linear and not quantized


def _matches(denoiser: Denoiser, path: str, glob: str) -> bool:
    return fnmatchcase(path, glob) or fnmatchcase(f"{denoiser.name}.{path}", glob)


def _fused(denoiser: Denoiser) -> list[str]:
    """Attention modules whose projections diffusers has joined itself. Older classes keep the flag when they are taken
    apart again; there the processor tells."""
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
    """The layers of a denoiser that read one tensor: those that its adapter names, and those of its attention."""
    adapter = denoiser.adapter
    found: list[_Group] = []
    taken: set[str] = set()
    paths = {id(module): path for path, module in denoiser.module.named_modules()}

    def take(owner: nn.Module, names: tuple[str, ...]) -> None:
        group = _group(paths[id(owner)], owner, names)
        if group is not None and taken.isdisjoint(group.paths):
            taken.update(group.paths)
            found.append(group)

    fused = tuple(f"{path}." for path in _fused(denoiser))
    for path, block in adapter.named_blocks(denoiser.module):
        for names in adapter.projections:
            # Stock code no longer calls projections that it has joined.
            if not any(f"{path}.{name}".startswith(fused) for name in names):
                take(block, names)
    for path, module in list(denoiser.module.named_modules()):
        if "to_k" not in module._modules or f"{path}.".startswith(fused):
            continue
        crossed = path.rpartition(".")[2] in adapter.cross_attention or getattr(module, "is_cross_attention", False)
        alone = type(getattr(module, "processor", None)).__name__ in adapter.value_only_processors
        for names in (_OTHER if crossed else _OWN[:2] if alone else _OWN, *_BESIDE):
            take(module, tuple(name for name in names if name in module._modules))
    return found


def _group(path: str, owner: nn.Module, names: tuple[str, ...]) -> _Group | None:
    """The layers of these names below a module, or `None` if there are not two of them; of a LoRA layer, what lies
    beneath it."""
    places: list[tuple[nn.Module, str]] = []
    for name in names:
        holder, _, child = name.rpartition(".")
        try:
            parent = owner.get_submodule(holder)
            layer: Any = parent._modules.get(child)
        except AttributeError:
            return None
        if layer is not None and isinstance(getattr(layer, "base_layer", None), nn.Module):
            parent, child, layer = layer, "base_layer", layer.base_layer
        if not isinstance(layer, nn.Linear):
            return None
        places.append((parent, child))
    return _Group(tuple(f"{path}.{name}".lstrip(".") for name in names), tuple(places)) if len(places) > 1 else None
