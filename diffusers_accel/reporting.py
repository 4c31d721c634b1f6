"""Results of `stats` and `explain`: plain data that prints itself as a table, in a terminal and in a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any

from .kernels.attention import margin


@dataclass(frozen=True)
class Row:
    """One line of an explanation.

    Attributes:
        feature: The feature's name.
        action: Its work, in a few words.
        modules: On how many modules.
        refused: The reason why the feature refuses, or `None`.
        notes: Consequences for the user, one sentence each.
    """

    feature: str
    action: str
    modules: int
    refused: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The rows of a configuration's features, in the order in which `accelerate` applies them."""

    pipeline: str
    device: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is refused."""
        return all(row.refused is None for row in self.rows)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        cells = []
        for row in self.rows:
            cells.append([row.feature, row.action, str(row.modules), row.refused or ""])
            cells.extend(["", f"  {note}", "", ""] for note in row.notes)
        return ["feature", "what", "modules", "refused because"], cells

    def __str__(self) -> str:
        lines = [f"{self.pipeline} on {self.device}", text_table(*self._table()), *self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(f"{self.pipeline} on {self.device}", *self._table())


@dataclass(frozen=True)
class Stats:
    """Counters of the last request.

    Attributes:
        requests: Requests seen since `accelerate`.
        steps_computed: Steps of the last request at which some branch was computed in full.
        steps_skipped: Steps at which every branch was skipped.
        branches: `"denoiser/branch"` -> calls computed and skipped.
        seconds_per_step: Seconds from the start of the first denoiser call to the end of the last one, divided by the
            steps; `None` without a request.
        speed_up: Factor by which skipping has made the denoisers faster: the median computed step times the number of
            steps, over the time of all calls. `None` if nothing was skipped.
        attention_kernels: Kernel name -> calls.
        sparse_by_layer: With sparse attention: layer -> share of the pairs of blocks that it computed, over the sparse
            steps.
        sparse_by_step: With sparse attention: sparse step -> share of the pairs of blocks that its layers computed.
        attention_timings: Class of shapes -> kernel -> measured seconds of one call, if `"auto"` chose among several.
        attention_broadcasts: Under PAB, attention outputs `"computed"` and `"reused"`.
        cache_bytes: Bytes that step caching kept between steps, over denoisers and branches.
        cache_guarded: `"denoiser/branch"` -> findings of the cache's guard: number of steps `checked`, `worst` relative
            error, and `stopped`, the step after which nothing was skipped, or `None`.
        linear_layers: Kind -> count, over the denoisers.
        weight_bytes_before: Bytes of the denoisers' parameters and buffers before `accelerate`.
        weight_bytes_after: Bytes of the denoisers' parameters and buffers now.
        graphs_captured: CUDA graphs held.
        graph_replays: CUDA graphs replayed in the last request.
        modulations_precomputed: Number of layers with precomputed modulations in the last request.
        modulations_recomputed: Number of these layers' products that were computed again, since their input differed.
        offload: With offloading: `bytes` of weights that were copied to the GPU; blocks that were copied `ahead` of
            their turn, and those that came `late`; the share of their copies' time that computation has `hidden`, in
            calls without CUDA graphs (`None` if all had graphs); `prompts` whose embeddings were known; `vae decode`
            and `vae encode`, the ways that the VAE took; `peak`, the most bytes of GPU memory that the process has used
            since it last reset `torch.cuda.max_memory_allocated`.
    """

    requests: int = 0
    steps_computed: int = 0
    steps_skipped: int = 0
    branches: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds_per_step: float | None = None
    speed_up: float | None = None
    attention_kernels: dict[str, int] = field(default_factory=dict)
    sparse_by_layer: dict[str, float] = field(default_factory=dict)
    sparse_by_step: dict[int, float] = field(default_factory=dict)
    attention_timings: dict[str, dict[str, float]] = field(default_factory=dict)
    attention_broadcasts: dict[str, int] = field(default_factory=dict)
    cache_bytes: int = 0
    cache_guarded: dict[str, dict[str, Any]] = field(default_factory=dict)
    linear_layers: dict[str, int] = field(default_factory=dict)
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    graphs_captured: int = 0
    graph_replays: int = 0
    modulations_precomputed: int = 0
    modulations_recomputed: int = 0
    offload: dict[str, Any] = field(default_factory=dict)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            ["requests", str(self.requests)],
            ["steps computed", str(self.steps_computed)],
            ["steps skipped", str(self.steps_skipped)],
        ]
        for name, calls in self.branches.items():
            rows.append([f"  {name}", f"{calls['computed']} computed, {calls['skipped']} skipped"])
        for name, found in self.cache_guarded.items():
            end = "" if found["stopped"] is None else f"; skipping stopped at step {found['stopped']}"
            rows.append([f"  guard of {name}", f"{found['checked']} checked, off by {found['worst']:.1%} at most{end}"])
        if self.seconds_per_step is not None:
            faster = "" if self.speed_up is None else f"; skipping made them {self.speed_up:.2f}x as fast"
            rows.append(["seconds per step", f"{self.seconds_per_step:.3g}{faster}"])
        if self.attention_broadcasts:
            rows.append(["attention", _counts(self.attention_broadcasts)])
        if self.cache_bytes:
            rows.append(["kept between steps", f"{self.cache_bytes / 2**20:.1f} MiB"])
        rows.append(["attention kernels", _counts(self.attention_kernels)])
        if self.sparse_by_step:
            least, most = min(self.sparse_by_layer.values()), max(self.sparse_by_layer.values())
            mean = sum(self.sparse_by_step.values()) / len(self.sparse_by_step)
            spread = "" if most - least < 0.005 else f", {least:.0%} to {most:.0%} by layer"
            rows.append(["sparse attention", f"{mean:.0%} of blocks{spread}, in {len(self.sparse_by_step)} steps"])
        for shape, times in self.attention_timings.items():
            rows.append([f"  {shape}", margin(times)])
        rows.append(["linear layers", _counts(self.linear_layers)])
        before, after = self.weight_bytes_before / 2**20, self.weight_bytes_after / 2**20
        rows.append(["denoiser weights", f"{before:.1f} MiB before, {after:.1f} MiB now"])
        if self.graphs_captured:
            rows.append(["CUDA graphs", f"{self.graphs_captured} captured, {self.graph_replays} replays"])
        if self.modulations_precomputed:
            missed = f", {self.modulations_recomputed} products made anew" if self.modulations_recomputed else ""
            rows.append(["modulations", f"{self.modulations_precomputed} layers, all steps at once{missed}"])
        rows.extend(self._offload_rows())
        return ["last request", ""], rows

    def _offload_rows(self) -> list[list[str]]:
        found, rows = self.offload, []
        if "bytes" in found:
            text = f"{found['bytes'] / 2**30:.2f} GiB copied, {found['ahead']} blocks ahead, {found['late']} late"
            hidden = "" if found["hidden"] is None else f"; {found['hidden']:.0%} of the copies hid"
            rows.append(["offload", text + hidden])
        if "peak" in found:
            rows.append(["  GPU memory", f"{found['peak'] / 2**30:.2f} GiB at most"])
        ways = [f"{method.removeprefix('vae ')} {way}" for method, way in found.items() if method.startswith("vae ")]
        if ways:
            rows.append(["  VAE", ", ".join(ways)])
        if found.get("prompts"):
            rows.append(["  prompts", f"{found['prompts']} known, encoded before"])
        return rows

    def __str__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table("", *self._table())


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in counts.items()) or "none"


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in plain text: columns as wide as their widest cell."""
    columns = [column for column in range(len(header)) if any(row[column] for row in rows) or header[column] == ""]
    widths = {column: max(len(row[column]) for row in [header, *rows]) for column in columns}

    def line(row: list[str]) -> str:
        return "  ".join(row[column].ljust(widths[column]) for column in columns).rstrip()

    return "\n".join([line(header), "  ".join("-" * widths[column] for column in columns), *map(line, rows)])


def html_table(caption: str, header: list[str], rows: list[list[str]]) -> str:
    """The same as HTML, for notebooks."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"
