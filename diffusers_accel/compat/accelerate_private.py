"""Private names of accelerate.

Owns the two attributes in which accelerate's hooks lie on a module.
"""

from __future__ import annotations

from typing import Any

READ = "accelerate 1.15"

# Private name -> what depends on it.
NAMES = {
    "hooks.add_hook_to_module._hf_hook": "layers around a hooked forward; refusals of offloaded weights; rank devices",
    "hooks.add_hook_to_module._old_forward": "layers around a hooked forward",
}

# Keys of a module's `__dict__`: its hook, and the forward that the hook wraps.
ACCELERATE_HOOK, WRAPPED_FORWARD = "_hf_hook", "_old_forward"


def has_accelerate_hook(module: Any) -> bool:
    """Whether a hook of accelerate is on a module."""
    return ACCELERATE_HOOK in vars(module)
