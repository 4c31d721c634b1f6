"""Which ranks' pipelines are moved to which GPU, and what moves. There are no GPUs here: tensors are torch's fake ones,
which know where they are and have no values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from torch import nn
from torch._subclasses import FakeTensorMode

from diffusers_accel import AccelConfig, Unsupported, api
from diffusers_accel.core.edits import Journal, MoveTensors
from diffusers_accel.features.context import PipelineContext
from diffusers_accel.features.parallel import rank_device
from diffusers_accel.features.parallel.rank_device import RankDevice, ranks_to_move

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


def devices(*places, pinned=None):
    """(GPU, GPU of the launcher's number) of each rank."""
    return [RankDevice("cuda:0", gpu, own, pinned) for gpu, own in places]


def test_those_who_share_a_gpu_go_to_their_own():
    # An unchanged script on a machine of four, and the same on two machines of two.
    assert ranks_to_move(devices(*(("a", own) for own in "abcd"))) == (1, 2, 3)
    assert ranks_to_move(devices(("a", "a"), ("a", "b"), ("c", "c"), ("c", "d"))) == (1, 3)


def test_those_who_have_one_stay():
    assert ranks_to_move(devices(("b", "a"), ("a", "b"))) == ()
    # --virtual-local-rank: nobody has a choice.
    assert ranks_to_move(devices(("a", None), ("b", None))) == ()
    # Rank 2 was placed by its script; the others were not.
    assert ranks_to_move(devices(("a", "a"), ("a", "b"), ("d", "c"))) == (1,)


def test_too_few_gpus_are_refused():
    with pytest.raises(Unsupported, match=r"ranks \[0, 2\] have one GPU, cuda:0.*no more processes than GPUs"):
        ranks_to_move(devices(("a", "a"), ("a", "b"), ("a", None)))
    # Where one goes another was put.
    with pytest.raises(Unsupported, match=r"ranks \[1, 2\] have one GPU"):
        ranks_to_move(devices(("a", "a"), ("a", "b"), ("b", "c")))
    with pytest.raises(Unsupported, match=r"ranks \[0, 1\] have one GPU"):
        ranks_to_move(devices(("a", None), ("a", None)))


def test_what_cannot_be_moved_is_refused_by_all():
    with pytest.raises(Unsupported, match=r"ranks \[0, 1\] are on one GPU, and rank 1's cannot be moved.*: hooks\."):
        ranks_to_move(devices(("a", "a"), ("a", "b"), pinned="hooks"))
    assert ranks_to_move(devices(("a", "a"), ("b", "b"), pinned="hooks")) == ()


class OnGPU(nn.Module):
    """A model of one tensor. A buffer: torch cannot swap fake parameters."""

    def __init__(self, device):
        super().__init__()
        self.register_buffer("tensor", torch.empty(4, device=device))

    def parameters(self, recurse=True):
        return self.buffers(recurse)

    def forward(self, x, others=()):
        return x.device, [other.device for other in others]


@pytest.fixture
def fake(monkeypatch):
    """Two GPUs, of which this process is the second's rank."""
    kinds, freed = {0: "H100", 1: "H100"}, []
    current = [0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: kinds[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device.index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    with FakeTensorMode():
        yield SimpleNamespace(kinds=kinds, current=current, freed=freed)


class Ranks:
    """Two ranks, of which this process is the second; the first's pipeline is on the GPU that is said."""

    rank = 1

    def __init__(self, first="GPU-0"):
        self.first, self.asked = RankDevice("cuda:0", first, first, None), []

    def all_gather_object(self, value):
        self.asked.append(value)
        return [self.first, value]


def context_of(**components):
    device = SimpleNamespace(type="cuda")
    denoiser = SimpleNamespace(module=components["transformer"], device=device)
    pipe = SimpleNamespace(components=components)
    return SimpleNamespace(pipe=pipe, denoisers=[denoiser], device=device, rank=lambda name: 0)


def places(*modules):
    return [module.tensor.device for module in modules]


def test_a_pipeline_is_moved_and_moved_back(fake):
    transformer, encoder, on_host = OnGPU(FIRST), OnGPU(FIRST), OnGPU("cpu")
    pipeline = context_of(transformer=transformer, text_encoder=encoder, vae=on_host, tokenizer=object())
    assert "goes from cuda:0 to cuda:1" in rank_device.notes(pipeline)[0]
    journal, ranks = Journal(), Ranks()
    with pytest.warns(UserWarning, match=r"those of ranks \[1\] have been moved"):
        journal.apply(rank_device.edits(pipeline, ranks))
    assert places(transformer, encoder, on_host) == [SECOND, SECOND, torch.device("cpu")]
    assert fake.current == [1] and fake.freed and ranks.asked[-1] is None
    # Tensors that the script made before are moved too, and nothing else.
    x, other = torch.empty(2, device=FIRST), torch.empty(2)
    assert transformer(x, others=[x, other]) == (SECOND, [SECOND, torch.device("cpu")])
    journal.undo()
    assert places(transformer, encoder, on_host) == [FIRST, FIRST, torch.device("cpu")]
    assert transformer(x) == (FIRST, []) and "forward" not in vars(transformer)


def test_one_on_its_own_gpu_is_offloaded_to_it(fake):
    """By `enable_model_cpu_offload()` afterwards, without a number."""
    pipeline, journal = context_of(transformer=OnGPU(SECOND)), Journal()
    journal.apply(rank_device.edits(pipeline, Ranks()))
    assert pipeline.pipe._offload_gpu_id == 1
    journal.undo()
    assert "_offload_gpu_id" not in vars(pipeline.pipe)


def test_one_on_the_host_is_offloaded_to_its_ranks_gpu(fake):
    """By a script that moves or offloads it afterwards."""
    pipeline, journal = context_of(transformer=OnGPU("cpu")), Journal()
    journal.apply(rank_device.edits_on_host(pipeline))
    assert pipeline.pipe._offload_gpu_id == 1 and fake.current == [1]
    journal.undo()
    assert "_offload_gpu_id" not in vars(pipeline.pipe)


def test_one_whose_offloading_is_taken_over(fake, monkeypatch):
    """By `offload`, before anything else: its weights wait on the host, and no hook says for which GPU."""
    pipeline, journal = context_of(transformer=OnGPU("cpu")), Journal()
    journal.apply(rank_device.edits(pipeline, Ranks()))
    assert pipeline.pipe._offload_gpu_id == 1 and fake.current == [1]
    journal.undo()
    # A script has numbered its GPU, and the launcher means another.
    fake.current[0] = 0
    monkeypatch.setenv("LOCAL_RANK", "0")
    pipeline.pipe._offload_gpu_id = 1
    journal.apply(rank_device.edits(pipeline, Ranks()))
    assert pipeline.pipe._offload_gpu_id == 1 and fake.current == [1]
    (denoiser,) = pipeline.denoisers
    home = PipelineContext.home.fget(SimpleNamespace(denoisers=[denoiser], pipe=pipeline.pipe))
    assert home == SECOND
    fake.current[0] = 0
    assert PipelineContext.home.fget(SimpleNamespace(denoisers=[denoiser], pipe=pipeline.pipe)) == SECOND
    del pipeline.pipe._offload_gpu_id
    assert PipelineContext.home.fget(SimpleNamespace(denoisers=[denoiser], pipe=pipeline.pipe)) == FIRST


def test_one_that_is_alone_stays(fake):
    transformer = OnGPU(FIRST)
    journal = Journal()
    journal.apply(rank_device.edits(context_of(transformer=transformer), Ranks("GPU-1")))
    assert places(transformer) == [FIRST] and fake.current == [0] and not len(journal)


def test_without_a_choice_nothing_is_said(fake, monkeypatch):
    pipeline = context_of(transformer=OnGPU(FIRST))
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_RANK", "2"), ("LOCAL_RANK", None)):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
        assert rank_device.notes(pipeline) == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank_device.notes(pipeline)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert rank_device.notes(pipeline) == []


def test_hooks_two_gpus_and_another_kind_bind_it(fake):
    def refused(words, **components):
        with pytest.raises(Unsupported, match=words):
            Journal().apply(rank_device.edits(context_of(**components), Ranks()))

    hooked = OnGPU(FIRST)
    hooked._hf_hook = object()
    refused("hooks of its OnGPU move tensors", transformer=OnGPU(FIRST), text_encoder=hooked)
    refused("its OnGPU is on cuda:1 and not on cuda:0", transformer=OnGPU(FIRST), vae=OnGPU(SECOND))
    grouped = OnGPU("cpu")
    group = SimpleNamespace(onload_device=FIRST, stream=None)
    grouped._diffusers_hook = SimpleNamespace(hooks={"group_offloading": SimpleNamespace(group=group)})
    refused("offloaded in groups that go to cuda:0", transformer=OnGPU(FIRST), vae=grouped)
    group.onload_device, group.stream = "cuda", object()
    refused("in groups, by a stream of another GPU", transformer=OnGPU(FIRST), vae=grouped)
    fake.kinds[1] = "A100"
    refused(r"cuda:1 \(A100\) is another kind of GPU than cuda:0 \(H100\)", transformer=OnGPU(FIRST))


@pytest.mark.parametrize("device", [FIRST, "cuda:0", 0])
def test_models_that_wait_on_the_host_go_to_the_ranks_gpu(fake, device):
    """Also those that are offloaded afterwards, or once more, as after every request."""
    transformer, encoder, grouped = OnGPU("cpu"), OnGPU("cpu"), OnGPU("cpu")
    transformer._hf_hook, inside = CpuOffload(device), CpuOffload(device)
    encoder._hf_hook = SequentialHook(AlignDevicesHook(io_same_device=True), inside)
    group = SimpleNamespace(onload_device="cuda", stream=None)
    grouped._diffusers_hook = SimpleNamespace(hooks={"group_offloading": SimpleNamespace(group=group)})
    pipeline = context_of(transformer=transformer, text_encoder=encoder, vae=grouped)
    pipeline.pipe._offload_gpu_id, pipeline.pipe._offload_device = 0, FIRST
    journal = Journal()
    with pytest.warns(UserWarning, match=r"those of ranks \[1\] have been moved"):
        journal.apply(rank_device.edits(pipeline, Ranks()))
    assert transformer._hf_hook.execution_device == inside.execution_device == SECOND
    assert (pipeline.pipe._offload_gpu_id, pipeline.pipe._offload_device) == (1, SECOND)
    # `restore` finds hooks that diffusers has renewed after a request.
    transformer._hf_hook = CpuOffload(SECOND)
    journal.undo()
    assert transformer._hf_hook.execution_device == inside.execution_device == FIRST
    assert (pipeline.pipe._offload_gpu_id, pipeline.pipe._offload_device) == (0, FIRST)


def test_a_move_that_fails_is_taken_back(fake):
    one, full = OnGPU(FIRST), OnGPU(FIRST)
    failures = iter([torch.OutOfMemoryError("no room")])

    def _apply(function):
        for error in failures:
            raise error

    full._apply = _apply
    with pytest.raises(torch.OutOfMemoryError):
        Journal().apply([MoveTensors((one, full), FIRST, SECOND)])
    assert places(one, full) == [FIRST, FIRST]


def test_it_is_moved_before_anything_is_done_to_weights(monkeypatch):
    order = []
    for name, entry in api.FEATURES.items():
        monkeypatch.setattr(entry.feature, "edits", lambda context, section, name=name: order.append(name) or ())
    config = AccelConfig.from_dict({"linear": "int8", "fuse": True, "parallel": {"ulysses": 2, "tp": 2}})
    assert not list(api._edits(None, config))
    assert order == ["process group", "tensor parallel", "linear", "fuse", "parallel", "request"]
