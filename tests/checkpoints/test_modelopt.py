"""Quantized checkpoints: files of nvidia-modelopt, our own files, the variants of the layout, and bad files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, build

from diffusers_accel import (
    CheckpointError,
    Unsupported,
    accelerate,
    demo,
    from_pretrained,
    restore,
    save_quantized,
    stats,
)
from diffusers_accel.kernels.linear import QuantizedLinear

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def dequantized(layer_tensors):
    """The dequantized weight of a layer's tensors, by arithmetic of this test."""
    weight, scale = layer_tensors["weight"], layer_tensors.get("weight_scale", layer_tensors.get("weight_scale_inv"))
    if weight.dtype == torch.uint8:
        codes = torch.stack([weight % 16, weight // 16], -1).flatten(1).long()
        values = torch.where(codes < 8, E2M1[codes % 8], -E2M1[codes % 8])
        found = values * scale.float().repeat_interleave(16, 1) * layer_tensors["weight_scale_2"].float()
        if "svdquant_lora_a" in layer_tensors:
            found = found + layer_tensors["svdquant_lora_b"].float() @ layer_tensors["svdquant_lora_a"].float()
    elif scale.numel() > 1:
        rows, columns = weight.shape
        each = scale.float().reshape(-(-rows // 128), -(-columns // 128))
        found = weight.float() * each.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    else:
        found = weight.float() * scale.float()
    return found * layer_tensors["pre_quant_scale"].float() if "pre_quant_scale" in layer_tensors else found


def file_of(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def layers_of(folder):
    """Layer -> its tensors, of quantized layers."""
    found = {}
    for name, tensor in load_file(file_of(folder)).items():
        layer, _, suffix = name.rpartition(".")
        found.setdefault(layer, {})[suffix] = tensor
    return {
        name: layer_tensors
        for name, layer_tensors in found.items()
        if {"weight_scale", "weight_scale_inv"} & set(layer_tensors)
    }


def dequantized_pipeline(pipe, folder):
    """The pipeline with a stock transformer that has the file's dequantized weights."""
    reference = type(pipe.transformer).from_config(dict(pipe.transformer.config)).eval().requires_grad_(False)
    state, layers = load_file(file_of(folder)), layers_of(folder)
    for name, layer_tensors in layers.items():
        state[f"{name}.weight"] = dequantized(layer_tensors)
    reference.load_state_dict({key: item.float() for key, item in state.items() if key in reference.state_dict()})
    return type(pipe)(**{**pipe.components, "transformer": reference})


def difference(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def same_bytes(found, expected):
    assert set(found) == set(expected)
    for key, item in expected.items():
        assert found[key].dtype == item.dtype and found[key].shape == item.shape, key
        assert torch.equal(found[key].reshape(-1).view(torch.uint8), item.reshape(-1).view(torch.uint8)), key


def edit(folder, change=None, config=None):
    """Changes the tensors, the `quantization_config`, or both."""
    if change is not None:
        tensors = load_file(file_of(folder))
        change(tensors)
        save_file(tensors, file_of(folder), metadata={"format": "pt"})
    if config is not None:
        file = folder / "transformer" / "config.json"
        values = json.loads(file.read_text())
        config(values["quantization_config"])
        file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("config", "algo", "bound"), [("FP8_DEFAULT_CFG", "fp8-tensor", 0.1), ("NVFP4_DEFAULT_CFG", "nvfp4", 1e-3)]
)
def test_files_of_modelopt(tmp_path, config, algo, bound):
    """`mtq.quantize`, and ModelOpt's export of a diffusers pipeline."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint

    source, entry = build("flux"), TINY["flux"]
    mtq.quantize(source.transformer, getattr(mtq, config), forward_loop=lambda model: entry.run(source, steps=2))
    export_hf_checkpoint(source, export_dir=tmp_path)
    pipe = from_pretrained(tmp_path, dtype=torch.float32)
    modules, layers = dict(pipe.transformer.named_modules()), layers_of(tmp_path)
    assert {name for name, item in modules.items() if isinstance(item, QuantizedLinear)} == set(layers) and len(
        layers
    ) > 20
    for name, layer_tensors in layers.items():
        assert modules[name].kind.startswith(algo)
        torch.testing.assert_close(modules[name].materialize(), dequantized(layer_tensors), rtol=1e-6, atol=0)
    if algo == "fp8-tensor":
        name, layer_tensors = next(iter(layers.items()))
        assert torch.equal(modules[name].input_scale, layer_tensors["input_scale"].reshape(1))
    assert difference(entry.run(pipe, steps=2), entry.run(dequantized_pipeline(pipe, tmp_path), steps=2)) < bound


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A saved folder per algorithm, and the pipeline that it was saved from."""
    found = {}
    for name, linear in {
        "fp8-tensor": {"algo": "fp8-tensor"},
        "nvfp4": {"algo": "nvfp4"},
        "svdq-nvfp4": {"algo": "svdq-nvfp4"},
        "mixed": {"algo": "nvfp4", "plan": {"*.attn.*": "fp8-tensor"}},
    }.items():
        folder = tmp_path_factory.mktemp(name)
        pipe = accelerate(build("flux"), linear={**linear, "smallest": 0, "keep_original": "drop"})
        save_quantized(pipe, folder)
        found[name] = folder, pipe
    return found


@pytest.fixture
def copied(written, tmp_path):
    def copy(name):
        shutil.copytree(written[name][0], tmp_path / name)
        return tmp_path / name

    return copy


@pytest.mark.parametrize("name", ["fp8-tensor", "nvfp4", "svdq-nvfp4", "mixed"])
def test_round_trip(written, name, tmp_path):
    folder, pipe = written[name]
    loaded = from_pretrained(folder, dtype=torch.float32)
    found, expected = dict(loaded.transformer.named_buffers()), dict(pipe.transformer.named_buffers())
    same_bytes(found, expected)
    parameters = dict(loaded.transformer.named_parameters())
    assert all(torch.equal(parameters[key], item) for key, item in pipe.transformer.named_parameters())
    save_quantized(loaded, tmp_path / "again")
    for one, other in zip(
        load_file(file_of(folder)).items(), load_file(file_of(tmp_path / "again")).items(), strict=True
    ):
        assert one[0] == other[0] and torch.equal(
            one[1].view(-1).view(torch.uint8), other[1].view(-1).view(torch.uint8)
        )
    entry = TINY["flux"]
    assert difference(entry.run(loaded, steps=2), entry.run(dequantized_pipeline(loaded, folder), steps=2)) < 0.1
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    names = {"fp8-tensor": "FP8", "nvfp4": "NVFP4", "svdq-nvfp4": "NVFP4_SVD", "mixed": "MIXED_PRECISION"}
    assert config["quant_algo"] == names[name]


@pytest.mark.parametrize("name", ["wan-shapes", "flux-shapes"])  # with and without multiples of 128
def test_round_trip_of_blocks(name, tmp_path):
    pipe = accelerate(demo.load(name), linear={"algo": "fp8-block", "keep_original": "drop", "smallest": 0})
    save_quantized(pipe, tmp_path)
    loaded = from_pretrained(tmp_path, dtype=torch.float32)
    found, expected = dict(loaded.transformer.named_buffers()), dict(pipe.transformer.named_buffers())
    assert sum(key.endswith("weight_scale") for key in expected) > 10
    same_bytes(found, expected)
    for name, layer_tensors in layers_of(tmp_path).items():
        layer = loaded.transformer.get_submodule(name)
        torch.testing.assert_close(layer.dequantize(), dequantized(layer_tensors), rtol=1e-6, atol=0)

    def renamed(tensors):  # DeepSeek's name, and dimensions of size one
        for key in [key for key in tensors if key.endswith("weight_scale")]:
            tensors[f"{key}_inv"] = tensors.pop(key)[:, None, :, None].contiguous()

    edit(tmp_path, renamed, lambda config: config.update(quant_algo="fp8_pb_wo"))
    again = dict(from_pretrained(tmp_path, dtype=torch.float32).transformer.named_buffers())
    same_bytes(again, found)


class TestVariants:
    def test_pre_quant_scale(self, copied):
        """`pre_quant_scale` multiplies the input."""
        folder = copied("nvfp4")
        name = next(iter(layers_of(folder)))
        size = layers_of(folder)[name]["weight"].shape[1] * 2

        def smooth(tensors):
            tensors[f"{name}.pre_quant_scale"] = torch.linspace(0.5, 2, size)

        edit(folder, smooth)
        pipe = from_pretrained(folder, dtype=torch.float32)
        layer = pipe.transformer.get_submodule(name)
        expected = dequantized(layers_of(folder)[name])
        torch.testing.assert_close(layer.weight + 0, expected)
        x = torch.randn(5, size)
        torch.testing.assert_close(layer(x), x @ expected.T + layer.bias)

    @pytest.mark.parametrize(
        ("dynamic", "groups", "static"), [(True, False, False), (False, False, True), (True, True, True)]
    )
    def test_static_and_dynamic_activations(self, copied, dynamic, groups, static):
        """Without groups `dynamic` decides; with groups, each group's flag, which is false by default."""
        folder = copied("fp8-tensor")
        name = next(iter(layers_of(folder)))

        def scales(tensors):
            for layer in layers_of(folder):
                tensors[f"{layer}.input_scale"] = torch.tensor(0.02)

        def flags(config):
            config.pop("config_groups", None)
            config["dynamic"] = dynamic
            if groups:
                config["config_groups"] = {"group_0": {"input_activations": {"num_bits": 8}, "weights": {}}}

        edit(folder, scales, flags)
        layer = from_pretrained(folder, dtype=torch.float32).transformer.get_submodule(name)
        assert (layer.input_scale is not None) == static

        for wanted in (True, False):  # the argument overrides the file
            layer = from_pretrained(folder, dtype=torch.float32, dynamic=wanted).transformer.get_submodule(name)
            assert (layer.input_scale is None) == wanted

        def without(tensors):
            tensors.pop(f"{name}.input_scale")

        edit(folder, without)
        with pytest.raises(CheckpointError, match=r"there is no input_scale\. dynamic=True"):
            from_pretrained(folder, dynamic=False)

    @pytest.mark.parametrize("name", ["fp8-tensor", "nvfp4", "mixed"])
    def test_a_single_file(self, written, name, tmp_path):
        """The header describes the quantization; the model's configuration is the stock folder's."""
        folder, pipe = written[name]
        build("flux").save_pretrained(tmp_path / "stock")
        file = shutil.copy(file_of(folder), tmp_path / "model.safetensors")
        for given in (file, str(file)):
            loaded = from_pretrained(tmp_path / "stock", dtype=torch.float32, transformer=given)
            same_bytes(dict(loaded.transformer.named_buffers()), dict(pipe.transformer.named_buffers()))
        assert loaded.text_encoder is not None

    def test_a_single_file_by_layer(self, written, tmp_path):
        folder, pipe = written["mixed"]
        build("flux").save_pretrained(tmp_path / "stock")
        tensors = load_file(file_of(folder))
        formats = {
            layer: {"format": "nvfp4" if layer_tensors["weight"].dtype == torch.uint8 else "float8_e4m3fn"}
            for layer, layer_tensors in layers_of(folder).items()
        }

        def load(layers):
            metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
            save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
            return from_pretrained(tmp_path / "stock", dtype=torch.float32, transformer=tmp_path / "model.safetensors")

        same_bytes(dict(load(formats).transformer.named_buffers()), dict(pipe.transformer.named_buffers()))
        name = next(iter(formats))
        with pytest.raises(CheckpointError, match=f"{name}: the format 'int3' is not known"):
            load({**formats, name: {"format": "int3"}})
        with pytest.raises(CheckpointError, match="the configuration says"):
            load({**formats, name: {"format": "nvfp4" if formats[name]["format"] != "nvfp4" else "float8_e4m3fn"}})
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="says nothing of a quantization"):
            from_pretrained(tmp_path / "stock", transformer=tmp_path / "model.safetensors")
        save_file(tensors, tmp_path / "model.safetensors", metadata={"quantization_config": "{"})
        with pytest.raises(CheckpointError, match="is not JSON"):
            from_pretrained(tmp_path / "stock", transformer=tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").write_bytes(b"short")
        with pytest.raises(CheckpointError, match="cannot be read"):
            from_pretrained(tmp_path / "stock", transformer=tmp_path / "model.safetensors")

    def test_a_loaded_pipeline_is_accelerated_and_restored(self, written):
        folder, _ = written["fp8-tensor"]
        pipe, entry = from_pretrained(folder, dtype=torch.float32), TINY["flux"]
        before = entry.run(pipe, steps=2)
        accelerate(pipe, attention="sdpa")
        assert stats(pipe).linear_layers["fp8-tensor"] > 5
        assert torch.equal(entry.run(pipe, steps=2), before)
        restore(pipe)
        with pytest.raises(Unsupported, match="is quantized already"):
            accelerate(pipe, linear="int8")

    def test_a_stock_folder_is_loaded_as_it_is(self, tmp_path):
        build("wan").save_pretrained(tmp_path)
        assert not any(isinstance(item, QuantizedLinear) for item in from_pretrained(tmp_path).transformer.modules())


class TestBadCheckpoints:
    def refused(self, folder):
        with pytest.raises(CheckpointError) as error:
            from_pretrained(folder)
        return str(error.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, n: t.pop(f"{n}.weight_scale"), "there is no weight_scale"),
            (lambda t, n: t.pop(f"{n}.weight_scale_2"), "there is no weight_scale_2"),
            (lambda t, n: t.update({f"{n}.weight_scale_2": torch.tensor(float("nan"))}), "weight_scale_2: a scale"),
            (lambda t, n: t.update({f"{n}.weight_scale_2": torch.tensor(-1.0)}), "negative or not a number"),
            (lambda t, n: t.update({f"{n}.weight_scale": torch.ones(3, 3)}), "weight_scale: shape (32, 2), not (3, 3)"),
            (lambda t, n: t.update({f"{n}.weight": t[f"{n}.weight"][:16].contiguous(),
                                    f"{n}.weight_scale": t[f"{n}.weight_scale"][:16].contiguous()}),
             "a weight of shape (16, 32); the model wants (32, 32)"),
            (lambda t, n: t.update({f"{n}.weight": torch.zeros(32, 32).to(torch.float8_e4m3fn)}), "says nvfp4"),
            (lambda t, n: t.pop(f"{n}.bias"), "1 tensors are missing"),
            (lambda t, n: t.update({f"{n}.bias": torch.zeros(7)}), "bias: shape (7,); the model wants (32,)"),
            (lambda t, n: t.update({f"{n}.bias": torch.zeros(32, dtype=torch.int8)}), "has no torch.int8"),
            (lambda t, n: t.update({"foreign.weight": torch.zeros(2)}), "foreign.weight: the model has no such tensor"),
        ],
    )  # fmt: skip
    def test_tensors(self, copied, change, message):
        folder = copied("nvfp4")
        name = "transformer_blocks.0.attn.to_q"
        edit(folder, lambda tensors: change(tensors, name))
        text = self.refused(folder)
        assert message in text and (name in text or "foreign" in text), text

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.update(quant_algo="INT3"), "the algorithm 'INT3' is not known. Known: FP8,"),
            (lambda c: c.update(quant_method="awq"), "quantized by 'awq'; only ModelOpt's"),
            (lambda c: c.update(quant_algo="FP8"), "the configuration says fp8, and the weight is torch.uint8"),
            (lambda c: c.update(ignore=["transformer_blocks.*"]), "the configuration ignores it"),
        ],
    )
    def test_configuration(self, copied, change, message):
        folder = copied("nvfp4")
        edit(folder, config=change)
        assert message in self.refused(folder)

    def test_files(self, copied, tmp_path):
        folder = copied("nvfp4")
        data = file_of(folder).read_bytes()
        file_of(folder).write_bytes(data[: len(data) // 2])
        assert "Was it downloaded in full?" in self.refused(folder)
        file_of(folder).unlink()
        assert "holds no safetensors file" in self.refused(folder)
        (tmp_path / "empty").mkdir()
        assert "no model_index.json" in self.refused(tmp_path / "empty")
        (folder / "transformer" / "config.json").write_text("{")
        assert "is not JSON" in self.refused(folder)


class TestSaving:
    def test_refusals(self, tmp_path):
        pipe = build("flux")
        with pytest.raises(Unsupported, match="no layer is quantized"):
            save_quantized(pipe, tmp_path / "none")
        accelerate(pipe, linear="int8")
        with pytest.raises(Unsupported, match="is int8, for which ModelOpt's layout has no name"):
            save_quantized(pipe, tmp_path / "none")
        assert not (tmp_path / "none").exists()
