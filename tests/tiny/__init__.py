"""Stock diffusers pipelines with tiny random weights, for tests: no download, seconds on one CPU core.

``TINY`` maps a name to a :class:`TinyPipeline`; ``build(name)`` gives the pipeline.
"""

from __future__ import annotations

import importlib

from .components import TinyPipeline

_MODULES = ("flux", "flux2", "wan", "ltx2", "qwen", "cosmos", "cosmos3", "sd3", "others")

TINY: dict[str, TinyPipeline] = {}
for _module in _MODULES:
    try:
        _found = importlib.import_module(f"{__name__}.{_module}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{_module}":
            raise
        continue
    for _entry in _found.ENTRIES:
        assert _entry.name not in TINY, _entry.name
        TINY[_entry.name] = _entry


def build(name: str, seed: int = 0):
    """The pipeline ``name`` with weights drawn from ``seed``."""
    return TINY[name].build(seed)


__all__ = ["TINY", "TinyPipeline", "build"]
