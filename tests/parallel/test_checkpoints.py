"""The shipped checkpoints, which are trained, on 2 and 4 processes, against the stock pipeline in one."""

from __future__ import annotations

import pytest
from ranks import requests

# Other ways, alone and together, are tested on small models.
ON_2 = {"ulysses": {"ulysses": 2}, "tp": {"tp": 2}, "fsdp": {"ulysses": 2, "fsdp": True}}
ON_4 = {"ulysses, ring and vae": {"ulysses": 2, "ring": 2, "vae": 4}}
# The video's requests take ten times as long.
GUIDED = {"cfg": 2, "vae": 2}


def agrees(pool, name, way):
    for error, restored in pool.run(requests.checkpoint, name, {"parallel": way}):
        assert error < 1e-4 and restored, error


@pytest.mark.parametrize(
    ("name", "ranks", "way"),
    [
        *(("flux-shapes", 2, way) for way in ON_2),
        *(("flux-shapes", 4, way) for way in ON_4),
        ("wan-shapes", 2, "ulysses"),
    ],
)
def test_shipped_checkpoints(pools, name, ranks, way):
    agrees(pools[ranks], name, {2: ON_2, 4: ON_4}[ranks][way])


def test_guidance(pools):
    agrees(pools[2], "wan-shapes", GUIDED)
