"""Sections of the configuration, one class per feature. The sections `cache` and `parallel` are in their own files."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, shown
from .fields import Section, option, plain
from .sparse import SparseConfig

# Kinds of registered names (`FieldSpec.registry`).
KERNEL, FORMAT = "attention kernel", "linear kernel"
BACKEND, MODE = "torch.compile backend", "torch.compile mode"


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Section):
    """The kernels that compute attention.

    Kernels have the names that `diffusers-accel env` lists: `"sdpa"`, `"cudnn"`, `"flash2"`, `"fa3"`, `"fa3-fp8"`,
    `"fa4"`, `"sage"`, `"sage-fp8"`, `"qk16pv8"`, or a name given to `register_attention`. `"auto"` times the available
    kernels on each new shape and takes the fastest.

    Raises:
        ConfigError: A value has another type than its field, or is out of its range.
    """

    backend: str = option(
        "auto",
        "The kernel of all attention layers without a more specific setting.",
        registry=KERNEL,
        extra_choices=("auto",),
    )
    recipe: str | None = option(
        None,
        """The rounding of a quantized backend. Built-in recipes are named by the type of QK and the tokens per scale of
        Q, K and V, e.g. `"int8-1-16-1"`. `None` takes the backend's first recipe.""",
    )
    fidelity: str = option(
        "exact",
        """The kernels that `"auto"` may choose: `"exact"` for exact kernels alone, `"8bit"` for 8-bit kernels too.""",
        choices=("exact", "8bit"),
    )
    dense_steps: float = option(
        0.0,
        "Share of the steps, at the beginning, whose attention `dense_backend` computes; between 0 and 1.",
        minimum=0,
        maximum=1,
    )
    dense_layers: float = option(
        0.0,
        "Share of the blocks, at the beginning, whose attention `dense_backend` computes; between 0 and 1.",
        minimum=0,
        maximum=1,
    )
    dense_backend: str = option(
        "auto", """The kernel of dense steps and layers. `"auto"` takes an exact kernel.""", registry=KERNEL,
        extra_choices=("auto",),
    )  # fmt: skip
    self_attention: str | None = option(
        None,
        "The kernel of self-attention, joint text and image attention included. `None` takes `backend`.",
        registry=KERNEL,
        extra_choices=("auto",),
    )
    cross_attention: str | None = option(
        None, "The kernel of cross-attention. `None` takes `backend`.", registry=KERNEL, extra_choices=("auto",)
    )
    layers: dict[str, str] | None = option(
        None,
        """Globs of attention modules -> kernels, e.g. `{"transformer_blocks.0.*": "sdpa"}`. The first matching glob
        overrides the fields above.""",
        registry=KERNEL,
        extra_choices=("auto",),
    )

    sparse: SparseConfig | None = option(
        None,
        """Sparse self-attention over picture and video tokens: `"auto"`, another rule's name, `True` for the default,
        or `SparseConfig`. `None` computes all of it.""",
        examples=(None, "auto", "window", {"keep": 0.25}, {"selector": "means", "block": 64, "order": "morton"}),
    )

    section: typing.ClassVar[str] = "attention"
    shorthand: typing.ClassVar[str | None] = "backend"
    switch: typing.ClassVar[bool] = True


# ModelOpt's algorithms with dynamic activation scales -> formats.
_MODELOPT = {
    "FP8": "fp8-tensor",
    "FP8_BLOCK_SCALES": "fp8-block",
    "NVFP4": "nvfp4",
    "NVFP4_SVD": "svdq-nvfp4",
}
_MIXED = "MIXED_PRECISION"


@dataclass(frozen=True, kw_only=True)
class ModelOptLayer(Section):
    """The settings of one layer in a ModelOpt `quantization_config`."""

    quant_algo: str = option("FP8", "The algorithm.", choices=tuple(_MODELOPT))
    group_size: int | None = option(
        None,
        "Number of features that share a scale, fixed by the algorithm: 16 for NVFP4, 128 for FP8 blocks.",
        minimum=1,
    )

    section: typing.ClassVar[str] = "linear.quantized_layers"

    def validate(self) -> None:
        """Refuses another group size than the algorithm's.

        Raises:
            ConfigError: `group_size` is given and differs from the algorithm's.
        """
        own = 16 if self.quant_algo.startswith("NVFP4") else 128 if self.quant_algo == "FP8_BLOCK_SCALES" else None
        if self.group_size not in (None, own):
            raise ConfigError(
                f"{self.section}.group_size: {self.quant_algo} has {own or 'no groups'}, got {self.group_size}. "
                f"Nearest: {own}."
            )


@dataclass(frozen=True, kw_only=True)
class ModelOptConfig(Section):
    """The fields of a ModelOpt `quantization_config` that can be applied to a loaded model."""

    quant_algo: str = option("FP8", "The algorithm of every layer.", choices=(*_MODELOPT, _MIXED))
    quant_method: str = option(
        "modelopt", "The quantization library that the configuration is for.", choices=("modelopt",)
    )
    ignore: tuple[str, ...] | None = option(None, "Globs of layers that are not quantized.")
    dynamic: bool = option(True, "Whether activations have dynamic scales. Static scales need a quantized checkpoint.")
    quantized_layers: dict[str, Any] | None = option(
        None, "Globs of layers -> the settings of each.", key_kind="globs", expected="a mapping of globs to mappings"
    )
    producer: dict[str, Any] | None = option(
        None, "The producer's name and version; not used.", key_kind="names", expected="a mapping"
    )

    section: typing.ClassVar[str] = "linear"

    @property
    def plan(self) -> dict[str, str] | None:
        """Globs of layers -> formats; `None` without settings by layer.

        Raises:
            ConfigError: A layer's settings are no mapping, lack a `quant_algo` or have unknown keys.
        """
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
        """Refuses settings that need a quantized checkpoint.

        Raises:
            ConfigError: Scales are static, or MIXED_PRECISION comes without settings by layer.
        """
        if not self.dynamic:
            raise ConfigError("linear.dynamic: a loaded model has no input scales; dynamic=True, or from_pretrained.")
        if self.quant_algo == _MIXED and not self.quantized_layers:
            raise ConfigError(f"linear.quantized_layers: {_MIXED} takes its formats from here, and it is empty.")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Section):
    """The formats in which linear layers store and multiply their weights.

    Formats: `"fp8"` (e4m3, a scale per row and per token), `"fp8-tensor"`, `"fp8-block"` (128 x 128), `"int8"` (a scale
    per row and per token), `"nvfp4"` and `"svdq-nvfp4"` (4-bit weights), `"torchao:<config>"`, or a name given to
    `register_linear`. A ModelOpt `quantization_config` is read too: `{"quant_algo": "FP8", "ignore": [...]}`.

    Raises:
        ConfigError: A value has another type than its field or is out of its range, or no format is named.
    """

    algo: str | None = option(
        None,
        "The format of all layers without a more specific setting. `None` quantizes only the layers that `plan` names.",
        registry=FORMAT,
    )
    ignore: tuple[str, ...] | None = option(
        None, "Globs of layers that are not quantized, besides the model's default exclusions."
    )
    plan: dict[str, str] | None = option(
        None,
        """Globs of layers -> formats, or `"none"` for no quantization. The first matching glob overrides the other
        fields.""",
        registry=FORMAT,
        extra_choices=("none",),
    )
    smallest: int | None = option(
        None,
        """Layers with at most this number of input or output features are not quantized. `None` takes the model's
        bound: 0 for models with a list of exclusions, 512 for others.""",
        minimum=0,
    )
    targets: tuple[str, ...] | None = option(
        None,
        """Names of the pipeline's models whose layers are quantized, e.g. `("transformer", "text_encoder_2")`. `None`
        takes the denoisers.""",
        min_items=1,
        condition=lambda names: len(set(names)) == len(names),
        expected="a list of names of the pipeline's models (not an empty one), each once, or None",
    )
    keep_original: str = option(
        "cpu",
        """`"cpu"` keeps the stock weights in the host's memory, so that `restore` is bit-exact. `"drop"` frees them,
        and `restore` then raises.""",
        choices=("cpu", "drop"),
    )

    section: typing.ClassVar[str] = "linear"
    shorthand: typing.ClassVar[str | None] = "algo"

    @classmethod
    def normalize_mapping(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of this class from a mapping. A ModelOpt `quantization_config` is translated.

        Args:
            values: Fields of this class, or a `quantization_config` with optional fields `smallest`, `targets` and
                `keep_original` of this class.

        Raises:
            ConfigError: A key of a `quantization_config` cannot be applied to a loaded model.
        """
        if "quant_algo" not in values:
            return values
        own = {name: values[name] for name in ("smallest", "targets", "keep_original") if name in values}
        foreign = {key: value for key, value in values.items() if key not in own}
        unknown = sorted(str(key) for key in set(foreign) - set(ModelOptConfig.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"linear: {unknown} of a quantization_config cannot be applied to a loaded model.")
        translated = ModelOptConfig(**foreign)
        algo = None if translated.quant_algo == _MIXED else _MODELOPT[translated.quant_algo]
        return {"algo": algo, "ignore": translated.ignore or None, "plan": translated.plan, **own}

    def validate(self) -> None:
        """Refuses a section without a format.

        Raises:
            ConfigError: Neither `algo` nor `plan` names a format.
        """
        if self.algo is None and not self.plan:
            raise ConfigError(
                "linear: no format is named. Give one, e.g. linear.algo='fp8', or formats by layer in linear.plan."
            )


@dataclass(frozen=True, kw_only=True)
class FuseConfig(Section):
    """Packing: linear layers with the same input (e.g. query, key and value) are multiplied as one layer. `True` stands
    for the section."""

    ignore: tuple[str, ...] | None = option(None, "Globs of layers that are not packed.")

    section: typing.ClassVar[str] = "fuse"
    switch: typing.ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Section):
    """Regional compilation of the denoiser's repeated blocks with `torch.compile`.

    Raises:
        ConfigError: A value has another type than its field, or a mode is given with options or for a backend without
            modes.
    """

    mode: str = option(
        "default",
        """The mode of `torch.compile`. `"auto"` takes the default mode on a CUDA device, and no compilation
        elsewhere.""",
        registry=MODE,
        extra_choices=("auto", "default"),
    )
    backend: str = option("inductor", "The backend of `torch.compile`.", registry=BACKEND, extra_choices=("inductor",))
    fullgraph: bool = option(
        True,
        "Whether each block is compiled as a single graph. A block with graph breaks gives a warning, and keeps them.",
    )
    dynamic: bool | None = option(
        None, "Whether shapes are dynamic, as in `torch.compile`. `None` makes a dimension dynamic once it changes."
    )
    options: dict[str, Any] | None = option(
        None,
        """Inductor's options, in the default mode. `{"coordinate_descent_tuning": True}` tries more tile sizes of every
        generated kernel, which takes minutes and gains a few percent.""",
        key_kind="names",
    )
    rewrites: bool | None = option(
        None,
        """Whether a block's graph is rewritten before inductor compiles it. Rewrites save passes over memory that
        inductor's fusion needs: norms with modulation, QK-norm with rotary embedding, GELU in a product, each with the
        rounding of a following quantized layer. Modulations that depend on the timestep and the prompt alone are
        computed for all steps at once (FLUX.1, Qwen-Image, SD3), in up to 0.15 GB for 32 steps. Rewrites need CUDA, and
        results are equal up to rounding. `None` rewrites for inductor alone. With `backend="eager"` and `True`, code
        without a rewrite runs as stock code.""",
    )

    section: typing.ClassVar[str] = "compile"
    shorthand: typing.ClassVar[str | None] = "mode"
    switch: typing.ClassVar[bool] = True

    @property
    def rewriting(self) -> bool:
        """Whether graphs are rewritten: `rewrites`, or its default for the backend."""
        return self.backend == "inductor" if self.rewrites is None else self.rewrites

    def validate(self) -> None:
        """Refuses contradictions between mode, options and backend.

        Raises:
            ConfigError: A mode is given with options, or for a backend without modes.
        """
        if self.mode in ("auto", "default"):
            return
        if self.options:
            raise ConfigError(
                f"compile.options: options or mode={self.mode!r}, not both, because a mode is a set of options."
            )
        if self.backend != "inductor":
            raise ConfigError(
                f"compile.mode: modes are inductor's, and backend={self.backend!r} has none; got {self.mode!r}. "
                "Nearest: 'default'."
            )


@dataclass(frozen=True, kw_only=True)
class CudaGraphConfig(Section):
    """CUDA graphs: runs of blocks are launched in one call each. `True` stands for the section.

    The activations of each graph variant stay in the GPU's memory.

    Raises:
        ConfigError: A value has another type than its field, or the limit is below 1.
    """

    limit: int = option(
        8,
        "Largest number of graph variants (sizes, batches, lengths of prompts); further ones run without graphs.",
        minimum=1,
    )
    vae: bool = option(
        False,
        "Whether the VAE's decoder is captured, as a whole. Video decoders that work in chunks cannot be captured.",
    )
    text_encoders: bool = option(
        False,
        """Whether the text encoders are captured, each as a whole. Language models that return a KV cache run without
        graphs.""",
    )

    section: typing.ClassVar[str] = "cuda_graph"
    switch: typing.ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Section):
    """The stock VAE's switches, and compilation of its decoder."""

    tiling: bool | None = option(
        None,
        "Whether the VAE works in tiles, which needs less memory and more time. `None` leaves the switch unchanged.",
    )
    slicing: bool | None = option(
        None, "Whether the VAE works on one sample of the batch at a time. `None` leaves the switch unchanged."
    )
    compile: bool = option(False, "Whether the decoder is compiled with `torch.compile`.")

    section: typing.ClassVar[str] = "vae"


@dataclass(frozen=True, kw_only=True)
class RequestConfig(Section):
    """Requests that arrive while another one runs on the same denoiser."""

    busy: str = option(
        "wait",
        """`"wait"` queues the request, in the order of arrival. `"raise"` raises `Busy` at once.""",
        choices=("wait", "raise"),
    )

    section: typing.ClassVar[str] = "request"
    shorthand: typing.ClassVar[str | None] = "busy"


@dataclass(frozen=True, kw_only=True)
class WarmupConfig(Section):
    """The defaults of `warmup(pipe)`: the sizes for which a server, for example, compiles and captures in advance.

    Raises:
        ConfigError: A resolution is malformed, or a number is below 1.
    """

    resolutions: tuple[str, ...] | None = option(
        None,
        """Sizes in pixels, each as `"<height>x<width>"`. `None` takes the pipeline's default size.""",
        min_items=1,
        pattern="[1-9][0-9]{0,4}x[1-9][0-9]{0,4}",
        expected="a list of '<height>x<width>', e.g. '480x832' (not an empty one), or None",
        examples=(("480x832",), ("32x32", "1024x99999")),
    )
    num_frames: tuple[int, ...] | None = option(
        None, "Numbers of frames, for video. `None` takes the pipeline's default.", minimum=1, min_items=1
    )
    num_inference_steps: int | None = option(
        None,
        "Number of steps of each request. `None` takes the smallest number that compiles and captures everything.",
        minimum=1,
    )

    section: typing.ClassVar[str] = "warmup"

    @property
    def sizes(self) -> list[tuple[int, int]] | None:
        """(height, width) of each resolution, in pixels; `None` without resolutions."""
        if self.resolutions is None:
            return None
        return [(int(height), int(width)) for height, _, width in (text.partition("x") for text in self.resolutions)]
