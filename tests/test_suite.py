"""How the suite is run: without GPUs, by several processes, and as it is packed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from workers import by_default, piece, place

ROOT = Path(__file__).parents[1]


def outcome(*arguments, **environment):
    """What a run of this suite says."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=120
    )
    return done.stdout + done.stderr


def test_no_gpu_is_seen(request):
    if not request.config.getoption("--gpu"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["TRITON_INTERPRET"] == "1"


def test_gpus_are_hidden_on_a_machine_that_has_some():
    test = f"tests/test_suite.py::{test_no_gpu_is_seen.__name__}"
    assert "1 passed" in outcome(test, CUDA_VISIBLE_DEVICES="0", TRITON_INTERPRET="0")


def test_gpus_that_are_asked_for_must_be_there():
    """Nothing runs on the CPU in their place."""
    found = outcome("--gpu", "tests/core/test_edits.py", CUDA_VISIBLE_DEVICES="")
    assert "--gpu: torch sees no GPU here" in found and "passed" not in found


def test_what_is_meant_for_a_gpu_is_marked():
    """Ranks, whose processes are forked, never run beside CUDA; kernels' tests do run on it."""
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)}
    marked = {path.name for path, text in texts.items() if "mark.gpu" in text}
    assert {"test_low_bit.py", "test_elementwise.py", "test_linear_kernels.py", "test_deferred.py"} <= marked
    forked = {path.name for path, text in texts.items() if "(pools" in text}
    assert len(forked) > 5 and not marked & forked


def test_processes_by_default(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr("workers._memory", lambda: 10 * 2**30)
    assert by_default(["tests"]) == 2 and by_default(["tests"], gpu=True) == 0
    assert by_default([f"{__file__}::test_processes_by_default"]) == 0
    monkeypatch.setattr("workers._memory", lambda: 2**40)
    assert by_default(["tests", __file__]) == 4


def test_pieces():
    ranks = {piece(f"tests/parallel/{name}.py::test_x[a::b]") for name in ("test_requests", "test_vae")}
    assert ranks == {"ranks"} and place("ranks") < 0
    assert piece("tests/demo/test_checkpoints.py::test_x") == "tests/demo/test_checkpoints.py"
    one, other = (piece(f"tests/core/test_step.py::{name}") for name in ("test_a[1]", "test_b"))
    assert one != other == "tests/core/test_step.py::test_b" and one == piece("tests/core/test_step.py::test_a[2]")


def test_a_source_distribution_can_be_tested(tmp_path):
    """It holds the tests, the documents and the environment, and no file that Python makes beside them."""
    metadata = ["egg_info", "--egg-base", str(tmp_path)]
    script = f"import sys; sys.argv = ['setup.py', *{metadata!r}, 'sdist', '-d', {str(tmp_path)!r}]\n"
    script += "from setuptools import setup; setup()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"tests/conftest.py", "tests/tiny/flux.py", "docs/index.md", "constraints.txt", "README.md"} <= names
    assert {"diffusers_accel/api.py", "diffusers_accel/py.typed", "mkdocs.yml", "CONTRIBUTING.md", ".ci/run"} <= names
    assert not [name for name in names if "__pycache__" in name]
