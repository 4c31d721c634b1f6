"""Recipes of 8-bit attention: the rounded operands, their types, the tokens that share a scale; and plain references.

The idea is SageAttention's (https://arxiv.org/abs/2410.02367, https://arxiv.org/abs/2411.10958). Softmax does not
change when one vector is subtracted from every key. The outlier channels of a real K lie in its mean, so the mean is
subtracted before rounding. Q is rounded with one scale per token, which includes the softmax scale; K with one scale
per block of tokens; V with one scale per channel. P lies in [0, 1] and is rounded to e4m3 with the constant scale 448.

A few outlier channels may dominate a logit: their errors are then its error, and in INT8 they set the step of all other
channels. Q and K are therefore first multiplied by an orthogonal Hadamard matrix (the incoherent processing of
FlashAttention 3, https://arxiv.org/abs/2407.08608). QK does not change, and outliers are spread over their group. The
matrix mixes the channels that one GPU thread holds, so threads exchange nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

INT8_MAX = 127.0
E4M3_MAX = 448.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The rounding of the operands of one kind of 8-bit attention.

    Attributes:
        qk: `"int8"` or `"fp8"` (e4m3), or `None` to leave Q and K as they are.
        k_block: Number of tokens that share a scale of K.
        pv: `"fp8"` to round P and V to e4m3, or `None` to leave V as it is and round P to V's type.
    """

    qk: str | None
    k_block: int
    pv: str | None

    @property
    def name(self) -> str:
        """Type of QK, then tokens per scale of Q, K and V, e.g. `"int8-1-16-1"`."""
        if self.qk is None:
            return "bf16-0-0-0"
        return f"{self.qk}-1-{self.k_block}-{1 if self.pv else 0}"


def _named(*recipes: Recipe) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes}


# Backend -> its recipes, the default first.
RECIPES: dict[str, dict[str, Recipe]] = {
    "sage": _named(*(Recipe(qk="int8", k_block=block, pv=None) for block in (128, 16, 4, 1))),
    "sage-fp8": _named(
        *(Recipe(qk="int8", k_block=block, pv="fp8") for block in (128, 16, 4, 1)),
        *(Recipe(qk="fp8", k_block=block, pv="fp8") for block in (128, 4, 1)),
    ),
    "qk16pv8": _named(Recipe(qk=None, k_block=0, pv="fp8")),
}


def _rounded(x: torch.Tensor, kind: str, amax: torch.Tensor) -> torch.Tensor:
    """`x` rounded to a type and scaled back. The scale maps `amax` to the largest value of the type."""
    largest = INT8_MAX if kind == "int8" else E4M3_MAX
    scale = (amax / largest).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (x / scale).clamp(-largest, largest)
    return (scaled.round() if kind == "int8" else scaled.to(torch.float8_e4m3fn).to(x.dtype)) * scale


def hadamard_levels(head_dim: int) -> int:
    """log2 of the number of neighbouring channels, eight at most, that the Hadamard matrix mixes in each quarter."""
    quarter = head_dim // 4
    return min(quarter & -quarter, 8).bit_length() - 1


def hadamard_matrix(head_dim: int) -> torch.Tensor:
    """The orthogonal Hadamard matrix of Q and K, float32 (head_dim, head_dim). Each group of mixed channels has
    2 ** `hadamard_levels(head_dim)` neighbours from each of the four quarters of a head: 16 or 32 channels."""
    within = 2 ** hadamard_levels(head_dim)
    groups = torch.eye(head_dim // 4 // within)
    return torch.kron(_sylvester(4), torch.kron(groups, _sylvester(within)))


def _sylvester(order: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(order)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    recipe: Recipe,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The attention of a recipe, in plain torch and float32: for tests, and to judge a recipe without a GPU.

    Args:
        query: (batch, sequence, heads, head_dim).
        key: (batch, key sequence, kv_heads, head_dim); `kv_heads` divides `heads`.
        value: (batch, key sequence, kv_heads, head_dim).
        recipe: The rounding of the operands.
        attn_mask: Boolean (True takes part) or additive, broadcast to (batch, heads, sequence, key sequence).
        scale: Softmax scale of the logits; head_dim ** -0.5 if `None`.

    Returns:
        (batch, sequence, heads, head_dim), in the query's dtype.
    """
    groups = query.shape[2] // key.shape[2]
    q, k, v = (item.float().transpose(1, 2) for item in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if recipe.qk is not None:
        k = k - k.mean(2, keepdim=True)
        matrix = hadamard_matrix(q.shape[-1]).to(q.device)
        q, k = q @ matrix, k @ matrix
        q = _rounded(q, recipe.qk, q.abs().amax(-1, keepdim=True))
        length, block = k.shape[2], recipe.k_block
        padded = torch.nn.functional.pad(k, (0, 0, 0, -length % block)).unflatten(2, (-1, block))
        k = _rounded(padded, recipe.qk, padded.abs().amax((-1, -2), keepdim=True)).flatten(2, 3)[:, :, :length]
    if recipe.pv is not None:
        v = _rounded(v, "fp8", v.abs().amax(2, keepdim=True))
    k, v = (item.repeat_interleave(groups, dim=1) for item in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask.float()
        )
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -math.inf, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    weights = _rounded(weights, "fp8", torch.ones(())) if recipe.pv is not None else weights.to(value.dtype).float()
    out = (weights @ v) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return out.transpose(1, 2).to(query.dtype)
