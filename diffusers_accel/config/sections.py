"""Sections of the configuration, one class per feature; the cache's are in `cache.py`."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, shown
from .fields import Section, option, plain

# Kinds of names in the configuration, as their registries call them.
KERNEL, FORMAT = "attention kernel", "linear kernel"
BACKEND, MODE = "torch.compile backend", "torch.compile mode"


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Section):
    """Which kernel computes attention.

    A kernel is named as `diffusers-accel env` lists them: `"sdpa"`, `"cudnn"`, `"flash2"`, `"fa3"`, `"fa3-fp8"`,
    `"fa4"`, `"sage"`, `"sage-fp8"`, `"qk16pv8"`, or a name given to `register_attention`. `"auto"` times the kernels
    that can run on each new shape and takes the fastest.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range.
    """

    backend: str = option(
        "auto",
        "The kernel for all layers that nothing below says otherwise of.",
        registry=KERNEL,
        extra_choices=("auto",),
    )
    recipe: str | None = option(
        None,
        """What a quantized backend rounds, and how. Ours are named by the type of QK and the tokens per scale of Q, K
        and V, e.g. `"int8-1-16-1"`. `None` takes the backend's first.""",
    )
    fidelity: str = option(
        "exact",
        """What `"auto"` may choose: `"exact"` kernels only, or `"8bit"` ones too.""",
        choices=("exact", "8bit"),
    )
    dense_steps: float = option(
        0.0, "Share of the first steps that are computed by `dense_backend`, between 0 and 1.", minimum=0, maximum=1
    )
    dense_layers: float = option(
        0.0, "Share of the first blocks that are computed by `dense_backend`, between 0 and 1.", minimum=0, maximum=1
    )
    dense_backend: str = option(
        "auto", """The kernel of dense steps and layers; `"auto"` takes an exact one.""", registry=KERNEL,
        extra_choices=("auto",),
    )  # fmt: skip
    self_attention: str | None = option(
        None,
        "The kernel for self-attention (text and image joined included) instead of `backend`.",
        registry=KERNEL,
        extra_choices=("auto",),
    )
    cross_attention: str | None = option(
        None, "The kernel for cross-attention instead of `backend`.", registry=KERNEL, extra_choices=("auto",)
    )
    layers: dict[str, str] | None = option(
        None,
        """Globs of attention modules -> kernels, e.g. `{"transformer_blocks.0.*": "sdpa"}`; the first that matches wins
        over everything above.""",
        registry=KERNEL,
        extra_choices=("auto",),
    )

    section: typing.ClassVar[str] = "attention"
    shorthand: typing.ClassVar[str | None] = "backend"
    switch: typing.ClassVar[bool] = True


# ModelOpt's names of algorithms, for layers whose activations are scaled as they come.
_MODELOPT = {
    "FP8": "fp8-tensor",
    "FP8_BLOCK_SCALES": "fp8-block",
    "NVFP4": "nvfp4",
    "NVFP4_SVD": "svdq-nvfp4",
}
_MIXED = "MIXED_PRECISION"


@dataclass(frozen=True, kw_only=True)
class ModelOptLayer(Section):
    """One layer's part of a ModelOpt `quantization_config`."""

    quant_algo: str = option("FP8", "The algorithm.", choices=tuple(_MODELOPT))
    group_size: int | None = option(
        None,
        "Features that share a scale, which the algorithm says already: 16 of NVFP4, 128 of FP8 blocks.",
        minimum=1,
    )

    section: typing.ClassVar[str] = "linear.quantized_layers"

    def validate(self) -> None:
        """Refuses groups of another size."""
        own = 16 if self.quant_algo.startswith("NVFP4") else 128 if self.quant_algo == "FP8_BLOCK_SCALES" else None
        if self.group_size not in (None, own):
            raise ConfigError(
                f"{self.section}.group_size: {self.quant_algo} has {own or 'no groups'}, got {self.group_size}. "
                f"Nearest: {own}."
            )


@dataclass(frozen=True, kw_only=True)
class ModelOptConfig(Section):
    """A ModelOpt `quantization_config`, as far as it can be applied to a loaded model."""

    quant_algo: str = option("FP8", "The algorithm of every layer.", choices=(*_MODELOPT, _MIXED))
    quant_method: str = option("modelopt", "Whose configuration it is.", choices=("modelopt",))
    ignore: tuple[str, ...] | None = option(None, "Globs of layers that stay as they are.")
    dynamic: bool = option(True, "Whether activations are scaled as they come, which only a checkpoint can deny.")
    quantized_layers: dict[str, Any] | None = option(
        None, "Globs of layers -> what is said of each.", key_kind="globs", expected="a mapping of globs to mappings"
    )
    producer: dict[str, Any] | None = option(None, "Who wrote it.", key_kind="names", expected="a mapping")

    section: typing.ClassVar[str] = "linear"

    @property
    def plan(self) -> dict[str, str] | None:
        """Globs -> our formats."""
        found = {}
        for glob, values in (self.quantized_layers or {}).items():
            where = f"linear.quantized_layers[{glob!r}]"
            if not isinstance(values, Mapping) or "quant_algo" not in values:
                raise ConfigError(f"{where}: expected a mapping with a quant_algo, got {shown(plain(values))}.")
            if unknown := sorted(set(values) - {"quant_algo", "group_size"}):
                raise ConfigError(f"{where}: {unknown} cannot be applied to a loaded model.")
            found[glob] = _MODELOPT[ModelOptLayer(**plain(values)).quant_algo]
        return found or None

    def validate(self) -> None:
        """Refuses what a loaded model has not."""
        if not self.dynamic:
            raise ConfigError("linear.dynamic: a loaded model has no input scales; dynamic=True, or from_pretrained.")
        if self.quant_algo == _MIXED and not self.quantized_layers:
            raise ConfigError(f"linear.quantized_layers: {_MIXED} says by layer what is quantized, and there is none.")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Section):
    """How linear layers store and multiply their weights.

    Formats: `"fp8"` (e4m3, a scale per row and per token), `"fp8-tensor"`, `"fp8-block"` (128 x 128), `"int8"` (a scale
    per row and per token), `"nvfp4"` and `"svdq-nvfp4"` (4-bit weights), `"torchao:<config>"`, or a name given to
    `register_linear`. A ModelOpt `quantization_config` is understood too: `{"quant_algo": "FP8", "ignore": [...]}`.

    Raises:
        ConfigError: A value is not of its field's type, or out of its range, or nothing is named at all.
    """

    algo: str | None = option(
        None,
        "The format of every layer that nothing below says otherwise of; `None` for those that `plan` names only.",
        registry=FORMAT,
    )
    ignore: tuple[str, ...] | None = option(
        None, "Globs of layers that stay as they are, besides those that each model keeps by default."
    )
    plan: dict[str, str] | None = option(
        None,
        """Globs of layers -> formats, or `"none"`; the first that matches wins over everything else.""",
        registry=FORMAT,
        extra_choices=("none",),
    )
    smallest: int | None = option(
        None,
        """Layers with no more input or output features than this stay as they are; `None` takes the model's own bound
        (0 for those with a list of their own, 512 for others).""",
        minimum=0,
    )
    targets: tuple[str, ...] | None = option(
        None,
        """Names of the pipeline's models whose layers are meant, e.g. `("transformer", "text_encoder_2")`; `None` for
        the denoisers.""",
        min_items=1,
        condition=lambda names: len(set(names)) == len(names),
        expected="a list of names of the pipeline's models (not an empty one), each once, or None",
    )
    keep_original: str = option(
        "cpu",
        """`"cpu"` keeps the stock weights in the host's memory, so that `restore` is bit-exact; `"drop"` frees them,
        and `restore` refuses.""",
        choices=("cpu", "drop"),
    )

    section: typing.ClassVar[str] = "linear"
    shorthand: typing.ClassVar[str | None] = "algo"

    @classmethod
    def normalize_mapping(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """A ModelOpt `quantization_config` as fields of this class; any other mapping as it is."""
        if "quant_algo" not in values:
            return values
        ours = {name: values[name] for name in ("smallest", "targets", "keep_original") if name in values}
        theirs = {key: value for key, value in values.items() if key not in ours}
        unknown = sorted(str(key) for key in set(theirs) - set(ModelOptConfig.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"linear: {unknown} of a quantization_config cannot be applied to a loaded model.")
        said = ModelOptConfig(**theirs)
        algo = None if said.quant_algo == _MIXED else _MODELOPT[said.quant_algo]
        return {"algo": algo, "ignore": said.ignore or None, "plan": said.plan, **ours}

    def validate(self) -> None:
        """Refuses a section that says nothing."""
        if self.algo is None and not self.plan:
            raise ConfigError("linear: name a format, linear.algo='fp8' say, or formats by layer in linear.plan.")


@dataclass(frozen=True, kw_only=True)
class FuseConfig(Section):
    """Linear layers that read one tensor (query, key and value, say) multiplied as one. `True` is short for it."""

    ignore: tuple[str, ...] | None = option(None, "Globs of layers that stay apart.")

    section: typing.ClassVar[str] = "fuse"
    switch: typing.ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Section):
    """Regional compilation of the denoiser's repeated blocks with `torch.compile`.

    Raises:
        ConfigError: A value is not of its field's type; options are given beside a mode, which stands for options
            itself; or a mode beside a backend that has none.
    """

    mode: str = option(
        "default",
        """As in `torch.compile`; `"auto"` means the default mode on a CUDA device and no compilation elsewhere.""",
        registry=MODE,
        extra_choices=("auto", "default"),
    )
    backend: str = option("inductor", "As in `torch.compile`.", registry=BACKEND, extra_choices=("inductor",))
    fullgraph: bool = option(True, "Refuse graph breaks inside a block.")
    dynamic: bool | None = option(None, "As in `torch.compile`; `None` turns a dimension dynamic once it changes.")
    options: dict[str, Any] | None = option(
        None,
        """As in `torch.compile`, in the default mode: `{"coordinate_descent_tuning": True}` tries more cuts of every
        generated kernel, which takes minutes and gains a few percent.""",
        key_kind="names",
    )
    rewrites: bool | None = option(
        None,
        """Rewrite a block's graph before inductor sees it, where its own fusion needs more passes over memory: norms
        with modulation, QK-norm with rotation, GELU in a product, each with the rounding of a quantized layer behind
        it. What modulates tokens by the time step and the prompt alone is made for all steps at once (FLUX.1,
        Qwen-Image, SD3), in up to 0.15 GB for 32 steps. On CUDA; the same up to rounding. `None` means wherever
        inductor compiles; with `backend="eager"` and `True` there is nothing to compile, and what is not rewritten
        runs as stock code does.""",
    )

    section: typing.ClassVar[str] = "compile"
    shorthand: typing.ClassVar[str | None] = "mode"
    switch: typing.ClassVar[bool] = True

    @property
    def rewriting(self) -> bool:
        """Whether graphs are rewritten."""
        return self.backend == "inductor" if self.rewrites is None else self.rewrites

    def validate(self) -> None:
        """Refuses what fields together do not mean."""
        if self.mode in ("auto", "default"):
            return
        if self.options:
            raise ConfigError(
                f"compile.options: options or mode={self.mode!r}, not both: a mode stands for options itself."
            )
        if self.backend != "inductor":
            raise ConfigError(
                f"compile.mode: modes are inductor's, and backend={self.backend!r} has none; got {self.mode!r}. "
                "Nearest: 'default'."
            )


@dataclass(frozen=True, kw_only=True)
class CudaGraphConfig(Section):
    """Runs of blocks launched in one call each, as CUDA graphs. `True` is short for it.

    What a graph needs stays in the GPU's memory: the activations of one call of each kind that was met.

    Raises:
        ConfigError: A value is not of its field's type, or the limit is below 1.
    """

    limit: int = option(
        8,
        "Kinds of calls (sizes, batches, lengths of prompts) that are recorded; others run without graphs.",
        minimum=1,
    )
    vae: bool = option(
        False, "Record the VAE's decoder too, as a whole. Video decoders that work in chunks cannot be recorded."
    )
    text_encoders: bool = option(
        False,
        """Record the text encoders too, each as a whole. Language models that return their cache of keys and values run
        as they are.""",
    )

    section: typing.ClassVar[str] = "cuda_graph"
    switch: typing.ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Section):
    """Switches of the stock VAE."""

    tiling: bool | None = option(
        None, "Decode and encode in tiles; less memory, slower. `None` leaves the switch as it is."
    )
    slicing: bool | None = option(
        None, "Decode and encode one sample of the batch at a time. `None` leaves the switch as it is."
    )
    compile: bool = option(False, "Compile the decoder with `torch.compile`.")

    section: typing.ClassVar[str] = "vae"


@dataclass(frozen=True, kw_only=True)
class RequestConfig(Section):
    """Requests that come while another one is running on the same denoiser."""

    busy: str = option(
        "wait",
        """`"wait"` has it wait for its turn, in the order of arrival; `"raise"` raises `Busy` at once.""",
        choices=("wait", "raise"),
    )

    section: typing.ClassVar[str] = "request"
    shorthand: typing.ClassVar[str | None] = "busy"


@dataclass(frozen=True, kw_only=True)
class WarmupConfig(Section):
    """What `warmup(pipe)` runs when it is not told: the sizes that a server, say, is to answer at once.

    Raises:
        ConfigError: A resolution is not of its form, or a number is below 1.
    """

    resolutions: tuple[str, ...] | None = option(
        None,
        """Pixels, each as `"<height>x<width>"`; `None` takes the pipeline's default size.""",
        min_items=1,
        pattern="[1-9][0-9]{0,4}x[1-9][0-9]{0,4}",
        expected="a list of '<height>x<width>', '480x832' say (not an empty one), or None",
        examples=(("480x832",), ("32x32", "1024x99999")),
    )
    num_frames: tuple[int, ...] | None = option(
        None, "Numbers of frames, for video; `None` takes the pipeline's default.", minimum=1, min_items=1
    )
    num_inference_steps: int | None = option(
        None, "Steps of each request; `None` takes as few as there is something new in.", minimum=1
    )

    section: typing.ClassVar[str] = "warmup"

    @property
    def sizes(self) -> list[tuple[int, int]] | None:
        """(height, width) of each resolution."""
        if self.resolutions is None:
            return None
        return [(int(height), int(width)) for height, _, width in (text.partition("x") for text in self.resolutions)]
