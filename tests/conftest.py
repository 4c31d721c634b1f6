"""Settings of the whole suite: no network, one way to count threads, quiet pipelines."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    # Our Triton kernels run through the interpreter where there is no GPU; it must be asked for before they are loaded.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The models of the tests are tiny: threads cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Compiled code of one test must not be found by another."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def pools():
    """Ranks that work together, by how many they are."""
    from ranks import Pool

    made = {size: Pool(size) for size in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()
