"""`diffusers-accel explain`: the plan of an acceleration, in order, with refused sections and their reasons."""

from __future__ import annotations

import typer

from .. import api
from .common import (
    CommandError,
    ConfigOption,
    DeviceOption,
    DTypeOption,
    ModelArgument,
    PresetOption,
    SetOption,
    load_model,
    one_line,
    read_device,
    read_requested,
)


def explain(
    model: ModelArgument,
    config: ConfigOption = None,
    preset: PresetOption = None,
    settings: SetOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Show the plan of accelerating MODEL: changes in order, and refused sections with reasons. Generates nothing.

    Exits with 0 if nothing is refused, with 1 otherwise.
    """
    requested = read_requested(config, preset, settings)
    pipe = load_model(model, read_device(device), dtype, keep_on_host=requested.begins_on_host)
    chosen, notes = requested.resolve(pipe)
    try:
        explanation = api.explain(pipe, chosen)
    except TypeError as error:
        raise CommandError(one_line(error)) from error
    typer.echo(str(explanation))
    for note in notes:
        typer.echo(note)
    if not explanation.ok:
        raise typer.Exit(1)
