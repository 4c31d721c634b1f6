"""The five functions a user calls, the table of features, and the one order in which everything is applied.

`accelerate` resolves its arguments to a context, runs every feature's check, and only then has the journal apply their
edits. A session (`sessions/`) keeps the edits on the components that they change; nothing is kept anywhere else.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from .checkpoints.loading import from_pretrained as load_pipeline
from .config import AccelConfig
from .core.edits import Edit, Journal
from .core.step import Mode, StepState
from .core.timestamps import seconds_between
from .errors import AccelError, NotAccelerated, Unsupported
from .features import attention, cache, compile, fuse, graphs, linear, offload, parallel, request, vae
from .features.context import PipelineContext
from .features.feature import Feature, Plan
from .features.offload import taken_over
from .features.parallel import fsdp, process_group, tensor_parallel
from .kernels.linear import kind_of, stock_modules
from .reporting import Explanation, Row, Stats
from .resolve import DENOISERS, pipeline_context, resolve_config
from .sessions import (
    ComponentSections,
    Session,
    forget_ended_session,
    session_of,
    session_of_denoisers,
    shared_components,
    undo_abandoned,
)
from .sessions.changes import check_changes

Pipe = TypeVar("Pipe")


@dataclass(frozen=True)
class Entry:
    """A row of FEATURES.

    Attributes:
        feature: The feature's module.
        section: Name of its section in AccelConfig; `None` for one that is always on.
        enabled: Whether a section that is there turns it on.
    """

    feature: ModuleType
    section: str | None
    enabled: Callable[[Any], bool] = lambda section: True


# The features, in the order their edits are applied. Weights are sharded among ranks before they are quantized.
FEATURES: dict[str, Entry] = {
    "diffusers offload": Entry(taken_over, "offload"),
    "process group": Entry(process_group, "parallel"),
    "tensor parallel": Entry(tensor_parallel, "parallel", lambda section: section.tp > 1),
    "linear": Entry(linear, "linear"),
    "fuse": Entry(fuse, "fuse"),
    "parallel": Entry(parallel, "parallel"),
    "attention": Entry(attention, "attention"),
    "compile": Entry(compile, "compile"),
    "cuda_graph": Entry(graphs, "cuda_graph"),
    "cache": Entry(cache, "cache"),
    "vae": Entry(vae, "vae"),
    "fsdp": Entry(fsdp, "parallel", lambda section: section.fsdp),
    "offload": Entry(offload, "offload"),
    "request": Entry(request, None),
}

# Layers from the inside to the outside. A layer's rank is its index here; the order of the edits does not matter.
ORDER = (
    "compile",
    "attention layer",
    "offload block",
    "graph block",
    "fsdp",
    "cache block",
    "sequence sharding of a block",
    "token order of a block",
    "graph denoiser",
    "sequence sharding",
    "token order",
    "cache denoiser",
    "data parallel",
    "cfg parallel",
    "input consistency",
    "vae",
    "graph module",
    "vae idle ranks",
    "offload model",
    "request",
    "rank device",
)


def accelerate(pipe: Pipe, config: str | AccelConfig | Mapping[str, Any] | Path | None = None, **sections: Any) -> Pipe:
    """Makes a stock pipeline faster, in place, and returns it. A second call replaces the first.

    Args:
        pipe: A diffusers pipeline.
        config: A preset's name (`"lossless"`, `"balanced"`, `"fast"`), the path of a YAML file, an `AccelConfig` or a
            mapping of its fields. Without `config` and sections, the preset `"lossless"`.
        sections: Fields of `AccelConfig`, which override the fields of `config`. With sections alone, all other
            sections are off.

    Raises:
        Unsupported: Something asked for cannot be done; nothing was changed.
        ConfigError: The configuration cannot be read; nothing was changed.
        TypeError: `pipe` is not a diffusers pipeline.
    """
    context, notes = _resolved(pipe, config, sections)
    resolved = context.config
    assert resolved is not None
    earlier = session_of_denoisers(pipe, context)
    if earlier is not None and any(each is not pipe for each in earlier.pipes):
        if earlier.config == resolved:
            if pipe not in earlier.pipes:
                earlier.join(pipe)
            return pipe
        if others := earlier.others(pipe):
            raise Unsupported(
                "accelerate",
                f"another pipeline that shares it ({', '.join(others)}) is accelerated otherwise.",
                "the same configuration, or restore(pipe), which takes it back for all that share it.",
                str(context),
            )
    plans: dict[str, Plan] = {}
    for name, feature, section in _active(resolved):
        plans[name] = feature.check(replace(context, plans=plans), section)
    component_sections = _component_sections(context, resolved)
    context = replace(context, shared=shared_components(context, component_sections, earlier))
    if earlier is not None:
        for reason in earlier.irreversible:
            raise Unsupported("accelerate", f"{reason}.", "load the pipeline again.", type(pipe).__name__)
        earlier.context.clock.wait_idle()
    # A copy: the caller may change its own objects later.
    arguments = copy.deepcopy((config, sections))
    left = [note for plan in plans.values() for note in plan.left]
    if context.denoisers and torch.cuda.is_available() and context.device.type == "cpu":
        left.append("the pipeline is on the CPU, for which all was chosen. On a GPU it is chosen again.")
    _begin(pipe, context, arguments, notes, component_sections, earlier)
    # Deviations from the request are warnings too, since not every user calls `explain`.
    for note in (*notes, *left):
        warnings.warn(f"accelerate: {note}", stacklevel=2)
    return pipe


def _begin(
    pipe: Any,
    context: PipelineContext,
    arguments: tuple[Any, Mapping[str, Any]],
    notes: tuple[str, ...],
    component_sections: ComponentSections,
    earlier: Session | None = None,
) -> None:
    """Puts the context's configuration in force. A failure puts the earlier session's configuration in force again.

    Args:
        pipe: The pipeline.
        context: The pipeline as features see it, with the configuration.
        arguments: The arguments of `accelerate`.
        notes: Sentences about the configuration, as `explain` prints them.
        component_sections: Components to change besides the denoisers -> feature -> section.
        earlier: The session in force until now, which ends; `None` without one.
    """
    config = context.config
    assert config is not None
    pipes = {pipe, *(earlier.pipes if earlier is not None else ())}
    doing: list[str] = []
    try:
        if earlier is not None:
            earlier.end()
        session = Session(config, context, notes, arguments, _weight_bytes(context), component_sections)

        def accelerate_again(pipe: Any) -> None:
            accelerate(pipe, arguments[0], **arguments[1])

        context.outputs.request_hooks.append(lambda pipe: check_changes(session, pipe, DENOISERS, accelerate_again))
        session.begin(_edits(context, config, doing), pipes)
    except BaseException as error:
        if earlier is not None:
            _again(pipe, earlier, error)
        if isinstance(error, Exception) and not isinstance(error, AccelError):
            feature = doing[-1] if doing else "accelerate"
            raise Unsupported(
                feature,
                f"{type(error).__name__}: {str(error).strip() or 'no message'}.",
                f"another setting of {feature}, or none.",
                str(context),
            ) from error
        raise


def _again(pipe: Any, earlier: Session, error: BaseException) -> None:
    """Puts back what was in force before something failed."""
    try:
        context = replace(_context(pipe), config=earlier.config)
        context = replace(context, shared=shared_components(context, earlier.component_sections, None))
        _begin(pipe, context, earlier.arguments, earlier.notes, earlier.component_sections)
    except Exception as other:  # the error that is reported is the first one
        error.add_note(f"The earlier configuration could not be put back ({other}); the pipeline is stock.")


def from_pretrained(
    path: str | Path, *, dtype: Any = torch.bfloat16, dynamic: bool | None = None, offload: Any = None, **arguments: Any
) -> Any:
    """Loads a pipeline whose models may be quantized in NVIDIA ModelOpt's layout, or are larger than the GPU's memory.

    Args:
        path: Folder of a pipeline, or its id on the Hugging Face Hub.
        dtype: Dtype of all tensors that are not quantized, or a mapping from component names to dtypes, with the key
            `"default"`, as in diffusers.
        dynamic: `True` computes the scales of activations at every call, `False` uses the calibrated scales of the
            checkpoint. `None` follows the checkpoint's configuration.
        offload: The section `offload`, e.g. `"12GiB"`. The pipeline is loaded on the host and then accelerated with
            this section alone, so that loading never takes more of the GPU than the budget. A later
            `accelerate(pipe, ..., offload=...)` adds other sections. `None` leaves the pipeline stock, on the host.
        arguments: Arguments of `DiffusionPipeline.from_pretrained`, including arguments for the hub (`revision`,
            `token`, `cache_dir`, `local_files_only`, `variant`, ...). `subfolder` is the pipeline's path in the folder
            or repository. A model may be given as a single quantized file, `transformer="model.safetensors"`, with
            diffusers' names of layers. The pipeline's folder then has the model's configuration. ComfyUI's scaled fp8
            is read as ModelOpt's FP8.

    Returns:
        The stock pipeline on the host, with quantized linear layers; with `offload`, the accelerated one.

    Raises:
        CheckpointError: A quantized model cannot be read. The message names the file or layer, and the reason.
        Unsupported: The pipeline cannot be offloaded so, or `device_map` places its models itself.
    """
    if offload is not None and arguments.get("device_map") is not None:
        raise Unsupported(
            "offload", f"device_map={arguments['device_map']!r} places the models.", "one of the two.", str(path)
        )
    pipe = load_pipeline(path, dtype=dtype, dynamic=dynamic, **arguments)
    return pipe if offload is None else accelerate(pipe, offload=offload)


def restore(pipe: Pipe) -> Pipe:
    """Takes back everything `accelerate` did; the pipeline is the stock one again, bit for bit, and so are all that
    share its denoisers. Changes that its user has made meanwhile stay.

    Raises:
        NotAccelerated: It was never accelerated, or is restored already.
        Unsupported: The stock weights are gone, as the configuration asked; nothing was changed.
    """
    if session_of(pipe) is None and any([forget_ended_session(pipe), undo_abandoned(pipe)]):
        return pipe  # taken back through another pipeline that shares its denoisers, or left by one that is gone
    session = _session(pipe, "restore")
    for reason in session.irreversible:
        raise Unsupported("restore", f"{reason}.", "load the pipeline again.", type(pipe).__name__)
    session.context.clock.wait_idle()
    try:
        session.end()
    finally:
        forget_ended_session(pipe)
    return pipe


def explain(
    pipe: Any, config: str | AccelConfig | Mapping[str, Any] | Path | None = None, **sections: Any
) -> Explanation:
    """The plan and the refusals of `accelerate` with the same arguments, in their order. Changes nothing.

    Raises:
        ConfigError: The configuration cannot be read.
        TypeError: `pipe` is not a diffusers pipeline.
    """
    context, notes = _resolved(pipe, config, sections)
    rows: list[Row] = []
    plans: dict[str, Plan] = {}
    for name, feature, section in _active(context.config):
        try:
            plan: Plan = feature.check(replace(context, plans=plans), section)
            plans[name] = plan
            rows.append(Row(name, plan.action, plan.modules, notes=(*plan.notes, *plan.left)))
        except Unsupported as error:
            rows.append(Row(name, "refused", 0, refused=f"{error.reason} Instead: {error.instead}"))
    off = [name for name in FEATURES if name not in {row.feature for row in rows}]
    rows.extend(Row(name, "off", 0) for name in off)
    default = [str(denoiser) for denoiser in context.denoisers if denoiser.adapter.default]
    if default:
        notes = (*notes, f"No adapter describes {', '.join(default)}: features that need one are refused.")
    return Explanation(type(pipe).__name__, str(context.device), tuple(rows), notes)


def stats(pipe: Any) -> Stats:
    """Counters of the last request, which print themselves as a table.

    Raises:
        NotAccelerated: The pipeline is not accelerated.
    """
    session = _session(pipe, "stats")
    clock = session.context.clock
    steps: dict[int | None, set[Mode]] = {}
    branches = {}
    for (denoiser, branch), calls in clock.calls.items():
        modes = Counter(calls.values())
        branches[f"{denoiser}/{branch}"] = {"computed": modes[Mode.FULL], "skipped": modes[Mode.SKIP]}
        for step, mode in calls.items():
            steps.setdefault(step, set()).add(mode)
    skipped = sum(modes == {Mode.SKIP} for modes in steps.values())
    linears = Counter(
        kind_of(module)
        for denoiser in session.context.denoisers
        for _, module in stock_modules(denoiser.module)
        if isinstance(module, nn.Linear)
    )
    by_layer, by_step = _sparse_shares(session.context)
    return Stats(
        requests=clock.requests,
        steps_computed=len(steps) - skipped,
        steps_skipped=skipped,
        branches=branches,
        **_seconds(session.context),
        attention_kernels=dict(session.context.stats.attention_calls),
        sparse_by_layer=by_layer,
        sparse_by_step=by_step,
        attention_timings={shape: dict(times) for shape, times in session.context.stats.attention_timings.items()},
        attention_broadcasts=dict(session.context.stats.attention_broadcasts),
        cache_bytes=sum(session.context.stats.cache_bytes.values()),
        cache_guarded={
            f"{denoiser}/{branch}": dataclasses.asdict(found)
            for (denoiser, branch), found in session.context.stats.cache_guarded.items()
        },
        linear_layers=dict(linears),
        weight_bytes_before=session.weight_bytes_before,
        weight_bytes_after=_weight_bytes(session.context),
        graphs_captured=sum(graphs.captured for graphs in session.context.outputs.graphs),
        graph_replays=sum(graphs.replays for graphs in session.context.outputs.graphs),
        modulations_precomputed=sum(each.layers for each in session.context.outputs.modulations),
        offload=_offload_counts(session.context),
        modulations_recomputed=sum(each.missed for each in session.context.outputs.modulations),
    )


def _offload_counts(context: PipelineContext) -> dict[str, Any]:
    """`Stats.offload` of the last request; empty without offloading."""
    stream, prompts = context.outputs.weight_stream, context.outputs.prompts
    found: dict[str, Any] = {}
    if stream is not None:
        counts = stream.counts
        found |= {"bytes": counts.bytes, "ahead": counts.ahead, "late": counts.late, "hidden": stream.hidden}
    if prompts is not None:
        found["prompts"] = prompts.hits
    if context.outputs.vae_choice is not None:
        found |= {f"vae {method}": way for method, way in context.outputs.vae_choice.taken.items()}
    if found and context.device.type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated(context.home)
    return found


def _seconds(context: PipelineContext) -> dict[str, float | None]:
    """`Stats.seconds_per_step` and `Stats.speed_up` of the last request."""
    steps: dict[int | None, list[tuple[StepState, float]]] = {}
    for state, begin, end in context.stats.call_times:
        steps.setdefault(state.step, []).append((state, seconds_between(begin, end)))
    if not steps:
        return {"seconds_per_step": None, "speed_up": None}
    whole = seconds_between(context.stats.call_times[0][1], context.stats.call_times[-1][2])
    full = [calls for calls in steps.values() if all(state.mode is Mode.FULL for state, _ in calls)]
    skipped = sum(seconds for calls in steps.values() for _, seconds in calls)
    known = bool(full) and len(full) < len(steps) and skipped > 0
    # The first step may have compiled something.
    one = sorted(sum(seconds for _, seconds in calls) for calls in full)[len(full) // 2] if full else 0.0
    return {"seconds_per_step": whole / len(steps), "speed_up": one * len(steps) / skipped if known else None}


def warmup(
    pipe: Pipe,
    resolutions: Sequence[tuple[int, int]] | None = None,
    num_frames: Sequence[int] | None = None,
    num_inference_steps: int | None = None,
    **call: Any,
) -> Pipe:
    """Runs short requests over the product of sizes, so that later ones of these sizes compile and record nothing.

    Without a given prompt, the first size also runs with a long one, because some models do not pad prompts. Arguments
    that are not given come from the configuration's section `warmup`, if it has one.

    Args:
        pipe: An accelerated pipeline.
        resolutions: (height, width) in pixels; `None` takes the pipeline's default size.
        num_frames: Numbers of frames, for video.
        num_inference_steps: Steps per request; `None` takes 2, and 4 with CUDA graphs.
        call: Other arguments of the pipeline's call (e.g. an image). `prompt` and `negative_prompt` have defaults.

    Raises:
        NotAccelerated: The pipeline is not accelerated.
        TypeError: The pipeline needs an argument that was not given, or takes no size or frames.
    """
    from tqdm.auto import tqdm

    config = _session(pipe, "warmup").config
    if config.warmup is not None:
        resolutions = resolutions or config.warmup.sizes
        num_frames = num_frames or config.warmup.num_frames
        num_inference_steps = num_inference_steps or config.warmup.num_inference_steps
    steps = num_inference_steps or (4 if config.cuda_graph is not None else 2)
    sizes: Iterable[dict[str, int]] = [{"height": h, "width": w} for h, w in resolutions] if resolutions else [{}]
    frames: Iterable[dict[str, int]] = [{"num_frames": count} for count in num_frames] if num_frames else [{}]
    requests: list[dict[str, Any]] = [{**size, **count} for size in sizes for count in frames]
    if "prompt_embeds" not in call:
        if "prompt" not in call:
            requests.insert(1, {**requests[0], "prompt": " ".join(["warm"] * 12)})
        takes = inspect.signature(type(pipe).__call__).parameters  # type: ignore[operator]
        own = "negative_prompt" in takes and "negative_prompt_embeds" not in call
        negative = {"negative_prompt": "warm-up"} if own else {}
        call = {"prompt": "warm-up", **negative, **call}
    with tqdm(requests, desc="warm-up") as bar:
        for arguments in bar:
            bar.set_postfix_str(", ".join(f"{key} {value}" for key, value in arguments.items() if key != "prompt"))
            with torch.no_grad():
                pipe(num_inference_steps=steps, **{**call, **arguments})  # type: ignore[operator]
    return pipe


@contextmanager
def recorded(pipe: Any, use_ret_steps: bool = False) -> Iterator[PipelineContext]:
    """Records changes of signal and residual from step to step in the context's `cache_records`, for every request
    within the `with` block. The pipeline is stock before and after.

    Args:
        pipe: A stock pipeline.
        use_ret_steps: Whether the signal is that of TeaCache's variant for Wan.

    Raises:
        Unsupported: The pipeline is accelerated, or its adapter defines no signal.
    """
    if session_of(pipe) is not None:
        raise Unsupported("calibrate", "the pipeline is accelerated.", "restore(pipe) first.", type(pipe).__name__)
    context, journal = _context(pipe), Journal()
    journal.apply(itertools.chain(cache.trace_edits(context, use_ret_steps), request.edits(context, None)))
    try:
        yield context
    finally:
        journal.undo()


def resolve(
    pipe: Any, config: str | AccelConfig | Mapping[str, Any] | Path | None = None, **sections: Any
) -> tuple[AccelConfig, tuple[str, ...]]:
    """The configuration that `accelerate` with the same arguments would apply, and notes on what a preset left off.

    Raises:
        ConfigError: The configuration cannot be read.
        TypeError: `pipe` is not a diffusers pipeline.
    """
    context, notes = _resolved(pipe, config, sections)
    assert context.config is not None
    return context.config, notes


def _session(pipe: Any, what: str) -> Session:
    session = session_of(pipe) if hasattr(pipe, "__dict__") else None
    if session is None:
        raise NotAccelerated(f"{what}: this {type(pipe).__name__} is not accelerated. Call accelerate(pipe) first.")
    return session


def _active(config: AccelConfig | None) -> Iterable[tuple[str, Feature, Any]]:
    for name, entry in FEATURES.items():
        section = getattr(config, entry.section) if entry.section is not None else None
        if entry.section is None or (section is not None and entry.enabled(section)):
            yield name, entry.feature, section  # type: ignore[misc]


def _edits(context: PipelineContext, config: AccelConfig, doing: list[str] | None = None) -> Iterator[Edit]:
    """Everything that `accelerate` does, in its order; `doing` is told which feature is at it."""
    doing = [] if doing is None else doing
    for name, feature, section in _active(config):
        doing.append(name)
        yield from feature.edits(context, section)


def _component_sections(context: PipelineContext, config: AccelConfig) -> ComponentSections:
    """The components besides the denoisers that a configuration changes, with the sections that do."""
    found: dict[str, dict[str, Any]] = {}
    for name, feature, section in _active(config):
        components = getattr(feature, "components", None)
        for component in components(context, section) if components is not None else ():
            found.setdefault(component, {})[name] = section
    return found


def _context(pipe: Any, config: Any = None, sections: Mapping[str, Any] | None = None) -> PipelineContext:
    return pipeline_context(pipe, ORDER.index, config, sections)


def _resolved(pipe: Any, config: Any, sections: Mapping[str, Any]) -> tuple[PipelineContext, tuple[str, ...]]:
    """A pipeline with the configuration to apply, and notes on it."""
    context = _context(pipe, config, sections)
    found, notes = resolve_config(context, config, sections)
    return replace(context, config=found), notes


def _sparse_shares(context: PipelineContext) -> tuple[dict[str, float], dict[int, float]]:
    """The shares of blocks that sparse attention computed, by layer and by step."""
    layers: dict[str, list[float]] = {}
    steps: dict[int, list[float]] = {}
    for (_, step, _), shares in context.stats.kept_blocks.shares().items():
        for (denoiser, role, block), share in shares.items():
            layers.setdefault(f"{denoiser}/{role}" if block is None else f"{denoiser}/{block}.{role}", []).append(share)
            steps.setdefault(step, []).append(share)
    return (
        {name: sum(found) / len(found) for name, found in layers.items()},
        {step: sum(found) / len(found) for step, found in steps.items()},
    )


def _weight_bytes(context: PipelineContext) -> int:
    return sum(context.outputs.sharded_bytes.get(denoiser.name, 0) for denoiser in context.denoisers) + sum(
        tensor.numel() * tensor.element_size()
        for denoiser in context.denoisers
        for tensor in itertools.chain(denoiser.module.parameters(), denoiser.module.buffers())
    )
