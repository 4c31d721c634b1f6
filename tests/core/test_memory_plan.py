"""The memory plan against sums by hand, and its simulation against another one, which plays every event."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest

from diffusers_accel.core.memory_plan import (
    MemoryPlan,
    ModelSizes,
    Work,
    least_budget,
    plan_memory,
    simulate,
    slot_of,
    spread,
)

# --- the simulation --------------------------------------------------------------------------------------------------


def played(sizes, seconds, link, slots, repeats=90):
    """Seconds of one repetition, after many: both streams take their next item as soon as it may run."""
    streamed = [index for index, size in enumerate(sizes) if size]
    place = {index: slot_of(number, len(streamed), slots) for number, index in enumerate(streamed)}
    copies = [(turn, index) for turn in range(repeats) for index in streamed]
    runs = [(turn, index) for turn in range(repeats) for index in range(len(sizes))]
    held, loaded, events, ends = {}, set(), [], []
    now, idle = 0.0, {"copy", "run"}
    while len(ends) < repeats:
        if "copy" in idle and copies and place[copies[0][1]] not in held:
            item = copies.pop(0)
            held[place[item[1]]] = item
            idle.remove("copy")
            heapq.heappush(events, (now + sizes[item[1]] / link, "copy", item))
        elif "run" in idle and runs and (not sizes[runs[0][1]] or runs[0] in loaded):
            item = runs.pop(0)
            idle.remove("run")
            heapq.heappush(events, (now + seconds[item[1]], "run", item))
        else:
            now, kind, item = heapq.heappop(events)
            idle.add(kind)
            if kind == "copy":
                loaded.add(item)
                continue
            if sizes[item[1]]:
                del held[place[item[1]]]
            if item[1] == len(sizes) - 1:
                ends.append(now)
    half = repeats // 2
    return (ends[-1] - ends[half - 1]) / (repeats - half)


@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_every_event(slots):
    draw = random.Random(slots)
    for _ in range(60):
        count = draw.randint(1, 12)
        sizes = [draw.choice([0, 0, 1, 2, 5, 9]) for _ in range(count)]
        seconds = [draw.choice([1.0, 2.0, 3.0, 7.0]) for _ in range(count)]
        link = draw.choice([0.5, 1.0, 2.0])
        step = simulate(sizes, seconds, link, slots)
        assert step.seconds == pytest.approx(played(sizes, seconds, link, slots)), (sizes, seconds, link)
        assert (step.compute, step.copy) == (sum(seconds), sum(sizes) / link)


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_closed_forms(slots):
    # Copies of 5 s and computation of 3: the link never rests. The other way around, computation never does.
    assert simulate([10] * 12, [3.0] * 12, 2.0, slots).seconds == pytest.approx(12 * 5)
    assert simulate([10] * 12, [3.0] * 12, 2.0, slots).hidden == pytest.approx(1 - 24 / 60)
    assert simulate([6] * 12, [5.0] * 12, 2.0, slots).seconds == pytest.approx(12 * 5)
    assert simulate([6] * 12, [5.0] * 12, 2.0, slots).hidden == pytest.approx(1)
    # A block that stays lends its computation to the copies of its neighbours.
    assert simulate([10, 0] * 6, [3.0] * 12, 2.0, slots).seconds == pytest.approx(36)
    # Nothing to copy, and nothing known of the computation.
    assert simulate([0] * 3, [2.0] * 3, 2.0, slots) == simulate([0] * 3, [2.0] * 3, 1.0, 2)
    assert simulate([0] * 3, [2.0] * 3, 2.0, slots).hidden == 1
    assert simulate([4] * 4, [0.0] * 4, 2.0, slots).hidden == 0


@pytest.mark.parametrize("count", [3, 5, 9])
def test_bubble_of_two_slots(count):
    """The first and the last of an odd number share a slot: the first is copied while nothing computes."""
    assert simulate([6] * count, [5.0] * count, 2.0, 2).seconds == pytest.approx(count * 5 + 3)
    assert simulate([10] * count, [3.0] * count, 2.0, 2).seconds == pytest.approx(count * 5 + 3)
    assert simulate([6] * count, [5.0] * count, 2.0, 3).seconds == pytest.approx(count * 5)


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 16])
def test_slots_of_a_cycle(slots):
    for count in range(1, 80):
        places = [slot_of(index, count, slots) for index in range(count)]
        assert set(places) == set(range(min(slots, count)))
        pairs = list(itertools.pairwise(places))
        if count > 1 and (slots > 2 or count % 2 == 0):
            pairs.append((places[-1], places[0]))
        assert all(one != next_one for one, next_one in pairs), places


def test_spread():
    """Any run of equal blocks has its share, within one block."""
    assert spread([2.0] * 6, 2) == (False, False, True, False, False, True)
    assert spread([0.0] * 5, 2) == (False, False, True, False, True)
    for count in range(1, 40):
        for kept in range(count + 1):
            marks = spread([0.1] * count, kept)
            assert marks == tuple((index + 1) * kept // count > index * kept // count for index in range(count))


def test_spread_of_unequal_blocks():
    """Blocks of half the rate are streamed half as often, while none is streamed more than once."""
    # The slow ones are streamed 6, 4 and 3 times, and the fast ones 8, 8 and 6 times.
    marks = spread([1.0] * 8 + [2.0] * 8, 2)
    assert [sum(marks[:8]), sum(marks[8:])] == [2, 0]
    marks = spread([1.0] * 8 + [2.0] * 8, 4)
    assert [sum(marks[:8]), sum(marks[8:])] == [4, 0]
    marks = spread([1.0] * 12 + [2.0] * 12, 15)
    assert [sum(marks[:12]), sum(marks[12:])] == [9, 6]
    draw = random.Random(2)
    for _ in range(200):
        rates = [draw.choice([0.5, 1.0, 2.0, 8.0]) for _ in range(draw.randint(1, 30))]
        assert all(sum(spread(rates, kept)) == kept for kept in range(len(rates) + 1))
        assert spread(rates, 1) == spread([rate * 1e-12 for rate in rates], 1)


# --- levels ----------------------------------------------------------------------------------------------------------

ENCODER = ModelSizes("text_encoder", "text encoder", (30, 20), rest=15, mappable=True)  # 65 bytes
DENOISER = ModelSizes("transformer", "denoiser", (40,) * 4, (5,) * 4, 7, (1.0,) * 4)  # 187
VAE = ModelSizes("vae", "vae", rest=11)
MODELS = [ENCODER, DENOISER, VAE]  # 263
WORK = Work(text=3, denoise=50, vae={"whole": 60, "tiles": 20}, reserve=2)


def planned(budget=None, **options) -> MemoryPlan:
    # A link of 1e6 hides every copy, but none of a first block that shares its slot with the last.
    return plan_memory(MODELS, WORK, 1e6, budget=budget, **options)


@pytest.mark.parametrize(
    ("budget", "level", "vae", "resident", "peaks"),
    [
        (None, 0, "whole", 263, (268, 315, 325)),
        (325, 0, "whole", 263, (268, 315, 325)),
        (324, 1, "tiles", 263, (268, 315, 285)),
        (315, 1, "tiles", 263, (268, 315, 285)),
        # The encoder's 65 bytes are in host memory, and its two slots of 30 and 20 there while it runs.
        (314, 2, "whole", 198, (253, 250, 260)),
        (259, 2, "tiles", 198, (253, 250, 220)),
        # The denoiser's blocks stay, but for 20 bytes that are read in place.
        (252, 3, "whole", 178, (233, 230, 240)),
        # Three of its blocks go through two slots, or four through three: 138 bytes.
        (239, 3, "whole", 138, (193, 190, 200)),
        # All four go through two slots.
        (199, 3, "whole", 98, (153, 150, 160)),
        (159, 3, "tiles", 98, (153, 150, 120)),
        (153, 3, "tiles", 98, (153, 150, 120)),
    ],
)
def test_levels(budget, level, vae, resident, peaks):
    plan = planned(budget)
    assert (plan.level, plan.vae, plan.resident_bytes, tuple(plan.peaks.values())) == (level, vae, resident, peaks)
    assert plan.peak == max(peaks)
    assert [model.streamed for model in plan.models] == [level >= 2, level >= 3, False]
    assert (plan.slots, plan.slot_bytes) in {(0, 0), (2, 80), (3, 120)}


def test_memory_of_graphs_and_fragments():
    """Graphs keep their memory while text encoders and the VAE run; a VAE's tensors take more than their bytes."""
    work = Work(text=3, denoise=50, vae={"whole": 60, "tiles": 20}, reserve=2, graphs=30, fragmentation=1.5)
    plan = plan_memory(MODELS, work, 1e6)
    assert tuple(plan.peaks.values()) == (298, 315, 263 + 2 + 30 + 90)
    assert plan_memory(MODELS, work, 1e6, budget=plan.peak - 1).vae == "tiles"


def test_levels_that_are_asked_for():
    assert [planned(level=level).vae for level in range(4)] == ["whole", "tiles", "tiles", "tiles"]
    assert planned(level=0, budget=10).peak == 325
    assert planned(level=2, budget=1000).level == 2
    # Without a budget, no block stays: four slots of 40 bytes hide no more than two.
    plan = planned(level=3)
    assert (plan.slots, plan.slot_bytes, plan.model("transformer").resident) == (2, 80, (False,) * 4)
    assert planned(level=3, slots=4).slot_bytes == 160


def test_bytes_of_a_placement():
    plan = planned(199)
    encoder, denoiser, vae = plan.models
    assert (encoder.sizes.bytes, denoiser.sizes.bytes, vae.sizes.bytes) == (65, 187, 11)
    assert (encoder.resident_bytes, denoiser.resident_bytes, vae.resident_bytes) == (0, 7, 11)
    assert (encoder.host_bytes, denoiser.host_bytes, vae.host_bytes) == (65, 180, 0)
    assert (encoder.streamed_bytes, denoiser.streamed_bytes, plan.host_bytes) == ((30, 20), (40,) * 4, 245)
    assert plan.step("transformer") == simulate([40] * 4, [1.0] * 4, 1e6, 2)


def test_text_encoders():
    """Slots are there for one text encoder at a time, and one block needs one slot."""
    small = ModelSizes("small", "text encoder", (9, 4, 6, 7), rest=3, mappable=True)
    large = ModelSizes("large", "text encoder", (100,), rest=1, mappable=False)
    plan = plan_memory([small, large], Work(text=5), 1.0, level=2)
    assert plan.peaks == {"text": 1 + 5 + 100, "denoise": 1, "vae": 1}
    plan = plan_memory([small], Work(text=5), 1.0, level=2)
    assert plan.peaks == {"text": 5 + 9 + 7, "denoise": 0, "vae": 0}


def test_the_lowest_peak_is_what_is_left():
    plan = planned(152)
    assert (plan.level, plan.peak) == (3, 153)
    assert least_budget(planned()) == least_budget(plan) == 153


# --- blocks that stay ------------------------------------------------------------------------------------------------


def held(blocks, resident, slots):
    """Bytes of the blocks that stay, and of the slots of the others."""
    streamed = [size for size, stays in zip(blocks, resident, strict=True) if not stays]
    places = [slot_of(index, len(streamed), slots) for index in range(len(streamed))]
    slot_bytes = [max(size for size, place in zip(streamed, places, strict=True) if place == at) for at in set(places)]
    return sum(blocks) - sum(streamed) + sum(slot_bytes)


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_equal_blocks(slots):
    """Of 12 blocks of 10 bytes, those stay that fit beside the slots."""
    model = ModelSizes("transformer", "denoiser", (10,) * 12, rest=3)
    for budget in range(10 * slots + 8, 128):
        plan = plan_memory([model], Work(denoise=5), 1.0, budget=budget, level=3, slots=slots)
        most = (budget - 8) // 10 - slots
        assert sum(plan.models[0].resident) == most
        assert plan.peak == 8 + 10 * (most + slots) <= budget < plan.peak + 10
    assert sum(plan_memory([model], Work(denoise=5), 1.0, budget=128, level=3).models[0].resident) == 12


def test_the_most_that_fits():
    """Of unequal blocks too: whatever keeps more exceeds the budget."""
    draw = random.Random(0)
    for _ in range(60):
        blocks = tuple(draw.randint(1, 30) for _ in range(draw.randint(2, 14)))
        model = ModelSizes("transformer", "denoiser", blocks, rest=2)
        for slots in (2, 3, 4):
            marks = [spread([1.0] * len(blocks), kept) for kept in range(len(blocks) + 1)]
            needs = {sum(each): 2 + held(blocks, each, slots) for each in marks}
            budget = draw.randint(min(needs.values()), sum(blocks) + 2)
            plan = plan_memory([model], Work(), 1.0, budget=budget, level=3, slots=slots)
            kept = max(kept for kept, size in needs.items() if size <= budget)
            assert plan.models[0].resident == spread([1.0] * len(blocks), kept)
            assert plan.peak == needs[kept]


def test_the_number_of_slots_with_the_shortest_step():
    """Two slots leave a bubble that three do not; three take the place of a block that could stay."""
    model = ModelSizes("transformer", "denoiser", (10,) * 9, seconds=(4.0,) * 9)
    for budget, slots in ((30, 2), (40, 3), (50, 2), (60, 3)):
        assert plan_memory([model], Work(), 2.0, budget=budget, level=3).slots == slots
    for budget in range(20, 91):
        found = plan_memory([model], Work(), 2.0, budget=budget, level=3)
        each = [plan_memory([model], Work(), 2.0, budget=budget, level=3, slots=slots) for slots in (2, 3, 4)]
        fitting = [plan for plan in each if plan.peak <= budget]
        best = min(plan.step("transformer").seconds for plan in fitting)
        assert found.step("transformer").seconds == best
        assert found.peak == min(plan.peak for plan in fitting if plan.step("transformer").seconds == best)


def test_two_denoisers():
    """Both have the same share of their blocks on the GPU, and one set of slots, which the larger blocks determine."""
    first = ModelSizes("transformer", "denoiser", (10,) * 8)
    second = ModelSizes("transformer_2", "denoiser", (6,) * 4)
    # 20 bytes of slots and 8 blocks of 4 + 4 / 2 x 6 bytes.
    for budget, kept in ((20, 0), (29, 0), (30, 1), (45, 1), (46, 2), (56, 3), (71, 3), (72, 4)):
        plan = plan_memory([first, second], Work(), 1.0, budget=budget, slots=2, level=3)
        assert [sum(model.resident) for model in plan.models] == [kept, kept // 2]
        assert (plan.slot_bytes, plan.peak) == (20, 20 + 10 * kept + 6 * (kept // 2))


def test_what_cannot_be_met():
    """The least budget is met, and one byte less is not."""
    draw = random.Random(1)
    for _ in range(60):
        models = [
            ModelSizes(name, "denoiser", tuple(draw.choice([1, 2, 50]) for _ in range(draw.randint(1, 12))), rest=3)
            for name in ("transformer", "transformer_2")[: draw.randint(1, 2)]
        ]
        encoder = tuple(draw.randint(1, 90) for _ in range(draw.randint(1, 3)))
        models.append(ModelSizes("text_encoder", "text encoder", encoder, rest=draw.randint(0, 9), mappable=True))
        work = Work(draw.randint(0, 9), draw.randint(0, 9), {"whole": 80, "tiles": draw.randint(0, 9)}, 1)
        for slots in (None, 2, 4):
            least = least_budget(plan_memory(models, work, 1.0, budget=0), slots)
            met = plan_memory(models, work, 1.0, budget=least, slots=slots)
            assert met.peak == least
            missed = plan_memory(models, work, 1.0, budget=least - 1, slots=slots)
            assert missed.peak == least
            assert plan_memory(models, work, 1.0, budget=0, slots=slots).peak == least


def test_least_of_unequal_blocks():
    """Fewer blocks may need smaller slots: in turns, the large ones share a slot."""
    blocks = (100, 1, 100, 1, 1, 100, 1, 100, 1)
    model = ModelSizes("transformer", "denoiser", blocks)
    # All of them need two slots of 100. Without the fifth and the last one, slots of 100 and 1 suffice.
    plan = plan_memory([model], Work(), 1.0, budget=110, slots=2)
    assert plan.models[0].resident == (*(False,) * 4, True, *(False,) * 3, True)
    assert (plan.peak, plan.slot_bytes, least_budget(plan, 2)) == (103, 101, 103)
    # Every third block is large: three slots of 100, 1 and 1. Two hold 100 and 1 without the last one of each three.
    model = ModelSizes("transformer", "denoiser", (100, 1, 1) * 4)
    assert least_budget(plan_memory([model], Work(), 1.0), 2) == 105
    assert least_budget(plan_memory([model], Work(), 1.0)) == 102


@pytest.mark.parametrize(
    ("seconds", "link", "bits", "kept"),
    [(0.123, 50e9, 16, 11.1e9), (0.080, 50e9, 8, 4.6e9), (0.570, 24e9, 16, 3.6e9)],
)
def test_flux(seconds, link, bits, kept):
    """FLUX.1 of 1024 x 1024 on an H200, in 16 and in 8 bits, and on an RTX 4090. Modulations are not streamed. With
    `kept` bytes of blocks on the GPU, copies take as long as computation, and slots come on top."""
    double, single = int(0.454e9 * bits / 16), int(0.223e9 * bits / 16)
    blocks = (double,) * 19 + (single,) * 38
    model = ModelSizes("transformer", "denoiser", blocks, (9,) * 57, 250_000_000, (seconds / 57,) * 57)
    budget = int(kept) + 4 * double + model.rest
    plan = plan_memory([model], Work(), link, budget=budget, level=3)
    step = plan.step("transformer")
    assert plan.peak <= budget
    assert step.compute == pytest.approx(seconds)
    assert (sum(blocks) - kept) / link == pytest.approx(seconds, rel=0.03)
    assert step.hidden >= 0.97
    # Double blocks have as much computation for twice the bytes: more of them stay.
    resident = plan.model("transformer").resident
    assert sum(resident[:19]) / 19 > sum(resident[19:]) / 38 + 0.1
