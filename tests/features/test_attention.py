"""Which kernel computes which call: by kind, layer, step, glob; what is refused; what `"auto"` remembers."""

from __future__ import annotations

import functools
import warnings
from collections import Counter

import pytest
import torch
from tiny import TINY, build, tensors

from diffusers_accel import (
    AccelConfig,
    AttentionConfig,
    CompileConfig,
    ConfigError,
    Unsupported,
    accelerate,
    explain,
    register_attention,
    restore,
    stats,
)
from diffusers_accel.kernels.attention import KERNELS, AttentionKernel

FAMILIES = sorted(name for name in TINY if TINY[name].family != "others")


def plain(query, key, value, attn_mask=None, is_causal=False, scale=None):
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
    )
    return out.transpose(1, 2)


@pytest.fixture
def second():
    """A second kernel, the same arithmetic under another name."""
    before = dict(KERNELS._records)
    register_attention("second", plain)
    yield
    KERNELS._records.clear()
    KERNELS._records.update(before)


def assert_close(found, expected):
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        # Grouped heads are repeated for a user's function: the same numbers in another order of operations.
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def cross_calls(entry, pipe, steps):
    """Calls of the dispatcher's SDPA in a stock run, by whether keys come from the query's own stream, told by the
    stock modules' arguments: an attention module that is given other hidden states attends to another stream."""
    counts: Counter[bool] = Counter()
    stack: list[bool] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        if stack:
            counts[stack[-1]] += 1
        return original(*args, **kwargs)

    def enter(module, args, kwargs):
        stack.append(kwargs.get("encoder_hidden_states") is not None or (len(args) > 1 and args[1] is not None))

    def leave(*_):
        stack.pop()

    handles = []
    modules = [getattr(pipe, denoiser) for denoiser in entry.denoisers if getattr(pipe, denoiser) is not None]
    for child in (child for module in modules for child in module.modules()):
        if callable(getattr(child, "processor", None)):
            handles.append(child.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(child.register_forward_hook(leave))
    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        entry.run(pipe, steps=steps)
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()
    return counts[True]


class TestKinds:
    # Cross-attention, in the terms of the models' papers: text (and image, for Wan's image to video), and between
    # LTX-2's video and audio. FLUX, FLUX.2, Qwen-Image and SD3 join the streams; Cosmos3's layers attend to themselves.
    JOINT = ("flux", "flux2", "qwen", "sd3", "cosmos3")

    @pytest.mark.parametrize("name", FAMILIES)
    def test_cross_attention_has_a_kernel_of_its_own(self, name, second):
        entry, pipe = TINY[name], build(name)
        stock = entry.run(pipe, steps=2)
        expected = 0 if entry.family in self.JOINT else cross_calls(entry, pipe, steps=2)
        accelerate(pipe, attention={"backend": "sdpa", "cross_attention": "second"})
        found = entry.run(pipe, steps=2)
        assert stats(pipe).attention_kernels.get("second", 0) == expected
        assert (expected > 0) == (entry.family not in self.JOINT)
        assert_close(found, stock)

    def test_the_other_way_round(self, second):
        entry, pipe = TINY["wan"], build("wan")
        accelerate(pipe, attention={"backend": "sdpa", "self_attention": "second"})
        entry.run(pipe, steps=2)
        calls = stats(pipe).attention_kernels
        assert calls["sdpa"] == calls["second"] == 12  # three blocks, two branches, two steps


class TestLayers:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_globs(self, compiled, second):
        entry, pipe = TINY["flux"], build("flux")
        stock = entry.run(pipe, steps=2)
        layers = {"transformer_blocks.0.*": "second", "transformer.single_transformer_blocks.1.attn": "second"}
        section = CompileConfig(backend="eager") if compiled else None
        accelerate(pipe, attention={"backend": "sdpa", "layers": layers}, compile=section)
        found = entry.run(pipe, steps=2)
        assert_close(found, stock)
        assert stats(pipe).attention_kernels["second"] == 4
        restore(pipe)
        assert_close(entry.run(pipe, steps=2), stock)

    def test_blocks_still_share_one_compiled_graph(self, second):
        """Which kernel runs is decided behind an opaque operator: it must not cost a graph per block."""
        graphs = []

        def backend(module, _):
            graphs.append(module)
            return module.forward

        import torch._dynamo

        torch._dynamo.register_backend(backend, name="counting")
        entry, pipe = TINY["wan"], build("wan")
        accelerate(
            pipe,
            attention={"backend": "sdpa", "layers": {"blocks.1.attn1": "second"}, "dense_layers": 0.3},
            compile=CompileConfig(backend="counting"),
        )
        entry.run(pipe, steps=2)
        assert len(graphs) == 1
        assert stats(pipe).attention_kernels["second"] == 4

    def test_a_glob_without_a_layer_is_refused(self):
        pipe = build("flux")
        with pytest.raises(Unsupported, match="matches no attention layer") as error:
            accelerate(pipe, attention={"layers": {"blocks.0.*": "sdpa"}})
        assert "transformer_blocks.0.attn" in str(error.value)

    @pytest.mark.parametrize("name", ["flux", "wan", "wan-vace", "ltx2", "cosmos3", "sd3"])
    def test_dense_layers(self, name, second):
        entry, pipe = TINY[name], build(name)
        accelerate(pipe, attention={"backend": "sdpa"})
        entry.run(pipe, steps=2)
        total = stats(pipe).attention_kernels["sdpa"]
        accelerate(pipe, attention={"backend": "second", "dense_layers": 1.0, "dense_backend": "sdpa"})
        entry.run(pipe, steps=2)
        assert stats(pipe).attention_kernels == {"sdpa": total}
        accelerate(pipe, attention={"backend": "second", "dense_layers": 0.01, "dense_backend": "sdpa"})
        entry.run(pipe, steps=2)
        calls = stats(pipe).attention_kernels
        assert 0 < calls["sdpa"] < total and sum(calls.values()) == total


class TestSteps:
    @pytest.mark.parametrize("name", ["flux", "wan", "ltx2", "cosmos"])
    def test_dense_steps(self, name, second):
        entry, pipe = TINY[name], build(name)
        stock = entry.run(pipe)
        accelerate(pipe, attention="sdpa")
        entry.run(pipe)
        total = stats(pipe).attention_kernels["sdpa"]
        accelerate(pipe, attention={"backend": "second", "dense_steps": 0.3, "dense_backend": "sdpa"})
        for _ in range(2):  # a share of every request, not of a pipeline's life
            found = entry.run(pipe)
            assert stats(pipe).attention_kernels == {"sdpa": total // 2, "second": total // 2}  # 0.3 of 4, rounded up
        assert_close(found, stock)

    def test_the_dense_kernel_is_exact_by_default(self, second):
        pipe = build("flux")
        accelerate(pipe, attention={"backend": "second", "dense_steps": 0.5})
        TINY["flux"].run(pipe)
        assert set(stats(pipe).attention_kernels) == {"sdpa", "second"}
        assert "the first 50% of steps run on sdpa" in str(
            explain(pipe, attention={"backend": "second", "dense_steps": 0.5})
        )


class TestFusedNormAndRotation:
    """FLUX, FLUX.2, Wan, Cosmos and LTX-2 rotate right before attention; FLUX's single-stream blocks and Cosmos norm
    right before that: a kernel that rounds query and key does it in the same pass."""

    @pytest.fixture
    def fusing(self):
        """A kernel that norms and rotates by itself, in float64; counts calls by whether it was given either."""
        before, calls = dict(KERNELS._records), Counter()

        def rotate(x, cos, sin, rope_style):
            half = rope_style == "half"
            real, imaginary = x.double().unflatten(-1, (2, -1) if half else (-1, 2)).unbind(-2 if half else -1)
            turns = torch.complex(cos.double(), sin.double())
            numbers = torch.complex(real, imaginary) * (turns if half else turns[..., ::2])
            return torch.stack([numbers.real, numbers.imag], -2 if half else -1).flatten(-2).to(x.dtype)

        def norm(x, weight, eps):
            x = x.double()
            return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(weight.dtype)

        def function(x):
            calls[x.rotary is not None] += 1
            calls["norm"] += x.norm is not None
            query, key = x.query, x.key
            if x.norm is not None:
                query, key = norm(query, x.norm.query, x.norm.eps), norm(key, x.norm.key, x.norm.eps)
            if x.rotary is not None:
                query, key = (
                    rotate(query, *x.rotary.query, x.rotary.rope_style),
                    rotate(key, *x.rotary.key, x.rotary.rope_style),
                )
            return plain(query, key, x.value, x.attn_mask, x.is_causal, x.scale)

        KERNELS.add(
            "fusing", AttentionKernel(name="fusing", load=lambda: function, fuses_qk_norm_rope=True, shortest=0)
        )
        yield calls
        KERNELS._records.clear()
        KERNELS._records.update(before)

    NAMES = ("flux", "flux2", "wan", "wan-i2v", "wan-vace", "cosmos", "cosmos-predict25-v2w", "ltx2", "ltx23-stg")

    @pytest.fixture
    def rotations(self, monkeypatch):
        """Counts the rotations of LTX-2's own functions in its denoiser (True) and its connectors (False)."""
        from diffusers.models.transformers import transformer_ltx2

        counts: Counter[bool] = Counter()

        def counted(original, *args):
            counts[inside[-1]] += 1
            return original(*args)

        inside = [False]
        forward = transformer_ltx2.LTX2VideoTransformer3DModel.forward

        def entered(*args, **kwargs):
            inside.append(True)
            try:
                return forward(*args, **kwargs)
            finally:
                inside.pop()

        monkeypatch.setattr(transformer_ltx2.LTX2VideoTransformer3DModel, "forward", entered)
        for name in ("apply_interleaved_rotary_emb", "apply_split_rotary_emb"):
            monkeypatch.setattr(transformer_ltx2, name, functools.partial(counted, getattr(transformer_ltx2, name)))
        return counts

    @pytest.mark.parametrize("name", NAMES)
    def test_a_kernel_norms_and_rotates(self, name, fusing, rotations):
        entry, pipe = TINY[name], build(name)
        if name == "ltx2":  # the other form, which no other tiny pipeline has
            model = pipe.transformer
            pipe.transformer = type(model).from_config({**model.config, "rope_type": "interleaved"}).eval()
            pipe.transformer.load_state_dict(model.state_dict())
        stock, in_stock = entry.run(pipe, steps=2), rotations[True]
        accelerate(pipe, attention="fusing")
        assert_close(entry.run(pipe, steps=2), stock)
        total = stats(pipe).attention_kernels["fusing"]
        assert fusing[True] + fusing[False] == total
        normed = rotated = total
        if entry.family in ("wan", "cosmos"):
            rotated -= cross_calls(entry, build(name), steps=2)  # text and image
        if entry.family == "flux" or entry.family == "flux2":
            normed = len(pipe.transformer.single_transformer_blocks) * 2  # the others join two streams after the norm
        elif entry.family in ("wan", "ltx2"):
            normed = 0  # over all heads at once
        if entry.family == "ltx2":
            rotated = in_stock // 2  # all but attention to text; perturbed blocks are left out
        assert fusing["norm"] == normed and fusing[True] == rotated
        restore(pipe)
        again = entry.run(pipe, steps=2)
        assert all(map(torch.equal, tensors(again), tensors(stock)))

    @pytest.mark.parametrize("name", ["flux", "wan"])
    def test_compiled_code_rotates_itself(self, name, fusing):
        """A compiler fuses the rotation with what stands before it, and there is one graph for all blocks."""
        entry, pipe = TINY[name], build(name)
        stock = entry.run(pipe, steps=2)
        accelerate(pipe, attention="fusing", compile=CompileConfig(backend="aot_eager"))
        assert_close(entry.run(pipe, steps=2), stock)
        assert fusing[True] == fusing["norm"] == 0 and fusing[False] > 0

    def test_a_hooked_norm_runs_as_it_is(self, fusing):
        entry, pipe = TINY["flux"], build("flux")
        stock = entry.run(pipe, steps=2)
        seen = Counter()
        for block in pipe.transformer.single_transformer_blocks:
            block.attn.norm_q.register_forward_hook(lambda *_: seen.update(["hook"]))
        accelerate(pipe, attention="fusing")
        assert_close(entry.run(pipe, steps=2), stock)
        assert seen["hook"] == 2 * len(pipe.transformer.single_transformer_blocks) and fusing["norm"] == 0

    @pytest.mark.parametrize("name", ["flux", "wan"])
    def test_dense_steps_see_it_applied(self, name, fusing):
        entry, pipe = TINY[name], build(name)
        stock = entry.run(pipe)
        accelerate(pipe, attention={"backend": "fusing", "dense_steps": 0.5, "dense_backend": "sdpa"})
        assert_close(entry.run(pipe), stock)
        assert fusing[True] > 0 and stats(pipe).attention_kernels["sdpa"] > 0

    def test_other_kernels_leave_it_to_the_stock_code(self, second):
        pipe = build("flux")
        kinds = [type(module.processor) for module in pipe.transformer.modules() if hasattr(module, "processor")]
        accelerate(pipe, attention="second")
        assert kinds == [
            type(module.processor) for module in pipe.transformer.modules() if hasattr(module, "processor")
        ]


class TestRefusals:
    def test_recipes(self):
        pipe = build("flux")
        with pytest.raises(Unsupported, match=r"no such recipe, but 'int8-1-128-1', 'int8-1-16-1'"):
            accelerate(pipe, attention={"backend": "sage-fp8", "recipe": "int8-1-8-1"})
        with pytest.raises(Unsupported, match="'fa3-fp8' has no recipes; 'sage', 'sage-fp8', 'qk16pv8' have"):
            accelerate(pipe, attention={"backend": "fa3-fp8", "recipe": "int8-1-16-1"})
        with pytest.raises(Unsupported, match="needs a CUDA device"):
            accelerate(pipe, attention={"backend": "sage-fp8", "recipe": "int8-1-16-1"})
        assert not hasattr(pipe, "_diffusers_accel_session")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"dense_steps": 1.5}, "number between 0 and 1"),
            ({"dense_layers": -0.1}, "number between 0 and 1"),
            ({"fidelity": "4bit"}, "'exact' or '8bit'"),
            ({"layers": {"a": 1}}, "globs to names"),
            ({"layers": ["a"]}, "layers"),
            ({"backends": "sdpa"}, "'backend'"),
        ],
    )
    def test_values(self, values, message):
        with pytest.raises(ConfigError, match=message):
            AccelConfig.from_dict({"attention": values})

    def test_every_kernel_that_is_named_is_judged(self):
        pipe = build("wan")
        for section in (
            {"backend": "sdpa", "cross_attention": "fa3"},
            {"backend": "sdpa", "layers": {"blocks.0.attn1": "sage"}},
            {"backend": "sdpa", "dense_steps": 0.1, "dense_backend": "fa4"},
        ):
            with pytest.raises(Unsupported):
                accelerate(pipe, attention=section)

    def test_it_round_trips(self, tmp_path):
        config = AccelConfig(
            attention=AttentionConfig(
                backend="sage-fp8", recipe="int8-1-16-1", dense_steps=0.2, layers={"blocks.0.*": "sdpa"}
            )
        )
        config.to_yaml(tmp_path / "accel.yaml")
        assert AccelConfig.from_yaml(tmp_path / "accel.yaml") == config


def test_shared_processors_are_told_apart(second):
    """diffusers' own setter puts one processor object into all layers."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    entry, pipe = TINY["wan"], build("wan")
    stock = entry.run(pipe, steps=2)
    shared = WanAttnProcessor()
    for module in pipe.transformer.modules():
        if hasattr(module, "processor"):
            module.processor = shared
    accelerate(pipe, attention={"backend": "sdpa", "cross_attention": "second"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = entry.run(pipe, steps=2)
    assert stats(pipe).attention_kernels == {"sdpa": 12, "second": 12}
    assert_close(found, stock)
    restore(pipe)
    assert all(module.processor is shared for module in pipe.transformer.modules() if hasattr(module, "processor"))
    assert vars(shared).keys() == vars(WanAttnProcessor()).keys()
