"""Every tiny pipeline builds, repeats bit for bit, gives finite varied output, and depends on its blocks."""

from __future__ import annotations

import pytest
import torch

from . import TINY, build


def tensors(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def block_lists(denoiser):
    """The top-level ModuleLists of a denoiser that hold transformer blocks."""
    return {
        name: child
        for name, child in denoiser.named_children()
        if isinstance(child, torch.nn.ModuleList)
        and len(child) > 1
        and type(child[0]).__name__.endswith(("Block", "Layer"))
    }


@pytest.mark.parametrize("name", list(TINY))
def test_tiny(name):
    tiny = TINY[name]
    pipe = build(name)
    assert all(getattr(pipe, d, None) is not None for d in tiny.denoisers)
    first = tensors(tiny.run(pipe))
    second = tensors(tiny.run(pipe))
    for a, b in zip(first, second, strict=True):
        assert torch.isfinite(a).all()
        assert a.float().std() > 1e-3
        assert torch.equal(a, b)

    again = tensors(tiny.run(build(name)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "a rebuilt pipeline differs"

    # one block changed, and the output changes: the output depends on the blocks of each denoiser
    for attribute in tiny.denoisers:
        denoiser = getattr(pipe, attribute)
        lists = block_lists(denoiser)
        assert lists, f"{attribute} has no list of blocks"
        for list_name, blocks in lists.items():
            saved = {k: v.clone() for k, v in blocks[0].state_dict().items()}
            with torch.no_grad():
                for parameter in blocks[0].parameters():
                    parameter.mul_(0.5)
            changed = tensors(tiny.run(pipe))
            blocks[0].load_state_dict(saved)
            gap = max((a - b).abs().max().item() for a, b in zip(first, changed, strict=True))
            assert gap > 1e-4, f"{attribute}.{list_name}[0] hardly reaches the output: {gap}"
