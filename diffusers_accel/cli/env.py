"""`diffusers-accel env`: devices, versions and kernels of this machine, with the reason for each unavailable kernel."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core import platform
from ..kernels.attention import KERNELS, AttentionKernel, recipes
from ..kernels.linear import LINEARS

_WIDTH = 118


def env() -> None:
    """Show this machine's devices and versions, and the kernels that can run on it.

    A kernel that cannot run is listed with the reason.
    """
    console = Console()
    if (
        console.width < _WIDTH
    ):  # a narrower table folds its cells and is hard to read, while a terminal wraps whole lines
        console = Console(width=_WIDTH)
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for device in devices:
        facts.add_row("device", f"{device}: {platform.describe(device)}")
    for name, version in platform.versions().items():
        facts.add_row(name, version)
    console.print(facts)

    default = platform.default_device()
    table = Table(title=f"Attention kernels on {default}", title_justify="left")
    for column in ("kernel", "here", "GPUs", "types", "head_dim", "mask", "LSE", "exact"):
        table.add_column(column, overflow="fold", no_wrap=column == "kernel")
    # A recipe differs from its backend in the rounding alone, so it is listed with it.
    missing = {name: KERNELS.get(name).missing(default) for name in KERNELS if "/" not in name}
    for name, reason in missing.items():
        here = "[green]yes[/green]" if reason is None else "[yellow]no[/yellow]"
        table.add_row(name, here, *_abilities(KERNELS.get(name)))
    console.print(table)
    for backend in missing:
        if recipes(backend):
            names = ", ".join(recipes(backend))
            console.print(f"[bold]{backend}[/bold] recipes: {names}", soft_wrap=True, highlight=False)
    for name, reason in missing.items():  # a column would be too narrow for sentences
        if reason is not None:
            console.print(f"[bold]{name}[/bold] {escape(reason)}", soft_wrap=True, highlight=False)

    formats = Table(title=f"Formats of linear layers on {default}", title_justify="left")
    for column in ("format", "here", "features", "bits of a weight", "why not"):
        formats.add_column(column, overflow="fold", no_wrap=column == "format")
    for name in LINEARS:
        linear = LINEARS.get(name)
        reason = linear.missing(default)
        here = "no" if reason is not None else "yes" if default.type == "cuda" else "reference"
        color = {"yes": "green", "no": "yellow"}.get(here, "cyan")
        multiple = f"multiples of {linear.in_multiple}" if linear.in_multiple > 1 else "any"
        bits = "" if linear.bits is None else f"{linear.bits:g}"
        formats.add_row(name, f"[{color}]{here}[/{color}]", multiple, bits, escape(reason or ""))
    console.print(formats)


def _abilities(kernel: AttentionKernel) -> tuple[str, ...]:
    types = ", ".join(_SHORT.get(dtype, str(dtype)) for dtype in kernel.dtypes) or "any"
    mask = "any" if kernel.mask else "keys" if kernel.key_mask else "no"
    return kernel.gpus, types, kernel.dims, mask, _yes(kernel.lse), _yes(kernel.exact)


_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _yes(value: bool) -> str:
    return "yes" if value else "no"
