"""VAE parallelism: a VAE's decoder and encoder are sharded among ranks, each with a strip of the picture's rows or
columns.

All ranks begin with the same whole latents (or pictures), compute a strip each, and end with the same whole result. The
result equals a single rank's, borders included, because layers that read beyond a strip get the values there:

- A convolution gets its halo, the neighbours' nearest rows, by one exchange with both neighbours; it pads at the
  picture's own borders only. A convolution that caches frames between chunks caches the strip's frames. One exchange
  brings the halos of cached and new frames.
- A group norm merges the strips' means and variances to the whole picture's, as in Chan, Golub and LeVeque (1979), with
  the precision of a single pass.
- Attention over the picture gathers keys and values; each rank keeps its own queries.

All other layers of these VAEs act on one pixel, on one place over time, or on patches within one strip. `kinds.py`
lists them; a VAE with unknown layers is refused. `idle_ranks.py` is for ranks that do not take part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ....compat.torch_private import CONV_FORWARD
from ....core.comm import Group, shard_sizes
from ....core.edits import AddLayer, Edit
from ....errors import Unsupported
from . import kinds, layers
from .kinds import kind
from .strips import Strips

FEATURE = "parallel.vae"
# Dimensions of (batch, channels, height, width) and of (batch, channels, frames, height, width).
AXES = {"height": -2, "width": -1}


def refuse(vae: Any, dim: str = "height") -> str | None:
    """The reason why a VAE cannot be sharded along `"height"` or `"width"`; `None` if it can. Changes nothing."""
    if kind(vae) not in kinds.VAES:
        return f"only {', '.join(kinds.VAES)} can be sharded into strips."
    if getattr(vae, "use_tiling", False):
        return "tiling is on, and tiles are not sharded among ranks."
    return kinds.unshardable(vae, AXES[dim])


def edits(vae: Any, group: Group, dim: str, rank: int) -> Iterator[Edit]:
    """Shards a VAE's `decode` and `encode`; does nothing in a group of one.

    From then on all ranks of the group must call both methods together, with the same tensors. A call raises
    `Unsupported` on every rank, before any computation: if the ranks need more rows (or columns), if a picture's rows
    are no whole rows of latents, or if tiling was switched on.

    Args:
        vae: The stock VAE.
        group: The ranks, in the order of their strips.
        dim: `"height"` or `"width"`.
        rank: Place of the layers among others around the same methods.

    Raises:
        Unsupported: `refuse` has a reason.
    """
    _refuse(vae, refuse(vae, dim))
    if group.size == 1:
        return
    strips = Strips(group, AXES[dim])
    halos = kinds.halos(vae, strips.axis)
    for module in vae.modules():
        if module in halos:
            function = partial(layers.convolution, strips, module, halos[module])
            yield AddLayer(module, rank, function, CONV_FORWARD)
        elif kind(module) in kinds.NORMS:
            yield AddLayer(module, rank, partial(layers.group_norm, strips, module))
        elif kind(module) in kinds.ATTENTIONS and kind(getattr(module, "processor", None)) not in kinds.TEMPORAL:
            yield AddLayer(module, rank, partial(layers.attention, strips))
    # A strip must be as long as its neighbours' halos where the picture is smallest, which is at the latents' size.
    least = max((max(halo.before, halo.after) for halo in halos.values()), default=1)
    methods = _DecodeEncode(vae, strips, dim, least)
    yield AddLayer(vae, rank, methods.decode, "decode")
    yield AddLayer(vae, rank, methods.encode, "encode")


class _DecodeEncode:
    """The layers around a VAE's `decode` and `encode`."""

    def __init__(self, vae: Any, strips: Strips, dim: str, least: int):
        self.vae, self.strips, self.dim, self.least = vae, strips, dim, least
        self.stride = kinds.stride(vae, strips.axis)

    def decode(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Decodes a strip of the latents and gathers the samples."""
        z, args = (args[0], args[1:]) if args else (kwargs.pop("z"), ())
        with self.strips.sharding(z, self._counts(z, "latent ", 1)) as strip:
            result = inner(strip, *args, **kwargs)
            if isinstance(result, tuple):
                return (self._whole(result[0]), *result[1:])
            return dataclasses.replace(result, sample=self._whole(result.sample))

    def encode(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Encodes a strip of the pictures and gathers the parameters of their distribution."""
        x, args = (args[0], args[1:]) if args else (kwargs.pop("x"), ())
        with self.strips.sharding(x, self._counts(x, "", self.stride)) as strip:
            result = inner(strip, *args, **kwargs)
            plain = isinstance(result, tuple)
            found = result[0] if plain else result.latent_dist
            whole = type(found)(self._whole(found.parameters))
            return (whole, *result[1:]) if plain else dataclasses.replace(result, latent_dist=whole)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        return self.strips.whole(x, self.strips.axis)

    def _counts(self, x: torch.Tensor, what: str, unit: int) -> list[int]:
        """Number of rows of each rank's strip, in whole units.

        Args:
            x: The latents or pictures.
            what: A word before the dimension's name in messages.
            unit: Rows that make one row of latents.
        """
        if getattr(self.vae, "use_tiling", False):
            _refuse(self.vae, refuse(self.vae, self.dim))
        length, ranks = x.shape[self.strips.axis], self.strips.group.size
        counts = [unit * share for share in shard_sizes(length // unit, ranks)]
        reason = None
        if length % unit:
            reason = f"a {what}{self.dim} of {length} is no multiple of {unit}, which make one of the latents."
        elif min(counts) < self.least * unit:
            reason = (
                f"a {what}{self.dim} of {length} is too little for {ranks} ranks with {self.least * unit} or more each."
            )
        if reason is not None:
            other = next(name for name in AXES if name != self.dim)
            raise Unsupported(FEATURE, reason, f"another size, {other} sharded, or fewer ranks.", kind(self.vae))
        return counts


def _refuse(vae: Any, reason: str | None) -> None:
    if reason is not None:
        tiled = getattr(vae, "use_tiling", False)
        raise Unsupported(FEATURE, reason, "vae.disable_tiling()." if tiled else f"no {FEATURE}.", kind(vae))
