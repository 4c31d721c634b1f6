"""Forms of nested values, against values taken apart by hand."""

from __future__ import annotations

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from diffusers_accel.core.tree import split, tensors_in


def test_tensors_are_taken_out_in_order_and_put_back():
    first, second = torch.zeros(2), torch.ones(3)
    value = {"a": [first, 3], "b": (None, {"c": second}), "d": "text"}
    tensors, form = split(value)
    assert [item is other for item, other in zip(tensors, (first, second), strict=True)] == [True, True]
    assert form.constants == [3, None, "text"]
    new = [torch.full((2,), 5.0), torch.full((3,), 6.0)]
    filled = form.fill(iter(new))
    assert filled["a"][0] is new[0] and filled["b"][1]["c"] is new[1]
    assert filled["a"][1] == 3 and filled["b"][0] is None and filled["d"] == "text"


def test_a_model_output_keeps_its_class():
    tensors, form = split(Transformer2DModelOutput(sample=torch.zeros(1)))
    filled = form.fill([tensors[0] + 1])
    assert type(filled) is Transformer2DModelOutput and filled.sample.item() == 1


def test_forms_are_equal_up_to_tensors():
    _, form = split([torch.zeros(2), 1.0, (torch.zeros(1),)])
    assert form == split([torch.ones(5), 1.0, (torch.ones(4),)])[1]
    for other in ([torch.zeros(2), 2.0, (torch.zeros(1),)], [torch.zeros(2), 1.0, [torch.zeros(1)]], [1.0, 1.0, (1,)]):
        assert form != split(other)[1]


def test_tensors_in():
    one = torch.zeros(1)
    assert tensors_in(None) == [] and tensors_in(3) == []
    assert [item is one for item in tensors_in([one, (2, {"a": one})])] == [True, True]
