"""`diffusers-accel demo`: a comparison of stock and accelerated pipelines on the shipped checkpoints.

Both sides run the same captions with the same seeds in float32. Each caption is one timed request; a short request for
warm-up precedes them. The demo fails if the PSNR is below its bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import api
from .. import demo as checkpoints
from ..core import platform
from ..demo import Checkpoint
from ..quality.metrics import psnr, ssim
from . import sheet
from .common import CommandError, quiet_loading

# Kind of checkpoint -> smallest passing PSNR in dB, over all pictures together.
BOUNDS = {"image": 33.0, "video": 30.0}
WARM_UP_STEPS = 2
SEED = 1000
FRAMES_SHOWN = 5
FRAMES_PER_SECOND = 8

Pictures = NDArray[np.floating]


class Only(str, Enum):
    """Kinds of checkpoints of the demo."""

    image = "image"
    video = "video"


@dataclass(frozen=True)
class Side:
    """The results of one side of a comparison.

    Attributes:
        pictures: Values (captions, [frames,] height, width, 3), in [0, 1] unless a value is not finite.
        seconds: Wall-clock seconds of all timed requests.
    """

    pictures: Pictures
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The comparison of stock and accelerated results for one checkpoint.

    Attributes:
        record: The checkpoint.
        captions: The captions, one request each.
        stock: Results of the stock pipeline.
        accelerated: Results of the accelerated pipeline.
        computed: Number of computed steps of the accelerated requests.
        skipped: Number of skipped steps of the accelerated requests.
    """

    record: Checkpoint
    captions: tuple[str, ...]
    stock: Side
    accelerated: Side
    computed: int
    skipped: int

    @property
    def bound(self) -> float:
        """Smallest passing PSNR in dB."""
        return BOUNDS[self.record.kind]

    def psnr(self, index: int | slice = slice(None)) -> float:
        """PSNR in dB of one caption's picture, or of all by default; 0 if an accelerated value is not finite."""
        if not np.isfinite(self.accelerated.pictures[index]).all():
            return 0.0
        return psnr(self.stock.pictures[index], self.accelerated.pictures[index])

    def ssim(self) -> float:
        """Mean SSIM over pictures and frames."""
        return ssim(self.stock.pictures, np.nan_to_num(self.accelerated.pictures))


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the written pictures.")
    ] = Path("diffusers-accel-demo"),
    captions: Annotated[
        int, typer.Option(min=1, max=6, help="Number of captions per checkpoint. All were held out of training.")
    ] = 2,
    only: Annotated[
        Only | None, typer.Option(help="Run the image or the video checkpoint alone.", show_default=False)
    ] = None,
) -> None:
    """Compare stock and accelerated pipelines on the small checkpoints that ship with the package.

    Runs on any machine, a CPU included, in about a minute, without downloads. Prints a table and writes pictures. Exits
    with 1 if the PSNR of the accelerated pictures is below its bound.
    """
    _check_packages()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {output}: {error.strerror}.") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = [record for record in checkpoints.CHECKPOINTS.values() if only is None or record.kind == only.value]
    comparisons, files = [], []
    steps = sum(2 * captions * record.arguments["num_inference_steps"] for record in records)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("", total=steps)
        for record in records:

            def show(stage: str, record: Checkpoint = record) -> None:
                progress.update(task, description=f"{record.name}: {stage}")

            comparison = compare(record, captions, device, show, lambda: progress.advance(task))
            show("drawing")
            files.extend(draw(comparison, output))
            comparisons.append(comparison)

    console = Console()
    console.print(table(comparisons, platform.describe(device)))
    for file in files:
        typer.echo(f"wrote {file}")
    missed = [item for item in comparisons if not item.psnr() >= item.bound]
    for item in missed:
        typer.echo(
            f"{item.record.name}: the PSNR of {item.psnr():.1f} dB is under its bound of {item.bound:g} dB.", err=True
        )
    if missed:
        raise typer.Exit(1)


def compare(
    record: Checkpoint,
    count: int,
    device: torch.device,
    show: Callable[[str], None] = lambda stage: None,
    advance: Callable[[], Any] = lambda: None,
) -> Comparison:
    """Runs a checkpoint, stock and accelerated, over its first captions.

    Args:
        record: The checkpoint.
        count: Number of captions.
        device: The device to run on.
        show: Called with the name of each stage as it begins.
        advance: Called after every timed denoising step.
    """
    captions = record.captions[:count]
    show("loading")
    with quiet_loading():
        pipe = checkpoints.load(record.name).to(device)
    pipe.set_progress_bar_config(disable=True)
    show("stock")
    stock = _side(pipe, record, captions, advance, lambda: None)
    show("accelerated")
    api.accelerate(pipe, record.config_file)
    computed = skipped = 0

    def count_steps() -> None:
        nonlocal computed, skipped
        request = api.stats(pipe)
        computed, skipped = computed + request.steps_computed, skipped + request.steps_skipped

    accelerated = _side(pipe, record, captions, advance, count_steps)
    return Comparison(record, captions, stock, accelerated, computed, skipped)


def _side(
    pipe: Any, record: Checkpoint, captions: Sequence[str], advance: Callable[[], Any], after: Callable[[], None]
) -> Side:
    """Runs all captions through a pipeline, after a short request for warm-up.

    Args:
        pipe: The pipeline, stock or accelerated.
        record: The checkpoint.
        captions: The captions, one request each.
        advance: Called after every denoising step.
        after: Called after every request.
    """
    _request(pipe, record, captions[0], 0, num_inference_steps=WARM_UP_STEPS)
    pictures, seconds = [], 0.0

    def step_done(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        advance()
        return tensors

    for index, caption in enumerate(captions):
        begin = time.perf_counter()
        pictures.append(_request(pipe, record, caption, SEED + index, callback_on_step_end=step_done))
        seconds += time.perf_counter() - begin
        after()
    return Side(np.stack(pictures), seconds)


def _request(pipe: Any, record: Checkpoint, caption: str, seed: int, **call: Any) -> Pictures:
    """The picture ([frames,] height, width, 3) of one request, in [0, 1], on the host: the GPU has finished."""
    arguments = {**record.arguments, "prompt": caption, "generator": torch.Generator("cpu").manual_seed(seed), **call}
    result = pipe(**arguments, output_type="np")
    pictures: Pictures = (result.images if record.kind == "image" else result.frames)[0]
    return pictures


def _check_packages() -> None:
    """Refuses to start without the packages of the extra `demo`: scikit-image for SSIM, ftfy for Wan's prompts.

    Raises:
        CommandError: A package is missing.
    """
    missing = [name for name in ("skimage", "ftfy") if not platform.has_module(name)]
    if missing:
        raise CommandError(f"The demo needs {' and '.join(missing)}: pip install 'diffusers-accel[demo]'")


def table(comparisons: Sequence[Comparison], device: platform.Device) -> Table:
    """The comparisons as a table of at most 80 characters per line, one column per checkpoint."""
    result = Table(title=f"Stock and accelerated, float32 on {device}", title_justify="left")
    result.add_column("")
    for item in comparisons:
        result.add_column(item.record.name, justify="right")
    rows = {
        "work": [_work(item) for item in comparisons],
        "stock": [f"{item.stock.seconds:.2f} s" for item in comparisons],
        "accelerated": [f"{item.accelerated.seconds:.2f} s" for item in comparisons],
        "speed-up": [f"[bold]{item.stock.seconds / item.accelerated.seconds:.2f} x[/bold]" for item in comparisons],
        "steps computed": [str(item.computed) for item in comparisons],
        "steps skipped": [str(item.skipped) for item in comparisons],
        "PSNR": [_psnr_cell(item) for item in comparisons],
        "PSNR bound": [f"at least {item.bound:.1f} dB" for item in comparisons],
        "SSIM": [f"{item.ssim():.4f}" for item in comparisons],
    }
    for name, cells in rows.items():
        result.add_row(name, *cells)
    return result


def _work(item: Comparison) -> str:
    arguments, count = item.record.arguments, len(item.captions)
    things = f"{count} {item.record.kind}{'s' if count > 1 else ''}"
    frames = f"{arguments['num_frames']} frames, " if item.record.kind == "video" else ""
    return f"{things}, {arguments['width']} x {arguments['height']},\n{frames}{arguments['num_inference_steps']} steps"


def _psnr_cell(item: Comparison) -> str:
    value = item.psnr()
    return _decibels(value) if value >= item.bound else f"[bold red]{_decibels(value)}[/bold red]"


def _decibels(value: float) -> str:
    return "infinite (equal)" if math.isinf(value) else f"{value:.1f} dB"


def _note(item: Comparison, index: int) -> str:
    return f"PSNR {_decibels(item.psnr(index))}"


def draw(item: Comparison, folder: Path) -> list[Path]:
    """Writes a comparison's pictures: a PNG sheet, and for a video an animated GIF too.

    Args:
        item: The comparison.
        folder: The folder to write to.

    Returns:
        The written files.
    """
    file = folder / f"{item.record.name}.png"
    if item.record.kind == "image":
        sheet.draw(*_columns(item, item.stock.pictures, item.accelerated.pictures)).save(file)
        return [file]
    frames = item.stock.pictures.shape[1]
    shown = sorted(set(np.linspace(0, frames - 1, min(FRAMES_SHOWN, frames)).round().astype(int).tolist()))
    rows = []
    for index, caption in enumerate(item.captions):
        stock, accelerated = item.stock.pictures[index], item.accelerated.pictures[index]
        strips = {
            "stock": stock,
            "accelerated": accelerated,
            _difference_heading(): sheet.difference(stock, accelerated),
        }
        for label, strip in strips.items():
            first = label == "stock"
            rows.append(
                sheet.Row(
                    [strip[frame] for frame in shown],
                    caption=caption if first else "",
                    note=_note(item, index) if first else "",
                    label=label,
                )
            )
    sheet.draw(rows, [f"frame {frame + 1}" for frame in shown], tile=256).save(file)

    pages = [
        sheet.draw(*_columns(item, item.stock.pictures[:, frame], item.accelerated.pictures[:, frame]))
        for frame in range(frames)
    ]
    animation = folder / f"{item.record.name}.gif"
    _animate(pages, animation)
    return [file, animation]


def _difference_heading() -> str:
    return f"difference x {sheet.AMPLIFICATION}"


def _columns(item: Comparison, stock: Pictures, accelerated: Pictures) -> tuple[list[sheet.Row], list[str]]:
    """(rows, headings) of a sheet with one picture (height, width, 3) per caption and side."""
    rows = [
        sheet.Row([left, right, sheet.difference(left, right)], caption=caption, note=_note(item, index))
        for index, (caption, left, right) in enumerate(zip(item.captions, stock, accelerated, strict=True))
    ]
    return rows, ["stock", "accelerated", _difference_heading()]


def _animate(pages: Sequence[Image.Image], file: Path) -> None:
    """Writes a looping GIF. All pages share one palette without dithering, so that still parts do not flicker."""
    mosaic = Image.new("RGB", (pages[0].width, pages[0].height * 3))
    for place, page in enumerate((pages[0], pages[len(pages) // 2], pages[-1])):
        mosaic.paste(page, (0, place * page.height))
    palette = mosaic.quantize(colors=256, method=Image.Quantize.MEDIANCUT)
    first, *rest = (page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages)
    first.save(file, save_all=True, append_images=rest, duration=1000 // FRAMES_PER_SECOND, loop=0)
