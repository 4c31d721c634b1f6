"""Rules of sparse attention: scores of pairs of blocks, the highest of which are kept.

A rule reads means of tokens, which cost one pass over queries and keys, or the places of blocks alone. Importing this
module needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...core.registry import Registry
from .token_grid import Grid


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks:
    """A call as a rule sees it: its blocks of queries and of keys.

    Attributes:
        query_means: (batch, heads, means, head_dim), in the dtype of the call: means of the parts of each block of
            queries; `None` for a rule without parts.
        key_means: (batch, kv_heads, means, head_dim), in the dtype of the call: means of the parts of each block of
            keys; `None` for a rule without parts.
        scale: Softmax scale of the logits.
        parts: Parts of a block. The last block may have fewer.
        grid: Frames, rows and columns of the tokens of pictures or frames.
        query_centers: float32 (query blocks, 3): mean frame, row and column of each block of queries; NaN for a block
            with other tokens, whose keys are all kept.
        key_centers: float32 (key blocks, 3): mean frame, row and column of each block of keys; NaN for a block with
            other tokens, which is always kept.
        kept: Number of key blocks that each block of queries keeps, if that is fixed; of heads with shares of their
            own, the largest.
        similarity: Returns the mean cosine between tokens of a block, float32 (batch, heads, query blocks) and (batch,
            kv_heads, key blocks).
    """

    query_means: Any
    key_means: Any
    scale: float
    parts: int
    grid: Grid
    query_centers: torch.Tensor
    key_centers: torch.Tensor
    kept: int | None
    similarity: Callable[[], tuple[torch.Tensor, torch.Tensor]]


# Blocks -> scores; see `register_sparse`.
Scores = Callable[[Blocks], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A rule that scores pairs of blocks.

    Attributes:
        name: Its name in a configuration.
        parts: Parts of a block whose means it reads, a power of two; 0 for a rule that reads the places of blocks
            alone, whose lists are made once for a shape.
        scores: From `Blocks`: scores, (batch, heads, query blocks, key blocks), or (query blocks, key blocks) without
            parts, of any floating dtype. A block with a score of infinity is always kept.
        logits: Whether scores are logits, so that a share of their softmax (`top_p`) means something.
        within_tiles: Whether there are no scores, because the kernel decides for each tile of keys by its logits.
        places: Whether it reads the places of blocks.
    """

    name: str
    parts: int
    scores: Scores
    logits: bool = False
    within_tiles: bool = False
    places: bool = False


SELECTORS: Registry[Selector] = Registry("selector of sparse attention", "register_sparse")


def _logits(blocks: Blocks) -> torch.Tensor:
    """The log of the sum of exp over the logits between means of parts."""
    from .block_lists import block_scores

    return block_scores(blocks.query_means, blocks.key_means, blocks.parts, blocks.parts, blocks.scale)


def _similar(blocks: Blocks) -> torch.Tensor:
    """SpargeAttention: logits between means. A block whose tokens point in different directions has a mean that says
    little of them: such keys are always kept, and such queries keep all keys. With a fixed number of blocks, the
    authors switch that off."""
    scores = _logits(blocks)
    if blocks.kept is not None:
        return scores
    least = 0.6
    queries, keys = blocks.similarity()
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    return scores.masked_fill((queries < least)[..., :, None] | (keys < least)[..., None, :], float("inf"))


def _distances(blocks: Blocks) -> torch.Tensor:
    """Distances in frames, rows and columns: float32 (query blocks, key blocks, 3)."""
    return (blocks.query_centers[:, None] - blocks.key_centers[None, :]).abs()


def _window(blocks: Blocks) -> torch.Tensor:
    """The nearest blocks: a box around each block of queries, with sides in the proportions of the grid."""
    sides = torch.tensor(blocks.grid, dtype=torch.float32, device=blocks.query_centers.device)
    relative = _distances(blocks) / sides
    # Of equal boxes, the nearer block.
    return -(relative.amax(-1) + 1e-3 * relative.sum(-1))


def _radial(blocks: Blocks) -> torch.Tensor:
    """Radial attention: the same and the next frame in full, then a window of neighbouring tokens that halves with each
    doubling of the distance in frames; the first frame is kept after them."""
    away = _distances(blocks)
    frames = away[..., 0].round()
    octave = frames.clamp_min(1).log2().floor()
    columns, tokens = blocks.grid[2], blocks.grid[1] * blocks.grid[2]
    between = (away[..., 1] * columns + away[..., 2]) / tokens
    scores = -(between * 2**octave) - 1e-3 * frames
    scores = torch.where(frames <= 1, 2 - 1e-3 * frames - 1e-4 * between, scores)
    sink = blocks.key_centers[None, :, 0].round() == 0
    return torch.where(sink & (frames > 1), 1 - 1e-4 * between, scores)


def _bands(blocks: Blocks) -> torch.Tensor:
    """Sparse VideoGen: for each head the frames near the query's own, or its place in all frames. The choice is the map
    that holds more of the softmax over means of blocks."""
    away = _distances(blocks)
    rows, columns = blocks.grid[1:]
    across = (away[..., 1] / rows).square() + (away[..., 2] / columns).square()
    spatial = -(away[..., 0] + 1e-3 * across)
    temporal = -(across + 1e-3 * away[..., 0] / blocks.grid[0])
    # The first frame is a sink of every head.
    sink = (blocks.key_centers[None, :, 0].round() == 0) & away[..., 0].isfinite()
    weights = _logits(blocks)
    weights = weights.masked_fill(weights.isnan(), -float("inf")).softmax(-1)
    count = blocks.kept or max(1, away.shape[1] // 2)
    maps, held = [], []
    for scores in (spatial, temporal):
        scores = torch.where(sink, scores.amax(-1, keepdim=True).nan_to_num(0.0) + 1, scores)
        scores = scores.nan_to_num(0.0)
        first = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
        mask = torch.zeros_like(scores).scatter(1, first, 1.0)
        maps.append(scores)
        held.append((weights * mask).sum((-1, -2)))
    return torch.where((held[0] >= held[1])[..., None, None], maps[0], maps[1])


def _no_scores(blocks: Blocks) -> torch.Tensor:
    raise ValueError("'skip-softmax' scores no blocks: the kernel decides for each tile.")


for _selector in (
    Selector(name="sub-blocks", parts=4, scores=_logits, logits=True),
    Selector(name="means", parts=1, scores=_logits, logits=True),
    Selector(name="similarity", parts=1, scores=_similar, logits=True),
    Selector(name="bands", parts=1, scores=_bands, places=True),
    Selector(name="window", parts=0, scores=_window, places=True),
    Selector(name="radial", parts=0, scores=_radial, places=True),
    # BLASST: logits are exact, and a tile far below the running maximum is left out.
    Selector(name="skip-softmax", parts=0, scores=_no_scores, within_tiles=True),
):
    SELECTORS.add(_selector.name, _selector)


def register_sparse(
    name: str, function: Any = None, *, replace: bool = False, parts: int = 1, logits: bool = False
) -> Any:
    """Registers a user's rule under a name that `attention.sparse` accepts. Also usable as a decorator.

    Args:
        name: The name in a configuration.
        function: `fn(blocks)`, from `Blocks`: means of queries and keys, the softmax scale, and places of blocks in the
            grid. It returns scores, (batch, heads, query blocks, key blocks); the highest of each row are kept, and one
            of infinity always. Without parts, (query blocks, key blocks). It must not read a value on the host: CUDA
            graphs record it.
        replace: Whether to replace a registered rule of that name.
        parts: Parts of a block whose means it reads: 1, 2, 4 or 8; 0 if the places of blocks are enough, so that lists
            are made once for a shape.
        logits: Whether scores are logits, which `top_p` needs.

    Raises:
        ValueError: The name is taken, or `parts` is none of these. A call raises it for scores of another shape.
    """
    if parts not in (0, 1, 2, 4, 8):
        raise ValueError(f"register_sparse: parts is 0, 1, 2, 4 or 8, got {parts!r}.")

    def register(function: Scores) -> Scores:
        SELECTORS.add(name, Selector(name=name, parts=parts, scores=function, logits=logits), replace)
        return function

    return register if function is None else register(function)


def no_similarity() -> tuple[torch.Tensor, torch.Tensor]:
    """The similarity of a rule without parts.

    Raises:
        ValueError: Always.
    """
    raise ValueError("similarity needs a rule with parts: register_sparse(..., parts=1).")
