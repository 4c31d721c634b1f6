"""CUDA graphs on the CPU, with a stand-in for the device's graphs: results equal stock bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from tape import TapeBackend
from tiny import TINY, build, same

from diffusers_accel import (
    AttentionConfig,
    CompileConfig,
    CudaGraphConfig,
    DBCacheConfig,
    EasyCacheConfig,
    FBCacheConfig,
    PABConfig,
    StepMaskConfig,
    TeaCacheConfig,
    Unsupported,
    accelerate,
    explain,
    register_attention,
    restore,
    stats,
    warmup,
)
from diffusers_accel.core import graphs
from diffusers_accel.core.chain import Chain, Layer
from diffusers_accel.kernels.attention import KERNELS

FAMILIES = ["flux", "flux-true-cfg", "flux2", "wan", "wan22", "ltx2", "qwen", "cosmos", "cosmos-predict25", "cosmos3",
            "sd3"]  # fmt: skip
STEPS = 6


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setitem(graphs.GRAPH_BACKENDS, "cpu", TapeBackend)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """Replayed results equal stock bit for bit, in requests of other lengths too, and so do restored ones."""
    entry, pipe = TINY[name], build(name)
    stock = {steps: entry.run(pipe, steps=steps) for steps in (STEPS, 3)}
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (STEPS, 3, STEPS):
            assert same(entry.run(pipe, steps=steps), stock[steps]), steps
    found = stats(pipe)
    assert found.graphs_captured >= 1 and found.graph_replays >= STEPS, found
    blocks = sum(len(stack.blocks(pipe.transformer)) for stack in _stacks(pipe))
    assert found.graphs_captured < blocks or blocks <= 2, "each block by itself gains nothing"
    restore(pipe)
    assert same(entry.run(pipe, steps=3), stock[3])


def test_graphs_of_a_model_share_memory(monkeypatch):
    """They are replayed one after the other; two pipelines' are not, and share nothing."""
    memories, stock = [], TapeBackend.__init__

    def kept(self, pool, device):
        stock(self, pool, device)
        memories[-1].append(pool)

    monkeypatch.setattr(TapeBackend, "__init__", kept)
    for _ in range(2):
        entry, pipe = TINY["wan"], build("wan")
        memories.append([])
        accelerate(pipe, attention="sdpa", cuda_graph=True)
        for frames in (5, 9):
            entry.run(pipe, steps=STEPS, num_frames=frames)
        assert len(memories[-1]) > 1 and len(set(memories[-1])) == 1
    assert memories[0][0] is not memories[1][0]


def _stacks(pipe):
    from diffusers_accel.models import adapter_for

    return adapter_for(pipe.transformer).stacks


@pytest.mark.parametrize("name", ["flux", "wan", "wan22", "sd3", "qwen"])
@pytest.mark.parametrize(
    "config",
    [
        StepMaskConfig(mask=(1, 1, 0, 1, 0, 0)),
        StepMaskConfig(mask=(1, 1, 0, 1, 0, 0), taylorseer_order=1),
        FBCacheConfig(residual_diff_threshold=9.0, max_continuous_cached_steps=1),
        DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=9.0,
            max_continuous_cached_steps=2,
        ),
        TeaCacheConfig(threshold=9.0, coefficients=(1.0, 0.0)),
        EasyCacheConfig(threshold=1e9, warmup=2),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.taylorseer_order}",
)  # fmt: skip
def test_with_caches(name, config):
    """The same steps are skipped, with the same result."""
    entry, pipe = TINY[name], build(name)
    accelerate(pipe, attention="sdpa", cache=config)
    expected, skipped = entry.run(pipe, steps=STEPS), stats(pipe).steps_skipped
    assert skipped
    accelerate(pipe, attention="sdpa", cache=config, cuda_graph=True)
    for _ in range(2):
        assert same(entry.run(pipe, steps=STEPS), expected)
    found = stats(pipe)
    assert found.steps_skipped == skipped and found.graph_replays > 0


@pytest.fixture
def another():
    def attention(query, key, value, attn_mask=None, is_causal=False, scale=None):
        parts = (item.transpose(1, 2) for item in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask, scale=scale).transpose(1, 2)

    register_attention("another", attention)
    yield
    KERNELS._records.pop("another")


def test_calls_are_counted_as_without(another):
    entry, pipe = TINY["flux"], build("flux")
    dense = AttentionConfig(backend="sdpa", dense_steps=0.5, dense_backend="another")
    for attention in ("sdpa", dense):
        accelerate(pipe, attention=attention)
        expected, counts = entry.run(pipe, steps=STEPS), stats(pipe).attention_kernels
        accelerate(pipe, attention=attention, cuda_graph=True)
        for _ in range(2):
            assert same(entry.run(pipe, steps=STEPS), expected)
            assert stats(pipe).attention_kernels == counts
    # Half of the steps by each kernel: two graph variants, each of two stacks.
    assert len(counts) == 2 and stats(pipe).graphs_captured == 4


def test_sizes_are_variants_of_their_own():
    entry, pipe = TINY["flux"], build("flux")
    sizes = [{}, {"height": 48}, {"num_images_per_prompt": 2}]
    stock = [entry.run(pipe, steps=4, **size) for size in sizes]
    accelerate(pipe, attention="sdpa", cuda_graph=CudaGraphConfig(limit=2))
    for size, expected in zip(sizes[:2], stock, strict=False):
        assert same(entry.run(pipe, steps=4, **size), expected)
    assert stats(pipe).graphs_captured == 4
    with pytest.warns(UserWarning, match=r"2 graph variants exist already \(cuda_graph.limit\)"):
        assert same(entry.run(pipe, steps=4, **sizes[2]), stock[2])
    assert stats(pipe).graph_replays == 0
    for size, expected in zip(sizes, stock, strict=True):
        assert same(entry.run(pipe, steps=4, **size), expected)


def test_a_warmed_up_pipeline_captures_nothing():
    entry, pipe = TINY["flux"], build("flux")
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    warmup(pipe, resolutions=[(32, 32)], max_sequence_length=16, output_type="latent")
    captured = stats(pipe).graphs_captured
    entry.run(pipe, steps=4)
    found = stats(pipe)
    assert found.graphs_captured == captured == 2 and found.graph_replays == 8


def test_blocks_between_controlnet_additions_are_not_captured():
    entry, pipe = TINY["flux-controlnet"], build("flux-controlnet")
    stock = entry.run(pipe, steps=3)
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    with pytest.warns(UserWarning, match="are called in . runs, with other work in between"):
        assert same(entry.run(pipe, steps=3), stock)
    assert same(entry.run(pipe, steps=3), stock)
    assert stats(pipe).graphs_captured == 0


@pytest.mark.parametrize(("name", "why"), [("wan-vace", None), ("ltx2-stg", None), ("sd3-slg", "blocks 2 are called")])
def test_blocks_that_are_called_otherwise(name, why):
    """VACE's hints come between blocks, and guidance may perturb a branch or leave blocks out: results are right all
    the same."""
    entry, pipe = TINY[name], build(name)
    stock = entry.run(pipe, steps=STEPS)
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert same(entry.run(pipe, steps=STEPS), stock)
    said = [str(item.message) for item in seen if "cuda_graph" in str(item.message)]
    assert stats(pipe).graph_replays > 0 or said
    assert why is None or any(why in text for text in said), said


def test_weights_that_move_or_change():
    """A graph reads a weight written in place. A moved weight or an adapter gives a new graph."""
    entry, pipe = TINY["flux"], build("flux")
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    entry.run(pipe, steps=4)
    layer = pipe.transformer.single_transformer_blocks[0].proj_out
    with torch.no_grad():
        layer.weight.mul_(1.5)
    written = entry.run(pipe, steps=4)
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)
    moved = entry.run(pipe, steps=4)
    restore(pipe)
    assert same(entry.run(pipe, steps=4), moved) and not same(moved, written)
    with torch.no_grad():
        layer.weight.div_(1.5)
    assert torch.allclose(entry.run(pipe, steps=4), written, atol=1e-5)


def test_an_adapters_scale():
    from peft import LoraConfig

    entry, pipe = TINY["flux"], build("flux")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False), "one")

    def runs():
        found = []
        for scale in (1.0, 0.3):
            pipe.set_adapters("one", scale)
            found.append(entry.run(pipe, steps=4))
        pipe.disable_lora()
        found.append(entry.run(pipe, steps=4))
        pipe.enable_lora()
        return found

    stock = runs()
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    assert all(same(one, other) for one, other in zip(runs(), stock, strict=True))
    assert not same(stock[0], stock[1])
    assert stats(pipe).graph_replays


def test_an_adapters_scale_that_changes_within_a_request():
    from peft import LoraConfig

    entry, pipe = TINY["flux"], build("flux")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False), "one")

    def fade(pipe, step, timestep, kwargs):
        pipe.set_adapters("one", 1.0 - 0.2 * step)
        return kwargs

    pipe.set_adapters("one", 1.0)
    stock = entry.run(pipe, steps=4, callback_on_step_end=fade)
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    for _ in range(2):
        pipe.set_adapters("one", 1.0)
        assert same(entry.run(pipe, steps=4, callback_on_step_end=fade), stock)


def test_streams_that_are_written_to_between_blocks():
    """In place the tensor stays the same, and its values do not."""
    entry, pipe = TINY["flux"], build("flux")

    def add(inner, *args, **kwargs):
        kwargs["hidden_states"].add_(0.5)
        return inner(*args, **kwargs)

    chain, layer = Chain.around(pipe.transformer.single_transformer_blocks[1]), Layer(99, add)
    chain.add(layer)
    try:
        expected = entry.run(pipe, steps=4)
    finally:
        chain.remove(layer)
    plain = entry.run(pipe, steps=4)
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    Chain.around(pipe.transformer.single_transformer_blocks[1]).add(layer)
    for _ in range(2):
        assert same(entry.run(pipe, steps=4), expected)
    assert stats(pipe).graphs_captured == 3 and not same(plain, expected)


def test_hooks_are_called():
    entry, pipe = TINY["flux"], build("flux")
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    entry.run(pipe, steps=3)
    seen = []
    handle = pipe.transformer.transformer_blocks[1].attn.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="transformer_blocks.1.attn has hooks"):
        entry.run(pipe, steps=3)
    assert len(seen) == 3
    handle.remove()
    entry.run(pipe, steps=3)
    assert stats(pipe).graph_replays > 0


def test_weights_that_are_offloaded():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    entry, pipe = TINY["flux"], build("flux")
    stock = entry.run(pipe, steps=3)
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    entry.run(pipe, steps=3)
    add_hook_to_module(pipe.transformer, AlignDevicesHook(io_same_device=True))
    with pytest.warns(UserWarning, match="its weights are offloaded"):
        assert same(entry.run(pipe, steps=3), stock)
    assert stats(pipe).graph_replays == stats(pipe).graphs_captured == 0
    restore(pipe)
    with pytest.raises(Unsupported, match="its weights move between devices"):
        accelerate(pipe, cuda_graph=True)
    remove_hook_from_module(pipe.transformer)


@pytest.mark.thorough
@pytest.mark.parametrize("sections", [{}, {"fuse": True}, {"linear": {"algo": "int8", "smallest": 0}}])
def test_compiled_blocks_are_captured(sections):
    entry, pipe = TINY["flux"], build("flux")
    torch.compiler.reset()
    accelerate(pipe, attention="sdpa", compile=CompileConfig(backend="eager"), **sections)
    expected = entry.run(pipe, steps=4)
    accelerate(pipe, attention="sdpa", compile=CompileConfig(backend="eager"), cuda_graph=True, **sections)
    for _ in range(2):
        assert same(entry.run(pipe, steps=4), expected)
    assert stats(pipe).graph_replays == 8


def test_gradients_are_recorded():
    entry, pipe = TINY["flux"], build("flux")
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    entry.run(pipe, steps=3)
    given = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    entry.run(pipe, steps=1)
    handle.remove()
    weight = pipe.transformer.single_transformer_blocks[0].proj_out.weight.requires_grad_()
    with torch.enable_grad(), pytest.warns(UserWarning, match="gradients are recorded"):
        out = pipe.transformer(**given[0])[0]
    out.sum().backward()
    assert weight.grad.abs().sum() > 0


def test_a_request_that_breaks_off():
    entry, pipe = TINY["flux"], build("flux")
    stock = entry.run(pipe, steps=4)

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    accelerate(pipe, attention="sdpa", cuda_graph=True)
    with pytest.raises(KeyboardInterrupt):
        entry.run(pipe, steps=4, callback_on_step_end=stop)
    for _ in range(2):
        assert same(entry.run(pipe, steps=4), stock)


def test_outputs_survive():
    """Both guidance branches replay the same graph, and the pipeline reads the first result after the second call."""
    entry, pipe = TINY["wan"], build("wan")
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    entry.run(pipe, steps=4)
    outputs, handle = [], None
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    kept = []
    handle_2 = pipe.transformer.register_forward_hook(lambda module, args, output: kept.append(output[0].clone()))
    entry.run(pipe, steps=4)
    handle.remove()
    handle_2.remove()
    assert stats(pipe).graph_replays == 8
    assert all(torch.equal(one, other) for one, other in zip(outputs, kept, strict=True))


def test_refusals(monkeypatch):
    pipe = build("flux")
    for sections, message in (
        ({"compile": CompileConfig(mode="reduce-overhead")}, "captures graphs itself"),
        ({"cache": PABConfig(window=(0, 0))}, "captured whole"),
    ):
        with pytest.raises(Unsupported, match=message):
            accelerate(pipe, cuda_graph=True, **sections)
    monkeypatch.delitem(graphs.GRAPH_BACKENDS, "cpu")
    with pytest.raises(Unsupported, match="it runs on cpu"):
        accelerate(pipe, cuda_graph=True)
    assert "it runs on cpu" in str(explain(pipe, cuda_graph=True))


@pytest.mark.parametrize("name", ["flux", "sd3", "ltx2"])
def test_whole_modules(name):
    """The VAE's decoder and the text encoders too: a result that a pipeline keeps is not overwritten by the next
    call."""
    entry, pipe, other = TINY[name], build(name), build(name)
    options = CudaGraphConfig(vae=True, text_encoders=True)
    accelerate(pipe, attention="sdpa", cuda_graph=options)
    before = stats(pipe).graphs_captured
    for prompt in ("one", "two", "three", "four"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if name == "ltx2":  # Gemma returns its cache of keys and values
                warnings.filterwarnings("ignore", "cuda_graph: text_encoder runs .* returns something besides tensors")
            found = entry.run(pipe, steps=2, prompt=prompt)
        assert same(found, entry.run(other, steps=2, prompt=prompt)), prompt
    found = [graphs for graphs in _context(pipe).outputs.graphs if hasattr(graphs, "around_module")]
    assert before == 0 and any(each.captured and each.replays for each in found)
    assert found[0].name == "vae.decoder" and found[0].captured == 1
    restore(pipe)
    assert same(entry.run(pipe, steps=2), entry.run(other, steps=2))


def _context(pipe):
    return vars(pipe)["_diffusers_accel_session"].context


def test_whole_modules_that_stay_as_they_are(monkeypatch):
    """A new size, moved weights, a failed capture, and modules that are refused."""
    pipe, other = build("flux"), build("flux")
    accelerate(pipe, attention="sdpa", cuda_graph=CudaGraphConfig(vae=True, limit=2))
    vae = next(graphs for graphs in _context(pipe).outputs.graphs if hasattr(graphs, "around_module"))
    latents = [torch.randn(1, 4, 4 + size, 8) for size in range(3)]
    with torch.no_grad():
        for latent in (*latents[:2], *latents[:2]):
            assert torch.equal(pipe.vae.decode(latent).sample, other.vae.decode(latent).sample)
        assert vae.captured == 2
        with pytest.warns(UserWarning, match="2 graph variants exist already"):
            pipe.vae.decode(latents[2])
        weight = pipe.vae.decoder.conv_in.weight
        weight.data = weight.data * 2  # in another place
        other.vae.decoder.conv_in.weight.data *= 2
        assert torch.equal(pipe.vae.decode(latents[0]).sample, other.vae.decode(latents[0]).sample)
        assert vae.captured == 0

        def refuses(self, function):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        monkeypatch.setattr(TapeBackend, "capture", refuses)
        with pytest.warns(UserWarning, match=r"vae.decoder runs without graphs: it cannot be captured \(operation not"):
            found = pipe.vae.decode(latents[0]).sample
        assert torch.equal(found, other.vae.decode(latents[0]).sample)
    video = build("wan")
    with pytest.raises(Unsupported, match="keeps features of earlier chunks"):
        accelerate(video, cuda_graph=CudaGraphConfig(vae=True))
    with pytest.raises(Unsupported, match="none is loaded"):
        accelerate(build("flux2"), cuda_graph=CudaGraphConfig(text_encoders=True))


def test_a_failed_capture_runs_without_graphs(monkeypatch):
    """Too little memory for the second of FLUX's two segments, say: this request goes on, and so do later ones."""
    entry, pipe = TINY["flux"], build("flux")
    stock, capture, seen = entry.run(pipe, steps=STEPS), TapeBackend.capture, []

    def refuses(self, function):
        seen.append(1)
        if len(seen) > 1:
            function()
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return capture(self, function)

    monkeypatch.setattr(TapeBackend, "capture", refuses)
    accelerate(pipe, attention="sdpa", cuda_graph=True)
    with pytest.warns(UserWarning, match=r"a call cannot be captured \(CUDA out of memory.\)"):
        assert same(entry.run(pipe, steps=STEPS), stock)
    calls = stats(pipe).attention_kernels
    assert stats(pipe).graphs_captured == 0 and len(seen) == 2
    accelerate(pipe, attention="sdpa")
    entry.run(pipe, steps=STEPS)
    assert stats(pipe).attention_kernels == calls
