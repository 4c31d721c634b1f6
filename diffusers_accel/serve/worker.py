"""A rank of a replica: loads a pipeline, accelerates it, and computes one job after the other.

Results go to files, which appear under their names once they are whole; messages stay small. Between two steps of a job
rank 0 tells the front how far it is, and hears whether to go on. The other ranks hear it from rank 0, so that all of
them end the job at the same step.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AccelError, Unsupported
from .messages import CANCEL, DONE, FAILED, READY, RUN, STEP, receive, send

# GPU memory above that after loading, in bytes, from which on a rank that ran out of it starts anew.
_LEFT_OVER = 256 * 2**20


class _Cancelled(Exception):
    """The running job was cancelled."""


def work(environment: Mapping[str, str], pipe: Any, spec: Mapping[str, Any]) -> None:
    """The life of a rank, until the front is gone.

    Args:
        environment: The variables that say which rank this is.
        pipe: The connection to the front.
        spec: The model, as `load` reads it.
    """
    # Ctrl-C reaches all processes of a terminal: the front decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    threading.Thread(target=_end_with_the_front, daemon=True).start()
    rank = int(environment["RANK"])
    try:
        pipeline = load(spec)
        control = _control()
        baseline = _allocated()
        send(pipe, READY)
    except BaseException as error:  # the front has to know why
        traceback.print_exc()
        send(pipe, FAILED, code="model_failed", message=f"rank {rank}: {type(error).__name__}: {error}")
        return
    while True:
        try:
            message = receive(pipe)
        except (EOFError, OSError):
            return
        if message["kind"] != RUN:
            continue  # the cancelling of a job that has ended
        steps = _Steps(pipe, message["id"], rank, control, spec)
        spoilt = False
        answer: dict[str, Any]
        try:
            answer = {"kind": DONE, "result": compute(pipeline, message["request"], steps, rank)}
        except _Cancelled:
            answer = {"kind": FAILED, "code": "cancelled", "message": "The job was cancelled."}
        except (AccelError, TypeError, ValueError) as error:
            answer = {"kind": FAILED, "code": "invalid_request", "message": f"{type(error).__name__}: {error}"}
        except Exception as error:
            traceback.print_exc()
            code = "out_of_memory" if "OutOfMemory" in type(error).__name__ else "failed"
            answer = {"kind": FAILED, "code": code, "message": f"{type(error).__name__}: {error}"}
            # Ranks may have left each other in the middle of a collective; a GPU's error stays; so may memory.
            spoilt = control is not None or _broken() or _leftover(baseline)
        kind = answer.pop("kind")
        send(pipe, kind, id=message["id"], ends=spoilt, **answer)
        if spoilt:
            sys.exit(1)


def load(spec: Mapping[str, Any]) -> Any:
    """The accelerated pipeline of a model.

    Args:
        spec: `model`: a folder, a Hugging Face id or the name of a demo checkpoint; or `function`, `"module:name"` of a
            function that returns a stock pipeline. `load`: its arguments. `dtype`: the name of a dtype, or `None`.
            `device`: the device, or `None` for this rank's GPU, else the CPU. `threads`: those of a rank on the CPU.
            `config`: a preset's name or the mapping of a configuration. `sections`: sections over that.
    """
    import torch

    from .. import demo
    from ..api import accelerate
    from ..checkpoints.loading import from_pretrained
    from ..resolve import begins_on_host

    gpu = _on_gpu(spec)
    if gpu:
        number = int(os.environ["LOCAL_RANK"])
        if spec.get("device") is None and number >= torch.cuda.device_count():
            raise Unsupported(
                "Engine", f"a rank needs GPU {number}, and this machine has {torch.cuda.device_count()}.",
                "fewer replicas or ranks.",
            )  # fmt: skip
        torch.cuda.set_device(spec.get("device") or number)
    else:
        torch.set_num_threads(spec["threads"])
    device = torch.device(spec.get("device") or (f"cuda:{torch.cuda.current_device()}" if gpu else "cpu"))
    dtype = getattr(torch, spec.get("dtype") or ("bfloat16" if gpu else "float32"))
    if spec.get("function"):
        module, _, name = spec["function"].partition(":")
        made = getattr(importlib.import_module(module), name)(**spec.get("load", {}))
    elif spec["model"] in demo.CHECKPOINTS:
        made = demo.load(spec["model"], dtype)
    else:
        made = from_pretrained(spec["model"], dtype=dtype, **spec.get("load", {}))
    made.set_progress_bar_config(disable=True)
    config, sections = spec.get("config"), spec.get("sections") or {}
    # Weights that may exceed one GPU's memory stay on the host until they are sharded or offloaded.
    if not begins_on_host(config, sections):
        made.to(device)
    return accelerate(made, config, **sections)


def compute(pipe: Any, request: Mapping[str, Any], steps: Any, rank: int = 0) -> dict[str, Any]:
    """Computes a request and writes its files.

    Args:
        pipe: The pipeline.
        request: `arguments` of the pipeline's call; `images`: argument -> files of pictures; `seed` of the first
            result, the others have the numbers after it; `n`, the number of results; `folder` for the files; `stats`,
            whether these are wanted.
        steps: Is called between steps.
        rank: This rank; rank 0 writes.

    Returns:
        `files`, `kind` of the results, `width` and `height` in pixels, `frames` of a video, `seeds`, `seconds` of the
        call, and `stats`.

    Raises:
        ValueError: The pipeline does not take an argument, or not this value.
    """
    import torch

    from .. import api

    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments = {**request["arguments"], **{name: _pictures(files) for name, files in request["images"].items()}}
    unknown = [name for name in arguments if name not in parameters]
    if unknown and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        raise ValueError(f"{type(pipe).__name__} does not take {', '.join(unknown)}.")
    count, seed = request["n"], request["seed"]
    generators = [torch.Generator("cpu").manual_seed(seed + place) for place in range(count)]
    arguments["generator"] = generators if count > 1 else generators[0]
    if count > 1:
        several = next(
            (name for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in parameters), None
        )
        if several is None:
            raise ValueError(f"{type(pipe).__name__} makes one result a call.")
        arguments[several] = count
    if "output_type" in parameters:
        arguments["output_type"] = "np"
    if "callback_on_step_end" in parameters:
        arguments["callback_on_step_end"] = steps
    begin = time.perf_counter()
    with torch.no_grad():
        found = pipe(**arguments)
    seconds = time.perf_counter() - begin
    if rank:
        return {}
    result = _write(found, Path(request["folder"]))
    result |= {"seeds": [seed + place for place in range(count)], "seconds": round(seconds, 4)}
    if request.get("stats"):
        result["stats"] = str(api.stats(pipe))
    return result


class _Steps:
    """The callback between two steps of a job: says how far it is, and raises if it is to end.

    Args:
        pipe: The connection to the front.
        job: The job's id.
        rank: This rank.
        control: The process group by which rank 0 tells the others to end; `None` for one rank.
        spec: The model, as `load` reads it.
    """

    def __init__(self, pipe: Any, job: str, rank: int, control: Any, spec: Mapping[str, Any]):
        self.pipe, self.job, self.rank, self.control = pipe, job, rank, control
        self._paced = _on_gpu(spec)
        self._events: list[Any] = []

    def __call__(self, pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self._pace()
        end = False
        if self.rank == 0:
            total = getattr(pipeline, "num_timesteps", None)
            send(self.pipe, STEP, step=step + 1, steps=int(total or step + 1))
            while self.pipe.poll():
                message = receive(self.pipe)
                end = end or (message["kind"] == CANCEL and message["id"] == self.job)
        if self.control is not None:
            import torch

            word = torch.tensor([int(end)])
            torch.distributed.broadcast(word, 0, group=self.control)
            end = bool(word.item())
        if end:
            raise _Cancelled
        return values

    def _pace(self) -> None:
        """Keeps the host two steps ahead of the GPU at most: a step that is said to be over nearly is."""
        if not self._paced:
            return
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(torch.cuda.current_device()))
        self._events.append(event)
        if len(self._events) > 2:
            self._events.pop(0).synchronize()


def _control() -> Any:
    """A process group of the ranks on the CPU; `None` for one rank."""
    import torch

    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.new_group(backend="gloo")


def _pictures(files: Sequence[str]) -> Any:
    from PIL import Image

    found = [Image.open(file).convert("RGB") for file in files]
    return found[0] if len(found) == 1 else found


def _write(found: Any, folder: Path) -> dict[str, Any]:
    """Writes the pictures or videos of a pipeline's result.

    Args:
        found: The pipeline's output: arrays or PIL images. `images` are (batch, height, width, channels), `frames` are
            (batch, frames, height, width, channels).
        folder: The folder, made if it is missing.
    """
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    frames = getattr(found, "frames", None)
    video, items = frames is not None, found.images if frames is None else frames
    files: list[str] = []
    for place, item in enumerate(items):
        array = np.asarray(item)
        if array.dtype != np.uint8:
            array = (array.clip(0, 1) * 255).round().astype(np.uint8)
        if video:
            files.append(_whole(folder / f"{place}.npy", lambda file, array=array: np.save(file, array)))
        else:
            picture = Image.fromarray(array.squeeze())
            files.append(_whole(folder / f"{place}.png", lambda file, picture=picture: picture.save(file, "PNG")))
    sides = array.shape[1:3] if video else array.shape[:2]
    result = {"files": files, "kind": "video" if video else "image", "height": int(sides[0]), "width": int(sides[1])}
    if video:
        result["frames"] = int(array.shape[0])
    sound = getattr(found, "audio", None)
    if sound is not None:
        values = np.asarray(sound.float().cpu() if hasattr(sound, "cpu") else sound)
        result["audio"] = _whole(folder / "audio.npy", lambda file: np.save(file, values))
    return result


def _whole(file: Path, write: Any) -> str:
    """Writes a file that appears under its name once it is whole."""
    part = file.with_name(f".{file.name}")
    try:
        with part.open("wb") as opened:
            write(opened)
            opened.flush()
            # A row that says "completed" may not outlive the file.
            os.fsync(opened.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return str(file)


def _end_with_the_front() -> None:
    """Ends this process once its parent is gone, whatever it computes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # Not an exception: the main thread may be anywhere.
        os.kill(os.getpid(), signal.SIGKILL)


def _on_gpu(spec: Mapping[str, Any]) -> bool:
    import torch

    return torch.cuda.is_available() and not str(spec.get("device") or "").startswith("cpu")


def _broken() -> bool:
    """Whether this process can use its GPU no more."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize(torch.cuda.current_device())
    except RuntimeError:
        return True
    return False


def _allocated() -> int:
    import torch

    return torch.cuda.memory_allocated(torch.cuda.current_device()) if torch.cuda.is_initialized() else 0


def _leftover(baseline: int) -> bool:
    """Whether more memory is held than after loading, once what can be freed is."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return _allocated() > baseline + _LEFT_OVER
