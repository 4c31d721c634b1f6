"""The adapter: data about one denoiser class, so that features need not know any model.

An adapter names the blocks and the tensors that flow through them, the signal that a cache watches, the kind of
guidance, and the published constants of each checkpoint. One family is one file and one line in the table of
`models/__init__.py`. A denoiser without an adapter gets a default one, built from the attributes of its stock class.
Features that need more than the default says refuse by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..compat.diffusers_private import block_class_names
from .sequence import SequenceShardingPlan, VisualTokens
from .tensor_parallel import TensorParallelPlan


@dataclass(frozen=True)
class Stack:
    """A `ModuleList` of blocks of one class.

    Attributes:
        path: Dotted path of the `ModuleList` in the denoiser.
        streams: Argument names of the tensors that a block updates, in the order of its return. A block with one stream
            returns the tensor itself.
    """

    path: str
    streams: tuple[str, ...]

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The blocks, in call order."""
        return list(denoiser.get_submodule(self.path))  # type: ignore[call-overload]


@dataclass(frozen=True)
class TeaCacheRow:
    """Published TeaCache constants.

    Attributes:
        coefficients: The rescaling polynomial, highest degree first.
        threshold: A published threshold, for a speedup of about 1.5.
        source: The publisher of the constants.
        use_ret_steps: Whether the constants were fitted for Wan's `use_ret_steps` variant.
    """

    coefficients: tuple[float, ...]
    threshold: float
    source: str
    use_ret_steps: bool = False


@dataclass(frozen=True)
class MagCacheRow:
    """A published MagCache table.

    Attributes:
        ratios: For each step of a schedule, the magnitude of the residual over that of the step before; the first is 1.
        source: The publisher of the table.
    """

    ratios: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Checkpoint:
    """The facts that distinguish checkpoints of one class: values of their configuration, never their name.

    Attributes:
        config: Configuration of the denoiser.
        pipeline: Name of the pipeline's class.
        pipeline_config: Configuration of the pipeline.
        use_ret_steps: Whether the user wants the constants of the `use_ret_steps` variant.
    """

    config: Mapping[str, Any]
    pipeline: str
    pipeline_config: Mapping[str, Any]
    use_ret_steps: bool = False

    def has(self, **expected: Any) -> bool:
        """Whether the denoiser's configuration has these values."""
        return all(self.config.get(key) == value for key, value in expected.items())


# The modulated input of the first block, as a function of that block and its arguments by name.
BlockSignal = Callable[[Any, Mapping[str, Any]], torch.Tensor]
# The signal of all timesteps at once, (steps, channels), as a function of the denoiser, its timesteps (steps,), and
# whether to return the projected embedding.
TimestepSignal = Callable[[Any, torch.Tensor, bool], torch.Tensor]
# The noisy latents, (batch, channels, *space) each, as a function of the denoiser, its arguments and `Adapter.grid`.
LatentsOf = Callable[[Any, Mapping[str, Any], Any], list[torch.Tensor]]


def plain_latents(denoiser: Any, arguments: Mapping[str, Any], grid: Any) -> list[torch.Tensor]:
    """The latents of a denoiser that takes them unpacked, (batch, channels, *space), without channels of
    conditioning."""
    latents = arguments["hidden_states"]
    channels = getattr(denoiser.config, "out_channels", None) or latents.shape[1]
    return [latents[:, :channels]]


def unpacked(tokens: torch.Tensor, grid: tuple[int, int], channels: int) -> torch.Tensor:
    """Latents from tokens that pack 2 x 2 values each.

    Args:
        tokens: (batch, sequence, 4 * channels or more). The latents are the first tokens and the first channels; the
            rest is conditioning.
        grid: Rows and columns of the latents' tokens.
        channels: Channels of the latents.

    Returns:
        (batch, channels, 2 * rows, 2 * columns).
    """
    height, width = grid
    tokens = tokens[:, : height * width, : 4 * channels].unflatten(1, (height, width)).unflatten(-1, (channels, 2, 2))
    return tokens.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def grid_of_ids(ids: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the generated image's tokens. Reads from the device.

    Args:
        ids: Position ids, (sequence, ids) or (batch, sequence, ids). The ids of the generated image are (0, row,
            column, ...).
    """
    ids = ids[0] if ids.ndim == 3 else ids
    generated = ids[ids[:, 0] == 0]
    rows, columns = (generated[:, 1:3].max(0).values - generated[:, 1:3].min(0).values + 1).tolist()
    return int(rows), int(columns)


@dataclass(frozen=True)
class Modulation:
    """Modulation layers, whose input depends on the timestep and the prompt alone.

    Attributes:
        embedding: Path of the module that computes their common input, with the timestep as its first argument.
        layers: Paths, within a block, of the linear layers that read SiLU of that input.
        timestep: The timestep argument of the module, as a function of the scheduler's timestep and the dtype of the
            activations.
        of_prompt: Whether the embedding depends on the prompt, and so on the guidance branch.
    """

    embedding: str
    layers: tuple[str, ...]
    timestep: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    of_prompt: bool = True


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Data about a denoiser class.

    Attributes:
        classes: Names of the described denoiser classes.
        stacks: The runs of blocks, in call order.
        guidance: `"separate"` for a call per branch, `"batched"` for one call, `"embedded"` for guidance in the model.
        branches: Names of the guidance branches in call order, for pipelines that set no `cache_context`.
        special_branch: Returns the name of a call that is not one of `branches`, from its keyword arguments, or `None`.
        block_signal: The signal of a cache, from the first block and its arguments.
        timestep_signal: The signal of a cache that depends on the timestep alone.
        teacache_rows: Published TeaCache constants, by name.
        published_row: Returns the name of a checkpoint's entry in `teacache_rows` and `magcache_rows`, or `None` if
            nothing was published.
        magcache_rows: Published MagCache tables, by name.
        denoised: Arguments of the denoiser that hold the latents, in the order of its outputs.
        grid: The layout of packed latents, from the denoiser's arguments, for `latents`. Called once per request,
            because a read from the device is allowed.
        latents: The unpacked latents, from the denoiser, its arguments and `grid`.
        side_stacks: Runs of blocks that feed the main stacks: compiled with them, never skipped by a cache.
        static_arguments: Arguments of a block on which stock code branches in Python. Tensors of one element among
            them become numbers outside a compiled block, which cannot read tensors.
        unbatched: Arguments of the denoiser whose first dimension is not the batch.
        cross_attention: Names of a block's attention modules whose keys come from another stream.
        fusable_processors: Classes of attention processors whose QK-norm and rotation a kernel may apply: they rotate
            right before attention, with a function that `features/attention/processors.py` supports.
        projections: Groups of linear layers in a block, by path, that read one tensor and belong to several modules.
        activated: Names of layers of `projections` whose result goes straight into an activation.
        modulation: The modulation layers, for a model with many; `None` otherwise.
        value_only_processors: Classes of self-attention processors that may ask for the value projection alone.
        unquantized_ends: Numbers of first and of last blocks whose linear layers are not quantized. Linear layers
            outside the blocks never are. The lists of NVIDIA ModelOpt, which come from measurements, agree.
        max_unquantized_features: Linear layers with at most this number of input or output features are not quantized.
        sequence: The plan for sharding tokens among ranks; `None` if they cannot be sharded.
        visual: The tokens of pictures or frames, for sparse attention, which needs `sequence` too; `None` if unknown.
        tensor: The plan for sharding the blocks' weights among ranks; `None` if they cannot be sharded.
        default: Whether this is a default adapter.
    """

    classes: tuple[str, ...]
    stacks: tuple[Stack, ...] = ()
    guidance: str = "separate"
    branches: tuple[str, ...] = ("cond", "uncond")
    special_branch: Callable[[Mapping[str, Any]], str | None] = lambda arguments: None
    block_signal: BlockSignal | None = None
    timestep_signal: TimestepSignal | None = None
    teacache_rows: Mapping[str, TeaCacheRow] = None  # type: ignore[assignment]
    published_row: Callable[[Checkpoint], str | None] = lambda checkpoint: None
    magcache_rows: Mapping[str, MagCacheRow] = None  # type: ignore[assignment]
    denoised: tuple[str, ...] = ("hidden_states",)
    grid: Callable[[Mapping[str, Any]], Any] = lambda arguments: None
    latents: LatentsOf = plain_latents
    side_stacks: tuple[Stack, ...] = ()
    static_arguments: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
    cross_attention: tuple[str, ...] = ()
    fusable_processors: tuple[str, ...] = ()
    projections: tuple[tuple[str, ...], ...] = ()
    activated: tuple[str, ...] = ()
    modulation: Modulation | None = None
    value_only_processors: tuple[str, ...] = ()
    unquantized_ends: tuple[int, int] = (0, 0)
    max_unquantized_features: int = 512
    sequence: SequenceShardingPlan | None = None
    visual: VisualTokens | None = None
    tensor: TensorParallelPlan | None = None
    default: bool = False

    def __post_init__(self) -> None:
        for name in ("teacache_rows", "magcache_rows"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, {})

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """All repeated blocks, side stacks included, in call order."""
        return [block for _, block in self.named_blocks(denoiser)]

    def named_blocks(self, denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """All repeated blocks, side stacks included, in call order, with their paths in the denoiser."""
        for stack in (*self.side_stacks, *self.stacks):
            for number, block in enumerate(stack.blocks(denoiser)):
                yield f"{stack.path}.{number}", block


def default_adapter(denoiser: nn.Module) -> Adapter:
    """An adapter for a class without one, from the attributes of the stock class.

    The stacks are the `ModuleList`s of the classes that the stock class names as its blocks. Without such names, the
    stacks are the `ModuleList`s of two or more modules of one class. The adapter has no cache signal.
    """
    named = block_class_names(denoiser)
    stacks: list[Stack] = []
    for path, module in denoiser.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(stack.path + ".") for stack in stacks):
            continue
        kinds = {type(block).__name__ for block in module}
        if kinds & named if named else len(module) > 1 and len(kinds) == 1 and _is_block(module[0]):
            stacks.append(Stack(path, _streams(module[0])))
    return Adapter(
        classes=(type(denoiser).__name__,),
        stacks=tuple(stacks),
        branches=(),
        cross_attention=_cross_attention(denoiser),
        default=True,
    )


def _cross_attention(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of cross-attention modules: modules with `is_cross_attention`, and, by the convention of diffusers, `attn2`
    beside `attn1`."""
    paths = {path: module for path, module in denoiser.named_modules() if hasattr(module, "processor")}
    found = {path for path, module in paths.items() if getattr(module, "is_cross_attention", False)}
    found |= {path for path in paths if path.endswith(".attn2") and f"{path[:-1]}1" in paths}
    return tuple(sorted({path.rpartition(".")[2] for path in found}))


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and "hidden_states" in parameter_names(module)


def _streams(block: nn.Module) -> tuple[str, ...]:
    return tuple(name for name in ("hidden_states",) if name in parameter_names(block))


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Parameter names of a module's stock `forward`, without `self`."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name.

    Args:
        names: Parameter names of the stock `forward`, from `parameter_names`.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    return {**dict(zip(names, args, strict=False)), **kwargs}
