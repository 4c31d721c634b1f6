"""What counts as the same on two ranks, and what does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffusers_accel import RanksDiffer, Unsupported
from diffusers_accel.features.parallel.agreement import Agreement


class Ranks:
    """Ranks of which this one stands for all: what it tells is kept, and what it hears is what some have told."""

    def __init__(self, heard=None):
        self.told, self.heard = [], heard

    def objects(self, value):
        return self._tell(value)

    def gather(self, values, dim):
        return self._tell(values)

    def _tell(self, value):
        self.told.append(value)
        return [value] if self.heard is None else [each[len(self.told) - 1] for each in self.heard]


def compare(*given):
    """What the first of some ranks does, each of which is given something."""
    told = []
    for value in given:
        ranks = Ranks()
        Agreement(None, ranks)._compare({"x": value}, "transformer")
        told.append(ranks.told)
    return Agreement(None, Ranks(told))._compare({"x": given[0]}, "transformer")


def alike(one, other):
    try:
        compare(one, other)()
    except RanksDiffer:
        return False
    return True


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


def test_ranks_on_one_gpu_are_told(monkeypatch):
    """As where all have said `enable_model_cpu_offload(gpu_id=0)`. Tensors are fake: there are no GPUs here."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    ranks = SimpleNamespace(objects=lambda told: [("GPU-0", told[1]), told, told])
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
        with pytest.raises(Unsupported, match=r"on transformer: ranks 1 and 2 are on one GPU\..*LOCAL_RANK"):
            Agreement(None, ranks)._compare({"x": x}, "transformer")
    compare(torch.ones(2), torch.ones(2))()
