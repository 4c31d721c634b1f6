"""A pipeline on another GPU than the current one: code that uses the current device gets the tensors' device.

There is no second GPU here, so the sources are read, and stand-ins record the current device of each launch.
`benchmarks/check_gpus.py --second-device` runs the kernels.
"""

from __future__ import annotations

import ast
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import diffusers_accel
from diffusers_accel.core import graphs, platform
from diffusers_accel.kernels.attention import AttentionDispatcher, AttentionKernel, Inputs
from diffusers_accel.kernels.launching import on_its_device

ROOT = Path(diffusers_accel.__file__).parent
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
# Function of torch.cuda -> how many arguments it has with the device.
WITH_DEVICE = {
    **dict.fromkeys(("current_stream", "default_stream", "Stream", "synchronize", "get_rng_state", "manual_seed"), 1),
    **dict.fromkeys(("get_device_capability", "get_device_name", "get_device_properties", "mem_get_info"), 1),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"), 1),
    "set_rng_state": 2,
}


def dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_every_triton_launch_is_on_its_tensors_device():
    launched, bare = set(), []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                decorators = [dotted(item.func if isinstance(item, ast.Call) else item) for item in node.decorator_list]
                if decorators == ["on_its_device", "triton.jit"]:
                    launched.add((file, node.name))
        if "triton.jit" not in (ROOT / file).read_text():
            continue
        bare += [
            (file, dotted(call.func.value))
            for call in calls(tree)
            if isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
            and (file, call.func.value.id) not in launched
        ]  # fmt: skip
    assert not bare and len(launched) > 20


def test_torch_cuda_is_told_the_device():
    bare = [
        (file, ast.unparse(call))
        for file, tree in TREES.items()
        for call in calls(tree)
        if dotted(call.func).startswith("torch.cuda.")
        and len(call.args) + len(call.keywords) < WITH_DEVICE.get(dotted(call.func).removeprefix("torch.cuda."), 0)
    ]
    assert not bare
    # Events are recorded on the current device's stream; `choice._alternate` runs where its tensors' is the current.
    events = {
        file
        for file, tree in TREES.items()
        for call in calls(tree)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "record" and not call.args
    }
    assert events == {"kernels/attention/choice.py"}


class Elsewhere(torch.Tensor):
    """A tensor on the host that says it is on the second GPU."""

    is_cuda = True

    def get_device(self):
        return 1

    @property
    def device(self):
        return torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch):
    """The current device of a machine with two GPUs, the first to begin with."""
    now = [0]

    @contextmanager
    def device(given):
        before, now[0] = now[0], torch.device(given).index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    return now


def test_kernels_run_where_their_tensors_are(current):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.append((grid, args[0], kwargs, current[0]))

    kernel = on_its_device(Kernel())
    here, there = torch.zeros(2), torch.zeros(2).as_subclass(Elsewhere)
    kernel[(3,)]("no tensor", here, WIDTH=4)
    kernel[(5,)]("no tensor", there, WIDTH=4)
    assert seen == [((3,), "no tensor", {"WIDTH": 4}, 0), ((5,), "no tensor", {"WIDTH": 4}, 1)] and current == [0]


def test_packages_and_timings_run_where_their_tensors_are(current):
    """A package's kernel goes by the current device, and so do the events that time it."""
    seen = []

    def load():
        def attention(x):
            seen.append(current[0])
            return x.query

        return attention

    class Chosen:
        kernels = (None, None)
        sparse = None

        def pick(self, call, run, shape):
            run(kernel)
            return kernel

    kernel = AttentionKernel(name="foreign", load=load)
    query, key, value = (torch.randn(1, 4, 2, 8) for _ in range(3))
    dispatcher = AttentionDispatcher(Chosen, Counter())
    # Timed, and then called.
    dispatcher.run(Inputs(query, key, value))
    assert seen == [0, 0]
    dispatcher.run(Inputs(query, key, value.as_subclass(Elsewhere)))
    assert seen == [0, 0, 1, 1] and current == [0]


def test_captures_have_a_stream_of_their_device(monkeypatch, current):
    """torch keeps one stream for captures, on the device of the process's first one."""
    streams, captured = [], []

    class Stream:
        def __init__(self, device):
            self.device = device
            streams.append(device)

    @contextmanager
    def graph(recording, pool, stream, capture_error_mode):
        captured.append((stream.device.index, current[0]))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    graphs._capture_stream.cache_clear()
    try:
        for index in (0, 1, 1):
            graphs.CudaGraphBackend(None, torch.device("cuda", index)).capture(list)
    finally:
        graphs._capture_stream.cache_clear()
    assert captured == [(0, 0), (1, 1), (1, 1)] and [each.index for each in streams] == [0, 1] and current == [0]


def test_a_permit_of_offloading_comes_back(monkeypatch):
    """Where the background thread takes no more work: four lost permits would stop all offloading."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: empty_like(x))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)

    def refuses(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(platform, "_OFFLOADING", SimpleNamespace(submit=refuses))
    monkeypatch.setattr(platform, "_PENDING", threading.BoundedSemaphore(1))
    with pytest.raises(KeyboardInterrupt):
        platform.offload_to_host(torch.ones(2))
    assert platform._PENDING.acquire(blocking=False)


def test_on_the_host_nothing_is_switched():
    assert platform.device_guard(torch.zeros(1)) is platform.device_guard(torch.zeros(2))
