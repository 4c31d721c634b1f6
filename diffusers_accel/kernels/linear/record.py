"""Linear records: what each low-bit format is called, where it can run, and which layers it can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.platform import Device, has_module
from ...core.registry import Registry

# Takes a stock layer and returns what stands in its place.
Replace = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True, kw_only=True)
class LinearKernel:
    """A way to store and multiply a linear layer's weight.

    Args:
        name: As a user writes it.
        load: Imports what is needed and returns the function that makes the layer.
        modules: Alternative modules it comes from on a CUDA device; any one of them is enough.
        install: How to get them.
        everywhere: Whether a plain reference runs where there is no CUDA device, whatever is installed.
        at_least: Lowest CUDA compute capability it multiplies on; `None` for any.
        architectures: The CUDA compute capabilities it multiplies on, where only some will do; empty otherwise.
        in_multiple: What the number of input features must be a multiple of.
        out_multiple: The same for output features.
        bits: Of a stored weight, scales included, to tell a user what it will take; `None` if it is not known.
        note: What a user should know of how it runs, by the device.
        foreign: Whether it is somebody else's code: what it takes is known once it has been tried on a layer.
    """

    name: str
    load: Callable[[], Replace]
    modules: tuple[str, ...] = ()
    install: str = ""
    everywhere: bool = True
    at_least: tuple[int, int] | None = None
    architectures: tuple[tuple[int, int], ...] = ()
    in_multiple: int = 1
    out_multiple: int = 1
    bits: float | None = None
    note: Callable[[Device], str | None] = lambda device: None
    foreign: bool = False

    def missing(self, device: Device) -> str | None:
        """Why it cannot run on a device, or `None` if it can."""
        if device.type != "cuda" and self.everywhere:
            return None
        if self.modules and not any(has_module(name) for name in self.modules):
            return f"needs the package {' or '.join(self.modules)} ({self.install})."
        if self.at_least is not None and device.arch is not None and device.arch < self.at_least:
            return f"needs sm_{self.at_least[0]}{self.at_least[1]} or later; this is {device}."
        if self.architectures and device.arch not in self.architectures:
            names = ", ".join(f"sm_{major}{minor}" for major, minor in self.architectures)
            return f"multiplies on {names}; this is {device}."
        return None

    def refuses(self, linear: nn.Linear) -> str | None:
        """Why it cannot take a layer, or `None` if it can."""
        if not linear.weight.is_floating_point() or linear.weight.dtype.itemsize < 2:
            return f"its weight is {str(linear.weight.dtype).removeprefix('torch.')}"
        for label, size, multiple in (
            ("input", linear.in_features, self.in_multiple),
            ("output", linear.out_features, self.out_multiple),
        ):
            if size % multiple:
                return f"{size} {label} features are no multiple of {multiple}"
        return None


LINEARS: Registry[LinearKernel] = Registry("linear kernel", "register_linear", ("none",))


def register_linear(name: str, function: Any = None, *, replace: bool = False, **properties: Any) -> Any:
    """Registers a user's linear layer under a name that `linear=` accepts. Also usable as a decorator.

    Args:
        name: The name.
        function: `fn(linear: nn.Linear) -> nn.Module`: takes a stock layer and returns the module for its place, which
            maps (..., in_features) to (..., out_features).
        replace: Allow the name to be registered already.
        properties: What it supports, as in `LinearKernel` (e.g. `in_multiple=16`).

    Raises:
        ValueError: The name is taken.
    """

    def register(function: Replace) -> Replace:
        def checked(linear: nn.Linear) -> nn.Module:
            found = function(linear)
            if not isinstance(found, nn.Module):
                raise ValueError(
                    f"The function registered as {name!r} returned {type(found).__name__}; it must return the "
                    "nn.Module that takes the layer's place."
                )
            return found

        LINEARS.add(
            name,
            LinearKernel(**{"name": name, "load": lambda: checked, **properties}),
            replace=replace,
        )
        return function

    return register if function is None else register(function)


def kind_of(module: nn.Module) -> str:
    """What a linear layer is called in `stats`."""
    return str(getattr(module, "kind", None) or type(module).__name__)
