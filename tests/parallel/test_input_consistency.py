"""Inputs that count as the same on two ranks, and inputs that do not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffusers_accel import RanksDiffer, Unsupported
from diffusers_accel.features.parallel.input_consistency import InputConsistency


class Ranks:
    """A group whose gathers record this rank's values, and return values that were recorded before."""

    def __init__(self, heard=None):
        self.gathered, self.heard = [], heard

    def all_gather_object(self, value):
        return self._tell(value)

    def all_gather(self, values, dim):
        return self._tell(values)

    def _tell(self, value):
        self.gathered.append(value)
        return [value] if self.heard is None else [each[len(self.gathered) - 1] for each in self.heard]


def compare(*given):
    """The check of the first of some ranks, each of which is given a value."""
    gathered = []
    for value in given:
        ranks = Ranks()
        InputConsistency(None, ranks)._compare({"x": value}, "transformer")
        gathered.append(ranks.gathered)
    return InputConsistency(None, Ranks(gathered))._compare({"x": given[0]}, "transformer")


def matches(one, other):
    try:
        compare(one, other)()
    except RanksDiffer:
        return False
    return True


@pytest.fixture
def embedding():
    return torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(0))


def test_rounding_is_the_same(embedding):
    assert matches(embedding, embedding.clone())
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    # Every value by half a unit in the last place of bf16.
    assert matches(embedding, embedding * (1 + noise.sign() * 2**-9))


def test_another_seed_or_another_word_is_not(embedding):
    other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2))
    assert not matches(embedding, other)
    one_token = embedding.clone()
    one_token[:, 7] = other[:, 7]
    assert not matches(embedding, one_token)


def test_forms_and_small_values_are_compared_as_they_are(embedding):
    assert not matches(embedding, embedding[:, :-1])
    assert not matches(embedding, embedding.half())
    assert not matches(torch.tensor([999.0]), torch.tensor([998.0]))
    assert not matches({"height": 32}, {"height": 48}) and matches({"height": 32}, {"height": 32})
    assert not matches([embedding, None], [embedding])


def test_ranks_on_one_gpu_are_told(monkeypatch):
    """As where all have said `enable_model_cpu_offload(gpu_id=0)`. Tensors are fake: there are no GPUs here."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    ranks = SimpleNamespace(all_gather_object=lambda gathered: [("GPU-0", gathered[1]), gathered, gathered])
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
        with pytest.raises(Unsupported, match=r"on transformer: ranks 1 and 2 are on one GPU\..*LOCAL_RANK"):
            InputConsistency(None, ranks)._compare({"x": x}, "transformer")
    compare(torch.ones(2), torch.ones(2))()
