"""The section `parallel`: the axes along which several ranks share one request."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .fields import Section, option

COMMS = ("auto", "symm_mem", "collectives")
IDLE_RANKS = ("compute", "receive", "idle")
COMM_DTYPES = ("auto", "fp8")
DIMS = ("height", "width")


def _ranks(means: str) -> Any:
    return option(1, means, minimum=1)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """The number of ranks along each axis. The product is the number of processes that a launcher has started.

    Raises:
        ConfigError: A number is below 1, a value is unknown, or both `ring` and `attn2d` are given.
    """

    cfg: int = _ranks("Ranks that share the branches of guidance.")
    tp: int = _ranks(
        """Ranks that share the blocks' weights, each with some attention heads and some features of the
        feed-forward."""
    )
    ulysses: int = _ranks("Ranks that share a sequence, each with all tokens of some attention heads.")
    async_ulysses: bool = option(
        True,
        """Whether compiled blocks overlap Ulysses' all-to-all with computation, if it goes over symmetric memory.""",
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
        """Ranks that share the VAE's decoding and encoding, a strip of the picture each: all ranks, or a divisor of
        their number. It is no factor of the product: the denoiser's ranks do it."""
    )
    vae_dim: str = option(
        "height", """The dimension along which the VAE's picture is sharded, `"height"` or `"width"`.""", choices=DIMS
    )
    vae_idle_ranks: str = option(
        "compute",
        """The part of the ranks after the first `vae` ones in decoding and encoding. `"compute"`: each `vae` of them
        do the same work. `"receive"`: they receive the result. `"idle"`: they get zeros instead of decoded pictures,
        for scripts in which rank 0 alone saves them.""",
        choices=IDLE_RANKS,
    )
    comm: str = option(
        "auto",
        """Communication of shards of a sequence, sums of `tp=2` and a VAE's rows. `"collectives"`: the process
        group's, of NCCL on GPUs and of Gloo on CPUs. `"symm_mem"`: symmetric memory, to which GPUs of one machine write
        directly. `"auto"`: symmetric memory where it can be allocated, otherwise collectives.""",
        choices=COMMS,
    )
    comm_dtype: str = option(
        "auto",
        """The dtype in which Ulysses communicates: that of the activations (`"auto"`), or `"fp8"`, e4m3 with a scale
        for each token and head, for links that are slower than quantization.""",
        choices=COMM_DTYPES,
    )
    fsdp: bool = option(
        False,
        """Whether the weights of the denoisers' and text encoders' blocks are sharded among all ranks, and a block's
        weights are gathered while it runs. It is no factor of the product; where the product is 1, any number of
        processes will do, and each computes the whole request.""",
    )

    section: typing.ClassVar[str] = "parallel"

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses * self.ring * math.prod(self.attn2d)

    @property
    def partial(self) -> bool:
        """Whether keys are sharded, so that partial outputs of attention are merged."""
        return self.ring * math.prod(self.attn2d) > 1

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks along each axis of the mesh that has more than one."""
        rows, columns = self.attn2d
        found = {"dp": self.dp, "cfg": self.cfg, "tp": self.tp, "ring": self.ring, "row": rows, "column": columns}
        return {axis: size for axis, size in {**found, "ulysses": self.ulysses}.items() if size > 1}

    @property
    def ranks(self) -> int:
        """The product of all axes: the number of ranks, unless `any_world_size`."""
        return math.prod(self.sizes.values())

    @property
    def any_world_size(self) -> bool:
        """Whether any number of ranks will do: they share weights and nothing else."""
        return self.fsdp and self.ranks == 1

    def axes(self, world: int) -> dict[str, int]:
        """`sizes` for a number of processes; ranks that share weights alone are along one axis."""
        return {"dp": world} if self.any_world_size else self.sizes

    @property
    def product(self) -> str:
        """The product of all axes in words, for messages."""
        named = {"cfg": self.cfg, "tp": self.tp, "ulysses": self.ulysses, "ring": self.ring, "dp": self.dp}
        parts = [f"{name} {size}" for name, size in named.items() if size > 1]
        if math.prod(self.attn2d) > 1:
            parts.append(f"attn2d {self.attn2d[0]} x {self.attn2d[1]}")
        return f"{' x '.join(parts) or 'everything 1'} = {self.ranks}"

    def validate(self) -> None:
        """Refuses two axes that both shard keys."""
        if self.ring > 1 and math.prod(self.attn2d) > 1:
            raise ConfigError(
                f"parallel.attn2d: ring={self.ring} and attn2d={list(self.attn2d)} both shard keys; take one of them, "
                "with ulysses beside it if you like."
            )
