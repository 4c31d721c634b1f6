"""Which of a call's arguments have something for every sample of a batch."""

from __future__ import annotations

import torch
from tiny import build

from diffusers_accel.api import _context
from diffusers_accel.core.comm import Group
from diffusers_accel.core.later import Later
from diffusers_accel.features.parallel.cfg_parallel import _MAX_DEFERRED, CFGParallel, _Call, _TensorMeta
from diffusers_accel.features.parallel.data_parallel import select_samples


def test_samples_of_what_has_them():
    (denoiser,) = _context(build("wan-vace")).denoisers
    latents = torch.arange(8.0).view(2, 4)
    given = {
        "hidden_states": latents,
        "timestep": torch.tensor([1.0, 2.0]),
        "encoder_hidden_states": (latents, None),
        "img_shapes": [[(1, 4, 4)], [(1, 4, 6)]],
        "attention_kwargs": {"mask": latents.bool(), "scale": 2.0},
        "return_dict": False,
        # One for each of two blocks, beside a batch of two.
        "control_hidden_states_scale": torch.tensor([0.5, 0.7]),
        "one_for_all": latents[:1],
        "numbers": [3, 4],
    }
    found = select_samples(denoiser, given, 2, 1, 1)
    assert torch.equal(found["hidden_states"], latents[1:]) and found["timestep"].tolist() == [2.0]
    assert torch.equal(found["encoder_hidden_states"][0], latents[1:]) and found["encoder_hidden_states"][1] is None
    assert found["img_shapes"] == [[(1, 4, 6)]] and found["return_dict"] is False
    assert torch.equal(found["attention_kwargs"]["mask"], latents[1:].bool())
    assert found["attention_kwargs"]["scale"] == 2.0
    for name in ("control_hidden_states_scale", "one_for_all"):
        assert torch.equal(found[name], given[name])
    assert found["numbers"] == [3, 4]


def test_what_waits_for_a_branch_that_does_not_come():
    """Some operations are put off, and not a whole VAE."""
    context = _context(build("wan"))
    branches = CFGParallel(context, context.denoisers[0], Group(None, (0,), 0))
    branches._calls, branches._expected = 1, 2
    x = branches._later(_Call([(0, 1)], [torch.ones(3)], _TensorMeta((3,), torch.float32)))
    for _ in range(_MAX_DEFERRED):
        assert type(x) is Later
        x = x + 1
    x = x + 1
    assert type(x) is torch.Tensor and x.tolist() == [_MAX_DEFERRED + 2.0] * 3
