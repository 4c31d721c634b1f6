"""What tests of several features need."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel.features import context
from diffusers_accel.features.compile import rewrites


@pytest.fixture
def on_cpu(monkeypatch):
    """Rewrites on the CPU too, of tiny models."""
    monkeypatch.setattr(rewrites.graph, "KINDS", [("cpu", torch.float32)])
    monkeypatch.setattr(rewrites.rows, "_NARROWEST", 1)
    monkeypatch.setattr(rewrites.linear, "_LEAST", 1)
    monkeypatch.setattr(context, "REWRITTEN_ON", ("cpu",))
    torch.compiler.reset()
    yield
    torch.compiler.reset()
