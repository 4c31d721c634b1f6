"""Ranks that do not decode: they receive the picture from those that do, or get zeros in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ....core.comm import Group
from ....core.edits import AddLayer, Edit


def edits(vae: Any, everyone: Group, computing: int, idle: bool, rank: int) -> Iterator[Edit]:
    """Has the first ranks alone decode and encode. All ranks must call the VAE together, with the same tensors.

    Args:
        vae: The stock VAE.
        everyone: All ranks.
        computing: How many compute: together, if they are several.
        idle: Whether the others get zeros instead of decoded pictures. What is encoded they receive: denoisers need it.
        rank: Place of the layers among others around the same methods.
    """
    if everyone.size > computing:
        others = _Others(everyone, computing)
        yield AddLayer(vae, rank, lambda inner, *args, **kwargs: others.shared(inner, args, kwargs, idle), "decode")
        yield AddLayer(vae, rank, lambda inner, *args, **kwargs: others.shared(inner, args, kwargs, False), "encode")


@dataclass(frozen=True)
class _Form:
    """Of what a VAE has returned, for those who did not see it.

    Attributes:
        result: Its class; `tuple` without `return_dict`.
        distribution: The class of what is in it, if that is no tensor.
        shape: Of the tensor in that.
        dtype: Likewise.
    """

    result: type
    distribution: type | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def filled(self, x: torch.Tensor) -> Any:
        """What the VAE would have returned."""
        found = x if self.distribution is None else self.distribution(x)
        if self.result is tuple:
            return (found,)
        # Outputs name what they hold differently: `sample`, `latent_dist`, `latent`, `latents`.
        return self.result(**{dataclasses.fields(self.result)[0].name: found})


class _Others:
    """What all ranks do when one VAE is called."""

    def __init__(self, everyone: Group, computing: int):
        self.everyone, self._computes = everyone, everyone.rank < computing

    def shared(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], idle: bool) -> Any:
        """A call's result: computed here, received, or zeros.

        Raises:
            RuntimeError: Those who compute could not; it says what they raised.
        """
        result, form, x = None, None, None
        if self._computes:
            try:
                result = inner(*args, **kwargs)
            except BaseException as error:
                # Those who wait hear of it, of Ctrl-C too. What goes wrong in telling them is not what is wrong.
                with suppress(Exception):
                    self.everyone.objects(f"{type(error).__name__}: {error}")
                raise
            found = result[0]
            distribution = None if isinstance(found, torch.Tensor) else type(found)
            x = found if distribution is None else found.parameters
            form = _Form(type(result), distribution, tuple(x.shape), x.dtype)
        said = self.everyone.objects(form)
        failed = [f"rank {rank}: {each}" for rank, each in enumerate(said) if isinstance(each, str)]
        if failed:
            raise RuntimeError(f"parallel.vae_others: the picture was not computed. {'; '.join(failed)}")
        form = said[0]
        if x is None:
            given = next(item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor))
            x = torch.zeros(form.shape, dtype=form.dtype, device=given.device)
        if not idle:
            # Those that have computed it are sent what they have.
            x = self.everyone.broadcast(x.contiguous(), 0)
        return form.filled(x) if result is None else result
