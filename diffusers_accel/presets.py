"""Presets: named configurations, as plain data with the reason beside each choice, filled in for a given pipeline.

- `lossless`: the same arithmetic up to rounding.
- `balanced`: on a GPU 8-bit weights and attention, and nearly half of the steps skipped.
- `fast`: `balanced` with more than 60% of the steps skipped.

Each section has candidates in the order of preference. The first candidate that the pipeline, its device and the
installed packages support is taken. A section without such a candidate is left off and noted; a preset never refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .config import AccelConfig, StepMaskConfig
from .errors import ConfigError, Unsupported, nearest, shown
from .features import attention, cache, compile, graphs, linear
from .features.context import PipelineContext


@dataclass(frozen=True)
class Choice:
    """A preset's candidates for one section.

    Attributes:
        candidates: Values of the section, the best first.
        why: The reason, from `benchmarks/results/` (`flux.json`, `presets*.json`, `caching-*.json`).
        guided: The same for models under classifier-free guidance, which multiplies what two calls differ in, errors
            included; `None` if there is no difference.
        gpu: Whether it is meant for CUDA devices alone.
        otherwise: The note for a pipeline that can have none of them; empty for no note.
    """

    candidates: tuple[Any, ...]
    why: str
    guided: tuple[Any, ...] | None = None
    gpu: bool = False
    otherwise: str = ""


def mask_of(computed: tuple[int, ...], skipped: tuple[int, ...]) -> tuple[int, ...]:
    """Ones and zeros of runs of computed steps, and of skipped ones between them."""
    pairs = zip(computed, (*skipped, 0), strict=True)
    return tuple(value for one, zero in pairs for value in (1,) * one + (0,) * zero)


_EXACT = Choice(("auto",), "the fastest exact kernel is measured for each shape, and the answer kept")
_COMPILE = Choice(("auto",), "on a GPU, the largest gain that costs nothing; elsewhere it takes longer than it saves")
_GRAPHS = Choice(
    (True,), "the same kernels without the host between them, which small pictures and 8-bit kernels wait for", gpu=True
)
# Keys of a cross-attention are few: rounding there costs what it gains.
_FA3, _SAGE_FP8, _SAGE = ({"backend": name, "cross_attention": "auto"} for name in ("fa3-fp8", "sage-fp8", "sage"))
_ATTENTION = Choice(
    (_FA3, _SAGE_FP8, _SAGE),
    "1.3 to 1.5x where attention is long; FlashAttention 3 in fp8 is faster, and at 51 dB by itself on flux-shapes; "
    "Q and K in INT8 are 5 to 6 dB better on wan-shapes (training captions), where fp8 breaks single pictures off",
    guided=(_SAGE_FP8, _SAGE),
    gpu=True,
)
_LINEAR = Choice(
    ("fp8", "int8"),
    "half the memory; e4m3 is faster where there are units for it, and at 46 dB by itself on flux-shapes; INT8 rounds "
    "finer, which guidance needs: fp8 is at 32 dB on wan-shapes",
    guided=("int8", "fp8"),
    gpu=True,
)
# Of 28 steps: lengths of the runs that `fast` computes, and of the runs between them that it skips. Found on training
# captions (39.3 and 31.0 dB) among masks that also skip more than 60% of 24 steps; the published mask `fast` does not.
# Predicting the skipped residuals gains 8 dB on flux-shapes and loses 22 dB on wan-shapes.
FAST = ((4, 1, 1, 1, 1, 1, 1), (1, 2, 3, 3, 4, 5))
_NO_BLOCKS = "caching is off: no blocks of this model are known."
PRESETS: dict[str, dict[str, Choice]] = {
    "lossless": {"attention": _EXACT, "compile": _COMPILE, "cuda_graph": _GRAPHS},
    "balanced": {
        "attention": _ATTENTION,
        "linear": _LINEAR,
        "compile": _COMPILE,
        "cuda_graph": _GRAPHS,
        "cache": Choice(
            (StepMaskConfig(mask="medium"),),
            "46% skipped at 49 and 39 dB, more than any rule that watches something, and no constants are needed",
            otherwise=_NO_BLOCKS,
        ),
    },
    "fast": {
        "attention": _ATTENTION,
        "linear": _LINEAR,
        "compile": _COMPILE,
        "cuda_graph": _GRAPHS,
        "cache": Choice(
            (StepMaskConfig(mask=mask_of(*FAST)),),
            "the best mask of those that skip more than 60%, at 24 steps too",
            otherwise=_NO_BLOCKS,
        ),
    },
}

# Section -> the feature whose check decides whether a pipeline can have it.
_FEATURES: dict[str, Any] = {
    "attention": attention, "linear": linear, "compile": compile, "cuda_graph": graphs, "cache": cache,
}  # fmt: skip


def resolve(
    name: str, context: PipelineContext, overrides: Mapping[str, Any] | None = None
) -> tuple[AccelConfig, tuple[str, ...]]:
    """The configuration of a preset for this pipeline, and notes on what it left off.

    Args:
        name: Of the preset.
        context: The pipeline.
        overrides: Sections that the user names: the preset says nothing of them, and has nothing that they exclude.

    Raises:
        ConfigError: There is no preset of that name, or an override cannot be read.
    """
    if name not in PRESETS:
        file = " A file's name ends in .yaml, .yml or .json." if set(name) & set("./\\") else ""
        raise ConfigError(f"There is no preset {shown(name)}. {nearest(name, PRESETS)}{file}")
    on_gpu = all(denoiser.device.type == "cuda" for denoiser in context.denoisers)
    guided = any(denoiser.adapter.guidance != "embedded" for denoiser in context.denoisers)
    overrides = dict(overrides or {})
    sections: dict[str, Any] = {}
    notes = []
    for section, choice in PRESETS[name].items():
        if section in overrides:
            continue
        candidates = choice.guided if guided and choice.guided is not None else choice.candidates
        candidates = candidates if on_gpu or not choice.gpu else ()
        fit = next((value for value in candidates if _fits(context, section, value, overrides)), None)
        if fit is not None:
            sections[section] = fit
        elif choice.otherwise:
            notes.append(f"preset {name!r}: {choice.otherwise}")
    return AccelConfig.from_dict({"attention": "auto", **sections, **overrides}), tuple(notes)


def _fits(context: PipelineContext, section: str, value: Any, overrides: Mapping[str, Any]) -> bool:
    """Whether a pipeline can have a section, beside the sections that the user names."""
    config = AccelConfig.from_dict({**overrides, section: value})
    judged = replace(context, config=config)
    try:
        for name in (section, *overrides):
            if name in _FEATURES and getattr(config, name) is not None:
                _FEATURES[name].check(judged, getattr(config, name))
    except Unsupported:
        return False
    return True
