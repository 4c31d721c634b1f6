"""Quantized linear layers on stock pipelines: the choice of layers, memory, restore, other features and packages."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import TINY, build, tensors
from torch import nn

from diffusers_accel import (
    AccelConfig,
    AttentionConfig,
    CompileConfig,
    ConfigError,
    LinearConfig,
    Unsupported,
    accelerate,
    explain,
    register_linear,
    restore,
    stats,
)
from diffusers_accel.kernels.linear import LINEARS, QuantizedLinear

FAMILIES = ["flux", "flux2", "wan", "wan22", "wan-i2v", "wan-vace", "ltx2", "qwen", "cosmos", "cosmos3", "sd3"]
ALGOS = ["fp8", "fp8-tensor", "int8", "nvfp4", "svdq-nvfp4"]
BOUNDS = {"fp8": 0.3, "fp8-tensor": 0.3, "int8": 0.12, "nvfp4": 0.35, "svdq-nvfp4": 0.01}
# All layers inside the blocks: the layers of tiny models are below `smallest`.
ALL = {"smallest": 0}


def denoisers(pipe):
    return [getattr(pipe, name) for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is not None]


def state(pipe):
    return {key: item.clone() for model in denoisers(pipe) for key, item in model.state_dict().items()}


def difference(found, expected):
    """The largest relative difference."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """Quantized inside the blocks, near stock, smaller, and bit for bit the stock pipeline again."""
    entry, pipe = TINY[name], build(name)
    stock, weights = tensors(entry.run(pipe, steps=2)), state(pipe)
    parameters = {key: item for model in denoisers(pipe) for key, item in model.named_parameters()}
    types = [type(module) for model in denoisers(pipe) for module in model.modules()]
    for algo in ALGOS:
        accelerate(pipe, linear={"algo": algo, **ALL})
        found = stats(pipe)
        kind = next(kind for kind in found.linear_layers if kind != "Linear")
        assert kind.startswith(algo) and found.linear_layers[kind] > 5, found.linear_layers
        if algo != "svdq-nvfp4":  # on layers this small the branch takes more than 4 bits save
            assert found.weight_bytes_after < found.weight_bytes_before
        # Random weights amplify errors, so this bound is loose; `tests/kernels/test_linear.py` bounds each layer.
        # The low-rank branch of svdq-nvfp4 represents layers as small as these exactly.
        assert difference(tensors(entry.run(pipe, steps=2)), stock) < BOUNDS[algo], algo
    restore(pipe)
    assert [type(module) for model in denoisers(pipe) for module in model.modules()] == types
    again = {key: item for model in denoisers(pipe) for key, item in model.named_parameters()}
    assert all(again[key] is item for key, item in parameters.items())
    assert all(torch.equal(item, weights[key]) for key, item in state(pipe).items())
    assert all(map(torch.equal, tensors(entry.run(pipe, steps=2)), stock))


class TestExcludedLayers:
    def test_outside_the_blocks(self):
        pipe = build("flux")
        accelerate(pipe, linear="fp8")
        unquantized = [path for path, module in pipe.transformer.named_modules() if type(module) is nn.Linear]
        assert unquantized and not any("blocks" in path for path in unquantized)
        assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= set(unquantized)

    def test_the_first_and_last_blocks_where_they_are_few(self):
        pipe = build("wan")
        blocks = pipe.transformer.blocks
        while len(blocks) < 14:
            blocks.append(copy.deepcopy(blocks[0]))
        accelerate(pipe, linear="fp8")
        kept = [index for index, block in enumerate(blocks) if type(block.attn1.to_q) is nn.Linear]
        assert kept == [0, 1, 2, 11, 12, 13]

    def test_ignore_and_plan(self):
        pipe = build("flux")
        accelerate(
            pipe,
            linear=LinearConfig(
                algo="fp8",
                ignore=("*.attn.to_q", "transformer.single_transformer_blocks.0.*"),
                plan={"transformer_blocks.0.ff.*": "int8", "x_embedder": "nvfp4", "*.norm1.linear": "none"},
            ),
        )
        modules = dict(pipe.transformer.named_modules())
        assert type(modules["transformer_blocks.0.attn.to_q"]) is nn.Linear
        assert type(modules["single_transformer_blocks.0.proj_out"]) is nn.Linear
        assert type(modules["transformer_blocks.0.norm1.linear"]) is nn.Linear
        assert modules["transformer_blocks.0.attn.to_k"].kind == "fp8"
        assert modules["transformer_blocks.0.ff.net.2"].kind == "int8"
        assert modules["x_embedder"].kind.startswith("nvfp4")
        counts = stats(pipe).linear_layers
        assert counts["int8"] == 2 and counts["fp8"] > 5
        restore(pipe)
        accelerate(pipe, linear={"plan": {"proj_out": "int8"}})
        assert stats(pipe).linear_layers["int8"] == 1

    def test_small_layers_of_models_without_a_list(self):
        pipe = build("sd3")
        with pytest.raises(Unsupported, match=r"of 46, 39 are no larger than linear.smallest=512"):
            accelerate(pipe, linear="fp8")
        accelerate(pipe, linear={"algo": "fp8", "smallest": 8})
        assert stats(pipe).linear_layers["fp8"] > 5

    def test_explain_names_them(self):
        pipe = build("flux")
        before = state(pipe)
        rows = {row.feature: row for row in explain(pipe, linear={"algo": "nvfp4", "keep_original": "drop"}).rows}
        row = rows["linear"]
        assert row.modules > 10 and "nvfp4 x" in row.action
        notes = " ".join(row.notes)
        assert "10 layers are not quantized: context_embedder, x_embedder" in notes and "instead of" in notes
        assert "restore cannot bring them back" in notes and "dequantized" in notes
        assert all(torch.equal(item, before[key]) for key, item in state(pipe).items())

    def test_shapes_that_a_format_cannot_store(self):
        pipe = build("flux")
        with pytest.raises(Unsupported, match=r"left to quantize: .*are no larger than linear.smallest=1000000"):
            accelerate(pipe, linear={"algo": "fp8-block", "smallest": 10**6})
        pipe.transformer.transformer_blocks[0].ff.net[2] = nn.Linear(
            pipe.transformer.transformer_blocks[0].ff.net[2].in_features, 24
        )
        with pytest.warns(
            UserWarning, match=r"1 layers are not quantized \(24 output features are no multiple of 16\)"
        ):
            accelerate(pipe, linear="fp8")


def test_shared_weights_are_not_quantized():
    pipe = build("flux")
    first, second = (block.attn.to_q for block in pipe.transformer.transformer_blocks[:2])
    second.weight = first.weight
    with pytest.warns(UserWarning, match="2 layers are not quantized .its weight is shared with another layer."):
        accelerate(pipe, linear="fp8")
    assert type(first) is type(second) is nn.Linear


class TestTorchao:
    def test_its_layers(self):
        pytest.importorskip("torchao")
        pipe, entry = build("flux"), TINY["flux"]
        stock = tensors(entry.run(pipe, steps=2))
        parameters = dict(pipe.transformer.named_parameters())
        accelerate(pipe, linear="torchao:int8_weight_only")
        found = stats(pipe)
        assert found.linear_layers["torchao:int8_weight_only"] > 5
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        assert type(layer.weight.data).__module__.startswith("torchao")
        assert 0 < difference(tensors(entry.run(pipe, steps=2)), stock) < 0.05
        # A second call starts from the stock layers.
        accelerate(pipe, linear="int8")
        assert set(stats(pipe).linear_layers) == {"Linear", "int8"}
        accelerate(pipe, linear="torchao:int8_weight_only")
        restore(pipe)
        assert all(item is parameters[key] for key, item in pipe.transformer.named_parameters())
        assert all(map(torch.equal, tensors(entry.run(pipe, steps=2)), stock))

    def test_names(self, monkeypatch):
        pytest.importorskip("torchao")
        pipe = build("flux")
        with pytest.raises(Unsupported, match=r"no such configuration.*int8_weight_only"):
            accelerate(pipe, linear="torchao:int8_weights_only")
        with pytest.raises(Unsupported, match="a granularity is 'row' or nothing, not 'column'"):
            accelerate(pipe, linear="torchao:float8_dynamic_activation_float8_weight/column")
        monkeypatch.setattr("diffusers_accel.kernels.linear.third_party.has_module", lambda name: False)
        monkeypatch.setattr("diffusers_accel.kernels.linear.record.has_module", lambda name: False)
        with pytest.raises(Unsupported, match=r"needs the package torchao \(pip install torchao\)"):
            accelerate(pipe, linear="torchao:int8_weight_only")


class TestTextEncoders:
    def test_on_request(self):
        pipe, entry = build("flux"), TINY["flux"]
        stock = tensors(entry.run(pipe, steps=2))
        embedded = pipe.encode_prompt("a red ball", None, device="cpu")[0]
        accelerate(pipe, linear={"algo": "int8", "smallest": 0, "targets": ["transformer", "text_encoder_2"]})
        encoders = [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2")]
        counts = [sum(isinstance(item, QuantizedLinear) for item in encoder.modules()) for encoder in encoders]
        assert counts[0] == 0 and counts[1] > 5
        assert stats(pipe).linear_layers["int8"] > 5
        found = pipe.encode_prompt("a red ball", None, device="cpu")[0]
        assert 0 < difference([found], [embedded]) < 0.05
        restore(pipe)
        assert torch.equal(pipe.encode_prompt("a red ball", None, device="cpu")[0], embedded)
        assert all(map(torch.equal, tensors(entry.run(pipe, steps=2)), stock))

    def test_names(self):
        pipe = build("flux")
        with pytest.raises(Unsupported, match=r"linear.targets: 'text_encoder_3'.*of .*text_encoder_2"):
            accelerate(pipe, linear={"algo": "fp8", "targets": ["text_encoder_3"]})


class TestOriginals:
    def test_kept_on_the_host(self):
        pipe = build("flux")
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        accelerate(pipe, linear="fp8")
        quantized = pipe.transformer.transformer_blocks[0].attn.to_q
        assert isinstance(quantized, QuantizedLinear) and quantized.stock is layer
        assert layer.weight.device.type == "cpu" and quantized.bias is layer.bias

    def test_dropped(self):
        pipe = build("flux")
        entry = TINY["flux"]
        stock = tensors(entry.run(pipe, steps=2))
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        accelerate(pipe, linear={"algo": "int8", "keep_original": "drop"})
        assert layer.weight.numel() == 0
        assert difference(tensors(entry.run(pipe, steps=2)), stock) < 0.02
        found = tensors(entry.run(pipe, steps=2))
        for attempt in (lambda: restore(pipe), lambda: accelerate(pipe, attention="sdpa")):
            with pytest.raises(Unsupported, match=r"original weights were dropped .* load the pipeline again"):
                attempt()
        with pytest.raises(Unsupported, match=r"quantized already \(int8\)"):
            accelerate(pipe, linear="fp8")
        assert all(map(torch.equal, tensors(entry.run(pipe, steps=2)), found))

    def test_a_second_call_starts_from_the_originals(self):
        pipe, other = build("flux"), build("flux")
        accelerate(pipe, linear="nvfp4")
        accelerate(pipe, linear="int8")
        accelerate(other, linear="int8")
        mine, theirs = (item.transformer.transformer_blocks[0].attn.to_q for item in (pipe, other))
        assert torch.equal(mine.weight_data, theirs.weight_data)

    @pytest.mark.parametrize("keep", ["cpu", "drop"])
    def test_an_error_midway_leaves_working_layers(self, keep):
        pipe, entry = build("flux"), TINY["flux"]
        stock = tensors(entry.run(pipe, steps=2))
        made = []

        def third_fails(linear):
            if len(made) == 2:
                raise RuntimeError("out of memory, say")
            made.append(LINEARS.get("int8").load()(linear))
            return made[-1]

        LINEARS.add("failing", type(LINEARS.get("int8"))(name="failing", load=lambda: third_fails), replace=True)
        try:
            with pytest.raises(Unsupported, match="RuntimeError: out of memory, say"):
                accelerate(pipe, linear={"algo": "failing", "keep_original": keep})
        finally:
            LINEARS._records.pop("failing")
        assert not any(isinstance(module, QuantizedLinear) for module in pipe.transformer.modules())
        found = tensors(entry.run(pipe, steps=2))
        if keep == "cpu":
            assert all(map(torch.equal, found, stock))
        else:
            assert difference(found, stock) < 0.02

    def test_one_layer_is_held_twice_at_most(self):
        """While a layer is quantized, the layers before it hold only their low-bit form on the device."""
        pipe, seen = build("flux"), []
        stocks = []

        def watched(linear):
            seen.append(sum(item.weight.device.type == "cpu" and item.weight.numel() == 0 for item in stocks))
            stocks.append(linear)
            return LINEARS.get("int8").load()(linear)

        register_linear("watched", watched)
        try:
            accelerate(pipe, linear={"algo": "watched", "keep_original": "drop"})
        finally:
            LINEARS._records.pop("watched")
        assert seen == list(range(len(seen)))


class TestBesideOthers:
    def test_state_dict_and_save_pretrained_are_the_stock_ones(self, tmp_path):
        pipe = build("flux")
        before = state(pipe)
        accelerate(pipe, linear="fp8")
        assert all(torch.equal(item, before[key]) for key, item in state(pipe).items())
        assert set(state(pipe)) == set(before)
        pipe.transformer.save_pretrained(tmp_path)
        loaded = type(pipe.transformer).from_pretrained(tmp_path)
        assert all(torch.equal(item, before[key]) for key, item in loaded.state_dict().items())

    def test_one_compiled_graph_for_all_blocks(self, collected):
        pipe, entry = build("flux"), TINY["flux"]
        graphs = {}
        for linear in (None, "fp8"):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            accelerate(pipe, linear=linear, compile=CompileConfig(backend="aot_eager"))
            found = tensors(entry.run(pipe, steps=2))
            graphs[linear] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs["fp8"] == graphs[None]
        restore(pipe)
        accelerate(pipe, linear="fp8")
        for one, other in zip(found, tensors(entry.run(pipe, steps=2)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)

    def test_attention_beside_it(self):
        pipe, entry = build("wan"), TINY["wan"]
        stock = tensors(entry.run(pipe, steps=2))
        accelerate(pipe, linear="int8", attention=AttentionConfig(backend="sdpa"))
        assert difference(tensors(entry.run(pipe, steps=2)), stock) < 0.12
        assert stats(pipe).attention_kernels["sdpa"] > 0
        restore(pipe)
        assert all(map(torch.equal, tensors(entry.run(pipe, steps=2)), stock))

    def test_moves_and_casts(self):
        pipe = build("flux")
        accelerate(pipe, linear="fp8")
        pipe.to(torch.bfloat16)
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        assert layer.weight_data.dtype == torch.float8_e4m3fn and layer.weight_scale.dtype == torch.float32
        assert layer.weight.dtype == torch.bfloat16
        found = tensors(TINY["flux"].run(pipe, steps=2))
        restore(pipe)
        stock = build("flux").to(torch.bfloat16)
        assert all(map(torch.equal, pipe.transformer.state_dict().values(), stock.transformer.state_dict().values()))
        assert difference(found, tensors(TINY["flux"].run(stock, steps=2))) < 0.05

    @pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
    def test_group_offloading_enabled_afterwards(self, kind):
        pipe, entry = build("flux"), TINY["flux"]
        accelerate(pipe, linear="fp8")
        expected = tensors(entry.run(pipe, steps=2))
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, **blocks
        )
        assert all(map(torch.equal, tensors(entry.run(pipe, steps=2)), expected))
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        assert isinstance(layer, QuantizedLinear) and layer.weight_data.dtype == torch.float8_e4m3fn

    def test_model_offloading_in_either_order(self):
        """The hooks of `enable_model_cpu_offload`, which need an accelerator; the host is used here."""
        from accelerate import cpu_offload_with_hook

        expected = tensors(TINY["flux"].run(accelerate(build("flux"), linear="fp8"), steps=2))
        for ours_first in (True, False):
            pipe = build("flux")
            if ours_first:
                accelerate(pipe, linear="fp8")
            _, hook = cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
            if not ours_first:
                accelerate(pipe, linear="fp8")
            for _ in range(2):
                assert all(map(torch.equal, tensors(TINY["flux"].run(pipe, steps=2)), expected))
                hook.offload()
            restore(pipe)
            assert not any(isinstance(module, QuantizedLinear) for module in pipe.transformer.modules())

    def test_offloaded_models_are_refused(self):
        pipe = build("flux")
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
        with pytest.raises(Unsupported, match="accelerate first, then enable offloading"):
            accelerate(pipe, linear="fp8")


class TestRefusals:
    def test_names(self):
        pipe = build("flux")
        with pytest.raises(Unsupported, match=r"no linear kernel of that name.*Did you mean 'fp8'"):
            accelerate(pipe, linear="fp9")
        with pytest.raises(Unsupported, match=r"linear.ignore: 'to_qq'.*matches no linear layer"):
            accelerate(pipe, linear={"algo": "fp8", "ignore": ["to_qq"]})
        with pytest.raises(Unsupported, match=r"linear.plan: 'x'"):
            accelerate(pipe, linear={"plan": {"x": "fp8"}})
        assert not any(isinstance(module, QuantizedLinear) for module in pipe.transformer.modules())

    def test_configuration(self, tmp_path):
        with pytest.raises(ConfigError, match="'cpu' or 'drop'"):
            AccelConfig(linear={"algo": "fp8", "keep_original": "gpu"})
        with pytest.raises(ConfigError, match="no format is named"):
            AccelConfig(linear={})
        with pytest.raises(ConfigError, match=r"linear.ignore: expected"):
            AccelConfig(linear={"algo": "fp8", "ignore": [1]})
        for values, expected in (
            (
                {"quant_algo": "NVFP4", "dynamic": True, "ignore": ["proj_out*"]},
                {"algo": "nvfp4", "ignore": ("proj_out*",)},
            ),
            (
                {"quant_algo": "FP8", "keep_original": "drop"},
                {"algo": "fp8-tensor", "keep_original": "drop"},
            ),
            (
                {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"blocks.0.*": {"quant_algo": "FP8"}}},
                {"plan": {"blocks.0.*": "fp8-tensor"}},
            ),
        ):
            assert AccelConfig(linear=values).linear == LinearConfig(**expected)
        with pytest.raises(ConfigError, match=r"got 'FP9'. Did you mean 'FP8'"):
            AccelConfig(linear={"quant_algo": "FP9"})
        with pytest.raises(ConfigError, match="a loaded model has no input scales"):
            AccelConfig(linear={"quant_algo": "FP8", "dynamic": False})
        with pytest.raises(ConfigError, match=r"\['config_groups'\] of a quantization_config"):
            AccelConfig(linear={"quant_algo": "FP8", "config_groups": {}})
        config = AccelConfig(linear=LinearConfig(algo="fp8", ignore=["*.to_q"], plan={"proj_out": "none"}))
        config.to_yaml(tmp_path / "accel.yaml")
        assert AccelConfig.from_yaml(tmp_path / "accel.yaml") == config


class TestUsersOwn:
    @pytest.fixture(autouse=True)
    def _registry(self):
        before = dict(LINEARS._records)
        yield
        LINEARS._records.clear()
        LINEARS._records.update(before)

    def test_a_users_layer(self):
        class Doubled(nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.halved = nn.Parameter(linear.weight.detach() / 2)
                self.bias = linear.bias

            def forward(self, x):
                return nn.functional.linear(2 * x, self.halved, self.bias)

        @register_linear("doubled", in_multiple=8)
        def doubled(linear):
            return Doubled(linear)

        pipe, entry = build("wan"), TINY["wan"]
        stock = tensors(entry.run(pipe, steps=2))
        accelerate(pipe, linear="doubled")
        for one, other in zip(tensors(entry.run(pipe, steps=2)), stock, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        restore(pipe)
        assert all(map(torch.equal, tensors(entry.run(pipe, steps=2)), stock))
        with pytest.raises(ValueError, match="already"):
            register_linear("doubled", doubled)
        # A dropped weight must be recoverable if a later layer fails.
        with pytest.raises(Unsupported, match=r"makes of .* has no weight of the stock shape"):
            accelerate(pipe, linear={"algo": "doubled", "keep_original": "drop"})
        assert all(map(torch.equal, tensors(entry.run(pipe, steps=2)), stock))

    def test_functions_that_return_no_module(self):
        register_linear("wrong", lambda linear: linear.weight)
        pipe = build("wan")
        with pytest.raises(Unsupported, match=r"ValueError: .*registered as 'wrong' returned Parameter"):
            accelerate(pipe, linear="wrong")
