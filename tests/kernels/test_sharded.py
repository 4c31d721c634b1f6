"""Layers of which a rank has a part, in one process: parts of all ranks together are the stock layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_accel.kernels.linear import is_sharded, sharded, stock_of, unsharded_layer
from diffusers_accel.kernels.linear.packed import LinearSlice, PackedLinear


class Together:
    """A group whose sum adds what other ranks would have sent."""

    def __init__(self, *others):
        self.others = list(others)

    def all_reduce(self, x):
        return x.add_(sum(self.others))

    def all_reduce_copy(self, x):
        return self.all_reduce(x.clone())


@pytest.fixture
def group():
    number = sharded.free_group_number()
    sharded.GROUPS[number] = Together(torch.zeros(()))
    yield number
    del sharded.GROUPS[number]


def linear(inputs, outputs, **options):
    return nn.Linear(inputs, outputs, **options).double().requires_grad_(False)


@torch.no_grad()
def test_columns_are_some_of_the_outputs():
    layer, x = linear(6, 10), torch.randn(3, 6).double()
    part = sharded.column_parallel(layer, [(0, 2), (5, 8)])
    assert type(part) is nn.Linear and part.weight.shape == (5, 6)
    assert torch.allclose(part(x), layer(x)[:, [0, 1, 5, 6, 7]])
    assert unsharded_layer(part) is layer and stock_of(part) is layer and is_sharded(part)
    # What is held is the rank's own, not a view that keeps the whole alive.
    assert part.weight.untyped_storage().nbytes() == 5 * 6 * 8


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_rows_sum_up_to_the_product(group, bias):
    layer, x = linear(6, 4, bias=bias), torch.randn(3, 6).double()
    ours, theirs = [(0, 2), (4, 5)], [(2, 4), (5, 6)]
    part, other = sharded.row_parallel(layer, ours, group), sharded.row_parallel(layer, theirs, group)
    sharded.GROUPS[group].others = [other.base_layer(x[:, [2, 3, 5]])]
    # The bias once.
    assert torch.allclose(part(x[:, [0, 1, 4]]), layer(x))
    assert unsharded_layer(part) is layer and unsharded_layer(part.base_layer) is layer


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-5, None])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_across_heads_is_the_stock_norm(group, eps, affine):
    norm, x = nn.RMSNorm(8, eps=eps, elementwise_affine=affine), torch.randn(2, 3, 8)
    if affine:
        norm.weight.normal_()
    part = sharded.rms_norm_across_heads(norm, [(2, 5)], group)
    sharded.GROUPS[group].others = [x[..., [0, 1, 5, 6, 7]].square().sum(-1, keepdim=True)]
    assert torch.allclose(part(x[..., 2:5]), norm(x)[..., 2:5], atol=1e-6)
    assert part(x[..., 2:5].bfloat16()).dtype == torch.bfloat16


def test_what_stands_for_a_part_remembers_the_whole():
    layer, other = linear(6, 10), linear(6, 10)
    parts = [sharded.column_parallel(item, [(0, 5)]) for item in (layer, other)]
    packed = PackedLinear(parts)
    joined = LinearSlice(packed, 1, parts[1])
    assert unsharded_layer(joined) is other and stock_of(joined) is other
    plain = LinearSlice(PackedLinear([layer, other]), 0, layer)
    assert unsharded_layer(plain) is plain and stock_of(plain).weight.shape == (10, 6)


def test_the_sum_is_an_operator_with_an_order(group):
    from torch._higher_order_ops.effects import has_effects

    assert has_effects(torch.ops.diffusers_accel.all_reduce.default)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.diffusers_accel.all_reduce, (torch.randn(2, 3), group), test_utils=checks)
