"""Edits and the journal: applied as yielded, unwound on any error, undone last-in first-out."""

from __future__ import annotations

import pytest
from torch import nn

from diffusers_accel.core.edits import AddLayer, Journal, SetAttr, SetItem, SwapModule


class Thing:
    kind = "class attribute"


def test_set_attr_shows_the_class_attribute_again():
    thing, journal = Thing(), Journal()
    journal.apply([SetAttr(thing, "kind", "instance"), SetAttr(thing, "kind", "twice"), SetAttr(thing, "new", 1)])
    assert (thing.kind, thing.new) == ("twice", 1)
    journal.undo()
    assert vars(thing) == {} and thing.kind == "class attribute"


def test_set_item_and_swap_module_keep_order():
    mapping, parent = {"a": 1}, nn.Sequential(nn.Identity(), nn.ReLU())
    first, journal = parent[0], Journal()
    journal.apply([SetItem(mapping, "a", 2), SetItem(mapping, "b", 3), SwapModule(parent, "0", nn.Tanh())])
    assert mapping == {"a": 2, "b": 3} and isinstance(parent[0], nn.Tanh)
    assert list(parent._modules) == ["0", "1"]
    journal.undo()
    assert mapping == {"a": 1} and parent[0] is first


@pytest.mark.parametrize("error", [RuntimeError("midway"), KeyboardInterrupt()])
def test_an_error_midway_unwinds_everything(error):
    thing, module, journal, seen = Thing(), nn.Linear(1, 1), Journal(), []

    def edits():
        yield SetAttr(thing, "kind", "changed")
        seen.append(thing.kind)
        yield AddLayer(module, 1, lambda inner, x: inner(x))
        seen.append("forward" in vars(module))
        raise error

    with pytest.raises(type(error)):
        journal.apply(edits())
    assert seen == ["changed", True], "edits apply as they are yielded"
    assert vars(thing) == {} and "forward" not in vars(module) and len(journal) == 0


def test_undo_twice_is_harmless():
    thing, journal = Thing(), Journal()
    journal.apply([SetAttr(thing, "kind", 1)])
    journal.undo()
    thing.kind = "the user's"
    journal.undo()
    assert thing.kind == "the user's"
