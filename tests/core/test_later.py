"""Tensors whose values come later: operations before, and the moment of the first request for a value."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel.core.later import Later, settled


@pytest.fixture
def later():
    """A tensor, the same later, how often it was asked for, and whether to wait."""
    value = torch.arange(6.0).view(2, 3) + 1
    asked, wait = [], [True]

    def find():
        asked.append(1)
        return value

    return value, Later(torch.empty_like(value, device="meta"), value.device, find, lambda: wait[0]), asked, wait


def test_it_looks_like_a_tensor_without_being_asked(later):
    value, item, asked, _ = later
    assert isinstance(item, torch.Tensor) and item.shape == value.shape and item.dtype == value.dtype
    assert item.device == value.device and item.ndim == 2 and not item.requires_grad
    assert "Later" in repr(item) and not asked


def test_what_can_wait_is_put_off(later):
    value, item, asked, _ = later
    other = torch.full((2, 3), 2.0)
    made = (other * item.float() + item[:, :2].sum()).to(torch.float64).chunk(3, dim=1)
    assert not asked and all(isinstance(part, Later) for part in made) and made[0].shape == (2, 1)
    expected = (other * value.float() + value[:, :2].sum()).to(torch.float64).chunk(3, dim=1)
    assert all(torch.equal(one, two) for one, two in zip(settled(list(made)), expected, strict=True))
    assert len(asked) == 1


def test_what_cannot_wait_is_done_at_once(later):
    value, item, asked, _ = later
    assert (item * 2).sum().item() == value.sum().item() * 2
    assert asked == [1]
    assert item.tolist() == value.tolist() and bool((item > 0).all())


@pytest.mark.parametrize("write", [lambda x: x.mul_(2), lambda x: x.__setitem__(0, 5.0), lambda x: x.__iadd__(1)])
def test_writing_is_done_at_once(later, write):
    value, item, asked, _ = later
    expected = value.clone()
    write(expected)
    write(item)
    assert torch.equal(item.now, expected) and asked == [1]


def test_writing_into_another_is_done_at_once(later):
    value, item, *_ = later
    room = torch.zeros(2, 3)
    room.add_(item)
    assert torch.equal(room, value) and type(room) is torch.Tensor


def test_without_waiting_everything_is_done_at_once(later):
    value, item, _, wait = later
    wait[0] = False
    found = item + 1
    assert type(found) is torch.Tensor and torch.equal(found, value + 1)


def test_once_found_nothing_is_put_off(later):
    value, item, asked, _ = later
    assert torch.equal(item.now, value)
    assert type(item - 1) is torch.Tensor
    assert torch.equal(torch.stack([item, item]), torch.stack([value, value])) and asked == [1]
