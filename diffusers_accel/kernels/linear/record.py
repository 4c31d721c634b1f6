"""Records of linear formats: the name of each format, the devices that run it, and the layers that it can take.

A record imports no kernel package; its `load` does. `missing` and `refuses` return sentences that users read in errors
and in `diffusers-accel env`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.platform import Device, has_module
from ...core.registry import Registry

# Maps a stock layer to the module that takes its place.
Replace = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True, kw_only=True)
class LinearKernel:
    """A way to store and multiply a linear layer's weight.

    Args:
        name: The name that a user writes in `linear=`.
        load: Imports the format's packages and returns the function that makes its layers.
        modules: Alternative Python modules that provide it on CUDA; any one of them suffices.
        install: The command that installs one of `modules`.
        everywhere: Whether a reference in plain torch runs on devices other than CUDA, without `modules`.
        at_least: Lowest CUDA compute capability, e.g. (8, 9); `None` for any.
        architectures: The only CUDA compute capabilities that run it, e.g. ((9, 0),); empty for all.
        in_multiple: Number that must divide the input features.
        out_multiple: Number that must divide the output features.
        bits: Bits of a stored weight, scales included, for the memory estimate; `None` if unknown.
        note: Maps a device to a sentence about how the format runs there, or to `None`.
        foreign: Whether another package's code makes the layer. Such a format is tried on one layer before any is
            replaced, since only a trial shows which layers it takes.
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
        """The reason why the format cannot run on a device, to follow its name; `None` if it can."""
        if device.type != "cuda" and self.everywhere:
            return None
        if self.modules and not any(has_module(name) for name in self.modules):
            return f"needs the package {' or '.join(self.modules)} ({self.install})."
        if self.at_least is not None and device.arch is not None and device.arch < self.at_least:
            return f"needs sm_{self.at_least[0]}{self.at_least[1]} or later; this is {device}."
        if self.architectures and device.arch not in self.architectures:
            names = ", ".join(f"sm_{major}{minor}" for major, minor in self.architectures)
            return f"runs on {names} only; this is {device}."
        return None

    def refuses(self, linear: nn.Linear) -> str | None:
        """The reason why the format cannot store a layer, or `None` if it can."""
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
    """Registers a linear layer of your own under a name that `linear=` accepts. Also usable as a decorator.

    Args:
        name: The name, one line of text.
        function: `fn(linear: nn.Linear) -> nn.Module`: maps a stock layer to the module that takes its place. The
            module maps (..., in_features) to (..., out_features).
        replace: Whether a record of this name may be replaced.
        properties: Fields of `LinearKernel`, e.g. `in_multiple=16`.

    Returns:
        `function`, or a decorator where it is `None`.

    Raises:
        ValueError: The name is taken, and `replace` is False.
    """

    def register(function: Replace) -> Replace:
        def checked(linear: nn.Linear) -> nn.Module:
            module = function(linear)
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"The function registered as {name!r} returned {type(module).__name__}; it must return the "
                    "nn.Module that takes the layer's place."
                )
            return module

        LINEARS.add(
            name,
            LinearKernel(**{"name": name, "load": lambda: checked, **properties}),
            replace=replace,
        )
        return function

    return register if function is None else register(function)


def kind_of(module: nn.Module) -> str:
    """The name of a linear layer's format, as `stats` prints it: its `kind`, or its class."""
    return str(getattr(module, "kind", None) or type(module).__name__)
