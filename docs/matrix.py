"""The matrix of models and features, asked of the code: the features' own checks over small stock pipelines.

A cell is what `explain` answers for every pipeline of a family in `tests/tiny`. So a feature that begins to refuse a
model, or a new adapter, changes the matrix, and `tests/test_pages.py` fails until the pages say the same.

    python docs/matrix.py     # writes it into README.md and docs/models.md, between the marks
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "models.md")
BEGIN, END = "<!-- matrix: python docs/matrix.py -->", "<!-- end of matrix -->"
YES, SOME, FITTED, NO = "✓", "some", "fit", "no"
LEGEND = {
    YES: "every pipeline of the family has it",
    SOME: "some pipelines have it",
    FITTED: "no constants are published for the family, so `calibrate` fits them, or you give them",
    NO: "refused, by name",
}

# Columns: the name that readers know -> adapters of `diffusers_accel.models`; none for a class that has no adapter.
MODELS: dict[str, tuple[str, ...]] = {
    "FLUX.1": ("FLUX",),
    "FLUX.2": ("FLUX2",),
    "Wan 2.1, 2.2": ("WAN",),
    "Wan VACE": ("WAN_VACE",),
    "LTX-2": ("LTX2",),
    "Qwen-Image": ("QWEN",),
    "Cosmos 1.0 to 2.5": ("COSMOS",),
    "Cosmos3": ("COSMOS3",),
    "SD 3, 3.5": ("SD3",),
    "other denoisers": (),
}
# A polynomial and a table of anybody's: what is asked is whether the rule can run, not who has published them.
_POLYNOMIAL = {"kind": "teacache", "threshold": 0.1, "coefficients": (1.0, 0.0)}
_TABLE = {"kind": "magcache", "mag_ratios": (1.0, 1.0)}
# Rows: a feature -> settings of which all must be accepted. Layers of small pipelines are below every bound on size.
FEATURES: dict[str, tuple[dict[str, Any], ...]] = {
    "attention kernels": ({"attention": "sdpa"},),
    "sparse attention": ({"attention": {"sparse": "auto"}},),
    "low-bit linear layers": tuple({"linear": {"algo": name, "smallest": 0}} for name in ("fp8", "nvfp4")),
    "fused projections": ({"fuse": True},),
    "compilation": ({"compile": True},),
    "CUDA graphs": ({"cuda_graph": True},),
    "streamed weights (`offload`)": ({"offload": 3},),
    "caches that need no constants": tuple(
        {"cache": kind} for kind in ("fbcache", "seacache", "easycache", "mask")
    ),
    "TeaCache": ({"cache": _POLYNOMIAL},),
    "MagCache": ({"cache": _TABLE},),
    "PAB": ({"cache": "pab"},),
    "guidance on several GPUs (`cfg`)": ({"parallel": {"cfg": 2}},),
    "sequence (`ulysses`, `ring`, `attn2d`)": (
        {"parallel": {"ulysses": 2}}, {"parallel": {"ring": 2}}, {"parallel": {"attn2d": (2, 1)}},
    ),
    "tensor parallel (`tp`)": ({"parallel": {"tp": 2}},),
    "shared weights (`fsdp`)": ({"parallel": {"fsdp": True}},),
    "VAE on several GPUs (`vae`)": ({"parallel": {"cfg": 2, "vae": 2}},),
}  # fmt: skip
# Rows whose rule needs constants: the adapter's rows of them.
PUBLISHED: dict[str, Callable[[Any], Any]] = {
    "TeaCache": lambda adapter: adapter.teacache_rows,
    "MagCache": lambda adapter: adapter.magcache_rows,
}


@contextmanager
def two_ranks() -> Iterator[None]:
    """As a check sees one of two processes; graphs, streamed weights and lists of blocks are asked about as on CUDA."""
    from diffusers_accel.core.graphs import GRAPH_BACKENDS
    from diffusers_accel.core.streaming import TRANSFERS
    from diffusers_accel.kernels.attention import KERNELS

    launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    as_cuda = (mock.patch.dict(table, {"cpu": table["cuda"]}) for table in (GRAPH_BACKENDS, TRANSFERS))
    # Whether a pipeline is refused does not depend on its VAE's peak, whose prediction takes a while.
    peaks = mock.patch("diffusers_accel.features.offload.planning.estimate", return_value={"whole": 0})
    lists = mock.patch("diffusers_accel.features.attention.sparse.engine", return_value=KERNELS.get("triton"))
    with mock.patch.dict(os.environ, launcher), next(as_cuda), next(as_cuda), peaks, lists:
        yield


def pipelines() -> dict[str, list[Any]]:
    """The pipelines of `tests/tiny`, by column."""
    from tiny import ALL
    from tiny.heads import with_heads

    from diffusers_accel import models

    adapters = {name: getattr(models, name) for names in MODELS.values() for name in names}
    assert set(map(id, adapters.values())) == set(map(id, models.ADAPTERS)), "MODELS does not name every adapter."
    classes = {kind: model for model, names in MODELS.items() for name in names for kind in adapters[name].classes}
    found: dict[str, list[Any]] = {model: [] for model in MODELS}
    seen = set()
    for entry in ALL.values():
        # The small Cosmos3 has one key head, which no two ranks can divide; the published one has several.
        pipe = with_heads(entry.name, 4) if entry.family == "cosmos3" else entry.build()
        if (key := (type(pipe), entry.denoisers)) in seen:
            continue  # another call of the same pipeline
        seen.add(key)
        kinds = {
            type(getattr(pipe, name)).__name__ for name in entry.denoisers if getattr(pipe, name, None) is not None
        }
        [model] = {classes.get(kind, "other denoisers") for kind in kinds}
        found[model].append(pipe)
    return found


def cell(feature: str, pipes: list[Any]) -> str:
    """The mark of the matrix for a feature and the pipelines of a family."""
    from diffusers_accel import explain
    from diffusers_accel.models import adapter_for

    answers = [all(explain(pipe, **sections).ok for sections in FEATURES[feature]) for pipe in pipes]
    if not any(answers):
        return NO
    if not all(answers):
        return SOME
    if feature in PUBLISHED:
        denoisers = [getattr(pipe, "transformer", None) for pipe in pipes]
        if not any(PUBLISHED[feature](adapter_for(each)) for each in denoisers if each is not None):
            return FITTED
    return YES


def matrix() -> str:
    """The matrix in Markdown, with the meaning of its marks."""
    found = pipelines()
    lines = [["", *MODELS], ["---"] * (len(MODELS) + 1)]
    with two_ranks():
        lines += [[feature, *(cell(feature, found[model]) for model in MODELS)] for feature in FEATURES]
    table = "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)
    marks = {mark for line in lines[2:] for mark in line[1:]}
    return f"{table}\n\n{'; '.join(f'{mark}: {means}' for mark, means in LEGEND.items() if mark in marks)}."


def between(text: str) -> tuple[str, str, str]:
    """A page before, between and after the marks."""
    head, _, rest = text.partition(BEGIN)
    body, _, tail = rest.partition(END)
    return head, body.strip(), tail


def main() -> None:
    """Writes the matrix into the pages."""
    table = matrix()
    for page in PAGES:
        head, _, tail = between(page.read_text(encoding="utf-8"))
        page.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}", encoding="utf-8")
        print(page.relative_to(ROOT))
    print(table)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main()
