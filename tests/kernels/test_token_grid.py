"""Orders of picture and video tokens, against sorting by hand, and the places of blocks."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel.kernels.attention import token_grid

CPU = torch.device("cpu")


def test_chunks_begin_with_a_block():
    """Tokens of a block that has others before them stay where they are."""
    span = token_grid.Span((2, 5, 10), 12, 64, token_grid.CLUSTERS, 32)
    assert span.chunks == ((32, 112), (64, 164))


def test_sides_of_cubes():
    """Columns grow first and frames last; no axis grows beyond its size while another can."""
    assert token_grid.cube((21, 30, 52), 128) == (4, 4, 8)
    assert token_grid.cube((21, 45, 80), 64) == (4, 4, 4)
    assert token_grid.cube((1, 128, 128), 128) == (1, 8, 16)
    assert token_grid.cube((2, 4, 64), 128) == (2, 4, 16)
    assert token_grid.cube((1, 2, 4), 128) == (1, 2, 64)


@pytest.mark.parametrize("grid", [(3, 3, 4), (4, 8, 8), (1, 5, 7), (21, 6, 10)])
@pytest.mark.parametrize("order", ["cubes", "morton"])
def test_orders(grid, order):
    frames, rows, columns = grid
    places = [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]
    sides = token_grid.cube(grid, 32)

    def key(place):
        if order == "cubes":
            return [at // side for at, side in zip(place, sides, strict=True)], place
        return [digit for digits in zip(*(f"{at:08b}" for at in place), strict=True) for digit in digits]

    found = token_grid.permutation(grid, order, 32)
    assert [places[at] for at in found.tolist()] == sorted(places, key=key)


def test_the_models_order_moves_nothing():
    assert token_grid.permutation((2, 3, 4), "model", 32) is None
    assert token_grid.indices((2, 3, 4), "model", 32, 5, 40, CPU) is None
    assert token_grid.inverse((2, 3, 4), "model", 32, 5, 40, CPU) is None


def test_other_tokens_stay():
    found = token_grid.indices((2, 4, 4), "morton", 8, 5, 40, CPU)
    assert found[:5].tolist() == list(range(5)) and found[37:].tolist() == [37, 38, 39]
    assert found[5:37].tolist() != list(range(5, 37)) and sorted(found.tolist()) == list(range(40))
    back = token_grid.inverse((2, 4, 4), "morton", 8, 5, 40, CPU)
    assert torch.arange(40)[found][back].tolist() == list(range(40))


def test_centers():
    """A block that holds a token of text has no place."""
    found = token_grid.centers((2, 2, 4), "model", 8, 4, 24, 8, CPU)
    assert found.shape == (3, 3) and found[0].isnan().all() and found[2].isnan().all()
    # The second row of the first frame, and the first row of the second.
    assert found[1].tolist() == [0.5, 0.5, 1.5]
    cubes = token_grid.centers((2, 2, 4), "cubes", 8, 0, 16, 8, CPU)
    assert cubes.tolist() == [[0.5, 0.5, 0.5], [0.5, 0.5, 2.5]]
