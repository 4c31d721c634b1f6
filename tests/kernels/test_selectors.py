"""Rules of sparse attention, each against its description in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_accel.kernels.attention import SELECTORS, token_grid
from diffusers_accel.kernels.attention.selectors import Blocks

pytest.importorskip("triton")
GRID, SIZE = (5, 4, 8), 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu


def blocks(parts=1, order="model", before=0, kept=5, heads=2, similarity=None):
    total = before + math.prod(GRID)
    centers = token_grid.centers(GRID, order, SIZE, before, total, SIZE, DEVICE)
    generator = torch.Generator().manual_seed(0)
    count = len(centers) * max(parts, 1)
    means = [torch.randn(1, heads, count, 16, generator=generator).to(DEVICE) for _ in range(2)]
    return Blocks(
        query_means=means[0], key_means=means[1], scale=0.3, parts=parts, grid=GRID, query_centers=centers,
        key_centers=centers, kept=kept, similarity=lambda: similarity,
    )  # fmt: skip


def highest(scores, count):
    """The columns of the highest scores of each row, as sets."""
    return [set(row.nan_to_num(0.0).sort(descending=True, stable=True).indices[:count].tolist()) for row in scores]


@pytest.mark.parametrize("order", ["model", "cubes"])
def test_window(order):
    """The blocks within the smallest box, in the proportions of the grid, that holds so many."""
    found = SELECTORS.get("window").scores(blocks(0, order)).cpu()
    centers = token_grid.centers(GRID, order, SIZE, 0, math.prod(GRID), SIZE, torch.device("cpu")).tolist()
    for row, at in zip(highest(found, 6), centers, strict=True):
        sides = [max(abs(a - b) / size for a, b, size in zip(at, to, GRID, strict=True)) for to in centers]
        inside = max(sides[column] for column in row)
        assert all(side >= inside - 1e-6 for column, side in enumerate(sides) if column not in row)


def test_radial():
    """The same and the next frame first, then the first frame, then windows that halve with each octave of frames."""
    found = SELECTORS.get("radial").scores(blocks(0)).cpu()
    columns, tokens = GRID[2], GRID[1] * GRID[2]
    centers = token_grid.centers(GRID, "model", SIZE, 0, math.prod(GRID), SIZE, torch.device("cpu")).tolist()
    for row, at in zip(found.tolist(), centers, strict=True):
        kinds = {"near": [], "sink": [], "window": []}
        for score, to in zip(row, centers, strict=True):
            frames = round(abs(at[0] - to[0]))
            within = (abs(at[1] - to[1]) * columns + abs(at[2] - to[2])) / tokens
            kind = "near" if frames <= 1 else "sink" if round(to[0]) == 0 else "window"
            width = within * 2 ** math.floor(math.log2(max(frames, 1)))
            kinds[kind].append((score, width))
        for before, after in (("near", "sink"), ("sink", "window"), ("near", "window")):
            if kinds[before] and kinds[after]:
                assert min(kinds[before])[0] > max(kinds[after])[0]
        for (score, width), (other, wider) in zip(*[iter(sorted(kinds["window"], reverse=True))] * 2, strict=False):
            assert score >= other and width <= wider + 0.05


@pytest.mark.parametrize("kept", [7, 9])
def test_bands(kept):
    """Each head takes near frames, or its place in all frames: the map that holds more of the softmax over means."""
    x = blocks(1, kept=kept, heads=24)
    found = SELECTORS.get("bands").scores(x).cpu()
    logits = (x.query_means.double() @ x.key_means.double().transpose(2, 3) * x.scale).cpu()
    weights = logits.softmax(-1)
    centers = token_grid.centers(GRID, "model", SIZE, 0, math.prod(GRID), SIZE, torch.device("cpu"))
    away = (centers[:, None] - centers[None]).abs()
    sink = centers[:, 0] == 0
    picked = set()
    for head in range(24):
        held, maps = [], []
        across = (away[..., 1] / GRID[1]) ** 2 + (away[..., 2] / GRID[2]) ** 2
        for near, other in ((away[..., 0], across), (across, away[..., 0] / GRID[0])):
            order = (near + 1e-3 * other).masked_fill(sink, -1.0)
            mask = torch.zeros_like(order, dtype=torch.bool)
            mask.scatter_(1, order.sort(dim=1, stable=True).indices[:, :kept], True)
            maps.append(order)
            held.append(float((weights[0, head] * mask).sum()))
        best = held.index(max(held))
        picked.add(best)
        for row, distances in zip(highest(found[0, head], kept), maps[best], strict=True):
            # Of equal distances, any.
            assert max(distances[list(row)]) <= distances.sort().values[kept - 1] + 1e-6
    assert picked == {0, 1}


def test_similarity():
    """Keys that differ are always kept, and queries that differ keep all; with a fixed number the authors' threshold is
    below all cosines."""
    generator = torch.Generator().manual_seed(3)
    similar = [torch.rand(1, 2, 20, generator=generator).to(DEVICE) for _ in range(2)]
    x = blocks(1, kept=None, similarity=similar)
    found = SELECTORS.get("similarity").scores(x).cpu()
    plain = SELECTORS.get("means").scores(x).cpu()
    for head in range(2):
        for row in range(20):
            for column in range(20):
                always = min(float(similar[0][0, head, row]), float(similar[1][0, head, column])) < 0.6
                expected = math.inf if always else float(plain[0, head, row, column])
                assert float(found[0, head, row, column]) == expected
    fixed = blocks(1, kept=5, similarity=similar)
    assert torch.equal(SELECTORS.get("similarity").scores(fixed).cpu(), plain)


@pytest.mark.parametrize("name", [name for name in SELECTORS if not SELECTORS.get(name).within_tiles])
def test_text_before_the_grid(name):
    """Blocks without a place make no score invalid that decides."""
    rule = SELECTORS.get(name)
    similar = [torch.ones(1, 2, 21, device=DEVICE)] * 2
    found = rule.scores(blocks(rule.parts, before=8, similarity=similar)).cpu()
    assert found.shape[-2:] == (21, 21) and found[..., 1:, 1:].isfinite().all()
