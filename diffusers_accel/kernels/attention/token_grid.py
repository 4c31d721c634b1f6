"""Tokens of pictures and frames: their grid, the order in which they follow each other, and the places of blocks.

Sparse attention groups neighbouring tokens of a sequence into blocks. In the order of the models, row by row and frame
by frame, a block is a strip of a frame. Cubes and the Morton order make it compact in space and time, so that fewer
blocks hold what a query attends to. Clusters go on from there: each call orders the tokens of a chunk by what they
attend to (`clusters.py`), and the order here brings neighbours into one chunk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Names of orders of tokens.
MODEL_ORDER, CUBES, MORTON, CLUSTERS = "model", "cubes", "morton", "clusters"
ORDERS = (MODEL_ORDER, CUBES, MORTON, CLUSTERS)
# Blocks of a chunk, within which tokens are clustered; a power of two.
CHUNK_BLOCKS = 32

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Span:
    """The place of the tokens of pictures or frames in the queries and keys of a call. Other tokens, those of text say,
    are before or after them.

    Attributes:
        grid: Frames, rows and columns of tokens.
        queries: Number of queries before the first of them.
        keys: Number of keys before the first of them.
        order: The order of the tokens.
        block: Tokens of a cube, for the order `"cubes"`, or of a cluster.
    """

    grid: Grid
    queries: int = 0
    keys: int = 0
    order: str = MODEL_ORDER
    block: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens of pictures or frames."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def chunks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Places of the first and behind the last of the tokens that are clustered, among the queries and among the
        keys. A block with other tokens before them keeps all of its own."""
        first, second = (
            (min(-(-before // self.block) * self.block, before + self.tokens), before + self.tokens)
            for before in (self.queries, self.keys)
        )
        return first, second


def cube(grid: Grid, block: int) -> Grid:
    """Frames, rows and columns of a cube: powers of two with a product of `block`, none beyond its axis where another
    can be longer, and as equal as that allows. The frame axis is the first to stay short.

    Args:
        grid: Frames, rows and columns.
        block: Tokens of a cube, a power of two.
    """
    sides = [1, 1, 1]
    while sides[0] * sides[1] * sides[2] < block:
        room = [axis for axis in range(3) if 2 * sides[axis] <= grid[axis]]
        # Of equal sides, columns grow first and frames last.
        axis = min(room or [2], key=lambda axis: (sides[axis], -axis))
        sides[axis] *= 2
    return sides[0], sides[1], sides[2]


def _coordinates(grid: Grid) -> torch.Tensor:
    """Frame, row and column of each token in the order of the models: int64 (tokens, 3)."""
    return torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3)


@functools.lru_cache(maxsize=8)
def permutation(grid: Grid, order: str, block: int) -> torch.Tensor | None:
    """The tokens of a grid in an order: int64 (tokens,), indices in the order of the models. `None` for that order.

    Args:
        grid: Frames, rows and columns.
        order: One of `ORDERS`.
        block: Tokens of a cube, for `"cubes"`, or of a cluster.
    """
    if order == MODEL_ORDER:
        return None
    if order == CLUSTERS:
        return permutation(grid, CUBES, block * CHUNK_BLOCKS)
    at = _coordinates(grid)
    if order == MORTON:
        # The bits of row, column and frame take turns, the lowest first.
        code = torch.zeros(len(at), dtype=torch.int64)
        for bit in range(max(grid).bit_length()):
            for place, axis in enumerate((2, 1, 0)):
                code |= ((at[:, axis] >> bit) & 1) << (3 * bit + place)
        return code.argsort(stable=True)
    sides = torch.tensor(cube(grid, block))
    counts = [-(-size // side) for size, side in zip(grid, sides.tolist(), strict=True)]
    outer, inner = at // sides, at % sides
    # Cubes at the far ends of an axis are cut off there: where sides do not divide, blocks and cubes run apart.
    number = (outer[:, 0] * counts[1] + outer[:, 1]) * counts[2] + outer[:, 2]
    within = (inner[:, 0] * sides[1] + inner[:, 1]) * sides[2] + inner[:, 2]
    return (number * block + within).argsort(stable=True)


def indices(grid: Grid, order: str, block: int, before: int, total: int, device: torch.device) -> torch.Tensor | None:
    """The order of a whole sequence on a device: tokens of a grid are ordered, those before and after them stay.

    Args:
        grid: Frames, rows and columns.
        order: One of `ORDERS`.
        block: Tokens of a cube, for `"cubes"`.
        before: Number of tokens before those of the grid.
        total: Number of tokens of the sequence.
        device: The device of the result.

    Returns:
        int64 (total,); `None` where nothing moves.
    """
    found = permutation(grid, order, block)
    if found is None:
        return None
    after = torch.arange(before + len(found), total)
    return torch.cat([torch.arange(before), found + before, after]).to(device)


def inverse(
    grid: Grid, order: str, block: int, before: int, total: int, device: torch.device
) -> torch.Tensor | None:  # fmt: skip
    """The order that takes `indices` back, with the same arguments."""
    found = indices(grid, order, block, before, total, device)
    return None if found is None else found.argsort()


def centers(
    grid: Grid, order: str, cube_tokens: int, before: int, total: int, block: int, device: torch.device
) -> torch.Tensor:
    """The mean frame, row and column of each block of a sequence: float32 (blocks, 3); NaN for a block that has a token
    outside the grid. A cluster has the place of its chunk.

    Args:
        grid: Frames, rows and columns.
        order: One of `ORDERS`.
        cube_tokens: Tokens of a cube, for `"cubes"`.
        before: Number of tokens before those of the grid.
        total: Number of tokens of the sequence.
        block: Tokens of a block.
        device: The device of the result.
    """
    at = _coordinates(grid).float()
    found = permutation(grid, order, cube_tokens)
    places = torch.full((total, 3), float("nan"))
    places[before : before + len(at)] = at if found is None else at[found]
    if order == CLUSTERS:
        for chunk in places[-(-before // block) * block : before + len(at)].split(block * CHUNK_BLOCKS):
            chunk.copy_(chunk.mean(0).expand_as(chunk))
    return torch.stack([part.mean(0) for part in places.split(block)]).to(device)
