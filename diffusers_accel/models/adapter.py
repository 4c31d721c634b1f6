"""What an adapter is: data about one denoiser class, so that features need not know any model.

An adapter says where the blocks are and which tensors flow through them, what signal a cache may watch, how guidance is
done, and which published constants belong to which configuration. One family, one file, one line in the table of
`models/__init__.py`. A denoiser nobody wrote an adapter for gets a default one, built from what the stock class says
about itself; features that need more than it can say refuse by name.

Private names of diffusers' models (`_repeated_blocks`, `_no_split_modules`) are read here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .sequence import SequenceShardingPlan
from .tensor_parallel import TensorParallelPlan


@dataclass(frozen=True)
class Stack:
    """A run of like blocks.

    Attributes:
        path: Dotted path of the `ModuleList` in the denoiser.
        streams: Argument names of the tensors that a block takes and returns updated, in the order of its return. A
            block with one stream returns the tensor itself.
    """

    path: str
    streams: tuple[str, ...]

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return list(denoiser.get_submodule(self.path))  # type: ignore[call-overload]


@dataclass(frozen=True)
class TeaCacheRow:
    """Published TeaCache constants.

    Attributes:
        coefficients: The rescaling polynomial, highest degree first.
        threshold: A published threshold, at about 1.5x.
        source: Who published it.
        fast_threshold: A published threshold at about 2x, where there is one.
        use_ret_steps: Whether it was fitted for Wan's `use_ret_steps` variant.
    """

    coefficients: tuple[float, ...]
    threshold: float
    source: str
    fast_threshold: float | None = None
    use_ret_steps: bool = False


@dataclass(frozen=True)
class MagCacheRow:
    """A published MagCache table.

    Attributes:
        ratios: Ratio of the residual's magnitude to the last step's, for each step of a schedule; the first is 1.
        source: Who published it.
    """

    ratios: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Checkpoint:
    """What tells checkpoints of one class apart: facts of their configuration, never their name.

    Attributes:
        config: The denoiser's configuration.
        pipeline: Name of the pipeline's class.
        pipeline_config: The pipeline's configuration.
        use_ret_steps: Whether the rows of that variant are asked for.
    """

    config: Mapping[str, Any]
    pipeline: str
    pipeline_config: Mapping[str, Any]
    use_ret_steps: bool = False

    def has(self, **expected: Any) -> bool:
        """Whether the denoiser's configuration has these values."""
        return all(self.config.get(key) == value for key, value in expected.items())


# The modulated input of the first block, from that block and its bound arguments.
BlockSignal = Callable[[Any, Mapping[str, Any]], torch.Tensor]
# The signal of every timestep at once, from the denoiser, its timesteps (steps,), and whether the projected embedding
# is asked for: (steps, channels).
TimestepSignal = Callable[[Any, torch.Tensor, bool], torch.Tensor]
# The latents that are being denoised, (batch, channels, *space) each, from the denoiser, its arguments and their grid.
LatentsOf = Callable[[Any, Mapping[str, Any], Any], list[torch.Tensor]]


def plain_latents(denoiser: Any, arguments: Mapping[str, Any], grid: Any) -> list[torch.Tensor]:
    """Latents that come as they are, (batch, channels, *space), with conditioning in further channels."""
    latents = arguments["hidden_states"]
    channels = getattr(denoiser.config, "out_channels", None) or latents.shape[1]
    return [latents[:, :channels]]


def unpacked(tokens: torch.Tensor, grid: tuple[int, int], channels: int) -> torch.Tensor:
    """Latents (batch, channels, height, width) from tokens (batch, sequence, 4 x channels) of 2 x 2 values each, the
    first height x width / 4 of the sequence, conditioning in further channels left out."""
    height, width = grid
    tokens = tokens[:, : height * width, : 4 * channels].unflatten(1, (height, width)).unflatten(-1, (channels, 2, 2))
    return tokens.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def grid_of_ids(ids: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the tokens whose position ids (sequence, ids) or (batch, sequence, ids) are (0, row, column,
    ...), those of the picture that is made. Reads from the device."""
    ids = ids[0] if ids.ndim == 3 else ids
    made = ids[ids[:, 0] == 0]
    rows, columns = (made[:, 1:3].max(0).values - made[:, 1:3].min(0).values + 1).tolist()
    return int(rows), int(columns)


@dataclass(frozen=True)
class Modulation:
    """Linear layers whose products the time step and the prompt alone decide.

    Attributes:
        embedding: Path of the module that makes their common input, called with the timestep first.
        layers: Paths, within a block, of the layers that read SiLU of it.
        timestep: The timestep as that module is given it, from the scheduler's and the type of the activations.
        of_prompt: Whether the embedding depends on the prompt, and so on the branch.
    """

    embedding: str
    layers: tuple[str, ...]
    timestep: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    of_prompt: bool = True


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Data about a denoiser class.

    Attributes:
        classes: Names of the denoiser classes it describes.
        stacks: The runs of blocks, in the order they are called.
        guidance: `"separate"` calls per branch, `"batched"` in one call, or `"embedded"` in the model.
        branches: Names of the branches in call order, for pipelines that set no `cache_context`.
        special_branch: Names a call that is not one of `branches`, from its keyword arguments, or returns `None`.
        block_signal: What a cache watches, from the first block's arguments.
        timestep_signal: What a cache watches where it depends on the timestep alone.
        rows: Published TeaCache constants, by name.
        row: Picks the row for a checkpoint, or `None` if none was published for it.
        mag_rows: Published MagCache tables, by name; `row` picks one of them too.
        denoised: Arguments of the denoiser that hold the latents, in the order of its outputs.
        grid: What `latents` needs to know of how they are packed, from the denoiser's arguments; it may read from the
            device, so it is asked once per request.
        latents: The latents in space, from the denoiser, its arguments and that.
        side_stacks: Runs of blocks that feed the main stacks; they are compiled with them and never skipped.
        static_arguments: Keyword arguments of a block that the stock code branches on in Python although they may be
            one-element tensors: they are read before a compiled block, which cannot.
        unbatched: Arguments of the denoiser whose first dimension is no batch's, whatever its length.
        cross_attention: Names of a block's attention modules whose keys are not its own stream's.
        folding: Names of attention processors whose QK-norm and rotation a kernel may do: they rotate right before
            attention, in a form of those that `features/attention/seam.py` knows.
        projections: Groups of linear layers in a block, by their paths there, that read one tensor and are not all of
            one attention module.
        activated: Names of those among them whose result goes through an activation at once.
        modulation: Layers that modulate all tokens of a step alike, where they are many.
        values_alone: Names of processors that, attending to their own stream, may ask for values alone.
        wide_ends: Numbers of first and of last blocks whose linear layers stay wide when the rest is quantized. What
            lies outside the blocks always does: NVIDIA ModelOpt's lists, which were found by measurement, agree on it.
        smallest_linear: Linear layers with no more input or output features than this stay wide.
        sequence: The plan by which its tokens are sharded among ranks; `None` if there is none.
        tensor: How its blocks' weights may be; likewise.
        default: Whether this is a default adapter, for a class nobody described.
    """

    classes: tuple[str, ...]
    stacks: tuple[Stack, ...] = ()
    guidance: str = "separate"
    branches: tuple[str, ...] = ("cond", "uncond")
    special_branch: Callable[[Mapping[str, Any]], str | None] = lambda arguments: None
    block_signal: BlockSignal | None = None
    timestep_signal: TimestepSignal | None = None
    rows: Mapping[str, TeaCacheRow] = None  # type: ignore[assignment]
    row: Callable[[Checkpoint], str | None] = lambda checkpoint: None
    mag_rows: Mapping[str, MagCacheRow] = None  # type: ignore[assignment]
    denoised: tuple[str, ...] = ("hidden_states",)
    grid: Callable[[Mapping[str, Any]], Any] = lambda arguments: None
    latents: LatentsOf = plain_latents
    side_stacks: tuple[Stack, ...] = ()
    static_arguments: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
    cross_attention: tuple[str, ...] = ()
    folding: tuple[str, ...] = ()
    projections: tuple[tuple[str, ...], ...] = ()
    activated: tuple[str, ...] = ()
    modulation: Modulation | None = None
    values_alone: tuple[str, ...] = ()
    wide_ends: tuple[int, int] = (0, 0)
    smallest_linear: int = 512
    sequence: SequenceShardingPlan | None = None
    tensor: TensorParallelPlan | None = None
    default: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "mag_rows"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, {})

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """All repeated blocks, side stacks included, in call order."""
        return [block for _, block in self.named_blocks(denoiser)]

    def named_blocks(self, denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The same with their paths in the denoiser."""
        for stack in (*self.side_stacks, *self.stacks):
            for number, block in enumerate(stack.blocks(denoiser)):
                yield f"{stack.path}.{number}", block


def default_adapter(denoiser: nn.Module) -> Adapter:
    """An adapter for a class nobody described, from what the stock class says about itself.

    Its stacks are the `ModuleList`s that hold the classes named in `_repeated_blocks` or `_no_split_modules`, or, if
    it names none, those of at least two modules of one class. It knows no cache signal.
    """
    named = set(getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ())
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
    """Names of attention modules that say of themselves that they attend to another stream, and of those that follow
    diffusers' habit: `attn1` attends to its own stream, `attn2` beside it to another."""
    paths = {path: module for path, module in denoiser.named_modules() if hasattr(module, "processor")}
    found = {path for path, module in paths.items() if getattr(module, "is_cross_attention", False)}
    found |= {path for path in paths if path.endswith(".attn2") and f"{path[:-1]}1" in paths}
    return tuple(sorted({path.rpartition(".")[2] for path in found}))


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and "hidden_states" in parameter_names(module)


def _streams(block: nn.Module) -> tuple[str, ...]:
    return tuple(name for name in ("hidden_states",) if name in parameter_names(block))


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Argument names of a module's stock `forward`, `self` left out."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by their names.

    Args:
        names: Of the stock `forward`, as `parameter_names` gives them.
        args: Those that came by place.
        kwargs: Those that came by name.
    """
    return {**dict(zip(names, args, strict=False)), **kwargs}
