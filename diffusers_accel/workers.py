"""Workers for a process without a launcher: a notebook, or a server.

`launch` starts a worker process for each rank. Each loads the pipeline, accelerates it and waits for calls. `launch`
hands back a `Launched`, which is called as the pipeline is and returns rank 0's result. A worker that raises or dies
ends all of them within seconds, and the call raises its error.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from .api import accelerate
from .checkpoints.loading import from_pretrained
from .compat.torch_private import pytree
from .config import AccelConfig
from .core.processes import free_port, rank_environment
from .errors import AccelError, Unsupported
from .resolve import begins_on_host, resolve_parallel


class WorkerFailed(AccelError):
    """A worker of `launch` raised, or died; all of them have been ended."""


class Launched:
    """A pipeline in several processes, called as the pipeline is. `launch` makes it.

    Its workers end with `close()`, at the end of a `with` statement, or with this process.
    """

    def __init__(self, ranks: int, load: Any, options: Mapping[str, Any], config: Any, sections: Mapping[str, Any]):
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        try:
            for rank in range(ranks):
                here, there = context.Pipe()
                environment = rank_environment(rank, ranks, port)
                arguments = (environment, there, load, dict(options), config, dict(sections))
                process = context.Process(target=_work, args=arguments, daemon=True, name=f"rank {rank}")
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)
        except BaseException:
            self.close()
            raise
        self._answers()

    @property
    def ranks(self) -> int:
        """Number of workers; 0 once they have ended."""
        return len(self._processes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's result for these arguments, tensors on the CPU.

        Raises:
            WorkerFailed: A worker raised or died; all have been ended.
            Unsupported: The arguments cannot be sent to workers; nothing was sent.
        """
        if not self._processes:
            raise WorkerFailed("launch: its workers have ended. Call launch(...) again.")
        # One message for each worker, since a tensor's memory is handed over once; all before the first is sent.
        messages = [_message("an argument", (args, kwargs)) for _ in self._pipes]
        for rank, (pipe, message) in enumerate(zip(self._pipes, messages, strict=True)):
            try:
                if not self._processes[rank].is_alive():
                    raise BrokenPipeError
                pipe.send_bytes(message)
            except OSError:
                raise self._died(rank, " between two calls") from None
            except BaseException:
                self.close()
                raise
        return self._answers()

    def close(self) -> None:
        """Ends the workers."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _died(self, rank: int, when: str = "") -> WorkerFailed:
        """The error for a worker that has died. All others, which would wait for it, are ended."""
        self._processes[rank].join(5)
        code = self._processes[rank].exitcode
        self.close()
        return WorkerFailed(
            f"rank {rank} died{when} (exit code {code}). All workers have been ended; call launch(...) again."
        )

    def _answers(self) -> Any:
        """Rank 0's answer, once all ranks have answered."""
        found: Any = None
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        try:
            while waiting:
                for pipe in multiprocessing.connection.wait(list(waiting)):
                    rank = waiting.pop(pipe)
                    try:
                        fine, value = self._pipes[rank].recv()
                    except (EOFError, OSError):
                        raise self._died(rank) from None
                    if not fine:
                        raise WorkerFailed(f"rank {rank} raised:\n{value}")
                    found = value if rank == 0 else found
        except BaseException:
            # Other ranks may wait for the failed one for ever.
            self.close()
            raise
        return found


def launch(
    pipeline: str | Path | Callable[..., Any],
    config: str | AccelConfig | Mapping[str, Any] | Path | None = None,
    load: Mapping[str, Any] | None = None,
    **sections: Any,
) -> Launched:
    """Starts the ranks that `parallel` asks for, each with an accelerated pipeline on a GPU of its own.

    Args:
        pipeline: A folder or Hugging Face id for `from_pretrained`, or a function that returns a stock pipeline.
            Workers import the function, so it is defined in a module, not in a notebook.
        config: A configuration with the section `parallel`, in any form that `accelerate` takes.
        load: Arguments of `from_pretrained`, or of the function. Without a `dtype`, a folder or id is loaded in
            bfloat16 on GPUs, and in float32 elsewhere.
        sections: Fields of `AccelConfig`, which override the fields of `config`.

    Returns:
        An object that is called as the pipeline is.

    Raises:
        Unsupported: `parallel` is not asked for, there are too few GPUs, or a worker cannot import the function.
        ConfigError: The configuration cannot be read.
        WorkerFailed: A worker could not load or accelerate the pipeline.

    Example:
        with launch("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", compile=True, parallel=ParallelConfig(cfg=2)) as pipe:
            video = pipe(prompt="a fox", generator=torch.Generator().manual_seed(0)).frames[0]
    """
    parallel = resolve_parallel(config, sections)
    if parallel is None:
        raise Unsupported(
            "launch", "nothing says how many ranks there are.", "parallel=ParallelConfig(ulysses=2), say."
        )
    if parallel.any_world_size:
        raise Unsupported(
            "launch", "fsdp alone does not say how many ranks there are.", "ParallelConfig(fsdp=True, ulysses=2), say."
        )
    ranks, gpus = parallel.ranks, torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise Unsupported("launch", f"{parallel.product} ranks, and this machine has {gpus} GPUs.", "fewer ranks.")
    if callable(pipeline):
        try:
            imported = "__main__" not in str(getattr(pipeline, "__module__", "")) and pickle.dumps(pipeline)
        except Exception:  # whatever keeps a function from being named
            imported = b""
        if not imported:
            raise Unsupported(
                "launch", "its workers cannot import the function that makes the pipeline.",
                "a function of a module, or the pipeline's folder or Hugging Face id.",
            )  # fmt: skip
    for name, item in {"load": load, "config": config, **sections}.items():
        _message(name, item)
    return Launched(ranks, pipeline, load or {}, config, sections)


def _message(what: str, item: Any) -> Any:
    """An object pickled for a worker.

    Args:
        what: The object's role, for the message.
        item: The object.

    Raises:
        Unsupported: It cannot be pickled.
    """
    try:
        return ForkingPickler.dumps(item)
    except Exception as error:  # whatever keeps an object from being pickled
        reason = f"{what} cannot be sent to its workers ({type(error).__name__}: {error})."
        raise Unsupported("launch", reason, "numbers, strings, tensors, and functions of modules.") from error


def _work(
    environment: dict[str, str], pipe: Any, load: Any, options: dict[str, Any], config: Any, sections: dict[str, Any]
) -> None:
    """The worker's loop: loads the pipeline, and answers calls until the pipe is closed."""
    os.environ.update(environment)
    rank = int(environment["RANK"])
    call: Any = None
    while True:
        try:
            if call is None:
                call, answer = _loaded(load, options, config, sections), None
            else:
                args, kwargs = pipe.recv()
                found = call(*args, **kwargs)
                answer = pytree.tree_map(_on_cpu, found) if rank == 0 else None
            pipe.send((True, answer))
        except (EOFError, BrokenPipeError):
            return
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return


def _loaded(load: Any, options: dict[str, Any], config: Any, sections: dict[str, Any]) -> Any:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if callable(load):
        made = load(**options)
    else:
        # Without a type, diffusers' models are loaded in float32 and transformers' in that of their files.
        usual = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        made = from_pretrained(load, **({} if "torch_dtype" in options else {"dtype": usual}) | options)
    # Weights that may exceed one GPU's memory stay on the host until they are sharded or offloaded.
    if torch.cuda.is_available() and not begins_on_host(config, sections):
        made.to(f"cuda:{torch.cuda.current_device()}")
    return accelerate(made, config, **sections)


def _on_cpu(item: Any) -> Any:
    return item.cpu() if isinstance(item, torch.Tensor) else item
