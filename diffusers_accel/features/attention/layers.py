"""A denoiser's attention layers, the roles they play, and the kernel that a configuration names for each.

Modules with the same role in every block (`attn1`, `audio_attn2`) share one dispatcher, so that all blocks share one
compiled graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ...compat.diffusers_private import ATTENTION_BACKEND
from ...config import AttentionConfig
from ...errors import Unsupported, nearest
from ...kernels.attention import KERNELS, recipes
from ..context import Denoiser, PipelineContext
from .processors import rebindable


@dataclass(frozen=True)
class Layer:
    """One attention module.

    Attributes:
        path: Its path in the denoiser.
        module: The module.
        block: Number of its block among all blocks; `None` outside of them.
    """

    path: str
    module: nn.Module
    block: int | None


@dataclass
class Role:
    """The attention modules with the same path in every block.

    Attributes:
        name: Path within the block; the full path of a module outside the blocks.
        cross: Whether the modules attend to another stream.
        layers: The modules.
        backends: The name of the kernel for each module.
    """

    name: str
    cross: bool
    layers: list[Layer] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)

    @property
    def head_dim(self) -> int | None:
        return _head_dim(self.layers[0].module)


def attention_modules(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with a processor, with their paths."""
    for path, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None and callable(processor):
            yield path, module


def roles(denoiser: Denoiser, config: AttentionConfig) -> tuple[list[Role], list[Any]]:
    """A denoiser's attention modules by role, and the processors that cannot be redirected."""
    blocks = {id(block): number for number, block in enumerate(denoiser.adapter.blocks(denoiser.module))}
    inside = {path: blocks[id(module)] for path, module in denoiser.module.named_modules() if id(module) in blocks}
    roles: dict[tuple[str, str], Role] = {}
    closed = []
    for path, module in attention_modules(denoiser.module):
        processor: Any = module.processor
        if not hasattr(processor, ATTENTION_BACKEND) and (
            isinstance(processor, nn.Module) or not rebindable(processor)
        ):
            closed.append(processor)
            continue
        parts = path.split(".")
        block = next((".".join(parts[:end]) for end in range(1, len(parts)) if ".".join(parts[:end]) in inside), None)
        name = path if block is None else path[len(block) + 1 :]
        stack = "" if block is None else block.rpartition(".")[0]
        cross = parts[-1] in denoiser.adapter.cross_attention
        role = roles.setdefault((stack, name), Role(name, cross))
        role.layers.append(Layer(path, module, None if block is None else inside[block]))
        role.backends.append(backend_of(denoiser, path, cross, config))
    return list(roles.values()), closed


def _head_dim(module: Any) -> int | None:
    """The head dimension in the attributes of an attention module; `None` if none of them names it."""
    for name in ("head_dim", "dim_head"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    inner, heads = getattr(module, "inner_dim", None), getattr(module, "heads", None)
    if isinstance(inner, int) and isinstance(heads, int) and heads and inner % heads == 0:
        return inner // heads
    return None


def named(config: AttentionConfig) -> str:
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


def backend_of(denoiser: Denoiser, path: str, cross: bool, config: AttentionConfig) -> str:
    """The name of the kernel for an attention module."""
    for glob, backend in (config.layers or {}).items():
        if matches(denoiser, path, glob):
            return backend
    return (config.cross_attention if cross else config.self_attention) or named(config)


def matches(denoiser: Denoiser, path: str, glob: str) -> bool:
    """Whether a glob matches a module's path, with or without the denoiser's name before it."""
    return fnmatchcase(path, glob) or fnmatchcase(f"{denoiser.name}.{path}", glob)


def refuse_unmatched(context: PipelineContext, config: AttentionConfig) -> None:
    """Raises `Unsupported` for a glob of the configuration that matches no attention layer."""
    for glob in config.layers or {}:
        paths = [(denoiser, path) for denoiser in context.denoisers for path, _ in attention_modules(denoiser.module)]
        if not any(matches(denoiser, path, glob) for denoiser, path in paths):
            example = paths[0][1] if paths else "none"
            raise Unsupported(
                f"attention.layers[{glob!r}]",
                "it matches no attention layer.",
                f"a glob over names like {example!r}; nn.Module.named_modules lists them.",
            )
