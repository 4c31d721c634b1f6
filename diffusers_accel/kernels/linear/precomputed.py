"""Precomputed outputs of linear layers that modulate a step, looked up instead of multiplied.

A modulation depends on the time step and the prompt alone, and a request's time steps are known when it begins. One
batched product therefore makes the outputs of all steps: each weight is read once a request instead of once a step.

The lookup is exact. The GPU compares the layer's input with the input that the output was made from, bit for bit. On
any difference the product is computed as usual. A wrong guess costs time, never a result.

This module owns the buffers (`PrecomputedInputs`, `PrecomputedOutputs`) and the table from weights to outputs.
`features/compile/modulation.py` fills them; `skinny.py` and `gemm.py` read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

# Buffers have room for a multiple of this many steps, so that requests of different lengths reuse them: CUDA graphs
# hold the buffers' addresses.
_STEPS_MULTIPLE = 32
# Formats of quantized layers whose rewritten graph does not round activations of a few rows.
PRECOMPUTED_FORMATS = ("fp8", "int8")


def can_precompute(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a rewritten graph looks up the outputs of a layer.

    Args:
        layer: A linear layer; of a LoRA layer, its base layer.
        dtype: The denoiser's dtype.
    """
    plain = type(layer) is nn.Linear and layer.weight.dtype == dtype
    return plain or getattr(layer, "kind", None) in PRECOMPUTED_FORMATS


class PrecomputedInputs:
    """The inputs of a request's steps, and the index of the current step.

    Args:
        rows: (steps, rows, depth): the input of SiLU and the linear layer at each step. Shape, dtype and device of the
            buffers are taken from it; its values are copied by `load`.

    Attributes:
        rows: (steps with room, rows, depth), dtype of the inputs.
        step: int32 (1,) on the device: index of the current step, or -1 if no output may be looked up.
        misses: int32 (1,) on the device: lookups of this request whose input differed.
        count: Number of steps that hold inputs.
    """

    def __init__(self, rows: torch.Tensor):
        steps = -(-rows.shape[0] // _STEPS_MULTIPLE) * _STEPS_MULTIPLE
        with torch.inference_mode(False):
            self.rows = rows.new_empty((steps, *rows.shape[1:]))
            self.step = torch.full((1,), -1, dtype=torch.int32, device=rows.device)
            self.misses = torch.zeros(1, dtype=torch.int32, device=rows.device)
        self.count = 0

    def has_room_for(self, rows: torch.Tensor) -> bool:
        """Whether the buffers hold as many steps as `rows`, (steps, rows, depth)."""
        return len(rows) <= len(self.rows)

    def load(self, rows: torch.Tensor) -> None:
        """Copies the inputs of a new request, (steps, rows, depth), and clears the current step and the misses."""
        self.rows[: len(rows)] = rows
        self.count = len(rows)
        self.misses.zero_()
        self.set_step(None)

    def set_step(self, step: int | None) -> None:
        """Sets the current step. `None`, or an index outside the request, disables the lookup."""
        self.step.fill_(-1 if step is None or not 0 <= step < self.count else step)


@dataclass(eq=False)
class PrecomputedOutputs:
    """The precomputed outputs of one layer.

    Attributes:
        inputs: The inputs they were made from. All layers that read the same embedding share them.
        outputs: (steps with room, rows, out_features), dtype of the inputs.
    """

    inputs: PrecomputedInputs
    outputs: torch.Tensor

    def lookup(self, x: torch.Tensor) -> torch.Tensor | None:
        """The output for `x`, in plain torch; this waits for the device.

        Args:
            x: (rows, depth): the layer's input before SiLU.

        Returns:
            (rows, out_features), a view of `outputs`; `None` if `x` is not the input of the current step.
        """
        step = int(self.inputs.step)
        if step >= 0 and x.dtype == self.inputs.rows.dtype and torch.equal(x, self.inputs.rows[step]):
            return self.outputs[step]
        self.inputs.misses += 1
        return None


# Address of a layer's weight -> its outputs. The entries live as long as the `Modulations` that made them.
_OUTPUTS: WeakValueDictionary[int, PrecomputedOutputs] = WeakValueDictionary()


def precomputed_for(weight: torch.Tensor) -> PrecomputedOutputs | None:
    """The precomputed outputs of the layer with this weight, or `None`."""
    return _OUTPUTS.get(weight.data_ptr())


def register_precomputed(outputs: Mapping[int, PrecomputedOutputs]) -> None:
    """Makes outputs available to `precomputed_for`. The table holds weak references: the caller keeps the outputs.

    Args:
        outputs: Address of a layer's weight (`data_ptr`) -> its outputs.
    """
    _OUTPUTS.update(outputs)
