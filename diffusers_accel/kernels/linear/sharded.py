"""Layers of which a rank has a part: tensor parallelism (Megatron-LM, https://arxiv.org/abs/1909.08053).

A layer whose outputs are divided is an ordinary `nn.Linear` with some of the weight's rows, so that whatever works on
linear layers (formats of fewer bits, joined projections) works on it. One whose inputs are divided stands inside a
module that sums the products of all ranks and adds the bias once. A norm across all heads sums squares over ranks.

In compiled graphs the sum is an operator that knows its group by a number, so that it is an opaque node, without a
graph break, and all blocks share one compiled graph. Outside them it is made in place.

A part remembers the stock layer that it was cut from (`whole_of`), so that a second `accelerate`, and whoever judges a
layer by its size, sees that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from ...core.comm import Group
from ...core.operators import operator
from .module import STOCK, LinearProxy
from .packed import LinearSlice

# Groups that sum, by number. The number is a constant in compiled graphs: freed ones are used again.
GROUPS: dict[int, Group] = {}
# Where a part remembers the stock layer; in a tuple, so that it is no child of it.
_WHOLE = "_diffusers_accel_whole"

Ranges = Sequence[tuple[int, int]]


def free_number() -> int:
    """A number that no group has."""
    return next(number for number in range(len(GROUPS) + 1) if number not in GROUPS)


def _sum_fake(x: torch.Tensor, group: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("sum_over_ranks", _sum_fake)
def _sum_over_ranks(x: torch.Tensor, group: int) -> torch.Tensor:
    # What an operator is given stays as it was.
    return GROUPS[group].total(x)


# Sums that do not depend on each other (of two streams, of a query's and a key's norm) must come in one order on all
# ranks. Inductor would order them by memory and speed, which differ where shares are uneven. (It does not find such
# graphs in its cache on disk again; two sums changed about would be worse.)
_register_effectful_op(_sum_over_ranks, _EffectType.ORDERED)


def summed(fresh: torch.Tensor, group: int) -> torch.Tensor:
    """The sum of all ranks' tensors, each of which nobody else holds: it may be written to.

    Args:
        fresh: This rank's.
        group: The group's number.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _sum_over_ranks(fresh, group)
    return GROUPS[group].sum(fresh.contiguous())


class SummedLinear(nn.Module):
    """A linear layer whose inputs are divided among ranks.

    Args:
        shard: The product of this rank's inputs, without a bias.
        bias: The stock layer's.
        group: The number of the ranks' group.
    """

    bias: nn.Parameter | None

    def __init__(self, shard: nn.Linear, bias: nn.Parameter | None, group: int):
        super().__init__()
        self.base_layer = shard
        self.register_parameter("bias", bias)
        self.group = group
        self.training = shard.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = summed(self.base_layer(x), self.group)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}, summed over ranks"


class NormAcrossHeads(nn.Module):
    """RMSNorm across the heads of all ranks, of which this one has some.

    Args:
        norm: The stock norm.
        parts: This rank's channels.
        group: The number of the ranks' group.
    """

    weight: nn.Parameter | None

    def __init__(self, norm: nn.RMSNorm, parts: Ranges, group: int):
        super().__init__()
        self.channels = norm.normalized_shape[-1]
        self.eps = norm.eps
        self.group = group
        self.training = norm.training
        self.register_parameter("weight", None if norm.weight is None else _cut(norm.weight, 0, parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = summed(wide.square().sum(-1, keepdim=True), self.group)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        wide = wide * torch.rsqrt(squares / self.channels + eps)
        return (wide if self.weight is None else wide * self.weight.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"of {self.channels} channels, eps={self.eps}"


def columns(linear: nn.Linear, parts: Ranges) -> nn.Linear:
    """A layer with some of another's outputs, where its weight lies.

    Args:
        linear: The stock layer.
        parts: Its outputs that are kept.
    """
    weight = _cut(linear.weight, 0, parts)
    shard = nn.Linear(linear.in_features, len(weight), bias=False, device="meta", dtype=weight.dtype)
    shard.weight = weight
    if linear.bias is not None:
        shard.bias = _cut(linear.bias, 0, parts)
    return _remembering(shard, linear)


def rows(linear: nn.Linear, parts: Ranges, group: int) -> SummedLinear:
    """A layer with some of another's inputs, whose products are summed over ranks.

    Args:
        linear: The stock layer. Its bias is taken over as it is.
        parts: Its inputs that are kept.
        group: The number of the ranks' group.
    """
    weight = _cut(linear.weight, 1, parts)
    shard = nn.Linear(weight.shape[1], linear.out_features, bias=False, device="meta", dtype=weight.dtype)
    shard.weight = weight
    return _remembering(SummedLinear(_remembering(shard, linear), linear.bias, group), linear)


def norm_across_heads(norm: nn.RMSNorm, parts: Ranges, group: int) -> NormAcrossHeads:
    """See `NormAcrossHeads`; it remembers the stock norm."""
    return _remembering(NormAcrossHeads(norm, parts, group), norm)


def whole_of(module: Any) -> Any:
    """The stock layer that a part was cut from, be it quantized or joined with others since; anything else itself."""
    behind = module
    while behind is not None:
        if _WHOLE in vars(behind):
            return vars(behind)[_WHOLE][0]
        if isinstance(behind, LinearSlice):
            behind = behind.original
        elif isinstance(behind, LinearProxy):
            behind = behind.stock
        else:
            behind = vars(behind).get(STOCK, (None,))[0]
    return module


def stock_of(module: Any) -> Any:
    """The stock layer behind whatever took its place; `None` if its weight is gone."""
    whole = whole_of(module)
    if whole is not module:
        return whole
    return module.stock if isinstance(module, LinearProxy) else vars(module).get(STOCK, (module,))[0]


def is_divided(model: nn.Module) -> bool:
    """Whether a model has only parts of some layers."""
    return any(whole_of(module) is not module for module in model.modules())


def _remembering(part: Any, stock: nn.Module) -> Any:
    part.train(stock.training)
    vars(part)[_WHOLE] = (stock,)
    return part


@torch.no_grad()
def _cut(x: torch.Tensor, dim: int, parts: Ranges) -> nn.Parameter:
    pieces = [x.detach().narrow(dim, first, last - first) for first, last in parts]
    found = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(found, requires_grad=x.requires_grad)
