"""Sparse attention: which blocks of keys each block of queries attends to, and the records of rules that choose them.

A call's tokens form blocks in the order that the model has them. A selector scores all pairs of blocks from means of
their tokens, and each block of queries attends to the highest scores. Kernels that take lists of key blocks call
`Sparse.choose` with their operands. Importing this module needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...core.registry import Registry
from .record import Inputs

if TYPE_CHECKING:
    from .block_lists import BlockLists
    from .quantize import Quantized


# (means of queries, means of keys, softmax scale) -> scores; see `register_sparse`.
Scores = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A rule that scores pairs of blocks.

    Attributes:
        name: Its name in a configuration.
        parts: Parts of a block whose means it reads, a power of two. The last block may have fewer.
        scores: From means of queries, float32 (batch, heads, means, head_dim), means of keys, float32 (batch, kv_heads,
            means, head_dim), and the softmax scale: scores, (batch, heads, query blocks, key blocks), of any floating
            dtype.
    """

    name: str
    parts: int
    scores: Scores


SELECTORS: Registry[Selector] = Registry("selector of sparse attention", "register_sparse")


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Sparse attention of a role's calls.

    Attributes:
        selector: The rule.
        keep: Share of the blocks of keys that each block of queries attends to.
        block: Tokens of a block.
        min_tokens: Number of tokens from which on a call is sparse.
    """

    selector: Selector
    keep: float
    block: int
    min_tokens: int

    def takes(self, inputs: Inputs) -> bool:
        """Whether a call is sparse: its queries and keys are the same tokens, there are enough of them, and none is
        masked, since a rule could keep blocks that a mask hides."""
        tokens = inputs.query.shape[1]
        if inputs.attn_mask is not None or inputs.is_causal:
            return False
        return tokens == inputs.key.shape[1] and tokens >= self.min_tokens and self.kept(tokens) < self._blocks(tokens)

    def kept(self, tokens: int) -> int:
        """The number of key blocks that each block of queries attends to."""
        return max(1, round(self.keep * self._blocks(tokens)))

    def share(self, tokens: int) -> float:
        """The share of pairs of blocks that are computed."""
        return self.kept(tokens) / self._blocks(tokens)

    def choose(self, x: Inputs, data: Quantized) -> BlockLists:
        """The blocks of keys that each block of queries attends to.

        Args:
            x: The call.
            data: Its operands, rounded or not.

        Raises:
            ValueError: The rule returned scores of another shape, whose blocks do not exist.
        """
        from .block_lists import operand_means, select

        size = self.block // self.selector.parts
        scores = self.selector.scores(*operand_means(x, data, size, size), x.softmax_scale)
        batch, heads = x.query.shape[0], x.query.shape[2]
        expected = (batch, heads, self._blocks(x.query.shape[1]), self._blocks(x.key.shape[1]))
        if tuple(scores.shape) != expected or not scores.is_floating_point():
            raise ValueError(
                f"The rule registered as {self.selector.name!r} returned {tuple(scores.shape)} {scores.dtype}; it must "
                f"return {expected} of a floating dtype, which is (batch, heads, query blocks, key blocks)."
            )
        budget = torch.full((batch * heads,), float(self.kept(x.key.shape[1])), device=x.query.device)
        return select(scores, budget, self.block, self.block)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)


def _block_scores(parts: int) -> Scores:
    def scores(query_means: torch.Tensor, key_means: torch.Tensor, scale: float) -> torch.Tensor:
        from .block_lists import block_scores

        return block_scores(query_means, key_means, parts, parts, scale)

    return scores


def _nearest(query_means: torch.Tensor, key_means: torch.Tensor, scale: float) -> torch.Tensor:
    """The nearest blocks in the order of the tokens, whatever they hold."""
    rows = torch.arange(query_means.shape[2], device=query_means.device)
    columns = torch.arange(key_means.shape[2], device=query_means.device)
    near = -(rows[:, None] - columns[None, :]).abs().float()
    return near.expand(*query_means.shape[:2], -1, -1)


for _selector in (
    # Sub-blocks: the log of the sum of exp over 4 x 4 logits between means of quarters of the blocks.
    Selector(name="sub-blocks", parts=4, scores=_block_scores(4)),
    Selector(name="means", parts=1, scores=_block_scores(1)),
    Selector(name="window", parts=1, scores=_nearest),
):
    SELECTORS.add(_selector.name, _selector)


def register_sparse(name: str, function: Any = None, *, replace: bool = False, parts: int = 1) -> Any:
    """Registers a user's rule under a name that `attention.sparse` accepts. Also usable as a decorator.

    Args:
        name: The name in a configuration.
        function: `fn(query_means, key_means, scale)`. `query_means`: float32 (batch, heads, means, head_dim).
            `key_means`: float32 (batch, kv_heads, means, head_dim). `scale`: the softmax scale. It returns scores,
            (batch, heads, query blocks, key blocks); the highest of each row are kept. It must not read a value on the
            host: CUDA graphs record it.
        replace: Whether to replace a registered rule of that name.
        parts: Parts of a block whose means it reads: 1, 2, 4 or 8.

    Raises:
        ValueError: The name is taken, or `parts` is none of these. A call raises it for scores of another shape.
    """
    if parts not in (1, 2, 4, 8):
        raise ValueError(f"register_sparse: parts is 1, 2, 4 or 8, got {parts!r}.")

    def register(function: Scores) -> Scores:
        SELECTORS.add(name, Selector(name=name, parts=parts, scores=function), replace)
        return function

    return register if function is None else register(function)
