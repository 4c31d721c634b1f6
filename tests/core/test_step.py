"""Step state against real schedulers: requests, steps and branches, without ever counting calls over time."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusers_accel.core.step import StepClock


def clock_for(scheduler):
    return StepClock(lambda: scheduler)


def step_through(clock, scheduler, order=("cond", "uncond"), branches=2, begin=0):
    """Runs the loop a stock pipeline runs, and returns the clock's place of each call."""
    sample, seen = torch.zeros(1, 4), []
    for timestep in scheduler.timesteps[begin:]:
        for _ in range(branches):
            state = clock.enter("transformer", order, timestep.expand(1))
            clock.leave(state)
            seen.append((state.request, state.step, state.branch, state.last, state.repeated))
        sample = scheduler.step(torch.ones(1, 4), timestep, sample, return_dict=False)[0]
    return seen


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(), DDIMScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_every_call_is_placed(scheduler):
    clock = clock_for(scheduler)
    for request in (1, 2):
        scheduler.set_timesteps(4)
        seen = step_through(clock, scheduler)
        expected = [(request, step, branch, step == 3, False) for step in range(4) for branch in ("cond", "uncond")]
        assert seen == expected


def test_a_request_that_broke_off_does_not_leak():
    scheduler = FlowMatchEulerDiscreteScheduler()
    clock = clock_for(scheduler)
    scheduler.set_timesteps(5)
    clock.enter("transformer", ("cond", "uncond"))
    clock.abandon()
    scheduler.set_timesteps(3)
    seen = step_through(clock, scheduler)
    assert [entry[:3] for entry in seen[:2]] == [(2, 0, "cond"), (2, 0, "uncond")]


def test_image_to_image_starts_late():
    scheduler = FlowMatchEulerDiscreteScheduler()
    clock = clock_for(scheduler)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    state = clock.enter("transformer")
    assert (state.first, state.step, state.total) == (2, 2, 6)


def test_the_context_names_the_branch_and_a_second_call_is_repeated():
    scheduler = FlowMatchEulerDiscreteScheduler()
    clock = clock_for(scheduler)
    scheduler.set_timesteps(2)
    clock.context = "cond"
    first = clock.enter("transformer")
    clock.leave(first)
    second = clock.enter("transformer")
    assert (first.repeated, second.repeated) == (False, True)


def test_no_scheduler_means_an_unknown_place():
    clock = StepClock(lambda: None)
    assert clock.enter("transformer").repeated
