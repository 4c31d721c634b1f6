"""What a step cache remembers: a lane for each denoiser and guidance branch, made anew for each request.

A lane keeps what the part that may be skipped added to its inputs, on the steps that were computed. What was added
from outside between two blocks (ControlNet's residuals, VACE's hints) is left out of it: the stock forward adds it,
fresh, on skipped steps too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...policies import Policy, Taylor

# A tensor per stream; None for one that is not there.
Streams = dict[str, torch.Tensor | None]


@dataclass
class Guarded:
    """What a guard found in one guidance branch of one request.

    Attributes:
        checked: Steps that could have been skipped and were computed, to compare.
        worst: Largest relative error of a prediction.
        stopped: The step after which nothing more was skipped; `None` if the bound held.
    """

    checked: int = 0
    worst: float = 0.0
    stopped: int | None = None


@dataclass
class Lane:
    """What one guidance branch of one denoiser remembers within one request.

    Attributes:
        request: Its number.
        policy: Its policy.
        signal: What was watched last: a tensor, or several.
        step: The step of the last decision.
        change: What was measured before the first block, where it is.
        begin: What went into the first stack, where its first blocks are watched.
        inputs: What went into the part of each stack that may be skipped, in the call that is running.
        left: What the last block of a stack returned, in the call that is running.
        between: What was added from outside between two blocks of a stack, in the call that is running.
        residuals: What that part added, by stack and stream, on the steps that were computed.
        offered: Steps that the policy would have skipped.
        checking: Whether the running call is one of those, computed for the guard.
        errors: Of its predictions.
        guarded: What the guard found; `None` without one.
        memory: Whatever else a watch keeps.
    """

    request: int
    policy: Policy
    signal: Any = None
    step: int | None = None
    change: tuple[Any, float | None] = (None, None)
    begin: torch.Tensor | None = None
    inputs: dict[str, Streams] = field(default_factory=dict)
    left: dict[str, Streams] = field(default_factory=dict)
    between: dict[str, Streams] = field(default_factory=dict)
    residuals: dict[str, dict[str, Taylor | None]] = field(default_factory=dict)
    offered: int = 0
    checking: bool = False
    errors: list[torch.Tensor] = field(default_factory=list)
    guarded: Guarded | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of what is kept from step to step."""
        kept = [*_tensors(self.signal), *_tensors(list(self.memory.values()))]
        kept += [
            item for stack in self.residuals.values() for value in stack.values() if value for item in value.derivatives
        ]
        return sum(item.numel() * item.element_size() for item in kept)

    def close(self, last: bool) -> None:
        """Forgets what belongs to one call; after the last one of a request, what belongs to it too."""
        for each in (self.inputs, self.left, self.between):
            each.clear()
        self.begin, self.change, self.checking = None, (None, None), False
        self.errors.clear()
        if last:
            self.residuals.clear()
            self.memory.clear()
            self.signal = None

    def can_skip(self, paths: Iterable[str], streams: Streams) -> bool:
        """Whether there is a residual of every stack, and the first one's shapes are those of this call."""
        paths = list(paths)
        if any(path not in self.residuals for path in paths):
            return False
        kept = self.residuals[paths[0]]
        return kept.keys() == streams.keys() and all(
            residual is None or (value is not None and value.shape == residual.derivatives[0].shape)
            for value, residual in ((streams[name], kept[name]) for name in streams)
        )

    def entering(self, path: str, streams: Streams) -> None:
        """Takes what goes into a stack's next block, and what was added to it since the last one returned."""
        before = self.left.get(path)
        if before is None:
            self.inputs[path] = streams
            return
        for name, value in streams.items():
            was = before[name]
            # Stock code hands on the very tensor where it adds nothing.
            if value is None or was is None or value is was:
                continue
            added = self.between.setdefault(path, {}).get(name)
            self.between[path][name] = value - was if added is None else added + (value - was)

    def keep(self, path: str, outputs: Streams, place: int, order: int) -> None:
        """Takes what the blocks of a stack added to each stream; the memory of the last residual is used again."""
        kept, inputs = self.residuals.setdefault(path, {}), self.inputs[path]
        for name, output in outputs.items():
            given, residual = inputs[name], kept.get(name)
            if output is None or given is None:
                kept[name] = None
                continue
            buffer = residual.derivatives[0] if residual is not None else None
            fits = buffer is not None and buffer.shape == output.shape and buffer.dtype == output.dtype
            fits = fits and not output.requires_grad  # torch writes to no buffer where it records gradients
            if residual is None or not fits:
                residual = kept[name] = Taylor(order)
            # What a guard compares with must not be written over.
            again = fits and not order and not self.checking
            value = torch.sub(output, given, out=buffer) if again else output - given
            added = self.between.get(path, {}).get(name)
            if added is not None:
                value = value.sub_(added) if again else value - added
            if self.checking and residual.step is not None:
                self.errors.append(relative(residual.predict(place), value))
            residual.update(place, value)


def predicted(streams: Streams, residuals: Mapping[str, Taylor | None], place: int) -> Streams:
    """What the blocks of a stack would give: the streams as they are, and what the blocks are predicted to add."""
    return {
        name: None if given is None or (residual := residuals[name]) is None else given + residual.predict(place)
        for name, given in streams.items()
    }


def relative(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """mean |value - reference| / mean |reference|, in float32, on the device."""
    size = reference.abs().mean(dtype=torch.float32)
    return (value - reference).abs().mean(dtype=torch.float32) / size


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [found for item in value for found in _tensors(item)] if isinstance(value, (list, tuple)) else []
