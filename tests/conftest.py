"""Settings of the whole suite: no network, no GPU unless asked for, one way to count threads, and who runs which tests.

`python -m pytest` leaves out the tests marked `thorough`, which take as long as half of the others: `-m thorough` runs
these alone, and `-m ""` all.

Tests see no GPU, so that they pass on any machine: small pipelines are put together on the CPU, and ranks are forked,
which a process that uses CUDA cannot be. `--gpu` runs the tests that are meant for one, marked `gpu`, and no others.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Mapping

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Inductor would start processes that import torch, one for each core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
from interpreter import patch_once
from workers import by_default, piece, place, scheduler


def settings(gpu: bool) -> Mapping[str, str]:
    """What the environment must say before torch looks for GPUs and before our Triton kernels are loaded, which run
    through the interpreter where there is none."""
    return {"TRITON_INTERPRET": "0"} if gpu else {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the tests that are meant for a GPU, on it, and no others")


# Before the conftest of a folder imports the compiler, and with it Triton. Workers inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.update(settings("--gpu" in sys.argv))


def pytest_configure(config):
    os.environ.update(settings(config.getoption("--gpu")))
    config.addinivalue_line("markers", "gpu: meant for a GPU too; what `--gpu` runs")
    config.addinivalue_line("markers", "thorough: every family, size or pair of a rule of which others test an example")
    if config.getoption("--gpu"):
        config.option.markexpr = ""
    import torch

    if config.getoption("--gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch sees no GPU here. Without it, tests run on the CPU.")
    # The models of the tests are tiny: threads cost more than they bring.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--gpu"):
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("gpu")])
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place(piece(item.nodeid)))


def pytest_collection_finish():
    """Objects of imports live to the end. Frozen, they are passed over by garbage collection, a quarter of the time."""
    for name in ("torch._dynamo", "tiny"):
        importlib.import_module(name)
    patch_once()
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config):
    return by_default(config.args, config.getoption("--gpu"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return scheduler(config, log)


def pytest_runtest_logstart(nodeid, location):
    """Tests load modules too, whose objects are frozen now and then."""
    _started.append(nodeid)
    if len(_started) % 50 == 0:
        gc.collect()
        gc.freeze()


_started: list[str] = []


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Compiled code of one test must not be found by another."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def collected():
    """Pipelines that other tests have dropped are gone, and do not go while graphs or dispatchers are counted."""
    gc.collect()


@pytest.fixture(scope="session")
def pools():
    """Ranks that work together, by how many they are."""
    from ranks import Pool

    made = {size: Pool(size) for size in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()
