"""The safetensors files of a model's weights, and the recognition of files of other kinds.

A folder is read as diffusers reads it: by the index file, or by diffusers' file name with the variant. Files are merged
only if an index or their shard numbers say that they belong together.

A file of another format is recognized by its first bytes, a file of another package by the names of its tensors. The
error names the format and the way to load it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .modelopt import CheckpointError

_SHARD = re.compile(r"-(\d+)-of-(\d+)$")
_DIFFUSERS = "diffusion_pytorch_model"
_INCOMPLETE = " Was it downloaded in full?"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model's folder.

    Args:
        folder: Folder of one model, e.g. a pipeline's `transformer`.
        variant: The variant in the file names, e.g. `"fp16"`; `None` for files without a variant.

    Returns:
        The file, or all shards in order.

    Raises:
        CheckpointError: There is no such file, shards are missing, or there are several sets of files and none has
            diffusers' name.
    """
    sets: dict[tuple[str, str | None], list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        sets.setdefault(_name_and_variant(file.stem), []).append(file)
    # `x.safetensors.index.json`, `x.safetensors.index.fp16.json`, or, formerly, `x.fp16.safetensors.index.json`.
    indexes: dict[tuple[str, str | None], Path] = {}
    for file in sorted(folder.glob("*.safetensors.index*.json")):
        stem, _, rest = file.name.partition(".safetensors.index")
        name, stem_variant = _name_and_variant(stem)
        indexes[name, rest.removesuffix(".json").lstrip(".") or stem_variant] = file
    known = {*sets, *indexes}
    if not known:
        raise CheckpointError(
            f"{str(folder)!r} holds no safetensors file{_other_file(folder)}. Give the folder of a quantized model."
        )
    matching = [each for each in known if each[1] == variant]
    if not matching:
        variants = sorted(str(each) for _, each in known)
        wanted = "without a variant" if variant is None else f"of the variant {variant!r}"
        way = f"variant={variants[0]!r}" if variants[0] != "None" else "no variant"
        raise CheckpointError(f"{str(folder)!r} holds no file {wanted}; it holds {', '.join(variants)}. Give {way}.")
    if len(matching) > 1:
        matching = [each for each in matching if each[0] == _DIFFUSERS] or matching
    if len(matching) > 1:
        names = ", ".join(sorted(name for name, _ in matching))
        raise CheckpointError(
            f"{str(folder)!r} holds several sets of weights, {names}, and none has diffusers' name {_DIFFUSERS!r}. "
            f"Give one of them as a file, {folder.name}='NAME.safetensors', or keep one."
        )
    [chosen] = matching
    if chosen in indexes:
        return _by_index(indexes[chosen], folder)
    found = sets[chosen]
    # A file without a shard number beside shards of the same name holds all weights.
    unsharded = [file for file in found if not _SHARD.search(file.stem)]
    if unsharded:
        return unsharded
    shards = [_SHARD.search(file.stem) for file in found]
    numbers = [(int(shard[1]), int(shard[2])) for shard in shards if shard is not None]
    if [number for number, _ in numbers] != list(range(1, numbers[0][1] + 1)):
        raise CheckpointError(
            f"{str(folder)!r} holds {len(found)} of {numbers[0][1]} shards of {chosen[0]!r}.{_INCOMPLETE}"
        )
    return found


def _name_and_variant(stem: str) -> tuple[str, str | None]:
    """A file's name without shard number and variant, and its variant."""
    name, _, variant = _SHARD.sub("", stem).partition(".")
    return name, variant or None


def _by_index(index: Path, folder: Path) -> list[Path]:
    """The files that an index file lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{str(index)!r} has no weight_map of tensors to files. Download it again, or remove it where one file "
            "holds all weights."
        )
    found = [folder / str(name) for name in dict.fromkeys(weight_map.values())]
    for file in found:
        if not file.is_file():
            raise CheckpointError(f"{str(file)!r} is missing: {index.name} lists it.{_INCOMPLETE}")
    return found


def _other_file(folder: Path) -> str:
    """A phrase that names a file of another format in a folder; empty if there is none."""
    others = [file.name for file in sorted(folder.iterdir()) if _format_by_name(file) is not None]
    return f", but {others[0]}, which is {_format_by_name(Path(others[0]))}" if others else ""


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        CheckpointError: The file is missing, is not JSON, or holds no mapping.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{str(file)!r} is missing.{_INCOMPLETE}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is not JSON: {error}.{_INCOMPLETE}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(file)!r} holds a {type(found).__name__}, not a mapping.")
    return found


# --- files of other formats -----------------------------------------------------------------------------------------

_GGUF = (
    "a GGUF file",
    "from_single_file(FILE, quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)) of the "
    "model's class, and transformer=MODEL",
)
_PICKLE = (
    "a pickle, which runs code when it is read",
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')",
)
_NAMES = {".gguf": _GGUF, **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), _PICKLE)}
# First bytes -> format of the file, and how to load it. Pickles are zip archives, or begin with their protocol.
_BYTES = {
    b"GGUF": _GGUF,
    b"PK\x03\x04": _PICKLE,
    **{bytes([0x80, protocol]): _PICKLE for protocol in range(2, 6)},
    b"version https://git-lfs": ("Git LFS's pointer to a file", "git lfs pull, or huggingface_hub's download"),
    b"<": ("a web page", "the address that ends in /resolve/main/NAME"),
}
# Suffixes of tensor names -> the package that wrote them, and how to load them.
_TENSORS = {
    (".wscales", ".smooth_factor", ".smooth", ".wcscales"): (
        "nunchaku's, whose weights are packed for its own kernels",
        "nunchaku's model class and transformer=MODEL, or linear='svdq-nvfp4' on the stock weights",
    ),
    (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".absmax"): (
        "bitsandbytes'", "diffusers.BitsAndBytesConfig with the stock folder, or linear='nvfp4' on the stock weights",
    ),
    (".qzeros", ".qweight"): ("GPTQ's or AWQ's", "a checkpoint of ModelOpt's, or linear='nvfp4' on the stock weights"),
    (".weight._data", ".weight._scale"): ("quanto's", "diffusers.QuantoConfig with the stock folder"),
}  # fmt: skip


def _format_by_name(file: Path) -> str | None:
    """The format that a file's suffix stands for, or `None`."""
    found = _NAMES.get(file.suffix.lower())
    return None if found is None else found[0]


def check_file(file: Path) -> None:
    """Refuses a file of another format than safetensors.

    Raises:
        CheckpointError: The message names the format and the way to load it.
    """
    if file.is_dir():
        raise CheckpointError(f"{str(file)!r} is a folder. Give a file, or the pipeline's folder alone.")
    if not file.is_file():
        raise CheckpointError(f"There is no file {str(file)!r}. Give the path of a safetensors file.")
    with file.open("rb") as opened:
        begin = opened.read(32)
    if not begin:
        raise CheckpointError(f"{str(file)!r} is empty.{_INCOMPLETE}")
    # A safetensors file begins with the length of its header, which may look like another format's first bytes. So a
    # safetensors file is recognized first: by a brace after the length, and by a file of at least this length.
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") + 8 <= file.stat().st_size:
        return
    found = next((each for key, each in _BYTES.items() if begin.startswith(key)), None) or _NAMES.get(
        file.suffix.lower()
    )
    if found is not None:
        raise CheckpointError(
            f"{str(file)!r} is {found[0]}; only safetensors files are supported. Instead: {found[1]}."
        )
    raise CheckpointError(f"{str(file)!r} cannot be read: it has no complete safetensors header.{_INCOMPLETE}")


def check_tensor_names(names: Iterable[str], file: Path) -> None:
    """Refuses tensors in another package's layout.

    Args:
        names: Names of all tensors of a file.
        file: The file, for the message.

    Raises:
        CheckpointError: The message names the package and the way to load the file.
    """
    names = list(names)
    for suffixes, (owner, instead) in _TENSORS.items():
        found = next((name for name in names if name.endswith(suffixes)), None)
        if found is not None:
            raise CheckpointError(
                f"{str(file)!r} is {owner}: it holds {found!r}. Only ModelOpt's layout is supported. "
                f"Instead: {instead}."
            )


def read_tensors(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of safetensors files, on the host: name -> tensor.

    Raises:
        CheckpointError: A file cannot be read, or two files hold a tensor of the same name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    origin: dict[str, Path] = {}
    for file in files:
        check_file(file)
        try:
            found = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(file)!r} cannot be read: {error}.{_INCOMPLETE}") from error
        for name in found:
            if name in origin:
                raise CheckpointError(f"{name} is in {origin[name].name} and in {file.name}. Keep it in one of them.")
            origin[name] = file
        check_tensor_names(found, file)
        tensors |= found
    return tensors


# --- ComfyUI's scaled fp8 --------------------------------------------------------------------------------------------

# Suffixes of ComfyUI's tensors that only mark a file or a layer.
_MARKERS = ("scaled_fp8", "comfy_quant")


def is_scaled(names: Iterable[str]) -> bool:
    """Whether tensors are in ComfyUI's first layout of scaled fp8: e4m3 weights, each with a factor `scale_weight`, and
    optionally a divisor `scale_input` of the layer's activations."""
    return any(name.rpartition(".")[2] in ("scaled_fp8", "scale_weight") for name in names)


def as_modelopt(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ComfyUI's tensors under ModelOpt's names, without markers. The tensors themselves are not changed.

    Raises:
        CheckpointError: A weight is e5m2.
    """
    names = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
    found = {}
    for name, tensor in tensors.items():
        layer, dot, suffix = name.rpartition(".")
        if tensor.dtype == torch.float8_e5m2:
            raise CheckpointError(
                f"{name}: {tensor.dtype}; ComfyUI's scaled fp8 is supported in e4m3 only. Give the model's e4m3 file."
            )
        if suffix not in _MARKERS:
            found[f"{layer}{dot}{names.get(suffix, suffix)}"] = tensor
    return found


def has_original_names(names: Iterable[str]) -> bool:
    """Whether tensors have the names of a model's original repository instead of diffusers'."""
    prefixes = (
        "double_blocks.",
        "single_blocks.",
        "model.diffusion_model.",
        "diffusion_model.",
        "joint_blocks.",
        "net.",
    )
    return any(name.startswith(prefixes) or ".self_attn." in name for name in names)
