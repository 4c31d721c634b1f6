"""The section `parallel`: how several ranks share the work."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks share what. The product of all numbers is the number of processes that a launcher has started.

    Args:
        cfg: Ranks that share the branches of guidance.
        tp: Ranks that share the blocks' weights, each with some attention heads and some features of the feed-forward.
        ulysses: Ranks that share a sequence, each with all tokens of some attention heads.
        ring: Ranks that share a sequence, keys and values passed on from rank to rank.
        attn2d: (rows, columns) of ranks that share a sequence, queries gathered along rows, keys and values along
            columns. Instead of `ring`.
        dp: Ranks that share the samples of a batch.
        vae: Ranks that share the VAE's decoding and encoding, a strip of the picture each; all ranks or a divisor. No
            factor of the product: the same ranks do it that share the denoiser's work.
        vae_dim: What the VAE's picture is divided along, `"height"` or `"width"`.

    Raises:
        ConfigError: A number is below 1, or both `ring` and `attn2d` are asked for.
    """

    cfg: int = 1
    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    attn2d: tuple[int, ...] = (1, 1)
    dp: int = 1
    vae: int = 1
    vae_dim: str = "height"

    _shorthand: typing.ClassVar[str | None] = None

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
        """How many ranks there are."""
        return math.prod(self.sizes.values())

    @property
    def product(self) -> str:
        """The number of ranks, spelled out."""
        named = {"cfg": self.cfg, "tp": self.tp, "ulysses": self.ulysses, "ring": self.ring, "dp": self.dp}
        parts = [f"{name} {size}" for name, size in named.items() if size > 1]
        if math.prod(self.attn2d) > 1:
            parts.append(f"attn2d {self.attn2d[0]} x {self.attn2d[1]}")
        return f"{' x '.join(parts) or 'everything 1'} = {self.ranks}"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        if len(self.attn2d) != 2:
            raise ConfigError(f"parallel.attn2d: rows and columns, [2, 2] say, got {list(self.attn2d)!r}.")
        for name in ("cfg", "tp", "ulysses", "ring", "dp", "vae"):
            size = getattr(self, name)
            if size < 1:
                raise ConfigError(f"parallel.{name}: 1 or more, got {size!r}.")
        if self.vae_dim not in ("height", "width"):
            raise ConfigError(f"parallel.vae_dim: 'height' or 'width', got {self.vae_dim!r}.")
        if min(self.attn2d) < 1:
            raise ConfigError(f"parallel.attn2d: 1 or more of each, got {list(self.attn2d)!r}.")
        if self.ring > 1 and math.prod(self.attn2d) > 1:
            raise ConfigError(
                f"parallel: ring={self.ring} and attn2d={list(self.attn2d)} both divide keys; take one of them, with "
                "ulysses outside it if you like."
            )
