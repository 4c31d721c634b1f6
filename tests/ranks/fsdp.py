"""Functions that ranks run in tests of FSDP."""

from __future__ import annotations

import tempfile
import warnings

import torch
from exact import relative
from tape import TapeBackend
from tiny import TINY, build, tensors

from diffusers_accel import accelerate, explain, restore, stats
from diffusers_accel.api import resolve
from diffusers_accel.core.graphs import GRAPH_BACKENDS
from diffusers_accel.features.parallel.fsdp_shards import GatherBuffers

FSDP = {"parallel": {"fsdp": True}}


def models(pipe):
    return {name: item for name, item in pipe.components.items() if isinstance(item, torch.nn.Module)}


def state(pipe):
    """Every tensor of a pipeline, by its place: the object, a copy of its values, and what its module holds."""
    found = {}
    for name, model in models(pipe).items():
        for path, item in (*model.named_parameters(), *model.named_buffers()):
            found[f"{name}.{path}"] = (item, item.detach().clone())
    slots = {
        f"{name}.{path}": set(vars(module)) for name, model in models(pipe).items() for path, module in
        model.named_modules()
    }  # fmt: skip
    return found, slots


def same_state(one, other):
    """Whether two states are one: the same objects with the same values, and nothing left on any module."""
    return (
        one[0].keys() == other[0].keys()
        and all(one[0][key][0] is other[0][key][0] for key in one[0])
        and all(torch.equal(one[0][key][1], other[0][key][1]) for key in one[0])
        and one[1] == other[1]
    )


def restored(name, configuration, steps=2):
    """Whether a pipeline is the same, bit for bit, after `restore`; only the last rank goes on to ask it for more."""
    pipe, entry = build(name), TINY[name]
    stock = tensors(entry.run(pipe, steps=steps))
    before = state(pipe)
    accelerate(pipe, **configuration)
    entry.run(pipe, steps=steps)
    if torch.distributed.get_rank():
        torch.distributed.barrier()
    restore(pipe)
    if not torch.distributed.get_rank():
        # Nobody is waited for.
        torch.distributed.barrier()
    same = same_state(before, state(pipe))
    again = tensors(entry.run(pipe, steps=steps))
    return same and all(map(torch.equal, stock, again))


@torch.no_grad()
def encoded(name, component):
    """How far a text encoder's output is from the stock one's, in relative terms."""
    pipe = build(name)
    model = getattr(pipe, component)
    ids = torch.arange(1, 13).view(1, 12)
    expected = model(ids)[0]
    accelerate(pipe, **FSDP)
    found = [model(ids)[0], model(ids)[0]]
    held = stats_held(pipe)
    restore(pipe)
    return max(relative(item, expected) for item in found), held[component]


def stats_held(pipe):
    return dict(vars(pipe)["_diffusers_accel_session"].context.outputs.sharded_bytes)


def bytes_of(model):
    return sum(item.numel() * item.element_size() for item in (*model.parameters(), *model.buffers()))


def held(name, configuration):
    """Bytes of blocks: all of them, those that this rank holds, and those that tensors of the model still have."""
    pipe = build(name)
    accelerate(pipe, **{**configuration, "parallel": None})
    blocks = [block for denoiser in _context(pipe).denoisers for block in denoiser.adapter.blocks(denoiser.module)]
    whole = sum(map(bytes_of, blocks))
    restore(pipe)
    accelerate(pipe, **configuration)
    mine = sum(_context(pipe).outputs.sharded_bytes[denoiser.name] for denoiser in _context(pipe).denoisers)
    left = sum(map(bytes_of, blocks))
    weights = stats(pipe).weight_bytes_after
    rest = sum(bytes_of(denoiser.module) for denoiser in _context(pipe).denoisers)
    restore(pipe)
    return whole, mine, left, weights - rest


def _context(pipe):
    return vars(pipe)["_diffusers_accel_session"].context


def refused_calls(name):
    """Messages of calls that need whole weights, and of others that are refused."""
    pipe = build(name)
    pipe.transformer.requires_grad_(True)
    accelerate(pipe, **FSDP)
    block = pipe.transformer.get_submodule(_context(pipe).denoisers[0].adapter.stacks[0].path)[0]
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            "pipeline": lambda: pipe.save_pretrained(folder),
            "model": lambda: pipe.transformer.save_pretrained(folder),
            "encoder": lambda: pipe.text_encoder.save_pretrained(folder),
            "state": lambda: pipe.transformer.state_dict(),
            "block": lambda: block.state_dict(),
            "load": lambda: pipe.transformer.load_state_dict({}, strict=False),
            "lora": lambda: pipe.load_lora_weights({}),
            "merge": lambda: pipe.fuse_lora(),
            "into the model": lambda: pipe.transformer.load_lora_adapter({}),
            "offload": lambda: pipe.enable_model_cpu_offload(),
            "adapter": lambda: pipe.transformer.add_adapter(None),
            "again": lambda: accelerate(pipe, attention="sdpa"),
            "gradients": lambda: block(torch.zeros(1, 4, 32)),
        }
        found = {key: _said(call) for key, call in calls.items()}
        pipe.transformer.to(torch.bfloat16)
        with torch.no_grad():
            found["cast"] = _said(lambda: block(torch.zeros(1, 4, 32)))
        pipe.transformer.to(torch.float32)
        restore(pipe)
        pipe.transformer.save_pretrained(folder)
    return found


def _said(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def moved(name):
    """How far outputs are off after the pipeline was sent to where it is, and whether what it holds is stock again."""
    pipe, entry = build(name), TINY[name]
    sections = {"linear": {"algo": "int8", "smallest": 0}, "fuse": True}
    accelerate(pipe, **sections)
    expected = tensors(entry.run(pipe, steps=2))
    restore(pipe)
    before = state(pipe)
    accelerate(pipe, **sections, **FSDP)
    pipe.to("cpu")
    out = tensors(entry.run(pipe, steps=2))
    restore(pipe)
    return max(map(relative, out, expected)), same_state(before, state(pipe))


def sends(name, configuration, steps=3):
    """How often blocks were gathered in a request: in all, while another computed, and only when they were called; and
    at how many addresses blocks find their weights."""
    pipe, entry = build(name), TINY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate(pipe, **configuration)
    counts = {"loaded": 0, "beside": 0, "entered": 0, "late": 0}
    load, enter = GatherBuffers._all_gather, GatherBuffers._unshard

    def _all_gather(self, shard):
        fresh = self._held[shard.slot] is not shard
        counts["loaded"] += fresh
        counts["beside"] += fresh and any(self._running)
        return load(self, shard)

    def _unshard(self, shard):
        counts["entered"] += 1
        counts["late"] += self._held[shard.slot] is not shard
        return enter(self, shard)

    GatherBuffers._all_gather, GatherBuffers._unshard = _all_gather, _unshard
    try:
        entry.run(pipe, steps=1)
        counts.update(dict.fromkeys(counts, 0))
        entry.run(pipe, steps=steps)
    finally:
        GatherBuffers._all_gather, GatherBuffers._unshard = load, enter
    addresses = set(map(len, _addresses(pipe, entry).values()))
    restore(pipe)
    return counts, addresses


def _addresses(pipe, entry):
    """Where blocks' weights were seen in further requests."""
    found = {}
    show = GatherBuffers._unshard

    def _unshard(self, shard):
        show(self, shard)
        found.setdefault(shard.name, set()).add(tuple(weight.now().data_ptr() for weight in shard.weights))

    GatherBuffers._unshard = _unshard
    try:
        for _ in range(2):
            entry.run(pipe, steps=2)
    finally:
        GatherBuffers._unshard = show
    return found


def tied(name):
    """Whether tensors that a block shares with another stay whole, and outputs stay what they are."""
    pipe, entry = build(name), TINY[name]
    first, second = pipe.transformer.transformer_blocks[:2]
    second.norm1.linear.weight = first.norm1.linear.weight
    first.attn.to_q.bias.data = pipe.transformer.transformer_blocks[2].attn.to_q.bias.data
    expected = tensors(entry.run(pipe, steps=2))
    accelerate(pipe, **FSDP)
    whole = first.norm1.linear.weight.numel(), first.attn.to_q.bias.numel(), first.attn.to_q.weight.numel()
    out = tensors(entry.run(pipe, steps=2))
    restore(pipe)
    return all(map(torch.equal, out, expected)), whole


def explained(name, configuration):
    return str(explain(build(name), **configuration))


class Foreign(torch.nn.Parameter):
    """A package's own kind of weight."""


def foreign(name):
    pipe = build(name)
    layer = pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q
    layer.weight = Foreign(layer.weight.data)
    try:
        accelerate(pipe, **FSDP)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def preset(name):
    """What a preset takes for CUDA graphs beside it, where there are some."""
    GRAPH_BACKENDS["cpu"] = TapeBackend
    pipe = build(name)
    try:
        return resolve(pipe, "lossless", **FSDP)[0].cuda_graph
    finally:
        del GRAPH_BACKENDS["cpu"]
