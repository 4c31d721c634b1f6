"""`diffusers-accel run`: one or more prompts through any diffusers checkpoint, accelerated, into files.

The signature of the pipeline's `__call__` lists its arguments. An option that the call does not take is an error.
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
    accelerate_pipeline,
    assign,
    assignment,
    key_value,
    load_model,
    one_line,
    read_device,
    read_requested,
)
from .launch import first, in_workers, read_parallel

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_ENDINGS = (".mp4", ".gif")

# Arguments of a pipeline's call -> the command's options.
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
    prompt: Annotated[list[str], typer.Option("--prompt", help="The prompt. Repeat it for a batch.")],
    negative_prompt: Annotated[
        str | None, typer.Option(help="The negative prompt, for guidance.", show_default=False)
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The input picture, for models that take one.")
    ] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    settings: SetOption = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="WAYS",
            help="Ways of parallelism: cfg=2,ulysses=2 runs four processes on four GPUs. The command starts them, "
            "unless torchrun has started it.",
            show_default=False,
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height in pixels. Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width in pixels. Default: the model's.")] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Number of frames of a video. Default: the model's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of denoising steps. Default: the model's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise, which is equal on all devices.")] = 0,
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
            help="Output file: .png, .jpg or .webp; .mp4 or .gif for a video. Several results are numbered. "
            "Default: a name from the prompt.",
            show_default=False,
        ),
    ] = None,
    fps: Annotated[int, typer.Option(min=1, help="Frames per second of the saved video.")] = 16,
) -> None:
    """Make a picture or a video with MODEL, accelerated, and save it.

    The default acceleration is the preset "lossless"; --config, --preset and --set change it.

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
    requested = read_requested(config, preset, settings)
    extra = dict(key_value(text, "--call", "true_cfg_scale=4.0") for text in call or ())
    for name, instead in (("generator", "--seed"), ("output_type", "--output")):
        if name in extra:
            raise CommandError(f"--call {name}: the command sets it. Give {instead}.")
    # Other ranks save nothing, and their machine may lack the folder.
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

    # The whole weights may exceed one GPU's memory.
    pipe = load_model(model, where, dtype, keep_on_host=requested.begins_on_host)
    defaults = demo.call_arguments(model) if model in demo.CHECKPOINTS else {}
    arguments = call_arguments(pipe, {**defaults, **given})
    target = output or default_output(prompt[0], "num_frames" in _parameters(pipe))
    if first():
        check_output(target, video="num_frames" in _parameters(pipe))

    notes = accelerate_pipeline(pipe, requested)
    begin = time.perf_counter()
    try:
        result = pipe(**arguments)
    except ValueError as error:  # the pipeline's check of its arguments
        raise CommandError(f"{type(pipe).__name__}: {one_line(error)}") from error
    except NameError as error:  # Wan's pipelines without ftfy, which cleans prompts
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
    typer.echo(f"{seconds:.2f} s on {where}, compilation by the first request included")
    for file in files:
        typer.echo(f"saved {file}")


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def call_arguments(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call, with `output_type="np"` if the call takes it.

    Args:
        pipe: The pipeline.
        given: Name -> argument, from options.

    Raises:
        CommandError: The pipeline does not take a given argument, or a required argument is missing.
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
    """The RGB picture of a file; `None` without a file.

    Raises:
        CommandError: The file cannot be read as a picture.
    """
    if file is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise CommandError(f"--image {file}: {one_line(error)}") from error


def default_output(prompt: str, video: bool) -> Path:
    """A file name from the prompt's first words."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())[:8]
    return Path("-".join(words)[:60] or "output").with_suffix(".mp4" if video else ".png")


def check_output(file: Path | None, video: bool | None = None) -> None:
    """Refuses an output file that could not be written after the run.

    Args:
        file: The output file; `None` is not checked.
        video: Whether the output is a video; `None` before the model is loaded.

    Raises:
        CommandError: The file's ending does not fit the output, or its folder or ffmpeg is missing.
    """
    if file is None:
        return
    endings = {None: IMAGE_ENDINGS + VIDEO_ENDINGS, True: VIDEO_ENDINGS, False: IMAGE_ENDINGS}[video]
    ending = file.suffix.lower()
    if ending not in endings:
        output = {None: "An output", True: "A video", False: "A picture"}[video]
        instead = repr(ending) if ending else "without an ending"
        raise CommandError(f"--output {file}: {output} is saved as {', '.join(endings)}, not {instead}.")
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
    """Saves every picture or video of a pipeline's result, with numbers in the names of several.

    Args:
        result: A pipeline's output: arrays in [0, 1] or lists of PIL images. `images` are (batch, height, width,
            channels), `frames` are (batch, frames, height, width, channels).
        target: The output file. Its ending decides the format.
        fps: Frames per second of a video.

    Returns:
        The written files.

    Raises:
        CommandError: The file's ending does not fit the result.
    """
    video = getattr(result, "frames", None)
    items = result.images if video is None else video
    if (video is not None) != (target.suffix.lower() in VIDEO_ENDINGS):
        made = "pictures" if video is None else "video"
        raise CommandError(f"The pipeline made {made}, which cannot be saved as {target}. Choose another --output.")
    files = []
    for index, item in enumerate(items):
        file = target if len(items) == 1 else target.with_stem(f"{target.stem}-{index}")
        write_image(item, file) if video is None else write_video(item, file, fps)
        files.append(file)
    return files


def _bytes(item: Any) -> NDArray[np.uint8]:
    """A picture as uint8 (height, width, channels), from values in [0, 1] or a PIL image."""
    array = np.asarray(item)
    return array if array.dtype == np.uint8 else (array.clip(0, 1) * 255).round().astype(np.uint8)


def write_image(picture: Any, file: Path) -> None:
    """Writes a picture (height, width, channels), of values in [0, 1] or a PIL image."""
    from PIL import Image

    Image.fromarray(_bytes(picture).squeeze()).save(file)


def write_video(frames: Any, file: Path, fps: int) -> None:
    """Writes a video as an animated GIF, or as H.264 in MP4.

    Args:
        frames: Array (frames, height, width, channels) in [0, 1], or a list of PIL images.
        file: The output file. Its ending decides the format.
        fps: Frames per second.
    """
    pictures: list[Any] = [_bytes(frame) for frame in frames]
    if file.suffix.lower() == ".gif":
        from PIL import Image

        first, *rest = map(Image.fromarray, pictures)
        first.save(file, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        return
    import imageio.v2 as imageio

    # H.264 needs even sides. Quality 9 of 10 keeps differences between two videos visible.
    imageio.mimwrite(file, pictures, fps=fps, codec="libx264", quality=9, macro_block_size=2)
