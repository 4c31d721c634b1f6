"""Which files a model's weights are in, and what kind of file each is.

A folder is read as diffusers reads one: by its index, or by the name that diffusers gives the file, with its variant.
Nothing is merged that is not said to belong together. A file of another kind is told by its first bytes and by the
names of its tensors; the error says what it is, and what reads it.
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
_FULL = " Was it downloaded in full?"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model's folder.

    Args:
        folder: The model's.
        variant: As `from_pretrained` takes it; `None` for files without one.

    Raises:
        CheckpointError: There are none, some are missing, or several sets of them are there and nothing says which one
            is meant.
    """
    sets: dict[tuple[str, str | None], list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        sets.setdefault(_set_of(file.stem), []).append(file)
    # `x.safetensors.index.json`, `x.safetensors.index.fp16.json`, or, formerly, `x.fp16.safetensors.index.json`.
    indexes: dict[tuple[str, str | None], Path] = {}
    for file in sorted(folder.glob("*.safetensors.index*.json")):
        stem, _, rest = file.name.partition(".safetensors.index")
        name, own = _set_of(stem)
        indexes[name, rest.removesuffix(".json").lstrip(".") or own] = file
    known = {*sets, *indexes}
    if not known:
        raise CheckpointError(f"{str(folder)!r} holds no safetensors file{_instead(folder)}.")
    fitting = [each for each in known if each[1] == variant]
    if not fitting:
        there = sorted(str(each) for _, each in known)
        asked = "without a variant" if variant is None else f"of the variant {variant!r}"
        way = f"variant={there[0]!r}" if there[0] != "None" else "no variant"
        raise CheckpointError(f"{str(folder)!r} holds no file {asked}; it holds {', '.join(there)}. Give {way}.")
    if len(fitting) > 1:
        fitting = [each for each in fitting if each[0] == _DIFFUSERS] or fitting
    if len(fitting) > 1:
        names = ", ".join(sorted(name for name, _ in fitting))
        raise CheckpointError(
            f"{str(folder)!r} holds several sets of weights, {names}, and nothing says which is meant. Give one of "
            f"them as a file, {folder.name}='....safetensors', or keep one."
        )
    [chosen] = fitting
    if chosen in indexes:
        return _by_index(indexes[chosen], folder)
    found = sets[chosen]
    # One file beside shards of the same name is the whole.
    whole = [file for file in found if not _SHARD.search(file.stem)]
    if whole:
        return whole
    parts = [_SHARD.search(file.stem) for file in found]
    numbers = [(int(part[1]), int(part[2])) for part in parts if part is not None]
    if [number for number, _ in numbers] != list(range(1, numbers[0][1] + 1)):
        raise CheckpointError(f"{str(folder)!r} holds {len(found)} of {numbers[0][1]} parts of {chosen[0]!r}.{_FULL}")
    return found


def _set_of(stem: str) -> tuple[str, str | None]:
    """A file's name without its number, and its variant."""
    name, _, variant = _SHARD.sub("", stem).partition(".")
    return name, variant or None


def _by_index(index: Path, folder: Path) -> list[Path]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{str(index)!r} says of no tensor where it is.")
    found = [folder / str(name) for name in dict.fromkeys(where.values())]
    for file in found:
        if not file.is_file():
            raise CheckpointError(f"{str(file)!r} is missing: {index.name} says that it holds weights.{_FULL}")
    return found


def _instead(folder: Path) -> str:
    others = [file.name for file in sorted(folder.iterdir()) if _kind_by_name(file) is not None]
    return f", but {others[0]}, which is {_kind_by_name(Path(others[0]))}" if others else ""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        CheckpointError: It is missing, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{str(file)!r} is missing.") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(file)!r} holds a {type(found).__name__}, not a mapping.")
    return found


# --- what kind of file it is -----------------------------------------------------------------------------------------

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
# First bytes -> what the file is, and the way out. Pickles are zip archives, or begin with their protocol.
_BYTES = {
    b"GGUF": _GGUF,
    b"PK\x03\x04": _PICKLE,
    **{bytes([0x80, protocol]): _PICKLE for protocol in range(2, 6)},
    b"version https://git-lfs": ("Git LFS's pointer to a file", "git lfs pull, or huggingface_hub's download"),
    b"<": ("a web page", "the address that ends in /resolve/main/NAME"),
}
# How a tensor's name ends -> what wrote it, and the way out.
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


def _kind_by_name(file: Path) -> str | None:
    found = _NAMES.get(file.suffix.lower())
    return None if found is None else found[0]


def judge_file(file: Path) -> None:
    """Refuses a file of another kind than safetensors.

    Raises:
        CheckpointError: It is one; the message says what it is and what reads it.
    """
    if file.is_dir():
        raise CheckpointError(f"{str(file)!r} is a folder. Give a file, or the pipeline's folder alone.")
    if not file.is_file():
        raise CheckpointError(f"There is no file {str(file)!r}.")
    with file.open("rb") as opened:
        begin = opened.read(32)
    if not begin:
        raise CheckpointError(f"{str(file)!r} is empty.{_FULL}")
    # The length of a header may look like another kind's first bytes: its brace, and that it is there, tell it first.
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") + 8 <= file.stat().st_size:
        return
    found = next((each for key, each in _BYTES.items() if begin.startswith(key)), None) or _NAMES.get(
        file.suffix.lower()
    )
    if found is not None:
        raise CheckpointError(f"{str(file)!r} is {found[0]}; only safetensors can be read here. Instead: {found[1]}.")
    raise CheckpointError(f"{str(file)!r} cannot be read: it has no whole header of safetensors.{_FULL}")


def judge_tensors(names: Iterable[str], file: Path) -> None:
    """Refuses tensors that another package has packed.

    Raises:
        CheckpointError: There are some; the message says whose they are, and the way out.
    """
    names = list(names)
    for ends, (whose, instead) in _TENSORS.items():
        found = next((name for name in names if name.endswith(ends)), None)
        if found is not None:
            raise CheckpointError(
                f"{str(file)!r} is {whose}: it holds {found!r}. Only ModelOpt's layout can be read here. "
                f"Instead: {instead}."
            )


def read_tensors(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of safetensors files.

    Raises:
        CheckpointError: One cannot be read, or a tensor is in two of them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    origin: dict[str, Path] = {}
    for file in files:
        judge_file(file)
        try:
            found = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(file)!r} cannot be read: {error}.{_FULL}") from error
        for name in found:
            if name in origin:
                raise CheckpointError(f"{name} is in {origin[name].name} and in {file.name}. Keep it in one of them.")
            origin[name] = file
        judge_tensors(found, file)
        tensors |= found
    return tensors


# --- ComfyUI's scaled fp8 --------------------------------------------------------------------------------------------

_MARKS = ("scaled_fp8", "comfy_quant")


def is_scaled(names: Iterable[str]) -> bool:
    """Whether tensors are in ComfyUI's first layout of scaled fp8: e4m3 weights, each with a `scale_weight` that
    multiplies it and perhaps a `scale_input` that its activations are divided by."""
    return any(name.rpartition(".")[2] in ("scaled_fp8", "scale_weight") for name in names)


def as_modelopt(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under ModelOpt's names, without those that only mark; nothing is computed.

    Raises:
        CheckpointError: Weights are of another type than e4m3.
    """
    names = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
    found = {}
    for name, tensor in tensors.items():
        layer, dot, part = name.rpartition(".")
        if tensor.dtype == torch.float8_e5m2:
            raise CheckpointError(f"{name}: {tensor.dtype}; ComfyUI's scaled fp8 can be read here as e4m3 only.")
        if part not in _MARKS:
            found[f"{layer}{dot}{names.get(part, part)}"] = tensor
    return found


def is_foreign_naming(names: Iterable[str]) -> bool:
    """Whether layers are named as a model's own repository names them, not diffusers."""
    begins = ("double_blocks.", "single_blocks.", "model.diffusion_model.", "diffusion_model.", "joint_blocks.", "net.")
    return any(name.startswith(begins) or ".self_attn." in name for name in names)
