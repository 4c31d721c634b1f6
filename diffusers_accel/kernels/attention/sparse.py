"""Sparse attention of a role's calls: which calls are sparse, and the lists of key blocks that a rule gives them.

A call's tokens form blocks in the order that they come in. A rule (`selectors.py`) scores all pairs of blocks, and each
block of queries attends to the highest scores. Blocks with tokens of text or sound are always kept, and their queries
attend to everything. Kernels that take lists call `Sparse.choose` with their operands. Where blocks are clusters,
`Sparse.clustered` orders the tokens of each head before. Importing this module needs no Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from . import token_grid
from .record import Inputs
from .selectors import Blocks, Selector, no_similarity
from .token_grid import Grid, Span

if TYPE_CHECKING:
    from .block_lists import BlockLists
    from .quantize import Quantized

# How many blocks of keys a block of queries keeps: a share of them, the fewest with a share of the softmax, or those
# above the mean by so many standard deviations.
KEEP, TOP_P, TAU = "keep", "top_p", "tau"
# Tiles of a dense kernel are left out whose weights are all below a share of the running maximum: the amount over the
# number of keys.
SKIP = "skip"
# One of these, and its number; for `KEEP` also a share for each head.
Amount = tuple[str, "float | tuple[float, ...]"]
# Layers whose numbers of kept blocks are told apart.
_LAYERS = 1024
_RULES = {KEEP: "count", TOP_P: "mass", TAU: "spread"}


@dataclass(eq=False)
class KeptBlocks:
    """Shares of pairs of blocks that are computed, by layer and denoiser call. Shares that depend on values are summed
    on the GPU, so that replays of CUDA graphs count too.

    A layer and a call are tuples that begin with the denoiser's name.

    Attributes:
        fixed: (layer, grid of the tokens) -> share, where it depends on no value.
        calls: The denoiser calls of the request outside the dense phase: name, grid of the tokens, sums after it.
    """

    fixed: dict[Any, float] = field(default_factory=dict)
    calls: list[tuple[Any, Grid, dict[torch.device, torch.Tensor]]] = field(default_factory=list)
    _sums: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    _rows: dict[Any, int] = field(default_factory=dict)
    _before: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def add(self, layer: Any, counts: torch.Tensor, columns: int) -> None:
        """Adds the counts of a call's lists, without a read.

        Args:
            layer: The layer, by any name.
            counts: int32 (batch, heads, query blocks).
            columns: Number of key blocks.
        """
        device = counts.device
        if device not in self._sums:
            self._sums[device] = torch.zeros(_LAYERS, 2, dtype=torch.int64, device=device)
        sums = self._sums[device][self._rows.setdefault(layer, len(self._rows) % _LAYERS)]
        sums[0] += counts.sum(dtype=torch.int64)
        sums[1] += counts.numel() * columns

    def end_call(self, call: Any, grid: Grid) -> None:
        """Notes the sums after a denoiser call, by its name."""
        self.calls.append((call, grid, {device: sums.clone() for device, sums in self._sums.items()}))

    def clear(self) -> None:
        """Forgets all calls, as a request begins."""
        self.calls.clear()
        # Graphs write to the sums, which therefore stay.
        self._before = {device: sums.clone() for device, sums in self._sums.items()}

    def shares(self) -> dict[Any, dict[Any, float]]:
        """Call -> layer -> share of the pairs of blocks that were computed. Reads from the GPU."""
        found: dict[Any, dict[Any, float]] = {}
        before = {device: sums.cpu() for device, sums in self._before.items()}
        for call, grid, sums in self.calls:
            shares = found.setdefault(call, {})
            # A graph's replay does not come by here: the shares are those of its first call, of the same grid.
            shares |= {layer: share for (layer, of), share in self.fixed.items() if layer[0] == call[0] and of == grid}
            for device, each in sums.items():
                now = each.cpu()
                kept, every = (now - before.get(device, torch.zeros_like(now))).unbind(1)
                shares |= {layer: float(kept[row] / every[row]) for layer, row in self._rows.items() if every[row]}
                before[device] = now
        return found


@dataclass(eq=False)
class Carried:
    """Choices that later steps use again: a bit for each pair of blocks, and the order of clustered tokens.

    Attributes:
        choosing: Whether the running denoiser call chooses anew.
        branch: The running guidance branch.
    """

    choosing: bool = True
    branch: str = ""
    _kept: dict[Any, torch.Tensor] = field(default_factory=dict)
    _chosen: set[Any] = field(default_factory=set)

    def kept(self, key: Any, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The tensor that a layer's calls keep in the running branch, int32. CUDA graphs write and read it in place.

        Args:
            key: Names the choice (blocks, or the order of one side), the layer and the call's shape.
            shape: The shape: (batch, heads, query blocks, words of 32 key blocks), or (batch, heads, tokens).
            device: The device.
        """
        place = (key, shape, self.branch, device)
        if place not in self._kept:
            self._kept[place] = torch.zeros(shape, dtype=torch.int32, device=device)
        return self._kept[place]

    def chooses(self, key: Any, shape: tuple[int, ...], device: torch.device) -> bool:
        """Whether a call chooses, which is noted: because its step does, or because nothing is kept for it yet."""
        place = (key, shape, self.branch, device)
        if not self.choosing and place in self._chosen:
            return False
        self._chosen.add(place)
        return True


def whole_sequence(queries: int, keys: int) -> Span | None:
    """The place of a call whose tokens are all of one row of blocks, as without a denoiser; `None` if its queries and
    keys are not the same tokens."""
    return Span((1, 1, queries)) if queries == keys else None


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Sparse attention of a role's calls.

    Attributes:
        selector: The rule.
        rule: How many blocks are kept: `"keep"`, `"top_p"`, `"tau"` or `"skip"`.
        amount: The share of the blocks for `"keep"`, the share of the softmax for `"top_p"`, the number of standard
            deviations for `"tau"`, or the threshold's scale factor for `"skip"`.
        block: Tokens of a block.
        centroids: Whether the mean of each block that is not kept stands for it.
        min_tokens: Number of tokens of pictures or frames from which on a call is sparse.
        by_layer: Layer -> rule and amount instead of these, a share of 1 for a dense layer.
        span: Returns the place of the tokens of pictures or frames, from the numbers of queries and keys of a call;
            `None` where it is not known, which makes the call dense.
        layer: Returns the running layer.
        kept_blocks: Receives the shares of computed blocks; `None` to count nothing.
        carried: The choices that later steps use again; `None` if every call chooses.
    """

    selector: Selector
    rule: str = KEEP
    amount: float
    block: int
    centroids: bool = False
    min_tokens: int
    by_layer: dict[Any, Amount] = field(default_factory=dict)
    span: Callable[[int, int], Span | None] = whole_sequence
    layer: Callable[[], Any] = lambda: None
    kept_blocks: KeptBlocks | None = None
    carried: Carried | None = None
    _static: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def takes(self, inputs: Inputs) -> bool:
        """Whether a call is sparse: it has enough tokens of pictures or frames, and their place is known. A call with a
        mask is dense, since a rule could keep blocks that the mask hides. So is one whose threshold would leave out all
        but new maxima."""
        if inputs.attn_mask is not None or inputs.is_causal:
            return False
        keys = inputs.key.shape[1]
        span = self.span(inputs.query.shape[1], keys)
        if span is None or span.tokens < self.min_tokens:
            return False
        if self.within_tiles and self.threshold(keys) >= 1:
            return False
        kept = self.kept(keys)
        return kept is None or kept < self._blocks(keys)

    def kept(self, keys: int) -> int | None:
        """The number of key blocks that each block of queries attends to in the running layer; `None` if it depends on
        values, or on the head."""
        rule, amount = self._amount()
        return self._number(amount, keys) if rule == KEEP and not isinstance(amount, tuple) else None

    def _most(self, keys: int) -> int | None:
        """The largest number of blocks that a head keeps; `None` if it depends on values."""
        amount = self._amount()[1]
        return self._number(max(amount), keys) if isinstance(amount, tuple) else self.kept(keys)

    def _number(self, share: float, keys: int) -> int:
        return max(1, round(share * self._blocks(keys)))

    def label(self, keys: int) -> str:
        """The share of the running layer's blocks, in words."""
        kept = self.kept(keys)
        if kept is not None:
            return f"{kept / self._blocks(keys):.0%} of blocks"
        amount = self._amount()[1]
        if isinstance(amount, tuple):
            return f"{sum(amount) / len(amount):.0%} of blocks, by head"
        if self.within_tiles:
            return f"skip-softmax, {amount:g} / keys"
        return f"blocks by {self.rule} {self.amount:g}"

    @property
    def within_tiles(self) -> bool:
        """Whether the kernel decides for each tile, without lists."""
        return self.selector.within_tiles

    def threshold(self, keys: int) -> float:
        """The share of the running maximum below which the weights of a tile are left out; 1 or more for so few keys
        that it means nothing."""
        amount = self._amount()[1]
        assert isinstance(amount, float)
        return amount / keys

    def count_tiles(self, computed: torch.Tensor, every: int) -> None:
        """Counts a call whose kernel decided for each tile.

        Args:
            computed: int32 (1,), the tiles that it computed.
            every: Number of all tiles.
        """
        if self.kept_blocks is not None:
            self.kept_blocks.add(self.layer(), computed, every)

    def clusters(self, x: Inputs) -> bool:
        """Whether the tokens of a sparse call are ordered by `clustered`."""
        span = self.span(x.query.shape[1], x.key.shape[1])
        return span is not None and span.order == token_grid.CLUSTERS

    def clustered(self, x: Inputs) -> tuple[Inputs, Callable[[Any], Any]]:
        """The call with its tokens in the order of their blocks, and a function that takes the order of its result
        back: of the output, and of the LSE if there is one.

        Args:
            x: The call, with QK-norm and rotary embedding applied.
        """
        from ..operands import row_contiguous
        from .clusters import cluster, ordered

        x = replace(x, query=row_contiguous(x.query), key=row_contiguous(x.key), value=row_contiguous(x.value))
        span = self.span(x.query.shape[1], x.key.shape[1])
        assert span is not None
        orders, chooses = None, True
        if self.carried is not None:
            places = [
                ((side, self.layer(), span), (each.shape[0], each.shape[2], each.shape[1]), each.device)
                for side, each in (("queries", x.query), ("keys", x.key))
            ]
            orders = tuple(self.carried.kept(*place) for place in places)
            # Both sides are noted.
            noted = [self.carried.chooses(*place) for place in places]
            chooses = any(noted)
        if orders is None or chooses:
            found = cluster(x.query, x.key, self.block, span.chunks)
            if orders is not None:
                for kept, new in zip(orders, found, strict=True):
                    kept.copy_(new)
            orders = found
        queries, keys = orders
        moved = replace(x, query=ordered(x.query, queries), key=ordered(x.key, keys), value=ordered(x.value, keys))

        def back(result: Any) -> Any:
            if not x.return_lse:
                return ordered(result, queries, back=True)
            out, lse = result
            return ordered(out, queries, back=True), torch.empty_like(lse).scatter_(2, queries.long(), lse)

        return moved, back

    def choose(self, x: Inputs, data: Quantized) -> BlockLists:
        """The blocks of keys that each block of queries attends to.

        Args:
            x: The call.
            data: Its operands, rounded or not.

        Raises:
            ValueError: The rule returned scores of another shape, whose blocks do not exist.
        """
        from .block_lists import centroids

        span = self.span(x.query.shape[1], x.key.shape[1])
        assert span is not None  # `takes` has asked
        lists = self._lists(x, data, span)
        self._count(x, span, lists)
        return replace(lists, centroids=centroids(x, data, self.block)) if self.centroids else lists

    def _lists(self, x: Inputs, data: Quantized, span: Span) -> BlockLists:
        """The lists of a call; those of a rule that reads no values are kept for the next call of its shape."""
        from .block_lists import lists_of_bits, select

        batch, heads, device = x.query.shape[0], x.query.shape[2], x.query.device
        queries, keys = x.query.shape[1], x.key.shape[1]
        rule, amount = self._amount()
        key = (batch, heads, queries, keys, span, rule, amount, device)
        if key in self._static:
            found: BlockLists = self._static[key]
            return found
        kept, forced = self.kept(keys), self._once(_others, span, queries, keys, self.block, device)
        bits = None
        if self.carried is not None and self.selector.parts:
            shape = (batch, heads, self._blocks(queries), -(-self._blocks(keys) // 32))
            place = ("blocks", self.layer(), *key)
            bits = self.carried.kept(place, shape, device)
            if not self.carried.chooses(place, shape, device):
                even = kept is not None and forced is None
                return lists_of_bits(
                    bits, self._blocks(keys), self.block, self.block, even=even, mark=self.centroids
                )  # fmt: skip
        scores = self._scores(x, data, span)
        expected: tuple[int, ...] = (batch, heads, self._blocks(queries), self._blocks(keys))
        if not self.selector.parts:
            expected = expected[2:]
        if tuple(scores.shape) != expected or not scores.is_floating_point():
            names = "(batch, heads, query blocks, key blocks)" if self.selector.parts else "(query blocks, key blocks)"
            raise ValueError(
                f"The rule registered as {self.selector.name!r} returned {tuple(scores.shape)} {scores.dtype}; it must "
                f"return {expected} of a floating dtype, which is {names}."
            )
        if not self.selector.parts:
            scores = scores.expand(batch, heads, -1, -1)
        if isinstance(amount, tuple):
            if len(amount) != heads:
                raise ValueError(f"attention.sparse.heads gives shares of {len(amount)} heads, and a call has {heads}.")
            counts = tuple(float(self._number(share, keys)) for share in amount)
            budget = self._once(_budgets, counts, batch, device)
        else:
            budget = torch.full((batch * heads,), float(amount if kept is None else kept), device=device)
        lists = select(
            # Blocks without a place are kept anyway; a score of infinity keeps its meaning.
            scores if self.selector.logits else scores.nan_to_num(0.0, float("inf"), -float("inf")),
            budget, self.block, self.block, rule=_RULES[rule], forced=forced, mark=self.centroids, bits=bits,
            even=kept is not None,
        )  # fmt: skip
        if not self.selector.parts:
            self._static[key] = lists
        return lists

    def _scores(self, x: Inputs, data: Quantized, span: Span) -> torch.Tensor:
        from .block_lists import operand_means, self_similarity

        parts, device = self.selector.parts, x.query.device
        query_means = key_means = None
        similarity: Callable[[], Any] = no_similarity
        if parts:
            size = max(1, self.block // parts)
            query_means, key_means = operand_means(x, data, size, size)
            similarity = functools.partial(_similarities, data, self.block, self_similarity)
        query_centers, key_centers = (
            self._once(token_grid.centers, span.grid, span.order, span.block, before, total, self.block, device)
            for before, total in ((span.queries, x.query.shape[1]), (span.keys, x.key.shape[1]))
        )
        known = Blocks(
            query_means=query_means,
            key_means=key_means,
            scale=x.softmax_scale,
            parts=parts,
            grid=span.grid,
            query_centers=query_centers,
            key_centers=key_centers,
            kept=self._most(x.key.shape[1]),
            similarity=similarity,
        )
        return self.selector.scores(known)

    def _once(self, function: Callable[..., Any], *key: Any) -> Any:
        """A function's result for a shape, made once. CUDA graphs read it, so that it lives as long as they do."""
        place = (function, *key)
        if place not in self._static:
            self._static[place] = function(*key)
        return self._static[place]

    def _amount(self) -> Amount:
        layer = self.layer() if self.by_layer else None
        return self.by_layer.get(layer, (self.rule, self.amount))

    def _count(self, x: Inputs, span: Span, lists: BlockLists) -> None:
        if self.kept_blocks is None:
            return
        columns = self._blocks(x.key.shape[1])
        if lists.even:
            self.kept_blocks.fixed[self.layer(), span.grid] = (self.kept(x.key.shape[1]) or 0) / columns
        else:
            self.kept_blocks.add(self.layer(), lists.counts, columns)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)


def _similarities(data: Quantized, block: int, of: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return of(data.query, block), of(data.key, block)


def _budgets(counts: tuple[float, ...], batch: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(counts, device=device).repeat(batch)


def _others(span: Span, queries: int, keys: int, block: int, device: torch.device) -> torch.Tensor | None:
    """The pairs of blocks with a token outside the grid: bool (query blocks, key blocks); `None` if there is none."""
    sides = []
    for before, total in ((span.queries, queries), (span.keys, keys)):
        outside = torch.ones(total, dtype=torch.bool)
        outside[before : before + span.tokens] = False
        sides.append(torch.stack([part.any() for part in outside.split(block)]))
    if not sides[0].any() and not sides[1].any():
        return None
    return (sides[0][:, None] | sides[1][None, :]).to(device)
