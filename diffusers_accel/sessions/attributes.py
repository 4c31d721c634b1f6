"""Attributes in which components and pipelines keep what belongs to a session."""

from __future__ import annotations

from typing import Any

from torch import nn

# Of a denoiser or a pipeline: its session.
SESSION = "_diffusers_accel_session"
# Of a pipeline: the edits of the pipeline object.
PIPELINE_EDITS = "_diffusers_accel_edits"
# Of another component: its `SharedComponent`.
SHARED = "_diffusers_accel_shared"


def modules_of(owner: Any) -> list[nn.Module]:
    """A component itself, or a pipeline's components that are modules."""
    if isinstance(owner, nn.Module):
        return [owner]
    return [item for item in owner.components.values() if isinstance(item, nn.Module)]
