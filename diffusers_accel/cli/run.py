"""`diffusers-accel run`: one prompt (or several) through any diffusers checkpoint, accelerated, into a file.

The pipeline stays the judge of its own arguments: an option is passed on only if the pipeline's call takes it, and is
an error otherwise.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from .. import api, demo
from ..config import AccelConfig
from .common import (
    CommandError,
    ConfigOption,
    DeviceOption,
    DTypeOption,
    ModelArgument,
    PresetOption,
    SetOption,
    accelerated,
    assign,
    assignment,
    key_value,
    load_model,
    one_line,
    read_device,
    read_wanted,
)
from .launch import first, in_workers, read_parallel

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_ENDINGS = (".mp4", ".gif")

# The command's options -> the arguments of a pipeline's call.
_ARGUMENTS = {
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "image": "--image",
    "height": "--height",
    "width": "--width",
    "num_frames": "--num-frames",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "generator": "--seed",
}


def run(
    model: ModelArgument,
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to make. Repeat it for a batch.")],
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to keep out; with guidance only.", show_default=False)
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture to start from, for models that take one.")
    ] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    settings: SetOption = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="WAYS",
            help="Several processes: cfg=2,ulysses=2 takes four (and as many GPUs). They are started here, unless "
            "torchrun has started the command itself.",
            show_default=False,
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the model's.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the model's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance. Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same noise, on every device.")] = 0,
    call: Annotated[
        list[str] | None,
        typer.Option(
            "--call",
            metavar="KEY=VALUE",
            help="Any other argument of the pipeline's call, value in YAML: true_cfg_scale=4.0. Repeatable.",
        ),
    ] = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to save: .png, .jpg or .webp; a video as .mp4 or .gif. Several results are numbered. "
            "Default: made from the prompt.",
            show_default=False,
        ),
    ] = None,
    fps: Annotated[int, typer.Option(min=1, help="Frames per second of the saved video.")] = 16,
) -> None:
    """Make a picture or a video with MODEL, accelerated, and save it.

    The acceleration is the preset "lossless" unless --config, --preset or --set say otherwise.

    Examples:

        diffusers-accel run flux-shapes --prompt "a large red circle in the center, on a plain gray background"

        diffusers-accel run Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a fox" --preset balanced --output fox.mp4

        diffusers-accel run Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a fox" --parallel cfg=2,ulysses=2
    """
    where = read_device(device)
    if parallel is not None:
        preset = preset or (None if config is not None or settings else "lossless")
        ways = read_parallel(parallel)
        in_workers(assign(AccelConfig(), [assignment(way) for way in ways]), where)
        settings = [*(settings or ()), *ways]
    wanted = read_wanted(config, preset, settings)
    extra = dict(key_value(text, "--call", "true_cfg_scale=4.0") for text in call or ())
    # Another machine, whose ranks save nothing, need not have that folder.
    if first():
        check_output(output)
    options = {
        "negative_prompt": negative_prompt,
        "image": read_image(image),
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if negative_prompt is not None and len(prompt) > 1:
        given["negative_prompt"] = [negative_prompt] * len(prompt)
    given = {"prompt": prompt[0] if len(prompt) == 1 else prompt, **given, **extra}
    given["generator"] = torch.Generator("cpu").manual_seed(seed)

    # Weights that ranks share may be more than one GPU holds: they are divided where they lie.
    pipe = load_model(model, where, dtype, waits=wanted.ranks is not None and wanted.ranks.fsdp)
    defaults = demo.call_arguments(model) if model in demo.CHECKPOINTS else {}
    arguments = call_arguments(pipe, {**defaults, **given})
    target = output or default_output(prompt[0], "num_frames" in _parameters(pipe))
    if first():
        check_output(target, video="num_frames" in _parameters(pipe))

    notes = accelerated(pipe, wanted)
    begin = time.perf_counter()
    try:
        result = pipe(**arguments)
    except ValueError as error:  # a pipeline's own check of its arguments
        raise CommandError(f"{type(pipe).__name__}: {one_line(error)}") from error
    except NameError as error:  # how Wan's pipelines miss the package that cleans their prompts
        if error.name != "ftfy":
            raise
        raise CommandError(f"{type(pipe).__name__} needs ftfy: pip install ftfy") from error
    seconds = time.perf_counter() - begin
    if not first():
        return
    files = save(result, target, fps)

    typer.echo(str(api.stats(pipe)))
    for note in notes:
        typer.echo(note)
    typer.echo(f"{seconds:.2f} s on {where}, everything that a first request compiles included")
    for file in files:
        typer.echo(f"saved {file}")


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def call_arguments(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call, with arrays asked for as output.

    Raises:
        CommandError: The pipeline does not take one of them, or needs one that is not given.
    """
    parameters = _parameters(pipe)
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown = [name for name in given if name not in parameters]
        if unknown:
            names = ", ".join(_ARGUMENTS.get(name, f"--call {name}") for name in unknown)
            known = ", ".join(name for name in parameters if name != "self")
            raise CommandError(f"{type(pipe).__name__} does not take {names}. Its call takes: {known}.")
    required = [
        name
        for name, parameter in parameters.items()
        if name != "self"
        and parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in given
    ]
    if required:
        names = ", ".join(_ARGUMENTS.get(name, f"--call {name}=...") for name in required)
        raise CommandError(f"{type(pipe).__name__} also needs {names}.")
    return {**given, "output_type": "np"} if "output_type" in parameters else given


def read_image(file: Path | None) -> Any:
    """A picture from a file, or `None`; `CommandError` if it cannot be read."""
    if file is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise CommandError(f"--image {file}: {one_line(error)}") from error


def default_output(prompt: str, video: bool) -> Path:
    """A file name made of the prompt's first words."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())[:8]
    return Path("-".join(words)[:60] or "output").with_suffix(".mp4" if video else ".png")


def check_output(file: Path | None, video: bool | None = None) -> None:
    """Refuses a file that could not be written in the end.

    Args:
        file: The file asked for.
        video: Whether a video comes out; `None` while that is unknown.

    Raises:
        CommandError: The name's ending does not fit, or ffmpeg or the folder is missing.
    """
    if file is None:
        return
    endings = {None: IMAGE_ENDINGS + VIDEO_ENDINGS, True: VIDEO_ENDINGS, False: IMAGE_ENDINGS}[video]
    ending = file.suffix.lower()
    if ending not in endings:
        what = {None: "An output", True: "A video", False: "A picture"}[video]
        raise CommandError(
            f"--output {file}: {what} is saved as {', '.join(endings)}, not {ending or 'without one'!r}."
        )
    if not file.parent.is_dir():
        raise CommandError(f"--output {file}: there is no folder {str(file.parent)!r}.")
    if ending == ".mp4" and not has_ffmpeg():
        raise CommandError(
            f"Saving {file} needs imageio with ffmpeg: pip install 'diffusers-accel[demo]'. "
            "Or give an --output that ends in .gif."
        )


def has_ffmpeg() -> bool:
    """Whether imageio and its ffmpeg are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("imageio", "imageio_ffmpeg"))


def save(result: Any, target: Path, fps: int) -> list[Path]:
    """Saves every picture or video of a pipeline's result; more than one get numbers.

    Args:
        result: A pipeline's output with `images` (batch, height, width, channels) or `frames` (batch, frames, height,
            width, channels), as arrays in [0, 1] or lists of PIL images.
        target: The file's name; its ending chooses the format.
        fps: Frames per second, for video.
    """
    video = getattr(result, "frames", None)
    items = result.images if video is None else video
    if (video is not None) != (target.suffix.lower() in VIDEO_ENDINGS):
        what = "pictures" if video is None else "video"
        raise CommandError(f"The pipeline made {what}, which cannot be saved as {target}. Choose another --output.")
    files = []
    for index, item in enumerate(items):
        file = target if len(items) == 1 else target.with_stem(f"{target.stem}-{index}")
        write_image(item, file) if video is None else write_video(item, file, fps)
        files.append(file)
    return files


def _bytes(item: Any) -> NDArray[np.uint8]:
    """A picture (height, width, channels) as bytes, from values in [0, 1] or a PIL image."""
    array = np.asarray(item)
    return array if array.dtype == np.uint8 else (array.clip(0, 1) * 255).round().astype(np.uint8)


def write_image(picture: Any, file: Path) -> None:
    """Writes a picture (height, width, channels)."""
    from PIL import Image

    Image.fromarray(_bytes(picture).squeeze()).save(file)


def write_video(frames: Any, file: Path, fps: int) -> None:
    """Writes frames (frames, height, width, channels) as an animated GIF or as H.264 in MP4."""
    pictures: list[Any] = [_bytes(frame) for frame in frames]
    if file.suffix.lower() == ".gif":
        from PIL import Image

        first, *rest = map(Image.fromarray, pictures)
        first.save(file, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        return
    import imageio.v2 as imageio

    # H.264 wants even sides; quality 9 of 10, so that the codec hides nothing of what is to be compared
    imageio.mimwrite(file, pictures, fps=fps, codec="libx264", quality=9, macro_block_size=2)
