"""Idle ranks of the VAE: ranks that do not decode receive the result from the others, or get zeros in its place.

Owns one layer around `decode` and one around `encode`. If the ranks that compute raise, all ranks raise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ....core.comm import Group
from ....core.edits import AddLayer, Edit


def edits(vae: Any, world: Group, computing: int, zeros: bool, rank: int) -> Iterator[Edit]:
    """Makes the first ranks alone decode and encode. All ranks must call the VAE together, with the same tensors.

    Args:
        vae: The stock VAE.
        world: All ranks.
        computing: The number of ranks that compute; several share the work.
        zeros: Whether idle ranks get zeros instead of decoded pictures. Encoded latents they receive in any case, since
            denoisers need them.
        rank: Place of the layers among others around the same methods.
    """
    if world.size > computing:
        idle = _IdleRanks(world, computing)
        yield AddLayer(vae, rank, lambda inner, *args, **kwargs: idle.call(inner, args, kwargs, zeros), "decode")
        yield AddLayer(vae, rank, lambda inner, *args, **kwargs: idle.call(inner, args, kwargs, False), "encode")


@dataclass(frozen=True)
class _OutputMeta:
    """The form of a VAE's output, by which idle ranks make their own.

    Attributes:
        result: The output's class; `tuple` without `return_dict`.
        distribution: The class of the distribution in it; `None` if it holds a tensor.
        shape: Shape of the tensor, or of the distribution's parameters.
        dtype: Dtype of the tensor, or of the distribution's parameters.
    """

    result: type
    distribution: type | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def output(self, x: torch.Tensor) -> Any:
        """The VAE's output with a tensor, or with a distribution that has it as parameters."""
        found = x if self.distribution is None else self.distribution(x)
        if self.result is tuple:
            return (found,)
        # Output classes name their only field differently: `sample`, `latent_dist`, `latent`, `latents`.
        return self.result(**{dataclasses.fields(self.result)[0].name: found})


class _IdleRanks:
    """Calls of one VAE, of which some ranks compute the results.

    Args:
        world: All ranks.
        computing: The number of ranks that compute.
    """

    def __init__(self, world: Group, computing: int):
        self.world, self._computes = world, world.rank < computing

    def call(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], zeros: bool) -> Any:
        """A call's result: computed here, received, or zeros.

        Args:
            inner: The method below.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            zeros: Whether idle ranks get zeros.

        Raises:
            RuntimeError: A rank that computes has raised; the message has its error.
        """
        result, meta, x = None, None, None
        if self._computes:
            try:
                result = inner(*args, **kwargs)
            except BaseException as error:
                # Idle ranks must not wait for ever, also after Ctrl-C. An error of the send would hide this one.
                with suppress(Exception):
                    self.world.all_gather_object(f"{type(error).__name__}: {error}")
                raise
            found = result[0]
            distribution = None if isinstance(found, torch.Tensor) else type(found)
            x = found if distribution is None else found.parameters
            meta = _OutputMeta(type(result), distribution, tuple(x.shape), x.dtype)
        gathered = self.world.all_gather_object(meta)
        failed = [f"rank {rank}: {each}" for rank, each in enumerate(gathered) if isinstance(each, str)]
        if failed:
            raise RuntimeError(f"parallel.vae_idle_ranks: the picture was not computed. {'; '.join(failed)}")
        meta = gathered[0]
        if x is None:
            given = next(item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor))
            x = torch.zeros(meta.shape, dtype=meta.dtype, device=given.device)
        if not zeros:
            # Ranks that have computed it receive it too: a broadcast is of all ranks.
            x = self.world.broadcast(x.contiguous(), 0)
        return meta.output(x) if result is None else result
