"""The shipped checkpoints, which are trained, on 2 and 4 processes, against the stock pipeline in one."""

from __future__ import annotations

import pytest
from ranks import requests

ON_2 = {
    "ulysses": {"ulysses": 2}, "ring": {"ring": 2}, "columns": {"attn2d": (1, 2)}, "tp": {"tp": 2},
    "fsdp": {"ulysses": 2, "fsdp": True}, "vae": {"ulysses": 2, "vae": 2},
}  # fmt: skip
ON_4 = {
    "ulysses": {"ulysses": 4}, "grid": {"attn2d": (2, 2)}, "tp and ulysses": {"tp": 2, "ulysses": 2},
    "ulysses, ring and vae": {"ulysses": 2, "ring": 2, "vae": 4},
}  # fmt: skip
# The video's requests take ten times as long: one way of each kind.
OF_VIDEOS = ((2, "ulysses"), (2, "tp"), (4, "ulysses, ring and vae"))
GUIDED = {2: {"cfg": 2}, 4: {"cfg": 2, "ulysses": 2, "vae": 2}}


def agrees(pool, name, way):
    for error, restored in pool.run(requests.checkpoint, name, {"parallel": way}):
        assert error < 1e-4 and restored, error


@pytest.mark.parametrize(
    ("name", "ranks", "way"),
    [
        # Other ways, alone and together, are tested on small models.
        *(("flux-shapes", 2, way) for way in ON_2 if way not in ("ring", "columns")),
        *(("flux-shapes", 4, way) for way in ON_4 if way not in ("ulysses", "tp and ulysses")),
        *(("wan-shapes", *each) for each in OF_VIDEOS),
    ],
)
def test_shipped_checkpoints(pools, name, ranks, way):
    agrees(pools[ranks], name, {2: ON_2, 4: ON_4}[ranks][way])


@pytest.mark.parametrize("ranks", [2, 4])
def test_guidance(pools, ranks):
    agrees(pools[ranks], "wan-shapes", GUIDED[ranks])
