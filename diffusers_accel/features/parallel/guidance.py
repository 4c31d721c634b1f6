"""Branches of guidance and samples of a batch, shared among ranks.

Branches that a pipeline calls one after another go to the ranks in turn: a rank that is not to compute a call returns
at once, with a `Later` in place of the result, and all exchange what they have when the pipeline first needs a value. A
call that holds several samples, or several branches as one batch, is divided along the batch. Nothing is known of the
pipeline: one that calls a single branch gets its result all the same, from the rank that has it.

Where ranks share weights, they must go through the blocks together. Calls are then counted in rounds: a round ends when
a rank would compute a second call, or somebody needs a value, and whoever has computed none by then computes the last
one too, for nothing but company.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...core.comm import Group, shares
from ...core.later import Later, settled
from ...models.adapter import by_name, parameter_names
from ..context import Denoiser, PipelineContext

# Twice the operations that any pipeline of the tests does to a branch before it calls the next one (LTX-2 with three of
# them: 22). Those after the last step, a VAE's say, are not put off for a branch that does not come.
_PUT_OFF = 48


@dataclass(frozen=True)
class _Form:
    """A tensor's place in an output: its shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Call:
    """A call whose results are still where they were computed.

    Attributes:
        owners: Ranks that have a part, in the order of the batch, and how many samples each.
        mine: This rank's tensors, if it is one of them.
        form: The whole output, a `_Form` in place of every tensor.
        found: All tensors, once they were exchanged.
    """

    owners: list[tuple[int, int]]
    mine: list[torch.Tensor] | None
    form: Any
    found: list[torch.Tensor] = field(default_factory=list)


class Guidance:
    """One denoiser's branches, among the ranks of a group.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        group: The ranks.
        together: Whether all ranks must compute equally many calls, as those do that share weights.
    """

    def __init__(self, context: PipelineContext, denoiser: Denoiser, group: Group, together: bool = False):
        self.context, self.denoiser, self.group, self.together = context, denoiser, group, together
        # Ranks that have computed a call of this round, and how to compute its last one.
        self._round: set[int] = set()
        self._again: Callable[[], Any] | None = None
        self._names = parameter_names(denoiser.module)
        self._step: tuple[Any, ...] = ()
        self._turn = 0
        self._calls = 0
        # Calls of the step before, or of the last request's last: how many are to come, as far as one can know.
        self._expected = 0
        self._open: list[_Call] = []
        self._forms: dict[Hashable, Any] = {}

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward."""
        args, kwargs = settled(args), settled(kwargs)
        self._place()
        arguments = by_name(self._names, args, kwargs)
        batch = _batch(_latents(self.denoiser, arguments)[0])
        size, first = self.group.size, self._turn
        counts = shares(batch, size) if batch > 1 else [1]
        owners = [((first + place) % size, count) for place, count in enumerate(counts) if count]
        self._turn += len(owners)
        self._calls += 1
        key = self._key(arguments, batch if batch > 1 else None)

        def compute(start: int, count: int) -> Any:
            if batch > 1:
                return inner(**_samples(self.denoiser, arguments, batch, start, count))
            return inner(*args, **kwargs)

        mine = self._computed(key, owners, compute)
        form = self._form(key, mine, owners[0][0], batch if batch > 1 else None)
        tensors = None if mine is None else [item for item in pytree.tree_leaves(mine) if _tensor(item)]
        call = _Call(owners, tensors, form)
        self._open.append(call)
        return self._later(call)

    def _place(self) -> None:
        """Notices a new step."""
        state = self.context.clock.current
        step = (state.request, state.step) if state is not None else ()
        if step != self._step or not step:
            self._expected = self._calls if step and self._step else 0
            self._step, self._turn, self._calls = step, 0, 0
            self._level()
            # What nobody asked for is nobody's: every rank knows it alike.
            self._open = []

    def _computed(self, key: Hashable, owners: list[tuple[int, int]], compute: Callable[[int, int], Any]) -> Any:
        """This rank's part of a call, or `None` if it has none."""
        parts, start = {}, 0
        for rank, count in owners:
            parts[rank] = (start, count)
            start += count
        part = parts.get(self.group.rank)
        if not self.together:
            return None if part is None else compute(*part)
        # Ranks that have no part wait to be told the form of a result that nobody has seen.
        ranks = set(parts) if key in self._forms else set(range(self.group.size))
        if self._round & ranks:
            self._level()
        self._round |= ranks
        self._again = self._later_as_now(lambda: compute(*parts[owners[0][0]]))
        if part is None and self.group.rank in ranks:
            self._again()
        return None if part is None else compute(*part)

    def _later_as_now(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """What computes a call in its own place among all, whenever it is called."""
        clock, state = self.context.clock, self.context.clock.current

        def again() -> Any:
            before, clock.current = clock.current, state
            try:
                return compute()
            finally:
                clock.current = before

        return again

    def _level(self) -> None:
        """Ends a round: what another rank has computed is computed here too, if nothing else was."""
        again, ranks = self._again, self._round
        self._again, self._round = None, set()
        if again is not None and self.group.rank not in ranks:
            again()

    def _key(self, arguments: dict[str, Any], batch: int | None) -> Hashable:
        """What tells forms of outputs apart. Calls on latents of one shape and type give one form, so ranks agree on
        whether anybody must be asked."""
        latents = _latents(self.denoiser, arguments)
        key = (batch, *((tuple(item.shape), item.dtype) for item in pytree.tree_leaves(latents) if _tensor(item)))
        return (*key, bool(arguments.get("return_dict", True)))

    def _form(self, key: Hashable, mine: Any, owner: int, batch: int | None) -> Any:
        """What the whole output is made of."""
        if key not in self._forms:
            told = pytree.tree_map(lambda item: _Form(tuple(item.shape), item.dtype) if _tensor(item) else item, mine)
            told = self.group.objects(told)[owner]
            if batch is not None:
                told = pytree.tree_map(
                    lambda item: _Form((batch, *item.shape[1:]), item.dtype) if isinstance(item, _Form) else item, told
                )
            self._forms[key] = told
        return self._forms[key]

    def _later(self, call: _Call) -> Any:
        """A call's output, whose tensors are found when they are needed."""
        # As a tensor names its device.
        device = torch.empty(0, device=self.denoiser.device.type).device
        places, asked = itertools.count(), itertools.count()

        def waiting() -> bool:
            """Whether another branch of this step is to come, as far as one can know."""
            return self._calls < self._expected and next(asked) < _PUT_OFF

        def later(form: Any) -> Any:
            if not isinstance(form, _Form):
                return form
            index = next(places)
            like = torch.empty(form.shape, dtype=form.dtype, device="meta")
            return Later(like, device, lambda: self._resolve(call)[index], waiting)

        return pytree.tree_map(later, call.form)

    def _resolve(self, call: _Call) -> list[torch.Tensor]:
        """Has every rank tell what it has of all calls that are open, in their order."""
        if not call.found:
            self._level()
            pending = self._open if call in self._open else [call]
            self._open = []
            for each in pending:
                each.found = self._exchanged(each)
                each.mine = None
        return call.found

    def _exchanged(self, call: _Call) -> list[torch.Tensor]:
        found = []
        whole = len(call.owners) == 1
        forms = [item for item in pytree.tree_leaves(call.form) if isinstance(item, _Form)]
        for index, form in enumerate(forms):
            pieces = []
            for rank, count in call.owners:
                if rank == self.group.rank:
                    assert call.mine is not None
                    piece = call.mine[index].contiguous()
                else:
                    device = self.denoiser.device.type
                    shape = form.shape if whole else (count, *form.shape[1:])
                    piece = torch.empty(shape, dtype=form.dtype, device=device)
                pieces.append(self.group.broadcast(piece, rank))
            found.append(pieces[0] if whole else torch.cat(pieces))
        return found


class Samples:
    """A batch's samples, among the ranks of a group: each computes some, and all get all.

    Args:
        denoiser: The denoiser.
        group: The ranks.
    """

    def __init__(self, denoiser: Denoiser, group: Group):
        self.denoiser, self.group = denoiser, group
        self._names = parameter_names(denoiser.module)

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward. What cannot be divided evenly enough is computed by all."""
        arguments = by_name(self._names, args, kwargs)
        batch = _batch(_latents(self.denoiser, arguments)[0])
        if batch < self.group.size:
            return inner(*args, **kwargs)
        counts = shares(batch, self.group.size)
        start = sum(counts[: self.group.rank])
        out = inner(**_samples(self.denoiser, arguments, batch, start, counts[self.group.rank]))
        return pytree.tree_map(
            lambda item: torch.cat(self.group.gather(item, 0, counts)) if _tensor(item) else item, out
        )


def _samples(denoiser: Denoiser, arguments: dict[str, Any], batch: int, start: int, count: int) -> dict[str, Any]:
    """Arguments for some samples of a batch."""
    whole = denoiser.adapter.unbatched
    return {name: value if name in whole else _rows(value, batch, start, count) for name, value in arguments.items()}


def _rows(value: Any, batch: int, start: int, count: int) -> Any:
    """Some samples of everything that has one for each of a batch: tensors by their first dimension, and lists of what
    is no number (shapes of pictures, say)."""
    if isinstance(value, torch.Tensor):
        return value[start : start + count] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _rows(item, batch, start, count) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == batch and all(isinstance(item, (list, tuple)) for item in value):
            return value[start : start + count]
        return type(value)(_rows(item, batch, start, count) for item in value)
    return value


def _latents(denoiser: Denoiser, arguments: dict[str, Any]) -> list[Any]:
    """The arguments that its outputs answer to; of a class that nobody described, the first."""
    known = [arguments[name] for name in denoiser.adapter.denoised if arguments.get(name) is not None]
    return known or [next(iter(arguments.values()))]


def _batch(latents: Any) -> int:
    """Samples in one call; of packed sequences, which are one, 1."""
    return int(latents.shape[0]) if isinstance(latents, torch.Tensor) else 1


def _tensor(item: Any) -> bool:
    return isinstance(item, torch.Tensor)
