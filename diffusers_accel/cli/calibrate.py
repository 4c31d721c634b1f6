"""`diffusers-accel calibrate`: fits a caching rule's constants to a checkpoint, and writes a configuration file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
import yaml

from .. import demo
from ..quality import calibrate as calibration
from .common import CommandError, DeviceOption, DTypeOption, ModelArgument, key_value, load_model, one_line, read_device
from .run import call_arguments


class Kind(str, Enum):
    """Caching rules with fitted constants."""

    teacache = "teacache"
    magcache = "magcache"


def calibrate(
    model: ModelArgument,
    prompts: Annotated[
        Path, typer.Option("--prompts", metavar="FILE", help="File of prompts to record, one per line; eight or more.")
    ],
    kind: Annotated[Kind, typer.Option(help="The caching rule.")] = Kind.teacache,
    skip: Annotated[float, typer.Option(help="Share of steps that the threshold skips.")] = 0.4,
    use_ret_steps: Annotated[bool, typer.Option(help="Whether TeaCache always computes the first five steps.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Write a poor fit instead of refusing it.")] = False,
    height: Annotated[int | None, typer.Option(min=1, help="Height in pixels. Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width in pixels. Default: the model's.")] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Number of frames of a video. Default: the model's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Number of denoising steps. Default: the model's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.")] = None,
    call: Annotated[
        list[str] | None,
        typer.Option("--call", metavar="KEY=VALUE", help="Any other argument of the pipeline's call. Repeatable."),
    ] = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The YAML file to write.")] = Path("calibrated.yaml"),
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of a plot of the fit.", show_default=False)
    ] = None,
) -> None:
    """Fit a caching rule's constants to MODEL, and write a file for --config.

    Prompts run in full while every step is recorded. A poor fit is refused.

    Example:

        diffusers-accel calibrate Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompts prompts.txt --kind magcache
    """
    lines = read_prompts(prompts)
    for file in (output, plot):
        if file is not None and not file.parent.is_dir():
            raise CommandError(f"{file}: there is no folder {str(file.parent)!r}.")
    options = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }
    given = {name: value for name, value in options.items() if value is not None}
    extra = dict(key_value(text, "--call", "true_cfg_scale=4.0") for text in call or ())
    pipe = load_model(model, read_device(device), dtype)
    defaults = demo.call_arguments(model) if model in demo.CHECKPOINTS else {}
    arguments = {**call_arguments(pipe, {**defaults, **given, **extra, "prompt": lines[0]}), "output_type": "latent"}
    arguments.pop("prompt")
    try:
        found = calibration.calibrate(
            pipe, lines, kind=kind.value, skip=skip, use_ret_steps=use_ret_steps, force=force, **arguments
        )
    except (ValueError, calibration.PoorFit) as error:
        raise CommandError(one_line(error).replace("force=True", "--force")) from error
    found.save(output)
    typer.echo(str(found))
    typer.echo(f"saved {output}")
    if plot is not None:
        try:
            found.plot(plot)
        except ImportError as error:
            raise CommandError("--plot needs matplotlib: pip install 'diffusers-accel[plot]'") from error
        typer.echo(f"saved {plot}")


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: lines of a text file, or a list in a YAML or JSON file.

    Raises:
        CommandError: The file cannot be read, or holds no prompts.
    """
    try:
        text = file.read_text(encoding="utf-8")
        lines = yaml.safe_load(text) if file.suffix in (".yaml", ".yml", ".json") else text.splitlines()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"--prompts {file}: {one_line(error)}") from error
    found = [line.strip() for line in lines if isinstance(line, str) and line.strip()] if lines else []
    if not found:
        raise CommandError(f"--prompts {file}: it holds no prompts. Write one per line.")
    return found
