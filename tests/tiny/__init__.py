"""Stock diffusers pipelines with tiny random weights, for tests: no download, seconds on one CPU core.

``TINY`` maps a name to a :class:`TinyPipeline`; ``build(name)`` gives the pipeline.
"""

from __future__ import annotations

import importlib

import torch

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


# Those with a UNet, which has no list of blocks; and all of them.
UNETS: dict[str, TinyPipeline] = {entry.name: entry for entry in importlib.import_module(f"{__name__}.unet").ENTRIES}
ALL = {**TINY, **UNETS}


def build(name: str, seed: int = 0):
    """The pipeline ``name`` with weights drawn from ``seed``."""
    return ALL[name].build(seed)


def tensors(output) -> tuple:
    """What a run gave, as a tuple: some pipelines give several tensors."""
    return output if isinstance(output, tuple) else (output,)


def same(found, expected) -> bool:
    """Whether two runs gave the same, to the bit."""
    return all(torch.equal(one, other) for one, other in zip(tensors(found), tensors(expected), strict=True))


__all__ = ["ALL", "TINY", "UNETS", "TinyPipeline", "build", "same", "tensors"]
