"""Shared parts of the commands: options of the configuration, loading of models, and errors.

Options are validated as far as possible before a model is loaded, because loading takes long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import api, demo
from ..checkpoints.files import check_file
from ..checkpoints.loading import from_pretrained
from ..checkpoints.modelopt import CheckpointError
from ..config import AccelConfig, parse_yaml, read_yaml
from ..core.mesh import world_size
from ..errors import AccelError, ConfigError, nearest, shown
from ..presets import PRESETS
from ..resolve import begins_on_host

# Sections that no preset has.
_NO_PRESET = ("parallel", "offload")


class CommandError(AccelError):
    """A command line that cannot be carried out."""


class DType(str, Enum):
    """Dtypes of a pipeline's loaded weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local pipeline folder, a Hugging Face id (owner/name), or a demo checkpoint: "
        f"{', '.join(demo.CHECKPOINTS)}.",
        show_default=False,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A YAML file with the keys of AccelConfig.", show_default=False),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help=f"A preset: {', '.join(PRESETS)}. Default, without --config and --set: lossless.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A configuration key and its value in YAML, over --config or --preset: attention.backend=sdpa, "
        "cache.threshold=0.2, compile=true, cache=null. With --set alone, all other sections are off. Repeatable.",
        show_default=False,
    ),
]
DTypeOption = Annotated[
    DType | None,
    typer.Option("--dtype", help="Dtype of the weights. Default: bfloat16 on CUDA, else float32.", show_default=False),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="cuda, cuda:1, cpu, ... Default: cuda if available.", show_default=False
    ),
]


@dataclass(frozen=True)
class RequestedConfig:
    """The configuration that a command line asks for.

    Attributes:
        base: A preset's name, or a configuration.
        assignments: (dotted key, value) pairs, set over the base in this order.
    """

    base: str | AccelConfig
    assignments: tuple[tuple[str, Any], ...] = ()

    @property
    def without_preset(self) -> AccelConfig:
        """The sections `parallel` and `offload`, which no preset has."""
        base = self.base if isinstance(self.base, AccelConfig) else AccelConfig()
        assignments = [(key, value) for key, value in self.assignments if key.partition(".")[0] in _NO_PRESET]
        return assign(AccelConfig(**{name: getattr(base, name) for name in _NO_PRESET}), assignments)

    @property
    def begins_on_host(self) -> bool:
        """Whether weights wait on the host until they are sharded or offloaded."""
        return begins_on_host(self.without_preset, {})

    def resolve(self, pipe: Any) -> tuple[str | AccelConfig, tuple[str, ...]]:
        """(configuration or preset's name for `accelerate`, notes of a preset that was resolved here).

        Args:
            pipe: The loaded pipeline. A preset's configuration depends on it.
        """
        if not self.assignments:
            return self.base, ()
        # A preset leaves out sections that conflict with weights that are sharded or offloaded.
        others = self.without_preset
        sections: dict[str, Any] = {} if others.offload is None else {"offload": others.offload}
        if others.parallel is not None and others.parallel.fsdp:
            sections["parallel"] = others.parallel
        base, notes = api.resolve(pipe, self.base, **sections)
        return assign(base, self.assignments), notes


def read_requested(config: Path | None, preset: str | None, settings: Sequence[str] | None) -> RequestedConfig:
    """The configuration that --config, --preset and --set ask for together.

    Args:
        config: The file of --config.
        preset: The name of --preset. The default is lossless, without --config and --set.
        settings: The texts KEY=VALUE of --set.

    Raises:
        CommandError: --config and --preset are both given, or a setting is not KEY=VALUE.
        ConfigError: The file, the preset's name or a key is invalid.
    """
    assignments = tuple(map(assignment, settings or ()))
    if config is not None and preset is not None:
        raise CommandError("--config and --preset exclude each other. Give one of them, and change it with --set.")
    if config is not None:
        base = AccelConfig.from_dict(read_yaml(config))
    elif preset is None and assignments:
        base = AccelConfig()
    else:
        preset = preset or "lossless"
        if preset not in PRESETS:
            raise ConfigError(f"There is no preset {preset!r}. {nearest(preset, PRESETS)}")
        # a preset's configuration depends on the model, so only sections' names can be checked before it is loaded
        AccelConfig.from_dict({key.split(".")[0]: None for key, _ in assignments})
        return RequestedConfig(preset, assignments)
    return RequestedConfig(assign(base, assignments))


def assign(config: AccelConfig, assignments: Sequence[tuple[str, Any]]) -> AccelConfig:
    """A configuration after assignments.

    Args:
        config: The configuration, which is not changed.
        assignments: (dotted key, value) pairs, in order.

    Raises:
        ConfigError: A key or a value is invalid. The message has the nearest key.
    """
    values = config.to_dict()
    for key, value in assignments:
        section, *parts = key.split(".")
        if parts and section in values and not isinstance(values[section], dict):
            # an earlier assignment of a shorthand (cache=teacache) is expanded, so that its field can be set
            values = AccelConfig.from_dict(values).to_dict()
        holder, last = values, section
        for part in parts:
            child = holder.get(last)
            holder[last] = holder = dict(child) if isinstance(child, dict) else {}
            last = part
        holder[last] = value
    return AccelConfig.from_dict(values)


def assignment(text: str) -> tuple[str, Any]:
    """(dotted key, value) of a setting KEY=VALUE.

    Raises:
        CommandError: The text has another form, or its value is not YAML.
    """
    return key_value(text, "--set", "attention.backend=sdpa")


def key_value(text: str, option: str, example: str) -> tuple[str, Any]:
    """(key, value) of a text KEY=VALUE, with the value read as YAML.

    Args:
        text: The text.
        option: The option's name, for the message.
        example: A valid text, for the message.

    Raises:
        CommandError: The text has another form, or its value is not YAML.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip(". "):
        raise CommandError(f"{option} {text}: expected KEY=VALUE, e.g. {option} {example}.")
    try:
        return key.strip(), parse_yaml(value)
    except ValueError as error:
        raise CommandError(f"{option} {key.strip()}: {shown(value)} is not YAML that can be read: {error}") from error


def read_device(name: str | None) -> torch.device:
    """The device of a name. The default is CUDA if it is available, else the CPU.

    Raises:
        CommandError: torch does not know the device, or this machine does not have it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name}: torch knows no such device. Give cuda, cuda:1 or cpu.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def load_model(model: str, device: torch.device, dtype: DType | None, keep_on_host: bool = False) -> Any:
    """A stock pipeline on its device: a demo checkpoint, a local folder or a Hugging Face id.

    Args:
        model: The demo checkpoint's name, the folder or the id.
        device: The device to run on.
        dtype: Dtype of the weights. `None` takes bfloat16 on CUDA, else float32.
        keep_on_host: Whether the weights stay on the host, to be sharded or offloaded there.

    Raises:
        CommandError: There is no such model, or it cannot be loaded.
        CheckpointError: The model is a file, and its format is not supported.
    """
    kind = dtype.value if dtype else "bfloat16" if device.type == "cuda" else "float32"
    torch_dtype: torch.dtype = getattr(torch, kind)
    if keep_on_host:
        if device.index is not None and world_size() is None:
            # Weights go from the host to the current GPU. A worker has selected its own.
            torch.cuda.set_device(device)
        device = torch.device("cpu")
    with quiet_loading():
        if model in demo.CHECKPOINTS:
            return demo.load(model, torch_dtype).to(device)
        source = _source(model)
        try:
            return from_pretrained(source, dtype=torch_dtype).to(device)
        except (CheckpointError, OSError, ValueError, ImportError, AttributeError) as error:
            # missing files, no network, a package that a class needs, a class that this diffusers does not have
            raise CommandError(f"Could not load {model!r}: {one_line(error)}") from error


def _source(model: str) -> str:
    """The argument of `from_pretrained` for a model: a folder, or a Hugging Face id.

    Raises:
        CommandError: The model is a single file, a folder without a pipeline, or neither a folder nor an id.
    """
    folder = Path(model).expanduser()
    if folder.is_file():
        check_file(folder)
        raise CommandError(f"{model!r} is one model's file. Give a pipeline's folder, or its Hugging Face id.")
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise CommandError(f"The folder {model!r} is no diffusers pipeline: it has no model_index.json.")
        return str(folder)
    if model.count("/") == 1 and not model.startswith((".", "~", "/")):
        return model  # owner/name: the hub checks it
    hint = "" if "/" in model else f" {nearest(model, demo.CHECKPOINTS)}"
    raise CommandError(f"There is no model folder {model!r}. Give a folder, a Hugging Face id or a demo name.{hint}")


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """A context without progress bars of loading, and with libraries' errors alone in the log."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bar in zip(libraries, before, bars, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def accelerate_pipeline(pipe: Any, requested: RequestedConfig) -> tuple[str, ...]:
    """Accelerates a pipeline by the requested configuration.

    Returns:
        Notes of a preset that was resolved here.

    Raises:
        CommandError: The object is no pipeline that can be accelerated.
    """
    config, notes = requested.resolve(pipe)
    try:
        api.accelerate(pipe, config)
    except TypeError as error:
        raise CommandError(one_line(error)) from error
    return notes


def one_line(error: BaseException) -> str:
    """An error's message in one line, or the error's type."""
    return " ".join(str(error).split()) or type(error).__name__
