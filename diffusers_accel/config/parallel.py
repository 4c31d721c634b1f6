"""The section `parallel`: how several ranks share the work."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .fields import Section, option

EXCHANGES = ("auto", "windows", "messages")
OTHERS = ("compute", "receive", "idle")
PAYLOADS = ("auto", "fp8")
DIMS = ("height", "width")


def _ranks(means: str) -> Any:
    return option(1, means, minimum=1)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How many ranks share what. The product of all numbers is the number of processes that a launcher has started.

    Raises:
        ConfigError: A number is below 1, a word is unknown, or both `ring` and `attn2d` are asked for.
    """

    cfg: int = _ranks("Ranks that share the branches of guidance.")
    tp: int = _ranks(
        """Ranks that share the blocks' weights, each with some attention heads and some features of the
        feed-forward."""
    )
    ulysses: int = _ranks("Ranks that share a sequence, each with all tokens of some attention heads.")
    async_ulysses: bool = option(
        True,
        """Whether, in compiled blocks, shards are exchanged while what does not depend on them is computed, where they
        go through windows.""",
    )
    ring: int = _ranks("Ranks that share a sequence, keys and values passed on from rank to rank.")
    attn2d: tuple[int, int] = option(
        (1, 1),
        """(rows, columns) of ranks that share a sequence, queries gathered along rows, keys and values along columns.
        Instead of `ring`.""",
        minimum=1,
        expected="rows and columns, [2, 2] say, each 1 or more",
    )
    dp: int = _ranks("Ranks that share the samples of a batch.")
    vae: int = _ranks(
        """Ranks that share the VAE's decoding and encoding, a strip of the picture each; all ranks or a divisor. No
        factor of the product: the same ranks do it that share the denoiser's work."""
    )
    vae_dim: str = option(
        "height", """The dimension that the VAE's picture is divided along, `"height"` or `"width"`.""", choices=DIMS
    )
    vae_others: str = option(
        "compute",
        """What ranks behind the first `vae` do when a picture is decoded or encoded: `"compute"` it too, as many
        together; `"receive"` it from the first; or be `"idle"` and get zeros instead of a decoded picture, where one
        rank alone saves it.""",
        choices=OTHERS,
    )
    exchange: str = option(
        "auto",
        """The way that what ranks share takes, a sequence, sums of `tp=2`, a VAE's rows: by `"messages"`; through
        `"windows"`, memory that GPUs of one machine write to directly; or `"auto"`, through windows where there are
        any.""",
        choices=EXCHANGES,
    )
    payload: str = option(
        "auto",
        """How Ulysses' shards travel: in the activations' own type (`"auto"`), or in `"fp8"`, e4m3 with a scale for
        each token and head, for links that are slower than rounding.""",
        choices=PAYLOADS,
    )
    fsdp: bool = option(
        False,
        """Whether all ranks share the weights of the denoisers' and text encoders' blocks: each holds a part, and a
        block's weights are put together while it runs. No factor of the product either; where the product is 1, any
        number of processes will do, and each computes the whole request.""",
    )

    section: typing.ClassVar[str] = "parallel"

    @property
    def sequence(self) -> int:
        """Ranks that have one sequence among them."""
        return self.ulysses * self.ring * math.prod(self.attn2d)

    @property
    def partial(self) -> bool:
        """Whether partial results of attention are merged."""
        return self.ring * math.prod(self.attn2d) > 1

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks along each axis of the mesh that has more than one."""
        rows, columns = self.attn2d
        found = {"dp": self.dp, "cfg": self.cfg, "tp": self.tp, "ring": self.ring, "row": rows, "column": columns}
        return {axis: size for axis, size in {**found, "ulysses": self.ulysses}.items() if size > 1}

    @property
    def ranks(self) -> int:
        """How many ranks there are; 1 may be any number where they share weights alone."""
        return math.prod(self.sizes.values())

    def axes(self, world: int) -> dict[str, int]:
        """`sizes` for so many processes: where they share weights alone, all stand along one axis."""
        return {"dp": world} if self.fsdp and self.ranks == 1 else self.sizes

    @property
    def product(self) -> str:
        """The number of ranks, spelled out."""
        named = {"cfg": self.cfg, "tp": self.tp, "ulysses": self.ulysses, "ring": self.ring, "dp": self.dp}
        parts = [f"{name} {size}" for name, size in named.items() if size > 1]
        if math.prod(self.attn2d) > 1:
            parts.append(f"attn2d {self.attn2d[0]} x {self.attn2d[1]}")
        return f"{' x '.join(parts) or 'everything 1'} = {self.ranks}"

    def validate(self) -> None:
        """Refuses two ways of dividing keys."""
        if self.ring > 1 and math.prod(self.attn2d) > 1:
            raise ConfigError(
                f"parallel.attn2d: ring={self.ring} and attn2d={list(self.attn2d)} both divide keys; take one of them, "
                "with ulysses outside it if you like."
            )
