"""A user's own policies by name, and how one gets in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import CACHE_CONFIGS, POLICY_NAMES
from ..core.registry import Registry
from ..core.step import Mode, StepState
from ..errors import PolicyFailed, Unsupported, shown
from .policy import Policy

WATCHES = (None, "signal", "residual", "latents")


@dataclass(frozen=True)
class PolicyRecord:
    """A registered policy.

    Attributes:
        name: As registered.
        factory: Makes the policy of one guidance branch of one request from its options.
        watches: What is measured for it.
        first: Blocks that are computed on every step, where what they add is measured.
    """

    name: str
    factory: Callable[..., Policy]
    watches: str | None = None
    first: int = 0

    def make(self, options: Mapping[str, Any]) -> Policy:
        """The policy of one guidance branch of one request.

        Raises:
            Unsupported: It cannot be made so.
        """
        try:
            made = self.factory(**options)
        except Exception as error:  # whatever a user's own code raises
            raise Unsupported(
                f"cache={self.name!r}",
                f"the policy cannot be made with {shown(options) if options else 'no options'}: "
                f"{type(error).__name__}: {error}.",
                "PolicyConfig(name=..., options={...}) with what its factory takes.",
            ) from error
        if not callable(getattr(made, "decide", None)):
            raise Unsupported(
                f"cache={self.name!r}",
                f"its factory made {shown(made)}, which has no decide(step, change).",
                "a factory that returns an object with that method.",
            )
        return _Named(self.name, made)


@dataclass(frozen=True)
class _Named:
    """A user's policy, whose mistakes are told by its name."""

    name: str
    policy: Policy

    def decide(self, step: StepState, change: float | None) -> Mode:
        """The mode of this step; see `Policy.decide`."""
        try:
            found = self.policy.decide(step, change)
        except Exception as error:  # whatever a user's own code raises
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
    watches: str | None = None,
    replace: bool = False,
) -> Any:
    """Lets a user's own caching policy in: `accelerate(pipe, cache=name)` uses it on any model.

    Usable as a function and as a decorator:

    >>> @register_policy("every-other")
    ... class EveryOther:
    ...     def decide(self, step, change):
    ...         return "skip" if step.step % 2 and change is not None else "full"

    Args:
        name: What `cache=` calls it.
        factory: Makes a policy, an object with `decide(step, change)` that returns a `Mode` or its value, `"full"` or
            `"skip"`; called once for every request and guidance branch, with the options of the configuration. `step`
            is a `diffusers_accel.core.step.StepState`.
        watches: What `change` is: `None` for nothing (0.0), `"signal"` for the relative change of TeaCache's modulated
            input since the last step, `"residual"` for that of what the first block adds since the last step that was
            computed (FBCache), `"latents"` for that of the latents' filtered signal since the last step (SeaCache).
            Whatever it watches, `change` is `None` where it is unknown or nothing is kept to skip the step with: such a
            step is computed, whatever the policy says.
        replace: Take the place of a policy of that name.

    Raises:
        ValueError: The name is taken or none, `watches` is none of those, or the factory cannot be called.
    """
    if watches not in WATCHES:
        raise ValueError(f"watches: one of {', '.join(map(repr, WATCHES))}, got {watches!r}.")
    if isinstance(name, str) and name in CACHE_CONFIGS:
        raise ValueError(f"There is a cache of our own named {name!r}. Give another name.")

    def add(made: Callable[..., Policy]) -> Callable[..., Policy]:
        if not callable(made):
            raise ValueError(f"register_policy({name!r}): the factory makes a policy when called; got {shown(made)}.")
        POLICIES.add(name, PolicyRecord(name, made, watches, 1 if watches == "residual" else 0), replace)
        POLICY_NAMES.add(name)
        return made

    return add if factory is None else add(factory)
