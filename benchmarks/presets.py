"""What the presets cost in fidelity on the shipped checkpoints, with everything they turn on: PSNR against stock on the
same device over held-out captions.

Parts of a preset are measured alone too, so that it can be seen what costs what. With `--masks`, masks that `fast`
could have, on training captions: the preset's own was chosen there.

    python benchmarks/presets.py                    # benchmarks/results/presets.json
    python benchmarks/presets.py --masks            # benchmarks/results/presets-masks.json
    python benchmarks/presets.py --split training   # benchmarks/results/presets-training.json
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import warnings
from pathlib import Path
from typing import Any

import measure
import torch
from fidelity import captions

from diffusers_accel import StepMaskConfig, accelerate, demo, stats
from diffusers_accel.presets import mask_of

FA3 = {"backend": "fa3-fp8", "cross_attention": "auto"}
SAGE = {"backend": "sage-fp8", "cross_attention": "auto"}
PARTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "lossless": ("lossless", {}),
    "balanced": ("balanced", {}),
    "fast": ("fast", {}),
    "balanced, attention in 16 bits": ("balanced", {"attention": "auto"}),
    "fp8 layers": (None, {"linear": "fp8", "compile": True}),
    "FA3 in fp8": (None, {"attention": FA3, "compile": True}),
    **{
        f"{preset}, {linear} layers, {name}": (preset, {"linear": linear, "attention": attention})
        for preset in ("balanced", "fast")
        for linear in ("fp8", "int8")
        for name, attention in {
            "FA3 in fp8": FA3,
            "FA3 in fp8, first fifth dense": FA3 | {"dense_steps": 0.2},
            "sage-fp8": SAGE,
            "sage-fp8, first fifth dense": SAGE | {"dense_steps": 0.2},
        }.items()
    },
}
# Runs of computed steps of 28, and of skipped ones between them.
MASKS = (
    ((6, 1, 1, 1, 1), (2, 4, 6, 6)),
    ((5, 1, 1, 1, 1, 1), (2, 3, 4, 4, 5)),
    ((4, 1, 1, 1, 1, 1, 1), (1, 2, 3, 3, 4, 5)),
    ((3, 1, 1, 1, 1, 1, 1, 1), (1, 1, 2, 3, 3, 4, 4)),
    ((7, 1, 1, 1), (4, 6, 8)),
    ((3, 1, 1, 1, 1, 1, 1, 1), (1, 2, 2, 3, 3, 3, 4)),
    ((2, 1, 1, 1, 1, 1, 1, 1, 1), (1, 1, 2, 2, 2, 3, 3, 4)),
    ((4, 1, 1, 1, 1, 1, 1), (2, 2, 3, 3, 4, 4)),
)


def masks() -> dict[str, tuple[str | None, dict[str, Any]]]:
    """Candidates for `fast`, alone, with and without a prediction."""
    return {
        f"{computed} {skipped}, order {order}": (
            None, {"cache": StepMaskConfig(mask=mask_of(computed, skipped), taylorseer_order=order), "compile": "auto"},
        )
        for computed, skipped in MASKS
        for order in (0, 1)
    }  # fmt: skip


def generate(name: str, pipe: Any, prompts: list[str]) -> torch.Tensor:
    """All pictures, (count, ...)."""
    record, pictures = demo.CHECKPOINTS[name], []
    for number, prompt in enumerate(prompts):
        out = pipe(prompt, generator=torch.Generator().manual_seed(number), output_type="pt", **record.arguments)
        pictures.append((out.images if record.kind == "image" else out.frames).float().cpu())
    return torch.cat(pictures)


@functools.cache
def loaded(name: str, count: int, split: str, device: str) -> tuple[Any, list[str], torch.Tensor]:
    """A process's own pipeline, the captions, and what stock makes of them."""
    prompts = captions(demo.CHECKPOINTS[name].kind, count, split)
    pipe = demo.load(name, torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompts, generate(name, pipe, prompts)


def row(task: tuple[str, int, str, str, str, tuple[str | None, dict[str, Any]]]) -> tuple[str, str, dict[str, Any]]:
    """One configuration's figures."""
    name, count, split, device, label, (preset, sections) = task
    pipe, prompts, stock = loaded(name, count, split, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate(pipe, *([preset] if preset else []), **sections)
        found = generate(name, pipe, prompts)
    said = stats(pipe)
    errors = (found - stock).square().flatten(1).mean(1)
    decibels = [-10 * float(error.log10()) if error > 0 else 100.0 for error in errors]
    return name, label, {
        "skipped": round(said.steps_skipped / (said.steps_skipped + said.steps_computed), 3),
        "psnr pooled": round(-10 * float(errors.mean().clamp_min(1e-10).log10()), 2),
        "psnr mean": round(statistics.mean(decibels), 2),
        "psnr worst": round(min(decibels), 2),
        "attention": said.attention_kernels,
        "linear": said.linear_layers,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", action="store_true", help="candidates for `fast`, on training captions")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=4, help="processes beside each other")
    parser.add_argument("--split", choices=("held-out", "training"), default="held-out", help="of the captions")
    parser.add_argument("--model", choices=sorted(demo.CHECKPOINTS), help="this checkpoint alone")
    parser.add_argument("--only", nargs="*", help="configurations whose names begin so, alone")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result")
    options = parser.parse_args()
    split = "training" if options.masks else options.split
    wanted = masks() if options.masks else PARTS
    tasks = [
        (name, options.count, split, options.device, label, given)
        for name in ([options.model] if options.model else sorted(demo.CHECKPOINTS))
        for label, given in wanted.items()
        if not options.only or label.startswith(tuple(options.only))
    ]
    found: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs, torch.set_num_threads, (4,)) as pool:
        for name, label, figures in pool.imap_unordered(row, tasks):
            found.setdefault(name, {})[label] = figures
            print(name, label, figures, flush=True)
            work = {"captions": options.count, "split": split, "device": options.device, "found": found}
            label = "presets-masks" if options.masks else "presets" if split == "held-out" else f"presets-{split}"
            path = measure.write(label, work, options.out)
    print(path)


if __name__ == "__main__":
    main()
