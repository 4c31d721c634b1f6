"""CFG parallelism: the branches of classifier-free guidance are shared among ranks.

Branches that a pipeline calls one after another go to the ranks in turn. A rank that does not own a call returns at
once with a `Later` in place of the result. When the pipeline first needs a value, all ranks broadcast the results they
own. A call that holds several branches, or several samples, as one batch is split along the batch. A pipeline that
calls a single branch gets its result from the owner.

With FSDP, ranks must run the blocks together. Calls are then counted in rounds. A round ends when a rank would compute
a second call, or when a value is needed. A rank without a call in the round computes the last call too, and drops the
result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...compat.torch_private import pytree
from ...core.comm import Group, shard_sizes
from ...core.later import Later
from ...core.lazy_tensor import materialized
from ...models.adapter import by_name, parameter_names
from ..context import Denoiser, PipelineContext
from .data_parallel import batch_size, is_tensor, latents_of, select_samples

# After this number of deferred operations on a branch, its value is resolved. The number is twice the most of any
# tested pipeline between two branches (LTX-2 with three branches: 22). So operations after the last step, such as the
# VAE's, do not wait for a branch that never comes.
_MAX_DEFERRED = 48


@dataclass(frozen=True)
class _TensorMeta:
    """Shape and dtype of a tensor in an output."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Call:
    """A call whose results are still on the ranks that computed them.

    Attributes:
        owners: (rank, samples) of the ranks that compute a part, in the order of the batch.
        mine: This rank's output tensors; `None` if it owns no part.
        form: The whole output, with a `_TensorMeta` in place of every tensor.
        found: The whole output's tensors, once they were broadcast.
    """

    owners: list[tuple[int, int]]
    mine: list[torch.Tensor] | None
    form: Any
    found: list[torch.Tensor] = field(default_factory=list)


class CFGParallel:
    """Shares the branches of one denoiser among the ranks of a group.

    Args:
        context: The pipeline.
        denoiser: The denoiser.
        group: The ranks along the axis `cfg`.
        balanced: Whether all ranks must compute equally many calls, as FSDP needs.
    """

    def __init__(self, context: PipelineContext, denoiser: Denoiser, group: Group, balanced: bool = False):
        self.context, self.denoiser, self.group, self.balanced = context, denoiser, group, balanced
        # Ranks that have computed a call of this round, and a function that computes its last call.
        self._round: set[int] = set()
        self._again: Callable[[], Any] | None = None
        self._names = parameter_names(denoiser.module)
        self._step: tuple[Any, ...] = ()
        self._turn = 0
        self._calls = 0
        # Calls of the previous step: the best estimate of the calls in this one.
        self._expected = 0
        self._open: list[_Call] = []
        self._forms: dict[Hashable, Any] = {}

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer around the denoiser's forward."""
        args, kwargs = materialized(args), materialized(kwargs)
        self._begin_step()
        arguments = by_name(self._names, args, kwargs)
        batch = batch_size(latents_of(self.denoiser, arguments)[0])
        size, first = self.group.size, self._turn
        counts = shard_sizes(batch, size) if batch > 1 else [1]
        owners = [((first + place) % size, count) for place, count in enumerate(counts) if count]
        self._turn += len(owners)
        self._calls += 1
        key = self._key(arguments, batch if batch > 1 else None)

        def compute(start: int, count: int) -> Any:
            if batch > 1:
                return inner(**select_samples(self.denoiser, arguments, batch, start, count))
            return inner(*args, **kwargs)

        mine = self._compute_part(key, owners, compute)
        form = self._form(key, mine, owners[0][0], batch if batch > 1 else None)
        tensors = None if mine is None else [item for item in pytree.tree_leaves(mine) if is_tensor(item)]
        call = _Call(owners, tensors, form)
        self._open.append(call)
        return self._later(call)

    def _begin_step(self) -> None:
        """Resets the counters at the first call of a step."""
        state = self.context.clock.current
        step = (state.request, state.step) if state is not None else ()
        if step != self._step or not step:
            self._expected = self._calls if step and self._step else 0
            self._step, self._turn, self._calls = step, 0, 0
            self._end_round()
            # Results that the pipeline never read are dropped, on every rank alike.
            self._open = []

    def _compute_part(self, key: Hashable, owners: list[tuple[int, int]], compute: Callable[[int, int], Any]) -> Any:
        """This rank's part of a call; `None` if it owns none."""
        parts, start = {}, 0
        for rank, count in owners:
            parts[rank] = (start, count)
            start += count
        part = parts.get(self.group.rank)
        if not self.balanced:
            return None if part is None else compute(*part)
        # For a form not seen before, ranks without a part wait for its owner, so they must take part in the forward.
        ranks = set(parts) if key in self._forms else set(range(self.group.size))
        if self._round & ranks:
            self._end_round()
        self._round |= ranks
        self._again = self._deferred_forward(lambda: compute(*parts[owners[0][0]]))
        if part is None and self.group.rank in ranks:
            self._again()
        return None if part is None else compute(*part)

    def _deferred_forward(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """A function that computes a call later, with the step state of now."""
        clock, state = self.context.clock, self.context.clock.current

        def again() -> Any:
            before, clock.current = clock.current, state
            try:
                return compute()
            finally:
                clock.current = before

        return again

    def _end_round(self) -> None:
        """Ends a round: computes the round's last call, if this rank has computed none."""
        again, ranks = self._again, self._round
        self._again, self._round = None, set()
        if again is not None and self.group.rank not in ranks:
            again()

    def _key(self, arguments: dict[str, Any], batch: int | None) -> Hashable:
        """Key of `_forms`. Calls on latents of one shape and dtype have one form, so all ranks agree whether the owner
        must send it."""
        latents = latents_of(self.denoiser, arguments)
        key = (batch, *((tuple(item.shape), item.dtype) for item in pytree.tree_leaves(latents) if is_tensor(item)))
        return (*key, bool(arguments.get("return_dict", True)))

    def _form(self, key: Hashable, mine: Any, owner: int, batch: int | None) -> Any:
        """The whole output's form, which its owner sends the first time."""
        if key not in self._forms:
            sent = pytree.tree_map(
                lambda item: _TensorMeta(tuple(item.shape), item.dtype) if is_tensor(item) else item, mine
            )
            sent = self.group.all_gather_object(sent)[owner]
            if batch is not None:
                sent = pytree.tree_map(
                    lambda item: (
                        _TensorMeta((batch, *item.shape[1:]), item.dtype) if isinstance(item, _TensorMeta) else item
                    ),
                    sent,
                )
            self._forms[key] = sent
        return self._forms[key]

    def _later(self, call: _Call) -> Any:
        """A call's output, whose tensors are resolved when they are needed."""
        # With an index, as a tensor's device has one.
        device = torch.empty(0, device=self.denoiser.device.type).device
        places, asked = itertools.count(), itertools.count()

        def waiting() -> bool:
            """Whether another branch of this step is expected."""
            return self._calls < self._expected and next(asked) < _MAX_DEFERRED

        def later(form: Any) -> Any:
            if not isinstance(form, _TensorMeta):
                return form
            index = next(places)
            like = torch.empty(form.shape, dtype=form.dtype, device="meta")
            return Later(like, device, lambda: self._resolve(call)[index], waiting)

        return pytree.tree_map(later, call.form)

    def _resolve(self, call: _Call) -> list[torch.Tensor]:
        """The tensors of a call's whole output. The tensors of all open calls are broadcast, in the calls' order."""
        if not call.found:
            self._end_round()
            pending = self._open if call in self._open else [call]
            self._open = []
            for each in pending:
                each.found = self._broadcast_parts(each)
                each.mine = None
        return call.found

    def _broadcast_parts(self, call: _Call) -> list[torch.Tensor]:
        """Broadcasts a call's parts from their owners, and joins them along the batch."""
        found = []
        whole = len(call.owners) == 1
        forms = [item for item in pytree.tree_leaves(call.form) if isinstance(item, _TensorMeta)]
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
