"""The section `offload`: a budget of GPU memory, or a level, and the means to keep it."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, shown
from .fields import Section, option

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = rf"[0-9]+(\.[0-9]+)? ?({'|'.join(_UNITS)})"
_MOST = 2**50
_EXAMPLES = ("12GiB", "900MB", 8 * 2**30)
AUTO = "auto"


def bytes_of(size: int | str) -> int:
    """The bytes of a size: a number of bytes, or text such as `"12GiB"` that fits the pattern of this section."""
    if isinstance(size, int):
        return size
    number, unit = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)", size).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit])


def _size(default: Any, meaning: str, *, smallest: int = 1, **spec: Any) -> Any:
    return option(default, meaning, minimum=smallest, maximum=_MOST, pattern=_SIZE, examples=_EXAMPLES, **spec)


@dataclass(frozen=True, kw_only=True)
class OffloadConfig(Section):
    """Weights in host memory: a pipeline that is larger than the GPU's memory, or than the part of it that it may use.

    A number up to 3 stands for a level, a larger one for a budget in bytes, text (`"12GiB"`, `"auto"`) for a budget.
    `True` stands for `"auto"`. VisualGen's `cpu_offload_config` (`enable`, `pin_memory`, `stages`) is read too.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    vram: int | str | None = _size(
        None,
        """The most that the pipeline may use of the GPU's memory: bytes, text such as `"12GiB"`, or `"auto"` for what
        is free. `None` sets no limit, and `level` decides alone.""",
        extra_choices=(AUTO,),
        expected="""a number of bytes, text such as '12GiB' (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB), 'auto', or None""",
    )
    ram: int | str | None = _size(
        None,
        """The most page-locked host memory that weights may take: bytes, or text such as `"24GiB"`. `None` takes what
        the machine can spare.""",
        expected="""a number of bytes, text such as '24GiB' (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB), or None""",
    )
    level: int | None = option(
        None,
        """0: everything on the GPU. 1: the VAE in tiles or slices. 2: text encoders in host memory too. 3: denoisers
        too. `None` takes the lowest level that keeps the budget.""",
        minimum=0,
        maximum=3,
    )
    stages: tuple[str, ...] | None = option(
        None,
        """Names of the pipeline's models that may be offloaded, e.g. `("transformer", "text_encoder_2")`. `None` takes
        all.""",
        min_items=1,
        condition=lambda names: len(set(names)) == len(names),
        expected="a list of names of the pipeline's models (not an empty one), each once, or None",
    )
    pin_memory: bool = option(
        True,
        """Whether weights are kept in page-locked memory, from which copies run beside the host and several times as
        fast.""",
    )
    prefetch: int | None = option(
        None,
        """Number of blocks that are copied ahead of the running one. Each takes the memory of a block. `None` takes the
        number with the shortest predicted step.""",
        minimum=1,
        maximum=15,
    )
    prompt_cache: int | str = _size(
        "256MiB",
        """Host memory for embeddings of prompts that were seen before: bytes, or text such as `"1GiB"`. A prompt that
        is there needs no text encoder. 0 keeps none.""",
        smallest=0,
        expected="""a number of bytes from 0, or text such as '256MiB' (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB)""",
    )

    section: typing.ClassVar[str] = "offload"
    shorthand: typing.ClassVar[str | None] = "vram"
    switch: typing.ClassVar[bool] = True
    number: typing.ClassVar[str | None] = "level, or bytes"

    @classmethod
    def from_number(cls, value: int) -> OffloadConfig:
        """The section of a number: a level, or a budget in bytes."""
        if value < 0:
            raise ConfigError(f"offload: expected a level from 0 to 3, or a number of bytes, got {value}. Nearest: 0.")
        return cls(level=value) if value <= 3 else cls(vram=value)

    @classmethod
    def normalize_mapping(cls, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The fields of this class from a mapping; VisualGen's `cpu_offload_config` is translated.

        Returns:
            `None` where `enable` is false, which turns the section off.

        Raises:
            ConfigError: `enable` is neither true nor false.
        """
        if "enable" not in values:
            return values
        enable = values["enable"]
        if not isinstance(enable, bool):
            raise ConfigError(f"offload.enable: expected true or false, got {shown(enable)}.")
        found = {key: value for key, value in values.items() if key != "enable"}
        if not found.get("stages"):
            found.pop("stages", None)
        return {"level": 3, **found} if enable else None

    def validate(self) -> None:
        """Completes a section without a budget and a level."""
        if self.vram is None and self.level is None:
            object.__setattr__(self, "vram", AUTO)

    @property
    def budget(self) -> int | None:
        """The budget in bytes; `None` for none, or for one that depends on the GPU."""
        return None if self.vram in (None, AUTO) else bytes_of(self.vram)  # type: ignore[arg-type]
