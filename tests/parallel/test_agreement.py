"""What counts as the same on two ranks, and what does not."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel.features.parallel.agreement import _alike, _marks


def alike(one, other):
    return _alike(_marks(one), _marks(other))


@pytest.fixture
def embedding():
    return torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(0))


def test_rounding_is_the_same(embedding):
    assert alike(embedding, embedding.clone())
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    # Every value by half a unit in the last place of bf16.
    assert alike(embedding, embedding * (1 + noise.sign() * 2**-9))


def test_another_seed_or_another_word_is_not(embedding):
    other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2))
    assert not alike(embedding, other)
    one_token = embedding.clone()
    one_token[:, 7] = other[:, 7]
    assert not alike(embedding, one_token)


def test_forms_and_small_values_are_compared_as_they_are(embedding):
    assert not alike(embedding, embedding[:, :-1])
    assert not alike(embedding, embedding.half())
    assert not alike(torch.tensor([999.0]), torch.tensor([998.0]))
    assert not alike({"height": 32}, {"height": 48}) and alike({"height": 32}, {"height": 32})
    assert not alike([embedding, None], [embedding])
