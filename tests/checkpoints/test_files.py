"""The files that are read, the errors for files that cannot be, and the requests to the hub."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import ClassVar

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny import build
from torch import nn

from diffusers_accel import CheckpointError, accelerate, from_pretrained, save_quantized
from diffusers_accel.kernels.linear import QuantizedLinear

NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A stock pipeline's folder, and a quantized one's."""
    found = tmp_path_factory.mktemp("made")
    build("flux").save_pretrained(found / "stock")
    pipe = accelerate(build("flux"), linear={"algo": "fp8-tensor", "smallest": 0, "keep_original": "drop"})
    save_quantized(pipe, found / "quantized")
    return found


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made / "quantized", tmp_path / "quantized")
    return tmp_path / "quantized"


def refused(path, **arguments):
    with pytest.raises(CheckpointError) as error:
        from_pretrained(path, dtype=torch.float32, **arguments)
    return str(error.value)


def pickled():
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, buffer)
    return buffer.getvalue()


WHOLE = save({"x.weight": torch.zeros(4, 4)})


class TestSingleFiles:
    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            ("x.gguf", b"GGUF\x03" + bytes(60), r"x.gguf' is a GGUF file.*GGUFQuantizationConfig"),
            ("x.safetensors", b"GGUF\x03" + bytes(60), "is a GGUF file"),
            ("x.safetensors", b"GGUF\x03\x00\x00\x00{" + bytes(60), "is a GGUF file"),  # of 123 tensors
            ("x.pt", pickled(), r"is a pickle.*safetensors.torch.save_file\(torch.load"),
            ("x.safetensors", pickled(), "is a pickle"),
            ("x.ckpt", b"\x80\x02}q\x00" + bytes(60), "is a pickle"),
            ("x.bin", bytes(64), "is a pickle"),
            ("x.bin", WHOLE, "says nothing of a quantization"),  # recognized by its content
            ("x.safetensors", b"", r"is empty\. Was it downloaded in full\?"),
            ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is Git LFS's pointer"),
            ("x.safetensors", b"<!doctype html><html>" + bytes(60), "is a web page"),
            ("x.safetensors", WHOLE[: len(WHOLE) // 3], "cannot be read.*downloaded in full"),
            ("x.safetensors", WHOLE[:-5], "cannot be read.*downloaded in full"),
            ("x.safetensors", None, "There is no file"),
        ],
        ids=range(14),
    )  # fmt: skip
    def test_other_kinds(self, made, tmp_path, name, data, message):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            from_pretrained(made / "stock", transformer=str(tmp_path / name))

    @pytest.mark.parametrize(
        ("tensors", "metadata", "message"),
        [
            ({"transformer_blocks.0.qkv_proj.qweight": torch.zeros(2, 2, dtype=torch.int8),
              "transformer_blocks.0.qkv_proj.wscales": torch.zeros(2)},
             {"quantization_config": json.dumps({"method": "svdquant"})},
             "is nunchaku's.*qkv_proj.wscales.*nunchaku's "),
            ({"a.weight": torch.zeros(4, dtype=torch.uint8), "a.weight.quant_state.bitsandbytes__nf4": torch.zeros(1)},
             None, "is bitsandbytes'.*BitsAndBytesConfig"),
            ({"a.qweight": torch.zeros(4, dtype=torch.int32), "a.qzeros": torch.zeros(1)}, None, "is GPTQ's or AWQ's"),
            ({"x_embedder.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, None,
             "says nothing of a quantization, and x_embedder.weight is torch.float8_e4m3fn without a scale.*"
             "from_single_file"),
            ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
              "double_blocks.0.img_attn.qkv.scale_weight": torch.ones(()), "scaled_fp8": torch.zeros(0)}, None,
             "has the layer names of the model's original repository .e.g. 'double_blocks.0.img_attn.qkv'.*"
             "from_single_file"),
            ({"x_embedder.weight": torch.zeros(4, 4).to(torch.float8_e5m2), "x_embedder.scale_weight": torch.ones(())},
             None, "x_embedder.weight: torch.float8_e5m2; ComfyUI's scaled fp8 is supported in e4m3 only"),
        ],
    )  # fmt: skip
    def test_other_packages(self, made, tmp_path, tensors, metadata, message):
        save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            from_pretrained(made / "stock", transformer=tmp_path / "x.safetensors")

    @pytest.mark.parametrize("inputs", [False, True])
    def test_scaled_fp8_of_comfyui(self, made, tmp_path, inputs):
        """A weight is the stored values times `scale_weight`; the reference is their product in float64."""
        tensors, expected = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, {}
        stock = load_file(made / "stock" / "transformer" / f"{NAME}.safetensors")
        for name, item in stock.items():
            layer, _, suffix = name.rpartition(".")
            tensors[name] = item
            if suffix == "weight" and item.ndim == 2 and "norm_q" not in name and "norm_k" not in name:
                scale = item.abs().max() / 448
                tensors[name] = (item / scale).to(torch.float8_e4m3fn)
                tensors[f"{layer}.scale_weight"] = scale
                expected[layer] = tensors[name].double() * scale.double()
                if inputs:
                    tensors[f"{layer}.scale_input"] = torch.tensor(0.02)
        save_file(tensors, tmp_path / "x.safetensors")
        given = {"dynamic": False} if inputs else {}
        pipe = from_pretrained(made / "stock", dtype=torch.float32, transformer=tmp_path / "x.safetensors", **given)
        linear = {name: item for name, item in pipe.transformer.named_modules() if isinstance(item, nn.Linear)}
        assert set(linear) == set(expected) and len(linear) > 20
        for name, layer in linear.items():
            assert isinstance(layer, QuantizedLinear) and layer.kind == "fp8-tensor"
            torch.testing.assert_close(layer.materialize().double(), expected[name], rtol=1e-7, atol=0)
            assert (layer.input_scale is not None) == inputs
            assert layer.bias is None or torch.equal(layer.bias, stock[f"{name}.bias"])


class TestFolders:
    def test_variants(self, folder):
        """Each variant is read by its own name, in any alphabetical order."""
        subfolder, model = folder / "transformer", f"{NAME}.safetensors"
        tensors = load_file(subfolder / model)
        name = next(key for key in tensors if key.endswith("bias"))
        for variant, value in (("ema", 1.0), ("zero", 0.0)):
            changed = {**tensors, name: torch.full_like(tensors[name], value)}
            save_file(changed, subfolder / f"{NAME}.{variant}.safetensors")
        for variant, expected in ((None, tensors[name]), ("ema", torch.ones(())), ("zero", torch.zeros(()))):
            model = from_pretrained(folder, dtype=torch.float32, variant=variant).transformer
            found = model.get_parameter(name)
            assert torch.equal(found, expected.expand(found.shape)), variant
        assert "no file of the variant 'fp16'; it holds None, ema, zero" in refused(folder, variant="fp16")
        (subfolder / f"{NAME}.safetensors").unlink()
        assert "no file without a variant; it holds ema, zero. Give variant='ema'" in refused(folder)

    def test_two_sets(self, folder):
        subfolder = folder / "transformer"
        (subfolder / f"{NAME}.safetensors").rename(subfolder / "one.safetensors")
        assert from_pretrained(folder, dtype=torch.float32).transformer is not None
        shutil.copy(subfolder / "one.safetensors", subfolder / "another.safetensors")
        assert "several sets of weights, another, one, and none has diffusers' name" in refused(folder)
        # diffusers' name decides.
        shutil.copy(subfolder / "one.safetensors", subfolder / f"{NAME}.safetensors")
        assert from_pretrained(folder, dtype=torch.float32).transformer is not None

    def test_shards(self, folder):
        subfolder = folder / "transformer"
        tensors = load_file(subfolder / f"{NAME}.safetensors")
        (subfolder / f"{NAME}.safetensors").unlink()
        names = sorted(tensors)
        files = [f"{NAME}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        halves = [names[: len(names) // 2], names[len(names) // 2 :]]
        for file, half in zip(files, halves, strict=True):
            save_file({name: tensors[name] for name in half}, subfolder / file)
        index = subfolder / f"{NAME}.safetensors.index.json"
        # A file that the index does not list is ignored.
        save_file({"foreign": torch.zeros(1)}, subfolder / "adapter.safetensors")
        where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        assert from_pretrained(folder, dtype=torch.float32).transformer is not None
        index.unlink()
        assert from_pretrained(folder, dtype=torch.float32).transformer is not None
        save_file({name: tensors[name] for name in names[len(names) // 2 - 1 :]}, subfolder / files[1])
        text = refused(folder)
        assert names[len(names) // 2 - 1] in text and files[0] in text and files[1] in text
        (subfolder / files[1]).unlink()
        assert f"1 of 2 shards of '{NAME}'" in refused(folder)
        index.write_text(json.dumps({"weight_map": where}))
        assert f"{files[1]}' is missing: {index.name} lists it" in refused(folder)
        index.write_text("{")
        assert "is not JSON" in refused(folder)
        index.write_text("{}")
        assert "has no weight_map" in refused(folder)

    def test_folders_of_no_pipeline(self, folder, made, tmp_path):
        subfolder = folder / "transformer"
        (subfolder / f"{NAME}.safetensors").rename(subfolder / f"{NAME}.bin")
        assert f"holds no safetensors file, but {NAME}.bin, which is a pickle" in refused(folder)
        (subfolder / f"{NAME}.bin").rename(subfolder / f"{NAME}.safetensors")
        file = subfolder / f"{NAME}.safetensors"
        assert "is the file of one model" in refused(file) and "transformer=" in refused(file)
        assert "There is no folder './nowhere'" in refused("./nowhere")
        assert "There is no folder" in refused(tmp_path / "a" / "b")
        assert "Did you mean 'transformer'?" in refused(made / "stock", transfomer=str(file))
        config = json.loads((subfolder / "config.json").read_text())
        del config["_class_name"]
        (subfolder / "config.json").write_text(json.dumps(config))
        assert "diffusers has no class None" in refused(folder)
        (subfolder / "config.json").unlink()
        assert "holds no config.json" in refused(folder, transformer=str(file))
        (folder / "model_index.json").write_text("[]")
        assert "holds a list, not a mapping" in refused(folder)
        (folder / "model_index.json").write_text("{")
        assert "is not JSON" in refused(folder)


class TestHub:
    ARGUMENTS: ClassVar = {
        "revision": "v2", "token": "secret", "cache_dir": "somewhere", "local_files_only": True, "variant": "fp16",
        "force_download": True, "proxies": {"https": "there"},
    }  # fmt: skip

    def test_its_arguments_reach_every_call(self, made, monkeypatch):
        asked, kind = [], diffusers.FluxPipeline

        def download(path, **given):
            asked.append((path, given))
            return str(made / "stock")

        def load(cls, folder, **given):
            asked.append((Path(folder), given))

        monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
        monkeypatch.setattr(kind, "from_pretrained", classmethod(load))
        encoder = nn.Identity()
        from_pretrained("owner/name", text_encoder=encoder, vae=None, **self.ARGUMENTS)
        [(path, fetched), (folder, loaded)] = asked
        assert path == "owner/name" and folder == made / "stock"
        # Components that are given as objects are not downloaded.
        assert fetched == {**self.ARGUMENTS, "text_encoder": encoder, "vae": None}
        assert loaded == {**fetched, "dtype": torch.bfloat16}

    def test_a_subfolder_of_a_repository(self, made, monkeypatch):
        asked = []

        def snapshot(path, **given):
            asked.append((path, given))
            return str(made)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        given = {name: item for name, item in self.ARGUMENTS.items() if name != "variant"}
        pipe = from_pretrained("owner/name", subfolder="quantized", dtype=torch.float32, **given)
        assert asked == [("owner/name", {**given, "allow_patterns": ["quantized/*"]})]
        assert any(isinstance(item, QuantizedLinear) for item in pipe.transformer.modules())
        again = from_pretrained(made, subfolder="quantized", dtype=torch.float32)
        assert any(isinstance(item, QuantizedLinear) for item in again.transformer.modules())

    def test_repositories_that_do_not_exist(self, tmp_path):
        text = refused("owner/name", cache_dir=tmp_path, local_files_only=True)
        assert text.startswith("'owner/name' is no local folder, and could not be downloaded: ")
        assert "could not be downloaded" in refused("no such name", cache_dir=tmp_path)

    def test_types_by_component(self, made):
        pipe = from_pretrained(made / "quantized", dtype={"transformer": torch.float16, "default": torch.float32})
        assert pipe.transformer.x_embedder.bias.dtype == torch.float16
        assert next(pipe.text_encoder.parameters()).dtype == torch.float32
