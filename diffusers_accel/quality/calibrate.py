"""Calibration: a fit of a caching rule's constants, for a checkpoint without published constants.

A few prompts run in full while every step's signal and residual are recorded. TeaCache's polynomial is the least
squares fit from the signal's change to the residual's change. MagCache's table is the mean ratio of the residual's
magnitudes. The rule is then simulated over the recorded steps, which gives the threshold for a wanted share of skipped
steps.

A polynomial that explains little of the residual's variance skips the wrong steps and destroys pictures, so it is
refused.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..api import recorded
from ..config import AccelConfig, MagCacheConfig, TeaCacheConfig
from ..core.step import Mode, StepState
from ..errors import AccelError
from ..features.cache import StepRecord
from ..policies import MagCache, Policy, TeaCache
from ..policies.teacache import RETAINED_STEPS

Kind = Literal["teacache", "magcache"]

DEGREES = (1, 2, 3, 4)
# Share of the residual's variance (R2) that a polynomial explains on left-out prompts. A fit below the first bound is
# refused, and below the second one it gives a warning.
REFUSED, DOUBTFUL = 0.4, 0.75
# Shares of skipped steps for which a result lists thresholds.
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)


class PoorFit(AccelError):
    """The signal's change does not explain the residual's change, so TeaCache cannot work with any polynomial."""


@dataclass(frozen=True)
class Fit:
    """The fit for one denoiser.

    Attributes:
        coefficients: Coefficients of TeaCache's polynomial, highest degree first; empty for MagCache.
        ratios: MagCache's ratios, one per step; empty for TeaCache.
        r2: Share of explained variance. For a polynomial: of the residual's change, on left-out prompts
            (leave-one-out). For a table: of the ratios, by their mean.
        points: (signal's change, residual's change) of every recorded step for a polynomial, (step, ratio) for a table.
    """

    coefficients: tuple[float, ...]
    ratios: tuple[float, ...]
    r2: float
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Calibration:
    """Constants for one checkpoint, with the quality of the fit.

    Attributes:
        kind: The rule's kind, `"teacache"` or `"magcache"`.
        config: The rule with these constants, for `accelerate(pipe, cache=calibration.config)`.
        fits: Denoiser's name -> fit.
        thresholds: Share of skipped steps -> threshold, simulated over the recorded steps.
        prompts: Number of recorded prompts.
        steps: Number of steps of each request.
    """

    kind: Kind
    config: TeaCacheConfig | MagCacheConfig
    fits: Mapping[str, Fit]
    thresholds: Mapping[float, float]
    prompts: int
    steps: int

    def __str__(self) -> str:
        lines = [f"{self.kind}, {self.prompts} prompts of {self.steps} steps"]
        lines += [f"  {name}: R2 {fit.r2:.3f} on prompts left out" for name, fit in self.fits.items()]
        lines += [f"  threshold {value:.4g} skips {share:.0%} of the steps" for share, value in self.thresholds.items()]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Writes a configuration file for `accelerate`, with the quality of the fit in comments.

        Args:
            path: The YAML file.
        """
        AccelConfig(cache=self.config).to_yaml(path)
        file = Path(path)
        comment = "".join(f"# {line}\n" for line in str(self).splitlines())
        file.write_text(comment + file.read_text(encoding="utf-8"), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draws the recorded steps and the fit into a picture.

        Args:
            path: The picture's file, in a format that matplotlib writes.

        Raises:
            ImportError: matplotlib is missing: `pip install 'diffusers-accel[plot]'`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5 * len(self.fits), 4), layout="constrained")
        for axes, (name, fit) in zip(np.atleast_1d(figure.subplots(1, len(self.fits))), self.fits.items(), strict=True):
            x, y = np.array(fit.points).T
            axes.scatter(x, y, s=8, alpha=0.5, label="recorded steps")
            if self.kind == "teacache":
                line = np.linspace(x.min(), x.max(), 200)
                axes.plot(line, np.abs(np.polyval(fit.coefficients, line)), color="C1", label="polynomial")
                axes.set(xlabel="change of the signal", ylabel="change of the residual")
            else:
                axes.plot(range(len(fit.ratios)), fit.ratios, color="C1", label="table")
                axes.set(xlabel="step", ylabel="ratio of the residual's magnitude")
            axes.set_title(f"{name}, R2 {fit.r2:.3f}")
            axes.legend()
        figure.savefig(path, dpi=120)


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    kind: Kind = "teacache",
    skip: float = 0.4,
    use_ret_steps: bool = True,
    degree: int | None = None,
    force: bool = False,
    **call: Any,
) -> Calibration:
    """Fits a caching rule's constants to a checkpoint. The pipeline is stock before and after.

    Args:
        pipe: A stock pipeline, not accelerated.
        prompts: Prompts to record, each as one request that is seeded by its index. Results hardly change with more
            than eight.
        kind: The rule, `"teacache"` or `"magcache"`.
        skip: Share of a schedule's steps that the threshold in `config` skips, between 0 and 1.
        use_ret_steps: Whether TeaCache always computes the first five steps (see `TeaCacheConfig`). Their changes
            differ from those of later steps, so the polynomial fits better without them.
        degree: Degree of the polynomial, 1 to 8. `None` takes the degree that explains left-out prompts best.
        force: Whether a poor fit is returned instead of refused.
        call: Arguments of the pipeline's call (size, steps, guidance). The constants hold for these.

    Returns:
        The constants, with thresholds for several shares of skipped steps.

    Raises:
        PoorFit: The polynomial explains less than 40% of the residual's variance.
        Unsupported: The pipeline is accelerated, or its adapter defines no signal.
        ValueError: An argument is invalid, or the requests have too few steps for a fit.
    """
    _refuse_invalid_arguments(prompts, kind, skip, degree, call)
    retained = RETAINED_STEPS if kind == "teacache" and use_ret_steps else 1
    if isinstance(call.get("num_inference_steps"), int):
        _refuse_too_few_steps(call["num_inference_steps"], retained)
    with recorded(pipe, use_ret_steps) as context, torch.no_grad():
        for number, prompt in enumerate(prompts):
            generator = torch.Generator("cpu").manual_seed(number)
            pipe(prompt, **{"generator": generator, **call})
        records = {key: list(found) for key, found in context.outputs.cache_records.items()}
    fits, simulated = {}, []
    if not any(records.values()):
        raise ValueError(
            f"calibrate: nothing was recorded: in a request of {type(pipe).__name__} its denoiser was called once at "
            "most. Instead: more num_inference_steps."
        )
    for name in dict.fromkeys(denoiser for denoiser, _ in records):
        branches = [found for (denoiser, _), found in records.items() if denoiser == name]
        # The first branch is the conditional one. Early steps of the other branches differ, so they are not fitted to.
        fits[name] = (
            _fit_ratios(branches[0])
            if kind == "magcache"
            else _fit_polynomial(branches[0], degree, use_ret_steps, name)
        )
        if kind == "teacache":
            _check_fit(name, fits[name], force)
        simulated += [(fits[name], found) for found in branches]
    policy: Callable[[Fit, float], Policy]
    if kind == "teacache":
        config: TeaCacheConfig | MagCacheConfig = _teacache_config(fits, use_ret_steps)
        policy = lambda fit, value: TeaCache.published(value, fit.coefficients, use_ret_steps)  # noqa: E731
    else:
        config = _magcache_config(fits)
        policy = lambda fit, value: MagCache(value, fit.ratios)  # noqa: E731
    thresholds = {}
    for share in sorted({*SHARES, skip}):
        found = _threshold(share, simulated, policy)
        if found is not None:
            thresholds[share] = found
    steps = max(each.total for found in records.values() for each in found)
    if skip not in thresholds:
        most = f"the most is {max(thresholds):.0%}" if thresholds else f"none skips {min(SHARES):.0%} either"
        raise ValueError(
            f"calibrate: no threshold skips {skip:.0%} of {steps} steps; {most}. Steps at the beginning and the end "
            "are always computed. Instead: a smaller skip, more num_inference_steps, or use_ret_steps=False."
        )
    config = replace(config, threshold=thresholds[skip])
    return Calibration(kind, config, fits, thresholds, len(prompts), steps)


def _refuse_invalid_arguments(prompts: Any, kind: str, skip: Any, degree: Any, call: Mapping[str, Any]) -> None:
    """Refuses arguments that are invalid for any pipeline.

    Raises:
        ValueError: One is invalid.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"calibrate: prompts is a list of texts to record, eight or more, got {prompts!r}.")
    odd = next((each for each in prompts if not isinstance(each, str)), None)
    if odd is not None:
        raise ValueError(f"calibrate: prompts is a list of texts, and one is {odd!r}.")
    if isinstance(skip, bool) or not isinstance(skip, (int, float)) or not 0 < skip < 1:
        raise ValueError(f"calibrate: skip is a share of steps between 0 and 1, got {skip!r}.")
    if kind not in ("teacache", "magcache"):
        raise ValueError(f"calibrate: kind is 'teacache' or 'magcache', got {kind!r}.")
    if degree is not None and (isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree <= 8):
        raise ValueError(f"calibrate: degree is a number from 1 to 8 or None, got {degree!r}.")
    if "prompt" in call:
        raise ValueError("calibrate: each of prompts is the call's prompt. Add this one to prompts.")


def _refuse_too_few_steps(steps: int, retained: int) -> None:
    """Refuses schedules with too few fitted steps.

    Args:
        steps: Number of steps of a request.
        retained: Number of first steps that are always computed, and not fitted.

    Raises:
        ValueError: Fewer than two steps are left.
    """
    least = retained + 2
    if steps < least:
        instead = " or use_ret_steps=False" if retained > 1 else ""
        raise ValueError(
            f"calibrate: of {steps} steps the first {retained} are always computed, and too few are left to fit "
            f"anything to. Instead: num_inference_steps={least} or more{instead}."
        )


def _fit_polynomial(
    records: list[StepRecord], degree: int | None, use_ret_steps: bool, name: str = "the denoiser"
) -> Fit:
    """The least squares polynomial from the signal's to the residual's change.

    Args:
        records: Records of one guidance branch.
        degree: Degree of the polynomial; `None` takes the degree that explains left-out requests best.
        use_ret_steps: Whether the first five steps are always computed, and left out.
        name: The denoiser's name, for messages.

    Raises:
        ValueError: The records are too few.
    """
    usable = [each for each in records if each.signal is not None and np.isfinite([each.signal, each.residual]).all()]
    # Steps that are always computed need no prediction.
    first, last = (RETAINED_STEPS, 0) if use_ret_steps else (1, 1)
    usable = [each for each in usable if first <= each.step < each.total - last]
    requests = np.array([each.request for each in usable])
    # Number of records in the smallest leave-one-out fit.
    least = min((sum(requests != request) or len(usable) for request in np.unique(requests)), default=0)
    degrees = [order for order in (DEGREES if degree is None else (degree,)) if order < least]
    if not degrees:
        steps = max((each.total for each in records), default=0)
        raise ValueError(
            f"calibrate: {name}: of {len(records)} calls recorded, in requests of {steps} steps, {len(usable)} can be "
            f"fitted to, too few for a polynomial of degree {degree or 1}. Instead: more num_inference_steps, more "
            "prompts, a smaller degree, or use_ret_steps=False."
        )
    x, y = np.array([(each.signal, each.residual) for each in usable]).T
    spread = float(np.square(y - y.mean()).sum())

    def r2(order: int) -> float:
        left = 0.0
        for request in np.unique(requests):
            out = requests == request
            inside = out if out.all() else ~out  # a single request is its own test set
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", np.exceptions.RankWarning)
                fitted = np.polyfit(x[inside], y[inside], order)
            left += float(np.square(np.polyval(fitted, x[out]) - y[out]).sum())
        return 1 - left / spread if spread else 0.0

    best = degree if degree is not None else max(degrees, key=lambda order: round(r2(order), 2) - order / 1e4)
    coefficients = tuple(float(f"{item:.9g}") for item in np.polyfit(x, y, best))
    return Fit(coefficients, (), r2(best), tuple(zip(x.tolist(), y.tolist(), strict=True)))


def _fit_ratios(records: list[StepRecord]) -> Fit:
    """The mean ratio of each step; 1 for steps that the denoiser never ran.

    Args:
        records: Records of one guidance branch.
    """
    total = max(each.total for each in records)
    by_step: dict[int, list[float]] = {}
    for each in records:
        by_step.setdefault(each.step, []).append(each.ratio)
    ratios = tuple(round(statistics.mean(by_step.get(step, [1.0])), 5) for step in range(total))
    ratio = np.array([each.ratio for each in records])
    left = float(sum((each.ratio - ratios[each.step]) ** 2 for each in records))
    spread = float(np.square(ratio - ratio.mean()).sum())
    points = tuple((float(each.step), each.ratio) for each in records)
    return Fit((), ratios, 1 - left / spread if spread else 0.0, points)


def _check_fit(name: str, fit: Fit, force: bool) -> None:
    """Refuses a poor fit, and warns of a doubtful one.

    Args:
        name: The denoiser's name.
        fit: Its fit.
        force: Whether a poor fit gives a warning instead of an error.

    Raises:
        PoorFit: The fit is poor.
    """
    figure = f"{name}: the change of the signal explains {max(fit.r2, 0):.0%} of the residual's (R2 {fit.r2:.3f})"
    if fit.r2 < REFUSED and not force:
        raise PoorFit(
            f"calibrate: {figure}, on prompts it was not fitted to. TeaCache would skip the wrong steps. "
            "Use a cache that needs no fit (FBCacheConfig, EasyCacheConfig), give more prompts, or force=True."
        )
    if fit.r2 < DOUBTFUL:
        warnings.warn(f"calibrate: {figure}. Compare with FBCacheConfig before relying on it.", stacklevel=3)


def _teacache_config(fits: Mapping[str, Fit], use_ret_steps: bool) -> TeaCacheConfig:
    second = fits.get("transformer_2")
    first = next(fit for name, fit in fits.items() if name != "transformer_2" or len(fits) == 1)
    return TeaCacheConfig(
        threshold=0.0,
        coefficients=first.coefficients,
        coefficients_2=second.coefficients if second is not None and len(fits) > 1 else None,
        use_ret_steps=use_ret_steps,
    )


def _magcache_config(fits: Mapping[str, Fit]) -> MagCacheConfig:
    second = fits.get("transformer_2")
    first = next(fit for name, fit in fits.items() if name != "transformer_2" or len(fits) == 1)
    return MagCacheConfig(
        threshold=0.0,
        mag_ratios=first.ratios,
        mag_ratios_2=second.ratios if second is not None and len(fits) > 1 else None,
    )


def _threshold(
    share: float, simulated: list[tuple[Fit, list[StepRecord]]], policy: Callable[[Fit, float], Policy]
) -> float | None:
    """The smallest threshold that skips at least a share of the recorded steps; `None` if there is none.

    Args:
        share: Share of skipped steps, between 0 and 1.
        simulated: (fit, records) of each denoiser and guidance branch.
        policy: Makes the rule's policy from a fit and a threshold.
    """

    def skipped(value: float) -> float:
        skips = calls = 0
        for fit, records in simulated:
            for request in dict.fromkeys(each.request for each in records):
                run = [each for each in records if each.request == request]
                decides = policy(fit, value)
                first = run[0].step - 1
                for each in run:
                    step = StepState("", "", request, each.step, first, each.total)
                    skips += decides.decide(step, each.signal if each.signal is not None else 0.0) is Mode.SKIP
                calls += len(run) + 1
        return skips / calls

    low, high = 0.0, 1e-3
    while skipped(high) < share:
        low, high = high, 2 * high
        if high > 1e4:
            return None
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if skipped(middle) >= share else (middle, high)
    return float(f"{high:.4g}") if skipped(float(f"{high:.4g}")) >= share else high
