"""The registry of users' own caching policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import CACHE_CONFIGS, POLICY_NAMES
from ..core.registry import Registry
from ..core.step import Mode, StepState
from ..errors import PolicyFailed, Unsupported, shown
from .policy import Policy

SIGNAL_NAMES = (None, "modulated_input", "residual", "latents")


@dataclass(frozen=True)
class PolicyRecord:
    """A registered policy.

    Attributes:
        name: The registered name.
        factory: Makes the policy of one guidance branch for one request from its options.
        signal: Name of the measured signal; see `register_policy`.
        first: Number of first blocks that are computed on every step, because their residual is measured.
    """

    name: str
    factory: Callable[..., Policy]
    signal: str | None = None
    first: int = 0

    def make(self, options: Mapping[str, Any]) -> Policy:
        """The policy of one guidance branch for one request.

        Args:
            options: Keyword arguments of the factory.

        Raises:
            Unsupported: The factory raised, or returned an object without `decide`.
        """
        try:
            made = self.factory(**options)
        except Exception as error:  # any exception of a user's own code
            raise Unsupported(
                f"cache={self.name!r}",
                f"the policy cannot be made with {shown(options) if options else 'no options'}: "
                f"{type(error).__name__}: {error}.",
                "PolicyConfig(name=..., options={...}) with its factory's arguments.",
            ) from error
        if not callable(getattr(made, "decide", None)):
            raise Unsupported(
                f"cache={self.name!r}",
                f"its factory made {shown(made)}, which has no decide(step, change).",
                "a factory that returns an object with that method.",
            )
        return _CheckedPolicy(self.name, made)


@dataclass(frozen=True)
class _CheckedPolicy:
    """A user's policy with checks, whose errors name the policy."""

    name: str
    policy: Policy

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The step's mode; see `Policy.decide`.

        Raises:
            PolicyFailed: The policy raised, or returned something else than a mode.
        """
        try:
            found = self.policy.decide(step, change)
        except Exception as error:  # any exception of a user's own code
            raise PolicyFailed(
                f"The caching policy {self.name!r} raised at step {step.step}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(found, str) and found in _MODES:
            return Mode(found)
        raise PolicyFailed(
            f"The caching policy {self.name!r} returned {shown(found)} at step {step.step}; decide(step, change) "
            f"returns a Mode or {' or '.join(map(repr, _MODES))}."
        )


_MODES = tuple(mode.value for mode in Mode)
POLICIES: Registry[PolicyRecord] = Registry("caching policy", "register_policy")


def register_policy(
    name: str,
    factory: Callable[..., Policy] | None = None,
    *,
    signal: str | None = None,
    replace: bool = False,
) -> Any:
    """Registers a user's own caching policy: `accelerate(pipe, cache=name)` uses it on any model.

    Also usable as a decorator:

    >>> @register_policy("every-other")
    ... class EveryOther:
    ...     def decide(self, step, change):
    ...         return "skip" if step.step % 2 and change is not None else "full"

    Args:
        name: The policy's name in `cache=`.
        factory: Makes a policy from the configuration's options, once per request and guidance branch. A policy is an
            object with `decide(step, change)` that returns a `Mode` or its value, `"full"` or `"skip"`. `step` is a
            `diffusers_accel.core.step.StepState`.
        signal: The signal whose relative change is passed as `change`:

            - `None`: no signal; `change` is 0.0.
            - `"modulated_input"`: TeaCache's modulated input, since the last step.
            - `"residual"`: the first block's residual (FBCache), since the last computed step.
            - `"latents"`: the latents with filtered noise (SeaCache), since the last step.

            `change` is `None` if it is unknown, or if no residual is kept to skip the step with. Such a step is
            computed whatever `decide` returns.
        replace: Whether to replace a registered policy of that name.

    Raises:
        ValueError: The name is taken or empty, the signal is unknown, or the factory is not callable.
    """
    if signal not in SIGNAL_NAMES:
        raise ValueError(f"signal: one of {', '.join(map(repr, SIGNAL_NAMES))}, got {signal!r}.")
    if isinstance(name, str) and name in CACHE_CONFIGS:
        raise ValueError(f"There is a cache of our own named {name!r}. Give another name.")

    def add(made: Callable[..., Policy]) -> Callable[..., Policy]:
        if not callable(made):
            raise ValueError(f"register_policy({name!r}): the factory makes a policy when called; got {shown(made)}.")
        POLICIES.add(name, PolicyRecord(name, made, signal, 1 if signal == "residual" else 0), replace)
        POLICY_NAMES.add(name)
        return made

    return add if factory is None else add(factory)
