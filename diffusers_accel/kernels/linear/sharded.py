"""Sharded linear layers of tensor parallelism (Megatron-LM, https://arxiv.org/abs/1909.08053).

Owns the layers that hold a rank's shard. A column-parallel layer is an ordinary `nn.Linear` with some of the weight's
rows, so that features for linear layers (quantization, fusion) work on it. A row-parallel layer is inside a module that
sums the products of all ranks and adds the bias once. A norm across all heads sums squares over ranks.

In compiled graphs the all-reduce is an operator with its group's number as an argument. So it is an opaque node without
a graph break, and all blocks share one compiled graph. In eager code the all-reduce is done in place.

A shard keeps its stock layer (`unsharded_layer`). A second `accelerate`, and features that judge a layer by its size,
use the stock layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...compat.torch_private import keep_in_order
from ...core.comm import Group
from ...core.operators import operator
from .module import STOCK, LinearProxy
from .packed import LinearSlice

# Number -> group. The number is a constant in compiled graphs, so free ones are used again.
GROUPS: dict[int, Group] = {}
# The attribute in which a shard keeps its stock layer; in a tuple, so that it is no submodule.
_UNSHARDED = "_diffusers_accel_unsharded"

Ranges = Sequence[tuple[int, int]]


def free_group_number() -> int:
    """A number that is free in `GROUPS`."""
    return next(number for number in range(len(GROUPS) + 1) if number not in GROUPS)


def _all_reduce_fake(x: torch.Tensor, group: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("all_reduce", _all_reduce_fake)
def _all_reduce(x: torch.Tensor, group: int) -> torch.Tensor:
    # An operator must not write to its arguments.
    return GROUPS[group].all_reduce_copy(x)


# Independent sums (of two streams, of a query's and a key's norm) must run in one order on all ranks. Inductor would
# order them by memory and speed, which differ where shards are uneven. The price: inductor's cache on disk does not
# keep graphs with such operators.
keep_in_order(_all_reduce)


def all_reduced(fresh: torch.Tensor, group: int) -> torch.Tensor:
    """The sum of all ranks' tensors.

    Args:
        fresh: This rank's tensor; it may be overwritten.
        group: The group's number in `GROUPS`.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _all_reduce(fresh, group)
    return GROUPS[group].all_reduce(fresh.contiguous())


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are sharded among ranks.

    Args:
        shard: This rank's shard, without a bias.
        bias: The stock layer's bias, added once after the sum; `None` without one.
        group: The group's number in `GROUPS`.
    """

    bias: nn.Parameter | None

    def __init__(self, shard: nn.Linear, bias: nn.Parameter | None, group: int):
        super().__init__()
        self.base_layer = shard
        self.register_parameter("bias", bias)
        self.group = group
        self.training = shard.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = all_reduced(self.base_layer(x), self.group)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}, summed over ranks"


class RMSNormAcrossHeads(nn.Module):
    """RMSNorm across the heads of all ranks.

    Args:
        norm: The stock norm.
        parts: Ranges of this rank's channels.
        group: The group's number in `GROUPS`.
    """

    weight: nn.Parameter | None

    def __init__(self, norm: nn.RMSNorm, parts: Ranges, group: int):
        super().__init__()
        self.channels = norm.normalized_shape[-1]
        self.eps = norm.eps
        self.group = group
        self.training = norm.training
        self.register_parameter("weight", None if norm.weight is None else _slice(norm.weight, 0, parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = all_reduced(wide.square().sum(-1, keepdim=True), self.group)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        wide = wide * torch.rsqrt(squares / self.channels + eps)
        return (wide if self.weight is None else wide * self.weight.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"of {self.channels} channels, eps={self.eps}"


def column_parallel(linear: nn.Linear, parts: Ranges) -> nn.Linear:
    """A layer with some outputs of a stock layer, on the device of its weight.

    Args:
        linear: The stock layer.
        parts: Ranges of the outputs that are kept.
    """
    weight = _slice(linear.weight, 0, parts)
    shard = nn.Linear(linear.in_features, len(weight), bias=False, device="meta", dtype=weight.dtype)
    shard.weight = weight
    if linear.bias is not None:
        shard.bias = _slice(linear.bias, 0, parts)
    return _with_stock(shard, linear)


def row_parallel(linear: nn.Linear, parts: Ranges, group: int) -> RowParallelLinear:
    """A layer with some inputs of a stock layer, whose products are summed over ranks.

    Args:
        linear: The stock layer; its bias is taken over as it is.
        parts: Ranges of the inputs that are kept.
        group: The group's number in `GROUPS`.
    """
    weight = _slice(linear.weight, 1, parts)
    shard = nn.Linear(weight.shape[1], linear.out_features, bias=False, device="meta", dtype=weight.dtype)
    shard.weight = weight
    return _with_stock(RowParallelLinear(_with_stock(shard, linear), linear.bias, group), linear)


def rms_norm_across_heads(norm: nn.RMSNorm, parts: Ranges, group: int) -> RMSNormAcrossHeads:
    """An `RMSNormAcrossHeads` with the arguments of its constructor, which keeps the stock norm."""
    return _with_stock(RMSNormAcrossHeads(norm, parts, group), norm)


def unsharded_layer(module: Any) -> Any:
    """The stock layer that a shard was cut from, also if the shard was quantized or fused since; others as they are."""
    behind = module
    while behind is not None:
        if _UNSHARDED in vars(behind):
            return vars(behind)[_UNSHARDED][0]
        if isinstance(behind, LinearSlice):
            behind = behind.original
        elif isinstance(behind, LinearProxy):
            behind = behind.stock
        else:
            behind = vars(behind).get(STOCK, (None,))[0]
    return module


def stock_of(module: Any) -> Any:
    """The stock layer of a module that has replaced it; `None` if the stock weight is gone."""
    whole = unsharded_layer(module)
    if whole is not module:
        return whole
    return module.stock if isinstance(module, LinearProxy) else vars(module).get(STOCK, (module,))[0]


def is_sharded(model: nn.Module) -> bool:
    """Whether any layer of a model is sharded."""
    return any(unsharded_layer(module) is not module for module in model.modules())


def _with_stock(part: Any, stock: nn.Module) -> Any:
    part.train(stock.training)
    vars(part)[_UNSHARDED] = (stock,)
    return part


@torch.no_grad()
def _slice(x: torch.Tensor, dim: int, parts: Ranges) -> nn.Parameter:
    pieces = [x.detach().narrow(dim, first, last - first) for first, last in parts]
    found = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(found, requires_grad=x.requires_grad)
