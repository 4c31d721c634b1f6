"""Sections of the configuration, one class per feature; the cache's are in `cache.py`."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which kernel computes attention.

    A kernel is named as `diffusers-accel env` lists them: `"sdpa"`, `"cudnn"`, `"flash2"`, `"fa3"`, `"fa3-fp8"`,
    `"fa4"`, `"sage"`, `"sage-fp8"`, `"qk16pv8"`, or a name given to `register_attention`. `"auto"` times the kernels
    that can run on each new shape and takes the fastest.

    Args:
        backend: The kernel for all layers that nothing below says otherwise of.
        recipe: What a quantized backend rounds, and how. Ours are named by the type of QK and the tokens per scale of
            Q, K and V, e.g. `"int8-1-16-1"`. `None` takes the backend's first.
        fidelity: What `"auto"` may choose: `"exact"` kernels only, or `"8bit"` ones too.
        dense_steps: Share of the first steps that are computed by `dense_backend`, between 0 and 1.
        dense_layers: Share of the first blocks that are computed by `dense_backend`, between 0 and 1.
        dense_backend: The kernel of dense steps and layers; `"auto"` takes an exact one.
        self_attention: The kernel for self-attention (text and image joined included) instead of `backend`.
        cross_attention: The kernel for cross-attention instead of `backend`.
        layers: Globs of attention modules -> kernels, e.g. `{"transformer_blocks.0.*": "sdpa"}`; the first that
            matches wins over everything above.

    Raises:
        ConfigError: A share is not between 0 and 1, or the fidelity is neither of the two.
    """

    backend: str = "auto"
    recipe: str | None = None
    fidelity: str = "exact"
    dense_steps: float = 0.0
    dense_layers: float = 0.0
    dense_backend: str = "auto"
    self_attention: str | None = None
    cross_attention: str | None = None
    layers: dict[str, str] | None = None

    _shorthand: typing.ClassVar[str] = "backend"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        for name in ("dense_steps", "dense_layers"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"attention.{name}: a share between 0 and 1, got {getattr(self, name)!r}.")
        if self.fidelity not in ("exact", "8bit"):
            raise ConfigError(f"attention.fidelity: 'exact' or '8bit', got {self.fidelity!r}.")
        for glob, backend in (self.layers or {}).items():
            if not isinstance(glob, str) or not isinstance(backend, str):
                raise ConfigError(f"attention.layers: globs to names of kernels, got {glob!r}: {backend!r}.")


# ModelOpt's names of algorithms, for layers whose activations are scaled as they come.
_MODELOPT = {
    "FP8": "fp8-tensor",
    "FP8_BLOCK_SCALES": "fp8-block",
    "NVFP4": "nvfp4",
    "NVFP4_SVD": "svdq-nvfp4",
}


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How linear layers store and multiply their weights.

    Formats: `"fp8"` (e4m3, a scale per row and per token), `"fp8-tensor"`, `"fp8-block"` (128 x 128), `"int8"` (a scale
    per row and per token), `"nvfp4"` and `"svdq-nvfp4"` (4-bit weights), `"torchao:<config>"`, or a name given to
    `register_linear`. A ModelOpt `quantization_config` is understood too: `{"quant_algo": "FP8", "ignore": [...]}`.

    Args:
        algo: The format of every layer that nothing below says otherwise of; `None` for those that `plan` names only.
        ignore: Globs of layers that stay as they are, besides those that each model keeps by default.
        plan: Globs of layers -> formats, or `"none"`; the first that matches wins over everything else.
        smallest: Layers with no more input or output features than this stay as they are; `None` takes the model's own
            bound (0 for those with a list of their own, 512 for others).
        targets: Names of the pipeline's models whose layers are meant, e.g. `("transformer", "text_encoder_2")`; `None`
            for the denoisers.
        keep_original: `"cpu"` keeps the stock weights in the host's memory, so that `restore` is bit-exact; `"drop"`
            frees them, and `restore` refuses.

    Raises:
        ConfigError: `keep_original` is neither of the two, or nothing is named at all.
    """

    algo: str | None = None
    ignore: tuple[str, ...] | None = None
    plan: dict[str, str] | None = None
    smallest: int | None = None
    targets: tuple[str, ...] | None = None
    keep_original: str = "cpu"

    _shorthand: typing.ClassVar[str] = "algo"

    @classmethod
    def _translated(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """A ModelOpt `quantization_config` as fields of this class; any other mapping as it is."""
        if "quant_algo" not in values:
            return values
        ours = {name: values[name] for name in ("smallest", "targets", "keep_original") if name in values}
        known = {"quant_algo", "quant_method", "ignore", "dynamic", "quantized_layers", "producer"}
        unknown = set(values) - known - set(ours)
        if unknown:
            raise ConfigError(
                f"linear: {sorted(unknown)} of a quantization_config cannot be applied to a loaded model."
            )
        if not values.get("dynamic", True):
            raise ConfigError("linear: a loaded model has no input scales; dynamic=True, or from_pretrained.")

        def algo(name: Any) -> str:
            if name not in _MODELOPT:
                raise ConfigError(f"linear.quant_algo: {name!r} is not known. {nearest(str(name), _MODELOPT)}")
            return _MODELOPT[name]

        mixed = values["quant_algo"] == "MIXED_PRECISION"
        layers = values.get("quantized_layers") or {}
        return {
            "algo": None if mixed else algo(values["quant_algo"]),
            "ignore": tuple(values.get("ignore") or ()) or None,
            "plan": {name: algo(layer.get("quant_algo")) for name, layer in layers.items()} or None,
            **ours,
        }

    def validate(self) -> None:
        """Checks what types alone do not say."""
        if self.keep_original not in ("cpu", "drop"):
            raise ConfigError(f"linear.keep_original: 'cpu' or 'drop', got {self.keep_original!r}.")
        if self.algo is None and not self.plan:
            raise ConfigError("linear: name a format, linear.algo='fp8' say, or formats by layer in linear.plan.")
        for glob, algo in (self.plan or {}).items():
            if not isinstance(glob, str) or not isinstance(algo, str):
                raise ConfigError(f"linear.plan: globs to names of formats, got {glob!r}: {algo!r}.")


@dataclass(frozen=True, kw_only=True)
class FuseConfig:
    """Linear layers that read one tensor (query, key and value, say) multiplied as one. `True` is short for it.

    Args:
        ignore: Globs of layers that stay apart.
    """

    ignore: tuple[str, ...] | None = None

    _shorthand: typing.ClassVar[str | None] = None
    _switch: typing.ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Regional compilation of the denoiser's repeated blocks with `torch.compile`.

    Args:
        mode: As in `torch.compile`; `"auto"` means the default mode on a CUDA device and no compilation elsewhere.
        backend: As in `torch.compile`.
        fullgraph: Refuse graph breaks inside a block.
        dynamic: As in `torch.compile`; `None` turns a dimension dynamic once it changes.
        options: As in `torch.compile`, in the default mode: `{"coordinate_descent_tuning": True}` tries more cuts of
            every generated kernel, which takes minutes and gains a few percent.
        rewrites: Rewrite a block's graph before inductor sees it, where its own fusion needs more passes over memory:
            norms with modulation, QK-norm with rotation, GELU in a product, each with the rounding of a quantized layer
            behind it. What modulates tokens by the time step and the prompt alone is made for all steps at once
            (FLUX.1, Qwen-Image, SD3), in up to 0.15 GB for 32 steps. On CUDA; the same up to rounding. `None` means
            wherever inductor compiles; with `backend="eager"` and `True` there is nothing to compile, and what is not
            rewritten runs as stock code does.

    Raises:
        ConfigError: Options are given beside a mode, which stands for options itself.
    """

    mode: str = "default"
    backend: str = "inductor"
    fullgraph: bool = True
    dynamic: bool | None = None
    options: dict[str, Any] | None = None
    rewrites: bool | None = None

    _shorthand: typing.ClassVar[str] = "mode"

    @property
    def rewriting(self) -> bool:
        """Whether graphs are rewritten."""
        return self.backend == "inductor" if self.rewrites is None else self.rewrites

    def validate(self) -> None:
        """Checks what types alone do not say."""
        if self.options and self.mode not in ("auto", "default"):
            raise ConfigError(f"compile: options or mode={self.mode!r}, not both: a mode stands for options itself.")


@dataclass(frozen=True, kw_only=True)
class CudaGraphConfig:
    """Runs of blocks launched in one call each, as CUDA graphs. `True` is short for it.

    What a graph needs stays in the GPU's memory: the activations of one call of each kind that was met.

    Args:
        limit: Kinds of calls (sizes, batches, lengths of prompts) that are recorded; others run without graphs.
        vae: Record the VAE's decoder too, as a whole. Video decoders that work in chunks cannot be recorded.
        text_encoders: Record the text encoders too, each as a whole. Language models that return their cache of keys
            and values run as they are.

    Raises:
        ConfigError: The limit is below 1.
    """

    limit: int = 8
    vae: bool = False
    text_encoders: bool = False

    _shorthand: typing.ClassVar[str | None] = None
    _switch: typing.ClassVar[bool] = True

    def validate(self) -> None:
        """Checks what types alone do not say."""
        if self.limit < 1:
            raise ConfigError(f"cuda_graph.limit: 1 or more, got {self.limit!r}.")


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Switches of the stock VAE.

    Args:
        tiling: Decode and encode in tiles; less memory, slower. `None` leaves the switch as it is.
        slicing: Decode and encode one sample of the batch at a time. `None` leaves the switch as it is.
        compile: Compile the decoder with `torch.compile`.
    """

    tiling: bool | None = None
    slicing: bool | None = None
    compile: bool = False

    _shorthand: typing.ClassVar[str | None] = None


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """What `warmup(pipe)` runs when it is not told: the sizes that a server, say, is to answer at once.

    Args:
        resolutions: Pixels, each as `"<height>x<width>"`; `None` takes the pipeline's default size.
        num_frames: Numbers of frames, for video; `None` takes the pipeline's default.
        num_inference_steps: Steps of each request; `None` takes as few as there is something new in.

    Raises:
        ConfigError: A resolution is not of that form, or a number is below 1.
    """

    resolutions: tuple[str, ...] | None = None
    num_frames: tuple[int, ...] | None = None
    num_inference_steps: int | None = None

    _shorthand: typing.ClassVar[str | None] = None

    @property
    def sizes(self) -> list[tuple[int, int]] | None:
        """(height, width) of each resolution."""
        if self.resolutions is None:
            return None
        return [(int(height), int(width)) for height, _, width in (text.partition("x") for text in self.resolutions)]

    def validate(self) -> None:
        """Checks what types alone do not say."""
        for text in self.resolutions or ():
            height, _, width = text.partition("x")
            if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
                raise ConfigError(f"warmup.resolutions: '<height>x<width>', '480x832' say, got {text!r}.")
        if any(
            number < 1
            for number in (
                *(self.num_frames or ()),
                1 if self.num_inference_steps is None else self.num_inference_steps,
            )
        ):
            raise ConfigError("warmup: num_frames and num_inference_steps are 1 or more.")
