"""`diffusers-accel`: the app with its commands. Deliberate errors become one red line here, and nowhere else."""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from .. import __version__
from ..errors import AccelError
from .calibrate import calibrate
from .common import one_line
from .demo import demo
from .env import env
from .explain import explain
from .run import run


class ErrorLine(TyperGroup):
    """A group of commands that prints an `AccelError` as one line and exits with 2. Other exceptions are bugs and keep
    their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AccelError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            line = Text.assemble(("error: ", "bold red"), (one_line(error), "red"))
            Console(stderr=True).print(line, soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=ErrorLine,
    name="diffusers-accel",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make stock diffusers pipelines faster.\n\nStart with: diffusers-accel demo",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"diffusers-accel {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="DIFFUSERS_ACCEL_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make stock diffusers pipelines faster.

    Start with: diffusers-accel demo
    """


for command in (demo, run, explain, env, calibrate):
    app.command()(command)


def main() -> None:
    """The entry point of `diffusers-accel` and of `python -m diffusers_accel`."""
    app(prog_name="diffusers-accel")


if __name__ == "__main__":
    main()
