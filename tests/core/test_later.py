"""Results of other ranks: which operations are deferred, and which use makes the ranks exchange their results."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel.core.later import Later
from diffusers_accel.core.lazy_tensor import materialized


@pytest.fixture
def later():
    """Values, a `Later` with a copy of them, a list of the calls of its `find`, and a switch: may it wait?"""
    value = torch.arange(6.0).view(2, 3) + 1
    asked, wait = [], [True]

    def find():
        asked.append(1)
        return value.clone()

    return value, Later(torch.empty_like(value, device="meta"), value.device, find, lambda: wait[0]), asked, wait


def test_operations_are_deferred(later):
    value, item, asked, _ = later
    other = torch.full((2, 3), 2.0)
    made = (other * item.float() + item[:, :2].sum()).to(torch.float64).chunk(3, dim=1)
    assert not asked and all(isinstance(part, Later) for part in made) and made[0].shape == (2, 1)
    expected = (other * value.float() + value[:, :2].sum()).to(torch.float64).chunk(3, dim=1)
    assert all(torch.equal(one, two) for one, two in zip(materialized(list(made)), expected, strict=True))
    assert len(asked) == 1


def test_a_read_of_the_values_is_not_deferred(later):
    value, item, asked, _ = later
    assert (item * 2).sum().item() == value.sum().item() * 2
    assert asked == [1]
    assert item.tolist() == value.tolist() and bool((item > 0).all())


@pytest.mark.parametrize("through", ["itself", "a view", "a view of a view"])
def test_deferred_operations_do_not_see_a_later_write(later, through):
    value, item, asked, _ = later
    double, row = item * 2, item[0]
    both, flat = double + row, row.view(-1)
    assert not asked
    if through == "itself":
        item.mul_(10)
    elif through == "a view":
        row.mul_(10)
    else:
        flat += torch.tensor([9.0, 18.0, 27.0])
    assert torch.equal(double, value * 2) and torch.equal(both, value * 2 + value[0]) and asked == [1]
    # Views share the memory that was written to.
    assert torch.equal(row, value[0] * 10) and torch.equal(flat, row) and torch.equal(item[0], row)


def test_without_waiting_no_operation_is_deferred(later):
    value, item, _, wait = later
    wait[0] = False
    found = item + 1
    assert type(found) is torch.Tensor and torch.equal(found, value + 1)


def test_operations_on_known_values_are_not_deferred(later):
    value, item, asked, _ = later
    assert torch.equal(item.materialize(), value)
    assert type(item - 1) is torch.Tensor
    assert torch.equal(torch.stack([item, item]), torch.stack([value, value])) and asked == [1]
