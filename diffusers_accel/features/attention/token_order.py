"""The tokens of pictures and frames in a denoiser's running call: their place among all tokens, and their order.

Sparse attention chooses blocks of neighbouring tokens. Another order than the model's makes neighbours of tokens that
are near each other in space and time. It is made once a call, where tokens and their rotary tables enter the blocks,
and taken back where they leave: the computation of each token stays the same. Under sequence sharding the layers are
outside those that shard, so that shards are parts of the ordered sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...core.step import Mode, StepState
from ...errors import Unsupported
from ...kernels.attention import Carried, KeptBlocks, Span, token_grid
from ...models.adapter import by_name
from ...models.sequence import AttentionStreams, TokenDim
from ..context import Denoiser, PipelineContext
from ..token_streams import TokenStreams


class TokenOrder(TokenStreams):
    """Orders the tokens of pictures and frames of one denoiser, and knows their place.

    Args:
        denoiser: The denoiser.
        context: The pipeline, whose clock tells requests apart.
        order: The order, one of `token_grid.ORDERS`.
        block: Tokens of a block.
        dense: Returns whether all attention of the running call is dense.
        kept: Is told of each sparse call of the denoiser; `None` for no one.
        carried: Is told which calls choose blocks anew; `None` if all do.
        refresh: Number of steps that share a choice.
        drift: Relative L1 change of the latents since a choice from which on a step chooses anew; `None` for no bound.
    """

    feature = "attention.sparse"
    instead = "attention.sparse=None for such calls."

    def __init__(
        self,
        denoiser: Denoiser,
        context: PipelineContext,
        order: str,
        block: int,
        dense: Callable[[], bool] = lambda: False,
        kept: KeptBlocks | None = None,
        carried: Carried | None = None,
        refresh: int = 1,
        drift: float | None = None,
    ):
        plan, visual = denoiser.adapter.sequence, denoiser.adapter.visual
        assert plan is not None and visual is not None
        super().__init__(denoiser, plan)
        self._clock, self._visual, self._order, self._block = context.clock, visual, order, block
        self._dense, self._kept, self._carried, self._refresh, self._drift = dense, kept, carried, refresh, drift
        self._outputs = context.outputs
        # Branch -> request, step and shapes of the last call that chose blocks, and its latents if their drift matters.
        self._chosen: dict[str, tuple[int, int, Any, torch.Tensor | None]] = {}
        # (request, shapes of the latents) -> the grid. Replaced as another request begins.
        self._grids: dict[tuple[int | None, tuple[Any, ...]], token_grid.Grid] = {}
        self._grid: token_grid.Grid | None = None
        self._entered: set[str] = set()
        # Indices of orders on the device, by shape.
        self._indices: dict[Any, torch.Tensor | None] = {}

    def around_denoiser(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self._clock.current
        arguments = by_name(self._names, args, kwargs)
        self._grid = self._grid_of(arguments, None if state is None else state.request)
        latents = shapes = None
        if self._carried is not None:
            shapes = tuple(item.shape for item in self._items(arguments))
            latents = self._latents(arguments)
            self._carried.choosing = self._chooses(state, shapes, latents)
            self._carried.branch = "" if state is None else state.branch
        out = super().around_denoiser(inner, *args, **kwargs)
        # A step that a cache skips computes a part of the layers at most: it chooses for none, and counts for none.
        if self._dense() or (state is not None and state.mode is not Mode.FULL):
            return out
        if self._carried is not None and self._carried.choosing and state is not None and state.step is not None:
            self._chosen[state.branch] = (state.request, state.step, shapes, latents)
        if self._kept is not None:
            place = (None, "") if state is None else (state.step, state.branch)
            self._kept.end_call((self.denoiser.name, *place), self._grid)
        return out

    def span(self, attends: AttentionStreams, queries: int, keys: int) -> Span | None:
        """The place of the ordered tokens in an attention call.

        Args:
            attends: The streams of the module.
            queries: Number of queries of the whole sequence.
            keys: Number of keys of the whole sequence.

        Returns:
            `None` for a call outside the blocks, or one whose lengths are not those of the streams.
        """
        stream = self._visual.stream
        if self._grid is None or stream not in attends.queries or stream not in attends.keys:
            return None
        before = []
        for names, total in ((attends.queries, queries), (attends.keys, keys)):
            lengths = [self._lengths.get(name, -1) for name in names]
            replicated = total - sum(lengths) if names is attends.keys and attends.replicated_keys else 0
            if min(lengths) < 0 or replicated < 0 or sum(lengths) + replicated != total:
                return None
            before.append(replicated + sum(lengths[: names.index(stream)]))
        return Span(self._grid, before[0], before[1], self._order, self._block)

    def _latents(self, arguments: dict[str, Any]) -> torch.Tensor | None:
        """The latents of a call, if their drift matters: the pipeline may write the next step's into them."""
        if self._drift is None:
            return None
        return torch.cat([item.detach().flatten().float() for item in self._items(arguments)])

    def _items(self, arguments: dict[str, Any]) -> list[torch.Tensor]:
        """The latents of a call, conditioning channels and reference tokens included where the denoiser takes them."""
        latents = arguments.get(self.denoiser.adapter.denoised[0])
        items = latents if isinstance(latents, (list, tuple)) else [latents]
        return [item for item in items if isinstance(item, torch.Tensor)]

    def _chooses(self, state: StepState | None, shapes: Any, latents: torch.Tensor | None) -> bool:
        if state is None or state.step is None or state.repeated or state.branch not in self._chosen:
            return True
        request, step, shapes_before, before = self._chosen[state.branch]
        if request != state.request or shapes != shapes_before or not 0 < state.step - step < self._refresh:
            return True
        if self._drift is None or before is None or latents is None:
            return False
        sums = torch.stack([(latents - before).abs().sum(), before.abs().sum()])
        if self._outputs.all_reduce is not None:
            # Ranks may round differently, and must decide alike.
            sums = self._outputs.all_reduce(sums)
        return float(sums[0] / sums[1].clamp_min(1e-30)) >= self._drift

    # --- the walk -----------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        super().forget()
        self._entered = set()

    def _grid_of(self, arguments: dict[str, Any], request: int | None) -> token_grid.Grid:
        latents = arguments.get(self.denoiser.adapter.denoised[0])
        items = latents if isinstance(latents, (list, tuple)) else [latents]
        shape = tuple(tuple(item.shape) for item in items if isinstance(item, torch.Tensor))
        if not self._grids or next(iter(self._grids))[0] != request or request is None:
            self._grids.clear()
        if (request, shape) not in self._grids:
            self._grids[request, shape] = self._visual.grid(self.denoiser.module, arguments)
        return self._grids[request, shape]

    def _enter_stream(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
        if len(streams) > 1:
            return x  # joined from ordered ones
        (name,) = streams
        if (id(x), TokenDim(dim, streams)) in self._changed:
            return self._change(x, TokenDim(dim, streams))
        if name in self._entered:
            return x
        self._entered.add(name)
        self._lengths[name] = x.shape[dim]
        changed = self._change(x, TokenDim(dim, streams))
        if not self.denoiser.adapter.side_stacks:
            # Only side blocks are given the same tokens again; the original need not outlive the first block.
            self._changed.pop((id(x), TokenDim(dim, streams)), None)
        return changed

    def _change(self, x: torch.Tensor, dims: TokenDim) -> torch.Tensor:
        key = (id(x), dims)
        if key not in self._changed:
            index = self._index(x, dims.dim, dims.streams, token_grid.indices)
            self._changed[key] = (x, x if index is None else x.index_select(dims.dim, index))
        return self._changed[key][1]

    def _leave_stream(self, x: torch.Tensor, dim: int, streams: tuple[str, ...]) -> torch.Tensor:
        index = self._index(x, dim, streams, token_grid.inverse)
        return x if index is None else x.index_select(dim, index)

    def _index(self, x: torch.Tensor, dim: int, streams: tuple[str, ...], of: Callable[..., Any]) -> Any:
        """Indices along a dimension with the tokens of these streams; `None` where nothing moves."""
        moving = next((name for name in streams if name in (self._visual.stream, *self._visual.beside)), None)
        if moving is None or self._grid is None:
            return None
        before = sum(self._lengths[name] for name in streams[: streams.index(moving)])
        total, tokens = x.shape[dim], self._grid[0] * self._grid[1] * self._grid[2]
        if before + tokens > total:
            raise Unsupported(
                self.feature,
                f"{' and '.join(streams)} came with {total} tokens, fewer than {before} and a grid of {self._grid}.",
                self.instead,
                str(self.denoiser),
            )
        key = (of, self._grid, before, total, x.device)
        if key not in self._indices:
            self._indices[key] = of(self._grid, self._order, self._block, before, total, x.device)
        return self._indices[key]
