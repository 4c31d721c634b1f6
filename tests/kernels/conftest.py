"""Kernels' tests on the CPU: Triton's interpreter runs one program after the other, and every turn of a loop."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """A reduction over the sequence is divided among 4 programs a head instead of 16, and one that rounds takes 2 tiles
    instead of 16: with the tests' sequences the others would have none."""
    if not torch.cuda.is_available():
        quantize = pytest.importorskip("diffusers_accel.kernels.attention.quantize", exc_type=ImportError)
        monkeypatch.setattr(quantize, "_SPLITS", 4)
        monkeypatch.setattr(quantize, "_HEAD_TILES", 2)
