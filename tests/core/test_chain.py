"""The chain: nesting by rank, complete removal, and other wrappers of `forward`."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch import nn

from diffusers_accel.core.chain import Chain
from diffusers_accel.core.edits import AddLayer


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def plus(number, log=None):
    def layer(inner, x):
        if log is not None:
            log.append(number)
        return inner(x) + number

    return layer


@pytest.mark.parametrize("ranks", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_nesting_follows_rank_and_not_history(ranks):
    module, log = Double(), []
    for rank in ranks:
        AddLayer(module, rank, plus(rank, log)).apply()
    assert module(1) == 2 + 6
    assert log == [3, 2, 1], "the highest rank runs first, on the outside"


def test_last_layer_leaves_no_trace():
    module = Double()
    before = dict(vars(module))
    edits = [AddLayer(module, 1, plus(1)), AddLayer(module, 2, plus(2))]
    for edit in edits:
        edit.apply()
    for edit in reversed(edits):
        edit.undo()
    assert vars(module) == before
    assert module(3) == 6


def test_undo_in_any_order():
    module = Double()
    inner, outer = AddLayer(module, 1, plus(1)), AddLayer(module, 2, plus(10))
    inner.apply()
    outer.apply()
    inner.undo()
    assert module(1) == 12
    outer.undo()
    assert "forward" not in vars(module)


class Negate(ModelHook):
    def post_forward(self, module, output):
        return -output


@pytest.mark.parametrize("hook_first", [True, False])
def test_accelerate_hook_taken_off_and_put_on_again(hook_first):
    """`enable_model_cpu_offload` does this after every request; the layer must survive and then vanish."""
    module = Double()
    edit = AddLayer(module, 1, plus(1))
    if hook_first:
        add_hook_to_module(module, Negate())
        edit.apply()
    else:
        edit.apply()
        add_hook_to_module(module, Negate())
    assert module(1) == -3
    remove_hook_from_module(module)
    assert module(1) == 3
    add_hook_to_module(module, Negate())
    assert module(1) == -3
    edit.undo()
    assert module(1) == -2
    remove_hook_from_module(module)
    assert module(1) == 2
    assert Chain.find(module) is None


class AddHundred(DiffusersHook):
    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs) + 100


@pytest.mark.parametrize("hook_first", [True, False])
def test_diffusers_hook_in_either_order(hook_first):
    module = Double()
    edit = AddLayer(module, 1, plus(1))
    if hook_first:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(AddHundred(), "hundred")
        edit.apply()
    else:
        edit.apply()
        HookRegistry.check_if_exists_or_initialize(module).register_hook(AddHundred(), "hundred")
    assert module(1) == 103
    edit.undo()
    assert module(1) == 102


def test_a_hook_that_outlives_a_chain_leaves_a_stock_module():
    """The hook puts back the chain that it found. The module is stock all the same; the next chain takes both away."""
    module = Double()
    assert Chain.is_stock(module)
    edit, registry = AddLayer(module, 1, plus(1)), HookRegistry.check_if_exists_or_initialize(module)
    edit.apply()
    registry.register_hook(AddHundred(), "hundred")
    assert Chain.is_stock(module), "a hook around a chain"
    edit.undo()
    assert not Chain.is_stock(module), "a hook that a chain would lie around"
    registry.remove_hook("hundred")
    assert Chain.is_stock(module) and module(1) == 2
    edit = AddLayer(module, 1, plus(1))
    edit.apply()
    assert Chain.is_stock(module) and module(1) == 3
    edit.undo()
    assert "forward" not in vars(module) and module(1) == 2


def test_a_hook_that_was_removed_leaves_a_stock_module():
    module = Double()
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(AddHundred(), "hundred")
    assert not Chain.is_stock(module)
    registry.remove_hook("hundred")
    assert Chain.is_stock(module) and Chain.is_stock(copy.deepcopy(module))
    module.forward = lambda x: x
    assert not Chain.is_stock(module)


def test_other_methods_and_a_new_chain_after_the_old():
    module = Double()
    module_train = AddLayer(module, 1, lambda inner, mode=True: inner(mode), method="train")
    module_train.apply()
    assert module.train() is module
    module_train.undo()
    assert "train" not in vars(module)


def test_copy_of_a_wrapped_module_is_stock():
    module = nn.Sequential(nn.Linear(2, 2))
    AddLayer(module[0], 1, plus(1)).apply()
    twin = copy.deepcopy(module)
    x = torch.ones(1, 2)
    assert torch.equal(twin(x), torch.nn.functional.linear(x, module[0].weight, module[0].bias))
    assert torch.equal(module(x), twin(x) + 1)
    assert Chain.is_stock(twin[0])
    twin[0].weight.data.zero_()
    assert torch.equal(twin(x)[0], twin[0].bias), "the copy runs its own weights"
