"""Skip-softmax as a checkpoint is calibrated for it: the `sparse_attention_config` that NVIDIA's ModelOpt writes.

The configuration of a denoiser then says, for groups of attention modules, how a threshold follows from the share of
tiles to leave out, at which noise level sparse steps begin, and which modules stay dense. diffusers keeps the entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ...config import SparseConfig
from ...errors import Unsupported, shown
from ..context import Denoiser
from .layers import Layer

# The only formula that ModelOpt fits.
_FORMULA = re.compile(r"\s*a\s*\*\s*(np\.|math\.)?exp\(\s*b\s*\*\s*target_sparsity\s*\)\s*")
_WHERE = "attention.sparse='skip-softmax'"
# Keys that stand in a group or beside all of them, and the largest scale factor of a configuration.
_SHARED = ("threshold_scale_factor", "target_sparsity", "disabled_until_timestep", "ignore")
_LARGEST = 1e9


@dataclass(frozen=True)
class Group:
    """Attention modules with one threshold.

    Attributes:
        factor: Scale factor of the threshold, from the group's own share of tiles; `None` without such a share.
        a: Coefficient of the formula `a * exp(b * share)`; `None` without a formula.
        b: Coefficient of the formula; `None` without one.
        targets: Class names of the modules; empty for all.
        ignore: Globs of module paths that stay dense.
        dense_until: Noise level down to which steps are dense; `None` for no such bound.
    """

    factor: float | None
    a: float | None
    b: float | None
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    dense_until: float | None

    def scale_factor(self, share: float | None) -> float | None:
        """The scale factor for a share of tiles to leave out; the group's own without a share.

        Raises:
            Unsupported: The formula gives a number that is no scale factor.
        """
        if share is None:
            return self.factor
        if self.a is None or self.b is None:
            return None
        # Beyond 700 the exponential leaves the range of floats.
        factor = self.a * math.exp(min(700.0, self.b * share))
        if not 0 < factor <= _LARGEST:
            raise Unsupported(
                f"attention.sparse.target_sparsity={share:g}",
                f"the checkpoint's formula, {self.a:g} * exp({self.b:g} * {share:g}), gives {factor:g}, which is not "
                f"above 0 and up to {_LARGEST:g}.",
                "a smaller share, or threshold_scale_factor=5000.",
            )
        return factor

    def takes(self, layer: Layer) -> bool:
        """Whether a layer is one of the group's modules."""
        return not self.targets or type(layer.module).__name__ in self.targets

    def ignores(self, denoiser: Denoiser, layer: Layer) -> bool:
        """Whether a layer stays dense. Globs match a path in the denoiser, its end, or that in the pipeline."""
        names = (layer.path, f"{denoiser.name}.{layer.path}")
        return any(
            fnmatchcase(name, each) for glob in self.ignore for each in (glob, f"*.{glob}") for name in names
        )  # fmt: skip


def groups(denoiser: Denoiser, config: SparseConfig) -> list[Group]:
    """The groups of a denoiser's checkpoint; none without a calibration of skip-softmax.

    Args:
        denoiser: The denoiser.
        config: The section. If it gives a threshold, those of the checkpoint are not read.

    Raises:
        Unsupported: The entry has a formula or a value that is not understood.
    """
    entry = getattr(denoiser.module, "config", {}).get("sparse_attention_config")
    found = entry.get("config_groups", {}) if isinstance(entry, Mapping) else {}
    values = found.values() if isinstance(found, Mapping) else ()
    # Some files hold what all groups share beside them.
    shared = {key: entry[key] for key in _SHARED if key in entry} if isinstance(entry, Mapping) else {}
    fitted = config.threshold_scale_factor is None
    return [_group({**shared, **each}, denoiser, fitted) for each in values if _is_skip_softmax(each)]


def _is_skip_softmax(values: Any) -> bool:
    if not isinstance(values, Mapping):
        return False
    name = values.get("algorithm", values.get("sparse_algo", ""))
    return str(name).replace("-", "_").startswith(("skip_softmax", "softmax_skip"))


def _group(values: Mapping[str, Any], denoiser: Denoiser, with_factor: bool) -> Group:
    fitted = values.get("threshold_scale_factor") if with_factor else None
    try:
        a = b = None
        factor = float(fitted) if isinstance(fitted, (int, float)) else None
        if isinstance(fitted, Mapping):
            # Older files hold the coefficients of a language model's two phases.
            within = fitted.get("coefficients") or fitted.get("prefill") or fitted
            if not _FORMULA.fullmatch(str(fitted.get("formula", "a * exp(b * target_sparsity)"))):
                raise ValueError(shown(fitted.get("formula")))
            a, b = float(within["a"]), float(within["b"])
            share = values.get("target_sparsity")
            share = share.get("prefill") if isinstance(share, Mapping) else share
            factor = None if share is None else a * math.exp(b * float(share))
        if factor is not None and not 0 < factor <= _LARGEST:
            raise ValueError(f"a factor of {factor:g}")
        until = values.get("disabled_until_timestep")
        return Group(
            factor=factor, a=a, b=b, targets=tuple(map(str, values.get("targets") or ())),
            ignore=tuple(map(str, values.get("ignore") or ())), dense_until=None if until is None else float(until),
        )  # fmt: skip
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise Unsupported(
            _WHERE,
            f"the checkpoint's sparse_attention_config has a threshold_scale_factor that is not understood: "
            f"{type(error).__name__}: {error}.",
            "attention.sparse.threshold_scale_factor=5000, which overrides it.",
            str(denoiser),
        ) from None


def calibrated(denoiser: Denoiser, config: SparseConfig) -> SparseConfig:
    """The section with the threshold and the dense steps of the denoiser's checkpoint, where it is skip-softmax and
    leaves them open. Modules that the checkpoint leaves out stay dense in any case (`by_layer`).

    Args:
        denoiser: The denoiser.
        config: The section, with its rule resolved.

    Raises:
        Unsupported: The checkpoint has no formula for `target_sparsity`, or one that is not understood.
    """
    if config.selector != "skip-softmax":
        return config
    found = groups(denoiser, config)
    if not found and config.target_sparsity is None:
        return config
    factors = [config.threshold_scale_factor, *(group.scale_factor(config.target_sparsity) for group in found)]
    factor = next((each for each in factors if each is not None), None)
    if factor is None and config.target_sparsity is not None:
        raise Unsupported(
            "attention.sparse.target_sparsity",
            "the checkpoint's configuration has no formula (sparse_attention_config) from which a threshold follows.",
            "threshold_scale_factor=5000, or a checkpoint that ModelOpt has calibrated.",
            str(denoiser),
        )
    until = config.dense_until if config.dense_until is not None else next(
        (group.dense_until for group in found if group.dense_until is not None), None
    )  # fmt: skip
    return replace(config, threshold_scale_factor=factor, target_sparsity=None, dense_until=until)


def unknown_targets(denoiser: Denoiser, config: SparseConfig, layers: list[Layer]) -> list[str]:
    """The class names of the checkpoint's groups, if none of them is a layer's class: names of another version. The
    groups are then for all layers, which `explain` says.

    Args:
        denoiser: The denoiser.
        config: The section as the user gave it, with its rule resolved.
        layers: The attention modules.
    """
    found = groups(denoiser, config) if config.selector == "skip-softmax" else []
    if any(group.takes(layer) for group in found for layer in layers):
        return []
    return [name for group in found for name in group.targets]


def by_layer(denoiser: Denoiser, config: SparseConfig, layers: list[Layer]) -> Iterator[tuple[Layer, float | None]]:
    """The layers with a threshold of their own by the checkpoint: the scale factor, `None` for a dense layer.

    Args:
        denoiser: The denoiser.
        config: The section as the user gave it, with its rule resolved.
        layers: The attention modules.
    """
    if config.selector != "skip-softmax":
        return
    found = groups(denoiser, config)
    named = not unknown_targets(denoiser, config, layers)
    for layer in layers:
        group = next((group for group in found if group.takes(layer) or not named), None)
        if found and (group is None or group.ignores(denoiser, layer)):
            yield layer, None
        elif group is not None and config.threshold_scale_factor is None:
            factor = group.scale_factor(config.target_sparsity)
            if factor is not None:
                yield layer, factor
