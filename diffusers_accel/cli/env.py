"""`diffusers-accel env`: what this machine has, and which attention kernels can run on it, or why not."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..core import platform
from ..kernels.attention import KERNELS, AttentionKernel


def env() -> None:
    """Show devices, versions, and for every attention kernel whether it can run here, or why not."""
    console = Console()
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for device in devices:
        facts.add_row("device", f"{device}: {platform.describe(device)}")
    for name, version in platform.versions().items():
        facts.add_row(name, version)
    console.print(facts)

    best = platform.best()
    table = Table(title=f"Attention kernels on {best}", title_justify="left")
    for column in ("kernel", "here", "types", "head_dim", "mask", "exact"):
        table.add_column(column, overflow="fold")
    for name in KERNELS:
        kernel = KERNELS.get(name)
        missing = kernel.missing(best)
        here = "[green]runs[/green]" if missing is None else f"[yellow]{escape(missing)}[/yellow]"
        table.add_row(name, here, *_abilities(kernel))
    console.print(table)


def _abilities(kernel: AttentionKernel) -> tuple[str, ...]:
    types = ", ".join(str(dtype).removeprefix("torch.") for dtype in kernel.dtypes) or "any"
    return types, _ranges(kernel.head_dims), _yes(kernel.mask), _yes(kernel.exact)


def _ranges(numbers: tuple[int, ...] | None) -> str:
    """8, 16, ..., 256 for an even spacing; all numbers otherwise."""
    if numbers is None:
        return "any"
    steps = {second - first for first, second in zip(numbers, numbers[1:], strict=False)}
    if len(numbers) > 4 and len(steps) == 1:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
