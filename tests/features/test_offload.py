"""Offloading on every family: bit-equal to stock while blocks are streamed, in any order of copies, and restored."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from offloading import on_cpu
from tape import Tape, TapeBackend
from tiny import ALL, TINY, build, same
from transfers import HostTransfers

from diffusers_accel import (
    CompileConfig,
    ConfigError,
    DBCacheConfig,
    OffloadConfig,
    StepMaskConfig,
    Unsupported,
    accelerate,
    explain,
    from_pretrained,
    restore,
    stats,
)
from diffusers_accel.core.graphs import GRAPH_BACKENDS
from diffusers_accel.core.platform import Device
from diffusers_accel.core.streaming import CudaTransfers, RecordedCopies, StreamedBlock, WeightStream
from diffusers_accel.features.offload import planning

FORMATS = ["fp8", "fp8-tensor", "fp8-block", "int8", "nvfp4", "svdq-nvfp4", "torchao:int8_weight_only"]
# Every denoiser class, and every way in which pipelines call theirs.
PIPELINES = (
    "flux", "flux-true-cfg", "flux-controlnet", "flux2", "flux2-klein", "wan", "wan22", "wan22-low-only",
    "wan-ti2v-i2v", "wan-vace", "ltx2-stg", "ltx23-stg", "ltx2-i2v", "qwen", "qwen-edit-plus", "cosmos",
    "cosmos-predict2-v2w", "cosmos-predict25", "cosmos3-i2v", "sd3-slg", "sd35", "pixart", "auraflow", "cogvideox",
    "ltx", "z-image",
)  # fmt: skip
FAMILIES = ["flux", "flux2", "wan", "ltx2", "qwen", "cosmos", "cosmos3", "sd3"]


@pytest.fixture(params=["early", "late"])
def cpu(request, monkeypatch):
    with on_cpu(monkeypatch, request.param) as made:
        yield made


@pytest.fixture
def late(monkeypatch):
    with on_cpu(monkeypatch) as made:
        yield made


def weights(pipe):
    """Copies of all weights, and the objects that hold them."""
    models = [item for item in pipe.components.values() if isinstance(item, torch.nn.Module)]
    return [(item, item.detach().clone()) for model in models for item in (*model.parameters(), *model.buffers())]


def row_of(pipe, **sections):
    """The row of `offload` in an explanation."""
    (row,) = [row for row in explain(pipe, **sections).rows if row.feature == "offload"]
    return row


@pytest.mark.parametrize("name", PIPELINES)
def test_streamed_as_stock(name, late):
    entry, pipe = TINY[name], build(name)
    before, stock = weights(pipe), entry.run(pipe, steps=2)
    accelerate(pipe, offload={"level": 3, "prompt_cache": 0})
    for _ in range(2):  # the second request finds blocks in the slots
        assert same(entry.run(pipe, steps=2), stock)
    restore(pipe)
    after = weights(pipe)
    assert all(one is other and torch.equal(a, b) for (one, a), (other, b) in zip(before, after, strict=True))
    assert same(entry.run(pipe, steps=2), stock)


@pytest.mark.parametrize(
    ("name", "prefetch"), [("flux", 1), ("flux", 2), ("flux", 5), ("flux", 15), ("wan22", 1), ("qwen", 2)]
)
def test_any_number_of_slots(name, prefetch, cpu):
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=3)
    accelerate(pipe, offload=OffloadConfig(level=3, prefetch=prefetch))
    assert same(entry.run(pipe, steps=3), stock) and same(entry.run(pipe, steps=3), stock)


def test_blocks_stay_as_the_budget_allows(cpu):
    entry, pipe = TINY["flux"], build("flux")
    stock, all_blocks = entry.run(pipe), row_of(pipe, offload=3).modules
    with pytest.raises(Unsupported, match="the least that this pipeline needs") as caught:
        accelerate(pipe, offload="1KiB")
    least = int(next(word for word in str(caught.value).split("'") if word.endswith("MiB")).removesuffix("MiB"))
    streamed = []
    for more in range(0, 400, 40):
        budget = least * 2**20 + more * 2**10
        streamed.append(row_of(pipe, offload=budget).modules)
        accelerate(pipe, offload=budget)
        assert same(entry.run(pipe), stock)
    assert streamed == sorted(streamed, reverse=True) and streamed[0] <= all_blocks
    assert len(set(streamed)) > 1


def test_only_the_named_stages(late):
    entry, pipe = TINY["flux"], build("flux")
    stock = entry.run(pipe)
    accelerate(pipe, offload={"level": 3, "stages": ["text_encoder_2"]})
    (streamed,) = [made for made in late if made.locked]
    assert same(entry.run(pipe), stock)
    assert streamed.locked < sum(item.numel() * 4 for item in pipe.text_encoder_2.parameters()) * 1.1


class TestSteps:
    """Skipped steps, two experts, exceptions: the right block is in its slot, and copies go on being ahead."""

    @pytest.mark.parametrize("graphs", [False, True])
    @pytest.mark.parametrize("cache", ["mask", "dbcache"])
    def test_skipped(self, cache, graphs, cpu, monkeypatch):
        monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
        rule = {
            "mask": StepMaskConfig(mask=(1, 1, 1, 0, 1, 0, 0, 1)),
            "dbcache": DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=9.0,
                max_continuous_cached_steps=1,
            ),
        }[cache]  # fmt: skip
        entry, pipe = TINY["flux"], build("flux")
        accelerate(pipe, attention="sdpa", cache=rule)
        resident = entry.run(pipe, steps=8)
        accelerate(pipe, attention="sdpa", cache=rule, offload=3, cuda_graph=graphs)
        assert same(entry.run(pipe, steps=8), resident) and same(entry.run(pipe, steps=8), resident)
        assert stats(pipe).steps_skipped
        assert not graphs or stats(pipe).graph_replays

    def test_copies_are_ahead(self, late):
        entry, pipe = TINY["flux"], build("flux")
        accelerate(pipe, offload=3)
        entry.run(pipe, steps=4)
        blocks, counts = (
            len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks),
            None,
        )
        counts = stats(pipe).offload
        assert counts["ahead"] + counts["late"] == 4 * blocks
        assert counts["late"] == 0

    def test_two_experts_take_turns(self, cpu):
        entry, pipe = TINY["wan22"], build("wan22")
        stock = entry.run(pipe, steps=6)
        accelerate(pipe, offload=3)
        assert same(entry.run(pipe, steps=6), stock) and same(entry.run(pipe, steps=6), stock)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("place", [0, 1, -1])
    def test_interrupted(self, place, error, cpu):
        entry, pipe = TINY["flux"], build("flux")
        stock, before = entry.run(pipe), weights(pipe)
        accelerate(pipe, offload=3)
        entry.run(pipe)
        block = pipe.transformer.transformer_blocks[place]

        def fail(*_):
            raise error

        handle = block.norm1.register_forward_pre_hook(fail)
        with pytest.raises(error):
            entry.run(pipe)
        handle.remove()
        # Outside of a forward the model has its own weights, also after an error.
        assert all(torch.equal(item, value) for item, value in before)
        assert same(entry.run(pipe), stock)

    def test_a_block_called_by_itself(self, late):
        entry, pipe = TINY["qwen"], build("qwen")
        block, given = pipe.transformer.transformer_blocks[1], []
        handle = block.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
        entry.run(pipe)
        handle.remove()
        with torch.no_grad():
            stock = block(*given[0][0], **given[0][1])
            accelerate(pipe, offload=3)
            entry.run(pipe)
            assert same(block(*given[0][0], **given[0][1]), stock)

    def test_gradients_are_refused(self, late):
        pipe = build("flux")
        pipe.transformer.requires_grad_(True)
        accelerate(pipe, offload=3)
        with pytest.raises(Unsupported, match="gradients"), torch.enable_grad():
            pipe.transformer(hidden_states=torch.zeros(1, 4, 4))


class TestFormats:
    """Quantized layers stream in their bytes."""

    @pytest.mark.parametrize(
        "algo", ["fp8", "fp8-tensor", "fp8-block", "int8", "nvfp4", "svdq-nvfp4", "torchao:int8_weight_only"]
    )
    def test_as_resident(self, algo, late):
        if algo.startswith("torchao"):
            pytest.importorskip("torchao")
        entry, pipe = TINY["flux"], build("flux")
        stock, linear = entry.run(pipe), {"algo": algo, "plan": {"*.to_q": algo, "*.ff.net.2": algo}, "smallest": 0}
        try:
            accelerate(pipe, linear=linear)
        except Unsupported as error:
            pytest.skip(str(error))
        resident = entry.run(pipe)
        assert not same(resident, stock)
        accelerate(pipe, linear=linear, offload=3)
        assert same(entry.run(pipe), resident)
        restore(pipe)
        assert same(entry.run(pipe), stock)

    def test_the_plan_knows_the_format(self, late):
        pipe = build("flux")
        linear = {"algo": "fp8", "smallest": 0}

        def copied(**sections):
            (note,) = [
                note
                for note in row_of(pipe, **sections).notes
                if note.startswith("transformer: ") and "streamed" in note
            ]
            return float(note.split("streamed, ")[1].split(" MiB")[0])

        assert copied(offload=3, linear=linear) < 0.6 * copied(offload=3)

    def test_the_plan_is_kept(self, late, monkeypatch):
        """What `explain` says of quantized blocks is done: they stay on the GPU if they fit."""
        entry, pipe = TINY["flux"], build("flux")
        linear = {"algo": "fp8", "smallest": 0}
        # The largest budget in which stock weights must be streamed.
        budget, more = 0, 2**26
        while more > 2**12:
            refused = row_of(pipe, offload=budget + more).refused
            if refused or row_of(pipe, offload=budget + more).action.startswith("level 3"):
                budget += more
            more //= 2
        sections = {"offload": budget, "linear": linear}
        assert not row_of(pipe, **sections).action.startswith("level 3")
        accelerate(pipe, **sections)
        entry.run(pipe)
        assert "bytes" not in stats(pipe).offload


class TestWeights:
    """Weights that are read and written while they are offloaded."""

    def test_saved(self, late, tmp_path):
        pipe = build("flux")
        before = {name: item.clone() for name, item in pipe.transformer.state_dict().items()}
        accelerate(pipe, offload=3)
        TINY["flux"].run(pipe)
        now = pipe.transformer.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
        pipe.transformer.save_pretrained(tmp_path)
        again = type(pipe.transformer).from_pretrained(tmp_path)
        assert all(torch.equal(item, before[name]) for name, item in again.state_dict().items())

    def test_copied(self, late):
        entry, pipe = TINY["flux"], build("flux")
        stock = entry.run(pipe)
        accelerate(pipe, offload=3)
        entry.run(pipe)
        twin = copy.deepcopy(pipe)
        assert same(entry.run(twin), stock) and same(entry.run(pipe), stock)

    @pytest.mark.parametrize("write", ["add_", "data", "assign", "load_state_dict", "load_assign"])
    def test_written(self, write, cpu):
        entry, pipe, plain = TINY["flux"], build("flux"), build("flux")
        other = {name: item + 0.1 for name, item in plain.transformer.state_dict().items()}

        def change(model):
            layer = model.transformer_blocks[1].attn.to_q
            with torch.no_grad():
                if write == "add_":
                    layer.weight.add_(0.1)
                elif write == "data":
                    layer.weight.data += 0.1
                elif write == "assign":
                    layer.weight = torch.nn.Parameter(layer.weight + 0.1, requires_grad=False)
                else:
                    model.load_state_dict(other, assign=write == "load_assign")

        accelerate(pipe, offload=3)
        entry.run(pipe)
        for each in (pipe, plain):
            change(each.transformer)
        assert same(entry.run(pipe), entry.run(plain))
        restore(pipe)
        assert same(entry.run(pipe), entry.run(plain))

    def test_written_between_steps(self, cpu):
        entry, pipe, plain = TINY["flux"], build("flux"), build("flux")

        def write(pipe, step, timestep, kwargs):
            if step == 1:
                for block in pipe.transformer.transformer_blocks:
                    with torch.no_grad():
                        block.attn.to_q.weight.add_(0.1)
            return kwargs

        accelerate(pipe, offload=3)
        found, expected = (entry.run(each, callback_on_step_end=write) for each in (pipe, plain))
        assert same(found, expected)

    def test_cast_is_refused(self, late):
        entry, pipe = TINY["flux"], build("flux")
        accelerate(pipe, offload=3)
        pipe.transformer.to(torch.float64)
        with pytest.raises(Unsupported, match=r"was torch\.float32"):
            entry.run(pipe)
        restore(pipe)
        assert {item.dtype for item in pipe.transformer.parameters()} == {torch.float64}

    @pytest.mark.parametrize("name", ["flux", "wan", "qwen"])
    def test_lora_after(self, name, cpu):
        peft = pytest.importorskip("peft")
        entry, pipe, plain = TINY[name], build(name), build(name)
        stock = entry.run(pipe)
        accelerate(pipe, offload=3)
        entry.run(pipe)
        lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        with torch.random.fork_rng():
            for each in (pipe, plain):
                torch.manual_seed(0)
                each.transformer.add_adapter(lora, "one")
        assert same(entry.run(pipe), with_lora := entry.run(plain)) and not same(with_lora, stock)
        for each in (pipe, plain):
            each.transformer.fuse_lora()
        assert same(entry.run(pipe), entry.run(plain))
        for each in (pipe, plain):
            each.transformer.unfuse_lora()
            each.transformer.delete_adapters("one")
        assert same(entry.run(pipe), entry.run(plain))
        restore(pipe)
        assert same(entry.run(pipe), entry.run(plain))

    def test_lora_before(self, cpu):
        peft = pytest.importorskip("peft")
        entry, pipe = TINY["flux"], build("flux")
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "one")
        stock = entry.run(pipe)
        accelerate(pipe, offload=3)
        assert same(entry.run(pipe), stock)
        pipe.transformer.disable_adapters()
        without = entry.run(pipe)
        restore(pipe)
        assert same(entry.run(pipe), without) and not same(without, stock)


class TestGraphs:
    """CUDA graphs record copies."""

    @pytest.fixture(autouse=True)
    def tape(self, monkeypatch):
        monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_as_stock(self, name, late):
        entry, pipe = TINY[name], build(name)
        stock = entry.run(pipe, steps=4)
        accelerate(pipe, attention="sdpa", offload=3, cuda_graph=True)
        for _ in range(2):
            assert same(entry.run(pipe, steps=4), stock)
        assert stats(pipe).graph_replays

    def test_sizes_take_turns(self, cpu):
        entry, pipe = TINY["flux"], build("flux")
        stock = [entry.run(pipe, steps=4, height=size) for size in (64, 32)]
        accelerate(pipe, attention="sdpa", offload=3, cuda_graph=True)
        for _ in range(3):
            for size, expected in zip((64, 32), stock, strict=True):
                assert same(entry.run(pipe, steps=4, height=size), expected)

    def test_pageable_memory_runs_without(self, late, monkeypatch):
        entry, pipe = TINY["flux"], build("flux")
        stock = entry.run(pipe, steps=4)
        accelerate(pipe, attention="sdpa", offload={"level": 3, "pin_memory": False}, cuda_graph=True)
        with pytest.warns(UserWarning, match="pageable host memory"):
            assert same(entry.run(pipe, steps=4), stock)
        assert not stats(pipe).graph_replays
        restore(pipe)
        assert same(entry.run(pipe, steps=4), stock)


class TestHostMemory:
    def test_a_bound(self, late):
        entry, pipe = TINY["flux"], build("flux")
        stock = entry.run(pipe)
        with pytest.warns(UserWarning, match="offload.ram"):
            accelerate(pipe, offload={"level": 3, "ram": "300KiB"})
        assert same(entry.run(pipe), stock)
        assert 0 < sum(made.locked for made in late) <= 300 * 1024
        restore(pipe)
        assert same(entry.run(pipe), stock)

    def test_too_little_on_the_machine(self, late, monkeypatch):
        from diffusers_accel.features import offload

        monkeypatch.setattr(offload, "available_bytes", lambda: 2**20)
        entry, pipe = TINY["flux"], build("flux")
        stock = entry.run(pipe)
        with pytest.warns(UserWarning, match="free host memory does not suffice"):
            accelerate(pipe, offload=3)
        assert not sum(made.locked for made in late)
        assert same(entry.run(pipe), stock)


class TestRefused:
    """Refusals name the thing, the reason and the way out, before anything was changed."""

    def test_without_a_gpu(self):
        pipe = build("flux")
        with pytest.raises(Unsupported, match=r"it runs on cpu.*offload=None"):
            accelerate(pipe, offload="12GiB")
        assert not explain(pipe, offload=3).ok

    def test_a_budget_that_is_too_small(self, late):
        entry, pipe = TINY["flux"], build("flux")
        stock = entry.run(pipe)
        with pytest.raises(Unsupported, match=r"the least that this pipeline needs is [0-9.]+ MiB") as caught:
            accelerate(pipe, offload="1MiB")
        (least,) = [word for word in str(caught.value).split("'") if word.endswith("MiB")]
        accelerate(pipe, offload=least)
        assert same(entry.run(pipe), stock)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("12", "such as '12GiB'"), ("much", "such as '12GiB'"), (-1, "level from 0 to 3"), (1.5, "whole number"),
            ({"level": 4}, "Nearest: 3"), ({"vram": 0}, "Nearest: 1"), ({"prefetch": 0}, "Nearest: 1"),
            ({"stages": []}, "not an empty one"), ({"enable": "yes"}, "true or false"), ({"levle": 3}, "'level'"),
        ],
    )  # fmt: skip
    def test_nonsense(self, given, message):
        with pytest.raises(ConfigError, match=message):
            accelerate(build("flux"), offload=given)

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"offload": {"level": 3, "stages": ["transfromer"]}}, "no such model"),
            ({"offload": 3, "compile": "max-autotune"}, "records graphs"),
            ({"offload": 3, "cuda_graph": {"text_encoders": True}}, "text_encoders=False"),
        ],
    )
    def test_combinations(self, sections, message, late, monkeypatch):
        monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
        pipe = build("flux")
        with pytest.raises(Unsupported, match=message):
            accelerate(pipe, **sections)


@pytest.mark.parametrize("name", sorted(set(ALL) - set(TINY)))
def test_unets(name, late):
    entry, pipe = ALL[name], build(name)
    stock = entry.run(pipe)
    accelerate(pipe, offload=3)
    assert same(entry.run(pipe), stock)


def test_stand_in_sees_races(monkeypatch):
    """The tests above can fail: without one kind of wait each, something differs or nothing orders it."""
    entry, pipe = TINY["flux"], build("flux")
    stock = entry.run(pipe)

    def run(method, order):
        with monkeypatch.context() as patch, on_cpu(patch, order):
            patch.setattr(HostTransfers, method, lambda *_: None)
            accelerate(pipe, offload=3)
            try:
                assert same(entry.run(pipe), stock)
            finally:
                restore(pipe)

    for method, order in (("copy_after", "early"), ("compute_after", "late")):
        with pytest.raises(AssertionError):
            run(method, order)


def test_stand_in_sees_races_of_graphs(monkeypatch):
    """As above, of the two events that cross a graph's bounds."""
    monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
    entry, pipe = TINY["flux"], build("flux")
    stock = entry.run(pipe)

    def run(order, *patches):
        with monkeypatch.context() as patch, on_cpu(patch, order):
            for patched in patches:
                patch.setattr(*patched)
            accelerate(pipe, offload={"level": 3, "prefetch": 1}, cuda_graph=True)
            try:
                assert all(same(entry.run(pipe), stock) for _ in range(3))
                assert stats(pipe).graph_replays
            finally:
                restore(pipe)

    wait = HostTransfers.compute_after

    def waits_for_its_own(transfers, event):
        if Tape.active is None or not event.external:
            wait(transfers, event)

    run("early")
    run("late")
    for order, patched in (
        ("early", (RecordedCopies, "is_last", lambda copies, block: block in copies._entry)),
        ("late", (HostTransfers, "compute_after", waits_for_its_own)),
    ):
        with pytest.raises(AssertionError):
            run(order, patched)


def test_names_of_the_seam():
    """The stand-in has the methods of the real one."""
    public = {name for name in vars(CudaTransfers) if not name.startswith("_")}
    assert public <= set(vars(HostTransfers))


class TestDiffusersOffloading:
    """Offloading that diffusers has enabled is taken over, and put back."""

    KINDS = ("model", "sequential", "group")

    @staticmethod
    def enable(pipe, kind):
        if kind == "group":
            cpu = torch.device("cpu")
            pipe.transformer.enable_group_offload(
                onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
            )
        else:
            getattr(pipe, f"enable_{kind}_cpu_offload")(device="cpu")

    @staticmethod
    def enabled(pipe):
        hooks = sum(hasattr(part, "_hf_hook") for part in pipe.transformer.modules())
        hooks += sum(
            len(part._diffusers_hook.hooks) for part in pipe.transformer.modules() if hasattr(part, "_diffusers_hook")
        )
        return hooks, {item.device.type for item in pipe.transformer.parameters()}

    @pytest.mark.parametrize(
        "sections", [{}, {"linear": {"algo": "fp8", "smallest": 0}, "fuse": True}, {"cuda_graph": True}]
    )
    # accelerate's sequential offloading does not run with the CPU as its device: it is put back, and not called.
    @pytest.mark.parametrize(
        ("kind", "called"),
        [("model", False), ("model", True), ("group", False), ("group", True), ("sequential", False)],
    )
    def test_taken_over(self, kind, called, sections, late, monkeypatch):
        monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
        entry, pipe, plain = TINY["flux"], build("flux"), build("flux")
        stock = entry.run(plain)
        if sections:
            accelerate(plain, attention="sdpa", **sections)
        expected = entry.run(plain)
        self.enable(pipe, kind)
        if called:
            entry.run(pipe)
        before = self.enabled(pipe)
        assert before[0]
        (row,) = [row for row in explain(pipe, offload=3).rows if row.feature == "diffusers offload"]
        assert "ends until restore" in row.action
        accelerate(pipe, attention="sdpa", **sections, offload=3)
        assert not self.enabled(pipe)[0]
        assert same(entry.run(pipe), expected) and same(entry.run(pipe), expected)
        restore(pipe)
        assert self.enabled(pipe) == before
        assert kind == "sequential" or same(entry.run(pipe), stock)

    @pytest.mark.parametrize("kind", KINDS)
    def test_refused_budget_leaves_it(self, kind, late):
        pipe = build("flux")
        self.enable(pipe, kind)
        before = self.enabled(pipe)
        with pytest.raises(Unsupported):
            accelerate(pipe, offload="1KiB")
        assert self.enabled(pipe) == before


class TestLoading:
    """Pipelines that are loaded to be offloaded are never on the GPU as a whole: they stay on the host until then."""

    def test_from_pretrained(self, late, tmp_path):
        entry, stock = TINY["flux"], build("flux")
        stock.save_pretrained(tmp_path)
        expected = entry.run(type(stock).from_pretrained(tmp_path, dtype=torch.float32))
        pipe = from_pretrained(tmp_path, dtype=torch.float32, offload=3)
        assert stats(pipe).requests == 0 and sum(made.locked for made in late)
        pipe.set_progress_bar_config(disable=True)
        # Weights in a file have other addresses than in slabs, by which products on the CPU round otherwise.
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(entry.run(pipe), expected, **close)
        accelerate(pipe, attention="sdpa", offload=3)
        torch.testing.assert_close(entry.run(pipe), expected, **close)
        loaded = type(stock).from_pretrained(tmp_path, dtype=torch.float32).transformer.state_dict()
        restore(pipe)
        torch.testing.assert_close(entry.run(pipe), expected, **close)
        assert all(torch.equal(item, loaded[name]) for name, item in pipe.transformer.state_dict().items())

    def test_a_device_map_is_refused(self, tmp_path):
        with pytest.raises(Unsupported, match="device_map"):
            from_pretrained(tmp_path, offload="12GiB", device_map="balanced")

    def test_without_a_gpu(self, tmp_path):
        build("flux").save_pretrained(tmp_path)
        with pytest.raises(Unsupported, match="offload=None"):
            from_pretrained(tmp_path, offload="12GiB")


def test_a_graph_copies_its_own_blocks(late, monkeypatch):
    """The first block of each slot is copied before a replay, the next graph's blocks beside its end."""
    monkeypatch.setitem(GRAPH_BACKENDS, "cpu", TapeBackend)
    entry, pipe, recorded = TINY["flux"], build("flux"), []
    make = WeightStream.recorded
    monkeypatch.setattr(WeightStream, "recorded", lambda *args: recorded.append(make(*args)) or recorded[-1])
    accelerate(pipe, attention="sdpa", offload={"level": 3, "prefetch": 1}, cuda_graph=True)
    entry.run(pipe, steps=4)
    assert len(recorded) == 2
    for copies in recorded:
        assert len(copies._entry) == 2 < len(copies._blocks)
        assert copies.bytes == sum(block.bytes for block in copies._blocks) - sum(
            block.bytes for block in copies._entry
        )
    entry.run(pipe, steps=4)
    found = stats(pipe).offload
    assert found["late"] == 0 and found["ahead"] == 4 * sum(len(copies._blocks) for copies in recorded)


def test_stats_say_how_much_was_hidden(late):
    entry, pipe = TINY["flux"], build("flux")
    accelerate(pipe, offload=3)
    entry.run(pipe)
    found = stats(pipe).offload
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    size = sum(item.numel() * 4 for block in blocks for item in block.parameters())
    assert found["bytes"] >= 4 * size and found["ahead"] == 4 * len(blocks)
    assert "blocks ahead" in str(stats(pipe))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "linear"), [("flux", None), ("flux", "fp8"), ("flux", "nvfp4"), ("qwen", None), ("sd3", None)]
)
def test_precomputed_modulations_are_not_copied(name, linear, late, on_cpu):
    """Their weights are read in place, once a request: copies and slots are smaller, results equal."""
    entry, pipe = TINY[name], build(name)
    sections = {"attention": "sdpa", "compile": CompileConfig(backend="eager", rewrites=True)}
    if linear is not None:
        sections["linear"] = {"algo": linear, "smallest": 0}
    accelerate(pipe, **sections)
    resident, layers = entry.run(pipe), stats(pipe).modulations_precomputed
    accelerate(pipe, **sections, offload=3)
    assert same(entry.run(pipe), resident) and same(entry.run(pipe), resident)
    found = stats(pipe)
    assert found.modulations_precomputed == layers and found.modulations_recomputed == 0
    (row,) = [row for row in explain(pipe, **sections, offload=3).rows if row.feature == "offload"]
    in_place = [note for note in row.notes if "precomputed modulations are read" in note]
    assert bool(in_place) == bool(layers) == (linear != "nvfp4")
    accelerate(pipe, **{**sections, "compile": None}, offload=3)
    entry.run(pipe)
    assert not layers or found.offload["bytes"] < 0.9 * stats(pipe).offload["bytes"]


@pytest.mark.parametrize("offload", [{"level": 3}, {"level": 3, "ram": "500KiB"}])
def test_slabs_after_a_copy(offload, late):
    """A copy undoes all edits and applies them again: weights are in slabs as before."""
    entry, pipe = TINY["flux"], build("flux")
    stock = entry.run(pipe)
    accelerate(pipe, offload=offload)
    locked = sum(made.locked for made in late)
    assert same(entry.run(copy.deepcopy(pipe)), stock)
    again = sum(made.locked for made in late) - locked
    assert again == locked if "ram" not in offload else 0.9 * locked < again <= 500 * 1024
    assert same(entry.run(pipe), stock)


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_on_the_way_out(times, late, monkeypatch):
    """Ctrl-C while tensors over the slots are taken out of the model: none stays, and no slab is written."""
    entry, pipe = TINY["flux"], build("flux")
    stock, before = entry.run(pipe), weights(pipe)
    accelerate(pipe, offload=3)
    entry.run(pipe)
    leave, left = StreamedBlock.leave, []

    def interrupted(block):
        left.append(block)
        if len(left) == 3:
            raise KeyboardInterrupt
        leave(block)

    for _ in range(times):
        left.clear()
        with monkeypatch.context() as patch:
            patch.setattr(StreamedBlock, "leave", interrupted)
            with pytest.raises(KeyboardInterrupt):
                entry.run(pipe)
        assert all(torch.equal(item, value) for item, value in before)
        assert same(entry.run(pipe), stock)
    restore(pipe)
    assert same(entry.run(pipe), stock) and weights(pipe)[0][0] is before[0][0]


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 5 + 3 - 1 + 4), (0.5, 10)])
def test_a_budget_of_what_is_free(fraction, expected, monkeypatch):
    """Free memory, memory that torch holds unused, and this pipeline's own; no more than the process may use."""
    for name, value in (("mem_get_info", (5, 20)), ("memory_reserved", 3), ("memory_allocated", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    gpu = torch.device("cuda", 0)
    context = SimpleNamespace(device=Device("cuda", "a GPU"), home=gpu)
    own = SimpleNamespace(bytes=4, tensor=SimpleNamespace(device=gpu))
    waiting = SimpleNamespace(bytes=9, tensor=SimpleNamespace(device=torch.device("cpu")))
    model = SimpleNamespace(rest=[own], buffers=[], blocks=[SimpleNamespace(copied=[waiting])])
    assert planning.budget_of(context, OffloadConfig(vram="auto"), [model]) == expected
    assert planning.budget_of(context, OffloadConfig(vram="3 B"), [model]) == 3
    assert planning.budget_of(context, OffloadConfig(level=2), [model]) is None
