"""Operators: torch's requirements, and an error for a gradient through one."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel.core.operators import operator


def _weighted_sum_fake(parts: list[torch.Tensor], weight: torch.Tensor | None, factor: float) -> torch.Tensor:
    return parts[0].new_empty(parts[0].shape)


@operator("test_weighted_sum", _weighted_sum_fake)
def weighted_sum(parts: list[torch.Tensor], weight: torch.Tensor | None, factor: float) -> torch.Tensor:
    """Of tensors in a list, which autograd does not look into by itself."""
    total = torch.stack(parts).sum(0) * factor
    return total if weight is None else total * weight


PARTS = [torch.arange(4.0), torch.ones(4)]


def test_as_torch_wants_it():
    for weight in (None, torch.full((4,), 2.0)):
        torch.library.opcheck(weighted_sum, (PARTS, weight, 3.0))
        assert weighted_sum(PARTS, weight, 3.0).tolist() == [
            (3.0 if weight is None else 6.0) * (x + 1) for x in range(4)
        ]


def test_a_mode_has_its_say():
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(item) for item in PARTS]
        assert isinstance(weighted_sum(fakes, None, 1.0), torch._subclasses.FakeTensor)
    # A fake tensor outside its mode, too.
    assert isinstance(weighted_sum(fakes, None, 1.0), torch._subclasses.FakeTensor)


@pytest.mark.parametrize("place", [0, 1])
def test_gradients_are_refused(place):
    """The error comes with the backward pass, not with the recording of gradients."""
    leaf = torch.ones(4, requires_grad=True)
    args = ([leaf, PARTS[1]], None, 1.0) if place == 0 else (PARTS, leaf, 1.0)
    out = weighted_sum(*args)
    assert out.requires_grad and torch.equal(
        out.detach(), weighted_sum(PARTS if place else [leaf.detach(), PARTS[1]], None, 1.0)
    )
    with pytest.raises(RuntimeError, match=r"test_weighted_sum.default is for inference.*restore"):
        out.sum().backward()
    with torch.no_grad():
        assert not weighted_sum(*args).requires_grad
