"""The configuration: a tree of frozen keyword-only dataclasses, one per feature, `None` meaning off.

A section accepts its class, a mapping of its fields, or a shorthand string for the common case. Everything here is
plain data: it imports nothing of the package but its errors, holds no run-time state, and round-trips through YAML.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Union

from .errors import ConfigError, nearest


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
        ignore: Globs of layers; groups with one of them stay apart.
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

    Raises:
        ConfigError: Options are given beside a mode, which stands for options itself.
    """

    mode: str = "default"
    backend: str = "inductor"
    fullgraph: bool = True
    dynamic: bool | None = None
    options: dict[str, Any] | None = None

    _shorthand: typing.ClassVar[str] = "mode"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        if self.options and self.mode not in ("auto", "default"):
            raise ConfigError(f"compile: options or mode={self.mode!r}, not both: a mode stands for options itself.")


@dataclass(frozen=True, kw_only=True)
class TeaCacheConfig:
    """TeaCache: skip a step while the accumulated, rescaled change of the model's modulated input stays small.

    Args:
        threshold: Accumulated change below which a step reuses the last residual. 0 skips nothing. `None` takes the
            published threshold of the coefficients (about 1.5x).
        coefficients: The rescaling polynomial, highest degree first; or the name of a published row (see
            `diffusers_accel.models.adapter.TEACACHE_ROWS`); or `None` to find the row from the model's configuration.
        coefficients_2: The same for the second expert (`transformer_2`); `None` takes `coefficients`.
        use_ret_steps: Wan's other published variant: compare the projected time embedding and always compute the
            first five steps.
        taylorseer_order: Order of the Taylor polynomial that predicts a skipped step's residual; 0 reuses the last.

    Raises:
        ConfigError: The order is not between 0 and 4.
    """

    threshold: float | None = None
    coefficients: tuple[float, ...] | str | None = None
    coefficients_2: tuple[float, ...] | str | None = None
    use_ret_steps: bool = False
    taylorseer_order: int = 0

    kind: typing.ClassVar[str] = "teacache"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        _check_order("cache.taylorseer_order", self.taylorseer_order)


# Names of published step computation masks.
MASKS = ("slow", "medium", "fast", "ultra")


def _check_order(name: str, order: int, least: int = 0) -> None:
    if not least <= order <= 4:
        raise ConfigError(f"{name}: between {least} and 4, got {order}.")


def _check_mask(name: str, mask: str | tuple[float, ...] | None) -> None:
    if isinstance(mask, str) and mask not in MASKS:
        raise ConfigError(f"{name}: unknown mask {mask!r}. {nearest(mask, MASKS)}")
    if isinstance(mask, tuple) and (not mask or not set(mask) <= {0, 1} or not mask[0]):
        raise ConfigError(f"{name}: ones for computed and zeros for skipped steps, the first one computed.")


@dataclass(frozen=True, kw_only=True)
class DBCacheConfig:
    """DBCache: skip the blocks between the first and the last few while what the first few add changes little.

    Args:
        Fn_compute_blocks: Blocks at the beginning that are computed on every step; what they add is watched.
        Bn_compute_blocks: Blocks at the end that are computed on every step.
        max_warmup_steps: Steps at the beginning that are always computed.
        max_cached_steps: Steps that may be skipped in all; -1 for any number.
        max_continuous_cached_steps: Steps that may be skipped one after another; -1 for any number.
        residual_diff_threshold: Relative change below which a step is skipped. 0 skips nothing.
        force_refresh_step_hint: A step, counted from the request's first, that is computed in any case.
        force_refresh_step_policy: `"once"`, or `"repeat"` for every so many steps.
        enable_separate_cfg: Whether guidance branches have a state each. They have it wherever the pipeline calls the
            denoiser once per branch, which `None` and `True` accept; `False` is refused there.
        steps_computation_mask: `"slow"`, `"medium"`, `"fast"`, `"ultra"`, or ones and zeros, scaled to the request's
            number of steps.
        steps_computation_policy: `"dynamic"`: where the mask skips, the change decides; `"static"`: the mask decides.
        taylorseer_order: Order of the Taylor polynomial that predicts a skipped step's residual; 0 reuses the last.

    Raises:
        ConfigError: A value is out of its range.
    """

    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    max_warmup_steps: int = 8
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    residual_diff_threshold: float = 0.08
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str = "once"
    enable_separate_cfg: bool | None = None
    steps_computation_mask: str | tuple[float, ...] | None = None
    steps_computation_policy: str = "dynamic"
    taylorseer_order: int = 0

    kind: typing.ClassVar[str] = "dbcache"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        if self.Fn_compute_blocks < 1 or self.Bn_compute_blocks < 0:
            raise ConfigError("cache: Fn_compute_blocks is at least 1, Bn_compute_blocks at least 0.")
        if self.force_refresh_step_hint is not None and self.force_refresh_step_hint < 1:
            raise ConfigError("cache.force_refresh_step_hint: at least 1; the first step is computed in any case.")
        for name, values in (
            ("force_refresh_step_policy", ("once", "repeat")),
            ("steps_computation_policy", ("dynamic", "static")),
        ):
            if getattr(self, name) not in values:
                raise ConfigError(f"cache.{name}: {values[0]!r} or {values[1]!r}, got {getattr(self, name)!r}.")
        _check_order("cache.taylorseer_order", self.taylorseer_order)
        _check_mask("cache.steps_computation_mask", self.steps_computation_mask)


@dataclass(frozen=True, kw_only=True)
class FBCacheConfig(DBCacheConfig):
    """FBCache: DBCache that watches the first block alone, without warm-up; see there for the arguments."""

    Fn_compute_blocks: int = 1
    max_warmup_steps: int = 0

    kind: typing.ClassVar[str] = "fbcache"


@dataclass(frozen=True, kw_only=True)
class StepMaskConfig:
    """A step computation mask: which steps are computed is said beforehand.

    Args:
        mask: `"slow"` (18 of 28 steps), `"medium"` (15), `"fast"` (11), `"ultra"` (8), or ones and zeros; scaled to the
            request's number of steps.
        taylorseer_order: Order of the Taylor polynomial that predicts a skipped step's residual; 0 reuses the last.

    Raises:
        ConfigError: There is no such mask, or the order is not between 0 and 4.
    """

    mask: str | tuple[float, ...] = "medium"
    taylorseer_order: int = 0

    kind: typing.ClassVar[str] = "mask"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        _check_order("cache.taylorseer_order", self.taylorseer_order)
        _check_mask("cache.mask", self.mask)


@dataclass(frozen=True, kw_only=True)
class TaylorSeerConfig:
    """TaylorSeer at a fixed interval: between computed steps, residuals are predicted by a Taylor polynomial.

    Args:
        interval: One of so many steps is computed.
        order: Of the polynomial; 0 reuses the last residual.
        warmup: Steps at the beginning that are computed.

    Raises:
        ConfigError: The interval or the warm-up is below 1, or the order not between 0 and 4.
    """

    interval: int = 3
    order: int = 1
    warmup: int = 3

    kind: typing.ClassVar[str] = "taylorseer"

    def validate(self) -> None:
        """Checks what types alone do not say."""
        if self.interval < 1 or self.warmup < 1:
            raise ConfigError("cache: interval and warmup are at least 1.")
        _check_order("cache.order", self.order)


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


# The cache section takes one of several classes; `kind` tells them apart in YAML, and is their shorthand string.
CACHE_CONFIGS: dict[str, type] = {
    kind.kind: kind for kind in (TeaCacheConfig, DBCacheConfig, FBCacheConfig, StepMaskConfig, TaylorSeerConfig)
}


@dataclass(frozen=True, kw_only=True)
class AccelConfig:
    """What to accelerate, and how. Every section is off by default; see each section's class.

    Raises:
        ConfigError: A value has the wrong type, or a section has an unknown key.
    """

    linear: LinearConfig | None = field(default=None, metadata={"section": LinearConfig})
    fuse: FuseConfig | None = field(default=None, metadata={"section": FuseConfig})
    attention: AttentionConfig | None = field(default=None, metadata={"section": AttentionConfig})
    compile: CompileConfig | None = field(default=None, metadata={"section": CompileConfig})
    cache: TeaCacheConfig | DBCacheConfig | StepMaskConfig | TaylorSeerConfig | None = field(
        default=None, metadata={"section": CACHE_CONFIGS}
    )
    vae: VAEConfig | None = field(default=None, metadata={"section": VAEConfig})

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, _section(entry, getattr(self, entry.name)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AccelConfig:
        """Builds a configuration from nested mappings, with the same keys as the fields."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"A configuration is a mapping of sections, not {type(values).__name__}.")
        known = {entry.name for entry in fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"Unknown configuration key {key!r}. {nearest(str(key), known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values: `from_dict(config.to_dict()) == config`. Sections that are off are left out."""
        result: dict[str, Any] = {}
        for entry in fields(self):
            section = getattr(self, entry.name)
            if section is not None:
                kind = {"kind": section.kind} if hasattr(section, "kind") else {}
                result[entry.name] = kind | {key: _plain(value) for key, value in dataclasses.asdict(section).items()}
        return result

    @classmethod
    def from_yaml(cls, path: str | Path) -> AccelConfig:
        """Reads a YAML file with the same keys as the fields.

        Raises:
            ConfigError: The file is missing, is not YAML, or holds an unknown key.
        """
        return cls.from_dict(read_yaml(path))

    def to_yaml(self, path: str | Path) -> None:
        """Writes the file that `from_yaml` reads."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; `ConfigError` if there is no such file or no mapping in it."""
    import yaml

    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"There is no configuration file {str(path)!r}. Give the path of a YAML file.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{str(path)!r} holds no mapping of configuration sections. Write e.g. 'attention: auto'.")
    return values


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _section(entry: dataclasses.Field[Any], value: Any) -> Any:
    """Turns what a user may write for a section into an instance of the section's class, or `None`."""
    section = entry.metadata["section"]
    choices: dict[str, type] | None = section if isinstance(section, dict) else None
    classes: tuple[type, ...] = tuple(choices.values()) if choices else (section,)
    if value is None or value is False:
        return None
    if isinstance(value, classes):
        for item in fields(value):  # type: ignore[arg-type]
            object.__setattr__(value, item.name, _checked(entry.name, value, item))
        if hasattr(value, "validate"):
            value.validate()
        return value
    if choices is not None:
        if isinstance(value, str):
            value = {"kind": value}
        if isinstance(value, Mapping):
            values = dict(value)
            kind = values.pop("kind", None)
            if kind is None:
                raise ConfigError(f"{entry.name}: say which with {entry.name}.kind. {nearest('', choices)}")
            if kind not in choices:
                raise ConfigError(f"{entry.name}: unknown kind {kind!r}. {nearest(str(kind), choices)}")
            return _section(entry, _build(entry.name, choices[kind], values))
    else:
        if isinstance(value, Mapping):
            value = section._translated(value) if hasattr(section, "_translated") else value
            return _section(entry, _build(entry.name, section, value))
        shorthand = section._shorthand
        if value is True and (shorthand is not None or getattr(section, "_switch", False)):
            return section()
        if shorthand is not None and isinstance(value, str):
            return section(**{shorthand: value})
    names = " or ".join(item.__name__ for item in classes)
    raise ConfigError(f"{entry.name}: expected {names}, a mapping of its fields, a shorthand or None, got {value!r}.")


def _build(name: str, section: type, values: Mapping[str, Any]) -> Any:
    known = {item.name for item in fields(section)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{name}: unknown key {key!r}. {nearest(str(key), known)}")
    return section(**values)


def _checked(section: str, holder: Any, item: dataclasses.Field) -> Any:
    """One field's value, checked against its annotation; lists become tuples and integers floats where asked."""
    annotation = typing.get_type_hints(type(holder))[item.name]
    value = getattr(holder, item.name)
    for kind in typing.get_args(annotation) if _is_union(annotation) else (annotation,):
        origin = typing.get_origin(kind) or kind
        if origin is tuple and isinstance(value, (list, tuple)):
            if typing.get_args(kind)[0] is str:
                if all(isinstance(item, str) for item in value):
                    return tuple(value)
            elif all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value):
                return tuple(float(number) for number in value)
        elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, origin):
            return value
    raise ConfigError(f"{section}.{item.name}: expected {item.type}, got {value!r}.")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)
