"""Configurations of quantized checkpoints: nonsense in a field is refused by the field's name, before any tensor is
read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from diffusers_accel import CheckpointError
from diffusers_accel.checkpoints.modelopt import Quantization, read_file_quantization, read_quantization

FIELDS = {
    "quant_method": str,
    "quant_algo": str,
    "ignore": list,
    "dynamic": bool,
    "quantized_layers": dict,
    "config_groups": dict,
}
NONSENSE = {
    str: ["", "x" * 5000],
    bool: [True],
    list: [[1], [None], [""], [[]]],
    dict: [{"": {}}],
    float: [1.5],
    int: [3],
}
MIXED = {"quant_algo": "MIXED_PRECISION"}


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_types(field):
    optional = [None] if FIELDS[field] in (str, bool) else []
    wrong = [item for kind, items in NONSENSE.items() if kind is not FIELDS[field] for item in items] + optional
    wrong += NONSENSE[FIELDS[field]] if FIELDS[field] in (list, dict) else NONSENSE[str][:1] * (FIELDS[field] is str)
    for value in wrong:
        with pytest.raises(CheckpointError, match=rf"file: .*{field}|file: quantized by ''"):
            Quantization.read({**MIXED, field: value}, "file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"quantization_config: expected a mapping, got \[\]"),
        ({}, "quantization_config.quant_algo: is needed"),
        ({"quant_algo": "FP9"}, "the algorithm 'FP9' is not known"),
        ({**MIXED, "quantized_layers": {"a": "FP8"}}, r"quantized_layers\['a'\]: expected a mapping, got 'FP8'"),
        ({**MIXED, "quantized_layers": {"a": {}}}, r"quantized_layers\['a'\]: the algorithm None is not known"),
        ({**MIXED, "quantized_layers": {"a": {"quant_algo": ["FP8"]}}}, r"the algorithm \['FP8'\] is not known"),
        ({"quant_algo": "FP8", "config_groups": {"a": 3}}, r"config_groups\['a'\]: expected a mapping, got 3"),
        ({"quant_algo": "FP8", "config_groups": {"a": {"input_activations": []}}}, "input_activations: expected a map"),
        ({"quant_algo": "FP8", "config_groups": {"a": {"input_activations": {"dynamic": 1}}}}, "dynamic: expected t"),
    ],
)  # fmt: skip
def test_wrong_values(values, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        Quantization.read(values, "file")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": values}))
    if values != {}:  # an empty configuration stands for none
        with pytest.raises(CheckpointError, match=message):
            read_quantization(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, '{"quantization_config": ' + "1" * 5000 + "}", "\0"])
def test_config_files_without_a_mapping(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_quantization(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    ["3", "[]", '{"layers": 3}', '{"layers": {"a": 3}}', '{"layers": {"a": {"format": ["nvfp4"]}}}', "[" * 100_000],
)
def test_metadata_of_wrong_types(metadata, tmp_path):
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"_quantization_metadata": metadata})
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        read_file_quantization(tmp_path / "m.safetensors")
    if metadata in ("3", "[]"):
        save_file({"a.weight": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"quantization_config": metadata})
        with pytest.raises(CheckpointError, match="quantization_config: expected a mapping"):
            read_file_quantization(tmp_path / "m.safetensors")
