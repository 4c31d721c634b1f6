"""Kernels' tests on the CPU: Triton's interpreter runs one program after the other, and every turn of a loop."""

from __future__ import annotations

import functools

import pytest
import torch


@functools.cache
def _interpreter_fails() -> str:
    """Why Triton's interpreter runs no loop here; empty if it does. That of Triton 3.6, with numpy 2.5, does not."""
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available() or not triton.knobs.runtime.interpret:
        return ""
    import numpy
    from kernels_probe import count

    out = torch.zeros(1, dtype=torch.int32)
    try:
        count[(1,)](out, 3)
        assert out.item() == 3
    except triton.runtime.errors.InterpreterError as error:
        if "0-dimensional arrays" not in str(error):  # any other error is to be seen
            raise
        versions = f"triton {triton.__version__} with numpy {numpy.__version__}"
        return f"the interpreter of {versions} runs no loop ({error}): pip install -c constraints.txt"
    return ""


@pytest.fixture(autouse=True)
def _interpreter():
    if reason := _interpreter_fails():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """A reduction over the sequence is divided among 4 programs a head instead of 16, and one that rounds takes 2 tiles
    instead of 16: with the tests' sequences the others would have none."""
    if not torch.cuda.is_available():
        quantize = pytest.importorskip("diffusers_accel.kernels.attention.quantize", exc_type=ImportError)
        monkeypatch.setattr(quantize, "_SPLITS", 4)
        monkeypatch.setattr(quantize, "_HEAD_TILES", 2)
