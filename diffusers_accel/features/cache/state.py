"""The state of a step cache: one `BranchState` per denoiser, guidance branch and request.

The state keeps the residual of the skippable blocks: the difference between their outputs and inputs on computed steps.
The stock forward adds other values between two blocks (ControlNet's residuals, VACE's hints), on skipped steps too.
These are therefore subtracted from the residual. State is dropped at a request's last step, at its end, and after an
exception, so nothing passes from one request to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...core.tree import tensors_in
from ...policies import Policy, Taylor

# Stream name -> tensor; None for a stream that the block does not get.
Streams = dict[str, torch.Tensor | None]


@dataclass
class GuardReport:
    """Findings of the guard in one guidance branch of one request.

    Attributes:
        checked: Number of skippable steps that were computed for comparison.
        worst: Largest relative error of a prediction.
        stopped: Index of the step after which nothing was skipped; `None` if the bound held.
    """

    checked: int = 0
    worst: float = 0.0
    stopped: int | None = None


@dataclass
class BranchState:
    """The cache state of one guidance branch of one denoiser within one request.

    Attributes:
        request: Number of the request.
        policy: The policy that decides this branch's steps.
        signal: The last measured signal: a tensor, a list of tensors, or `None`.
        step: Index of the step of the last decision.
        measurement: (signal, relative change) of the running call.
        first_input: Main stream at the entry of the first stack, kept if the first blocks are always computed.
        inputs: Stack path -> streams that enter its skippable blocks, in the running call.
        outputs: Stack path -> streams that its last finished block returned, in the running call.
        injected: Stack path -> sum of the additions from outside between its blocks, in the running call.
        residuals: Stack path -> stream name -> residual on computed steps, as a Taylor polynomial.
        skippable: Number of steps that the policy would have skipped.
        checking: Whether the running call is a skippable step that is computed for the guard.
        errors: Relative errors of the running call's predictions, on the device.
        guard: The guard's findings; `None` without a guard.
        memory: Values that a signal or the trace keeps from step to step.
    """

    request: int
    policy: Policy
    signal: Any = None
    step: int | None = None
    measurement: tuple[Any, float | None] = (None, None)
    first_input: torch.Tensor | None = None
    inputs: dict[str, Streams] = field(default_factory=dict)
    outputs: dict[str, Streams] = field(default_factory=dict)
    injected: dict[str, Streams] = field(default_factory=dict)
    residuals: dict[str, dict[str, Taylor | None]] = field(default_factory=dict)
    skippable: int = 0
    checking: bool = False
    errors: list[torch.Tensor] = field(default_factory=list)
    guard: GuardReport | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that are kept between steps."""
        kept = [*tensors_in(self.signal), *tensors_in(list(self.memory.values()))]
        kept += [
            item for stack in self.residuals.values() for value in stack.values() if value for item in value.derivatives
        ]
        return sum(item.numel() * item.element_size() for item in kept)

    def end_call(self, last: bool) -> None:
        """Drops the running call's values.

        Args:
            last: Whether the call was the request's last, so that the values kept between steps are dropped too.
        """
        for streams in (self.inputs, self.outputs, self.injected):
            streams.clear()
        self.first_input, self.measurement, self.checking = None, (None, None), False
        self.errors.clear()
        if last:
            self.residuals.clear()
            self.memory.clear()
            self.signal = None

    def can_skip(self, paths: Iterable[str], streams: Streams) -> bool:
        """Whether every stack has a residual, and the first stack's fits the shapes of this call.

        Args:
            paths: Paths of the stacks with skippable blocks.
            streams: Streams at the first skippable block.
        """
        paths = list(paths)
        if any(path not in self.residuals for path in paths):
            return False
        kept = self.residuals[paths[0]]
        return kept.keys() == streams.keys() and all(
            residual is None or (value is not None and value.shape == residual.derivatives[0].shape)
            for value, residual in ((streams[name], kept[name]) for name in streams)
        )

    def record_input(self, path: str, streams: Streams) -> None:
        """Keeps the first skippable block's input, and sums up injections before the later blocks.

        Args:
            path: Path of the stack.
            streams: Streams that enter its next block.
        """
        before = self.outputs.get(path)
        if before is None:
            self.inputs[path] = streams
            return
        for name, value in streams.items():
            returned = before[name]
            # Stock code passes on the same tensor object if it adds nothing.
            if value is None or returned is None or value is returned:
                continue
            injected = self.injected.setdefault(path, {}).get(name)
            self.injected[path][name] = value - returned if injected is None else injected + (value - returned)

    def record_residual(self, path: str, outputs: Streams, step: int, order: int) -> None:
        """Updates the residual of a stack after its last skippable block. A residual of order 0 is written in place.

        Args:
            path: Path of the stack.
            outputs: Streams that the block returned.
            step: Step, counted from the request's first.
            order: Order of the Taylor polynomial of a new residual.
        """
        kept, inputs = self.residuals.setdefault(path, {}), self.inputs[path]
        for name, output in outputs.items():
            given, residual = inputs[name], kept.get(name)
            if output is None or given is None:
                kept[name] = None
                continue
            buffer = residual.derivatives[0] if residual is not None else None
            fits = buffer is not None and buffer.shape == output.shape and buffer.dtype == output.dtype
            fits = fits and not output.requires_grad  # torch refuses `out=` for a tensor that needs gradients
            if residual is None or not fits:
                residual = kept[name] = Taylor(order)
            # The guard still compares with the old residual, which may not be overwritten before.
            in_place = fits and not order and not self.checking
            value = torch.sub(output, given, out=buffer) if in_place else output - given
            injected = self.injected.get(path, {}).get(name)
            if injected is not None:
                value = value.sub_(injected) if in_place else value - injected
            if self.checking and residual.step is not None:
                self.errors.append(relative(residual.predict(step), value))
            residual.update(step, value)


def predicted(streams: Streams, residuals: Mapping[str, Taylor | None], step: int) -> Streams:
    """The predicted outputs of a stack's blocks: their input streams plus the predicted residuals."""
    return {
        name: None if given is None or (residual := residuals[name]) is None else given + residual.predict(step)
        for name, given in streams.items()
    }


def relative(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Relative L1 error mean |value - reference| / mean |reference|, a float32 scalar on the device."""
    size = reference.abs().mean(dtype=torch.float32)
    return (value - reference).abs().mean(dtype=torch.float32) / size
