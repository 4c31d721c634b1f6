"""Functions that ranks run in tests of tensor parallelism."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path

import torch
from exact import relative
from safetensors.torch import load_file
from tiny import TINY, build, same, tensors
from tiny.flux import load_ip_adapter
from tiny.heads import with_heads
from torch import nn

from diffusers_accel import accelerate, restore, save_quantized, stats
from diffusers_accel.core.comm import Group
from diffusers_accel.kernels.linear import sharded, unsharded_layer


def quietly(pipe, **configuration):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accelerate(pipe, **configuration)


def _snapshot(pipe, denoisers):
    """Everything of the denoisers that must come back: parameters, types of modules, and plain attributes."""
    found = {}
    for name in denoisers:
        for path, module in getattr(pipe, name).named_modules():
            plain = {key: item for key, item in vars(module).items() if isinstance(item, (int, str, bool, float))}
            found[name, path] = (type(module), id(module), plain, sorted(vars(module)))
        for path, item in getattr(pipe, name).named_parameters():
            found[name, path, "values"] = item.detach().clone()
            found[name, path, "id"] = id(item)
    return found


def _equal(one, other):
    return list(one) == list(other) and all(
        torch.equal(item, other[key]) if isinstance(item, torch.Tensor) else item == other[key]
        for key, item in one.items()
    )


def restored(name, configuration):
    """Whether a request differs at all under `accelerate`, whether two equal ones agree there, and whether all is as it
    was after `restore`: outputs, parameters, modules and attributes."""
    pipe, entry = build(name), TINY[name]
    before, known = entry.run(pipe, steps=2), _snapshot(pipe, entry.denoisers)
    quietly(pipe, **configuration)
    changed = not _equal(_snapshot(pipe, entry.denoisers), known)
    one, two = entry.run(pipe, steps=2), entry.run(pipe, steps=2)
    restore(pipe)
    back = _equal(_snapshot(pipe, entry.denoisers), known)
    return changed, same(one, two), back and same(before, entry.run(pipe, steps=2)), len(sharded.GROUPS)


def one_after_the_other(name, first, second, heads=None, options=None):
    """How far requests are from stock under one configuration, and under another that replaces it."""
    pipe, entry = with_heads(name, heads, **(options or {})), TINY[name]
    expected = tensors(entry.run(pipe, steps=2))
    errors = []
    for configuration in (first, second):
        quietly(pipe, **configuration)
        out = tensors(entry.run(pipe, steps=2))
        errors.append(max(relative(x, y) for x, y in zip(out, expected, strict=True)))
    restore(pipe)
    return errors, same(tuple(expected), entry.run(pipe, steps=2))


def held(name, configuration, heads=None):
    """Of each divided module, its path, the shapes of its stock weight and of what the rank holds; which linear layers
    of the blocks are whole; and what `stats` counts."""
    pipe = with_heads(name, heads)
    quietly(pipe, **configuration)
    found, left = {}, []
    for denoiser in TINY[name].denoisers:
        model = getattr(pipe, denoiser)
        for path, module in model.named_modules():
            whole = unsharded_layer(module)
            if whole is not module and not path.endswith("base_layer"):
                weight = getattr(module, "base_layer", module).weight
                found[f"{denoiser}.{path}"] = (tuple(whole.weight.shape), tuple(weight.shape))
            elif isinstance(module, nn.Linear) and whole is module and "blocks." in path + ".":
                left.append(path)
    seen = stats(pipe)
    restore(pipe)
    return found, left, seen.linear_layers, seen.weight_bytes_before, seen.weight_bytes_after


def shown(name, configuration):
    """Whether `state_dict` and what `save_pretrained` writes are the stock model's, while a rank has parts of it."""
    pipe = build(name)
    model = pipe.transformer
    expected = {path: item.clone() for path, item in model.state_dict().items()}
    quietly(pipe, **configuration)
    found = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, safe_serialization=True)
        written = {key: item for file in Path(folder).glob("*.safetensors") for key, item in load_file(file).items()}
        config = json.loads((Path(folder) / "config.json").read_text())
    restore(pipe)
    hooks = len(model._state_dict_hooks)
    written = {key: written[key] for key in expected}
    if "linear" in configuration:  # a quantized layer names its bias first
        found = {key: found[key] for key in expected}
    return _equal(found, expected), _equal(written, expected), config["num_attention_heads"], hooks


def closed(name, configuration):
    """What methods that would put a whole model's numbers beside parts raise meanwhile; and whether requests go on as
    they did."""
    pipe, entry = build(name), TINY[name]
    known = pipe.transformer.state_dict()
    quietly(pipe, **configuration)
    before = entry.run(pipe, steps=1)
    calls = {
        "load_lora_weights": lambda: pipe.load_lora_weights({}),
        "load_ip_adapter": lambda: pipe.load_ip_adapter("nowhere"),
        "load_lora_adapter": lambda: pipe.transformer.load_lora_adapter({}),
        "fuse_qkv_projections": lambda: pipe.transformer.fuse_qkv_projections(),
        "load_state_dict": lambda: pipe.transformer.load_state_dict(known, strict=False),
        "save_quantized": lambda: save_quantized(pipe, tempfile.mkdtemp()),
    }
    found = {}
    for method, call in calls.items():
        try:
            call()
            found[method] = None
        except Exception as error:
            found[method] = f"{type(error).__name__}: {error}"
    after = entry.run(pipe, steps=1)
    restore(pipe)
    open_again = not any(method in vars(owner) for owner in (pipe, pipe.transformer) for method in calls)
    return found, same(before, after), open_again


def copied(name, configuration):
    """Whether a copy of a denoiser that is divided computes as it does."""
    pipe = build(name)
    quietly(pipe, **configuration)
    block = pipe.transformer.transformer_blocks[0]
    x = torch.randn(1, 3, block.ff.net[0].proj.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = torch.equal(copy.deepcopy(block).ff(x), block.ff(x))
    restore(pipe)
    return found


def prepared_refusal(name, configuration, how):
    """The error of `accelerate` on a pipeline to which something was done, and whether it is as it was."""
    pipe = build(name)
    _HOW[how](pipe)
    known = _snapshot(pipe, ("transformer",))
    try:
        quietly(pipe, **configuration)
    except Exception as error:
        return type(error).__name__, str(error), _equal(_snapshot(pipe, ("transformer",)), known)
    restore(pipe)
    return None


def _lora(pipe):
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]))


def _fused(pipe):
    pipe.transformer.fuse_qkv_projections()


def _own(pipe):
    pipe.transformer._parallel_config = object()


def _other_layer(pipe):
    class Linear4bit(nn.Linear):
        pass

    pipe.transformer.transformer_blocks[1].attn.to_k.__class__ = Linear4bit


def _bytes(pipe):
    layer = pipe.transformer.transformer_blocks[0].attn.to_v
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def _quantized(pipe):
    """As a low-bit checkpoint is loaded: the stock weights are nowhere."""
    quietly(pipe, linear={"algo": "int8", "smallest": 0, "keep_original": "drop"})


def attending_to_a_picture(heads, configuration):
    """How far one call of a Cosmos 2.5 denoiser that attends to a picture beside the text is from stock. No stock
    pipeline gives a picture to a denoiser of its own."""
    picture = {"img_context_dim_in": 12, "img_context_dim_out": 16 * heads, "img_context_num_tokens": 5}
    pipe = with_heads("cosmos-predict25", heads, **picture, concat_padding_mask=False)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    call = {
        "hidden_states": random(1, 17, 2, 4, 4), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": (random(1, 7, 48), random(1, 5, 12)), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        (expected,) = pipe.transformer(**call)
        quietly(pipe, **configuration)
        (found,) = pipe.transformer(**call)
    restore(pipe)
    return relative(found, expected)


def cast(name, configuration):
    """The types of a denoiser's parameters after a cast while weights are divided, and `restore`."""
    pipe = build(name)
    quietly(pipe, **configuration)
    pipe.transformer.to(torch.float64)
    restore(pipe)
    return {str(item.dtype) for item in pipe.transformer.parameters()}


_HOW = {
    "lora": _lora, "ip-adapter": load_ip_adapter, "fused": _fused, "own": _own, "layer": _other_layer, "bytes": _bytes,
    "quantized": _quantized,
}  # fmt: skip


def summed_compiled(values):
    """The sum over ranks, from a compiled graph, in place, and with gradients recorded: results, and what was given
    afterwards."""
    from torch.distributed import get_rank, get_world_size

    from diffusers_accel.core.mesh import Mesh, init_process_group

    init_process_group("cpu")
    group: Group = Mesh({"tp": get_world_size()}, "cpu").group("tp")
    number = sharded.free_group_number()
    sharded.GROUPS[number] = group
    mine = torch.tensor(values) * (get_rank() + 1)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    kept = mine.clone()
    compiled = torch.compile(lambda x: sharded.all_reduced(x, number) * 2, backend=backend, fullgraph=True)
    with torch.no_grad():
        first = compiled(mine)
        untouched = torch.equal(mine, kept)
        second = sharded.all_reduced(mine.clone(), number)
    third = sharded.all_reduced(mine.clone().requires_grad_(), number)
    try:
        third.sum().backward()
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    sharded.GROUPS.pop(number)
    return first, second, third.detach(), untouched, len(graphs), "all_reduce" in graphs[0], refused
