"""`diffusers-accel env`: what this machine has, and which attention kernels can run on it, or why not."""

from __future__ import annotations

import itertools

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
    for column in ("kernel", "runs here", "types", "head_dim", "mask", "exact"):
        table.add_column(column, overflow="fold")
    missing = {name: KERNELS.get(name).missing(best) for name in KERNELS}
    for name, reason in missing.items():
        here = "[green]yes[/green]" if reason is None else "[yellow]no[/yellow]"
        table.add_row(name, here, *_abilities(KERNELS.get(name)))
    console.print(table)
    for name, reason in missing.items():  # sentences get lines of their own: a column would be too narrow for them
        if reason is not None:
            console.print(f"[bold]{name}[/bold] {escape(reason)}", soft_wrap=True, highlight=False)


def _abilities(kernel: AttentionKernel) -> tuple[str, ...]:
    types = ", ".join(str(dtype).removeprefix("torch.") for dtype in kernel.dtypes) or "any"
    return types, _ranges(kernel.head_dims), _yes(kernel.mask), _yes(kernel.exact)


def _ranges(numbers: tuple[int, ...] | None) -> str:
    """8, 16, ..., 256 for an even spacing; all numbers otherwise."""
    if numbers is None:
        return "any"
    steps = {second - first for first, second in itertools.pairwise(numbers)}
    if len(numbers) > 4 and len(steps) == 1:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
