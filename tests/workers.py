"""Processes that share the suite's tests: how many, and who runs which.

- The tests of ranks are one piece of work: ranks are started once, and are several busy processes already.
- A file whose tests share what is costly to make is one piece.
- Any other test function is a piece by itself, so that no worker is left alone with a long file at the end.

Long pieces come first. (pytest-xdist's own groups do nothing under pytest 9.2.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# A worker and the ranks it may start: torch, diffusers and transformers, each a gigabyte at most.
_GIGABYTES = 4
_MOST = 4
# Their tests use the fixture `pools`.
_RANKS = ("tests/parallel/", "tests/core/test_comm.py", "tests/kernels/test_context_parallel.py")
# They start processes of their own, or share pipelines that are trained.
_WHOLE = ("tests/demo/", "tests/cli/", "tests/parallel/test_nodes.py", "tests/parallel/test_workers.py")
# After the ranks', from the longest.
_LONG = (
    "tests/demo/test_checkpoints.py", "tests/cli/test_run.py", "tests/parallel/test_nodes.py", "test_pairs",
    "test_every_kernel_compiles", "tests/parallel/test_workers.py", "test_compiled_without_a_graph_break",
    "test_inductor_takes_them", "test_every_family", "test_lossless_then_restored", "test_many_sizes_in_one_process",
)  # fmt: skip


def by_default(arguments: Sequence[str], gpu: bool = False) -> int:
    """How many processes run the tests if nobody says (`-n`): one for each core, up to 4 and what memory there is; none
    but pytest's own for single files and for a GPU."""
    if gpu or all(Path(argument.split("::")[0]).is_file() for argument in arguments):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _MOST, _memory() // (_GIGABYTES * 2**30)))


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not everywhere
        return _MOST * _GIGABYTES * 2**30


def piece(test: str) -> str:
    """The piece of work that a test (`FILE::NAME[PARAMETERS]`) is part of."""
    file = test.split("::")[0]
    if file.startswith(_WHOLE):
        return file
    return "ranks" if file.startswith(_RANKS) else test.split("[")[0]


def place(work: str) -> int:
    """Where in the queue it stands."""
    if work == "ranks":
        return -1
    return next((place for place, name in enumerate(_LONG) if work.endswith(name)), len(_LONG))


def scheduler(config, log):
    """Of pytest-xdist: by pieces, long ones first."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Pieces(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return piece(nodeid)

        def schedule(self):
            # The queue is filled from the collection, in the order that workers have it, and kept in it.
            self.config.option.loadscopereorder = False
            super().schedule()

    return Pieces(config, log)
